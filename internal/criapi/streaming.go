package criapi

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/utils/exec"

	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// streamer serves the URLs of exec, attach and port-forward. It listens from the
// first of them on.
type streamer struct {
	s    *Server
	mu   sync.Mutex
	srv  streaming.Server
	http *http.Server
	done chan struct{}
	over bool
}

func (t *streamer) server() (streaming.Server, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return nil, fault.New(fault.Unavailable, "cannot stream: the engine is shutting down")
	}
	if t.srv != nil {
		return t.srv, nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("cannot listen for streams: %w", err)
	}
	conf := streaming.DefaultConfig
	conf.BaseURL = &url.URL{Scheme: "http", Host: l.Addr().String(), Path: "/"}
	srv, err := streaming.NewServer(conf, runtime{t.s})
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("cannot serve streams: %w", err)
	}
	t.srv, t.done = srv, make(chan struct{})
	t.http = &http.Server{Handler: srv, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(t.done)
		_ = t.http.Serve(l)
	}()
	return srv, nil
}

func (t *streamer) stop() {
	t.mu.Lock()
	t.over = true
	h, done := t.http, t.done
	t.mu.Unlock()
	if h != nil {
		_ = h.Close()
		<-done
	}
}

// runtime is what the streaming server calls once a client has come.
type runtime struct{ s *Server }

// sizes converts the terminal's sizes; it ends with them.
func sizes(in <-chan remotecommand.TerminalSize) <-chan [2]uint16 {
	if in == nil {
		return nil
	}
	out := make(chan [2]uint16, 1)
	go func() {
		defer close(out)
		for z := range in {
			select {
			case out <- [2]uint16{z.Width, z.Height}:
			default: // nobody listens any more, or the next one is what counts
			}
		}
	}()
	return out
}

func writer(w io.WriteCloser) io.Writer {
	if w == nil {
		return nil
	}
	return w
}

// Exec implements streaming.Runtime.
func (r runtime) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	code, err := r.s.cfg.Engine.PodContainerExec(ctx, id, engine.PodExec{
		Cmd: cmd, TTY: tty, Stdin: in, Stdout: writer(out), Stderr: writer(errs), Resize: sizes(resize),
	})
	if err != nil {
		return err
	}
	if code != 0 {
		return exec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: code}
	}
	return nil
}

// Attach implements streaming.Runtime.
func (r runtime) Attach(ctx context.Context, id string, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	a, err := r.s.cfg.Engine.ContainerAttach(ctx, id, engine.AttachRequest{Stream: true, Stdin: in != nil, Stdout: out != nil, Stderr: errs != nil && !tty})
	if err != nil {
		return err
	}
	defer a.Close()
	defer context.AfterFunc(ctx, func() { _ = a.Close() })()
	if z := sizes(resize); z != nil {
		go func() {
			for size := range z {
				_ = r.s.cfg.Engine.ContainerResize(ctx, id, size[0], size[1])
			}
		}()
	}
	left := make(chan struct{})
	if in != nil {
		go func() {
			_, _ = io.Copy(a.Stdin, in)
			_ = a.Stdin.Close()
			close(left)
		}()
	}
	var wg sync.WaitGroup
	for _, s := range []struct {
		r io.Reader
		w io.WriteCloser
	}{{a.Stdout, out}, {a.Stderr, errs}} {
		if s.r == nil || s.w == nil {
			continue
		}
		wg.Go(func() { _, _ = io.Copy(s.w, s.r) })
	}
	if out == nil && errs == nil && in != nil {
		<-left // input alone: it ends with the client's
		return nil
	}
	wg.Wait()
	return nil
}

// PortForward implements streaming.Runtime.
func (r runtime) PortForward(ctx context.Context, pod string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	if port < 1 || port > 65535 {
		return invalid("cannot forward to port %d", port)
	}
	return r.s.cfg.Engine.PodForward(ctx, pod, uint16(port), stream)
}

// Exec implements the CRI.
func (s *Server) Exec(_ context.Context, req *v1.ExecRequest) (*v1.ExecResponse, error) {
	id, err := s.streamable(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("cannot exec: no command is given")
	}
	srv, err := s.streaming.server()
	if err != nil {
		return nil, err
	}
	return srv.GetExec(&v1.ExecRequest{ContainerId: id, Cmd: req.GetCmd(), Tty: req.GetTty(), Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr()})
}

// Attach implements the CRI.
func (s *Server) Attach(_ context.Context, req *v1.AttachRequest) (*v1.AttachResponse, error) {
	id, err := s.streamable(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	srv, err := s.streaming.server()
	if err != nil {
		return nil, err
	}
	return srv.GetAttach(&v1.AttachRequest{ContainerId: id, Tty: req.GetTty(), Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr()})
}

func (s *Server) streamable(id string) (string, error) {
	r, err := s.cfg.Engine.PodContainer(id)
	if err != nil {
		return "", err
	}
	if st := containerState(r); st != v1.ContainerState_CONTAINER_RUNNING {
		return "", fault.New(fault.Conflict, "container %s is not running: it is in state %s", r.ID, st)
	}
	return r.ID, nil
}
