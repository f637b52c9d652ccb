package engine

import (
	"context"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// PodExec is a command to run in a pod's container.
type PodExec struct {
	Cmd []string
	TTY bool
	// Stdin may be nil. Stdout takes all output with a terminal; nil drops it.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Resize gives sizes of the terminal, width and height; may be nil.
	Resize <-chan [2]uint16
}

// PodContainerExec runs a command and returns its exit code once it has ended and
// its output was delivered. When ctx ends, the command is killed.
func (e *Engine) PodContainerExec(ctx context.Context, id string, x PodExec) (int, error) {
	u, err := e.memberUnit(id)
	if err != nil {
		return 0, err
	}
	if len(x.Cmd) == 0 || x.Cmd[0] == "" {
		return 0, fault.New(fault.Invalid, "cannot exec: no command is given")
	}
	t, err := u.needTask()
	if err != nil {
		return 0, err
	}
	if err := e.executable(u, u.id); err != nil {
		return 0, err
	}
	if e.policed() {
		if err := e.mayExec(ctx, u.rec.Load(), "", false); err != nil {
			return 0, err
		}
	}
	req := mcontainer.ExecCreateRequest{Cmd: x.Cmd, Tty: x.TTY, AttachStdin: x.Stdin != nil, AttachStdout: true, AttachStderr: true}
	run := &execution{id: newID(), u: u, req: req}
	proc, err := e.runExec(context.WithoutCancel(ctx), u, t, run, false)
	if err != nil {
		return 0, explainExec(x.Cmd[0], err)
	}
	s := proc.Streams()
	defer s.Close()
	if x.Stdin != nil && s.Stdin != nil {
		go func() { // ends with the streams, or with its client
			_, _ = io.Copy(s.Stdin, x.Stdin)
			if !x.TTY {
				_ = s.Stdin.Close()
			}
		}()
	}
	if x.Resize != nil && x.TTY {
		done := make(chan struct{})
		defer close(done)
		go func() {
			for {
				select {
				case <-done:
					return
				case size, ok := <-x.Resize:
					if !ok {
						return
					}
					_ = proc.Resize(ctx, size[0], size[1])
				}
			}
		}()
	}
	p := newPump(s.Stdout, x.Stdout, s.Stderr, x.Stderr)
	select {
	case <-proc.Exited():
	case <-ctx.Done():
		_ = proc.Signal(context.WithoutCancel(ctx), int(unix.SIGKILL))
		tm := time.NewTimer(5 * time.Second)
		defer tm.Stop()
		select {
		case <-proc.Exited():
		case <-tm.C:
		}
		return 0, fault.New(fault.DeadlineExceeded, "command %q was killed: %w", strings.Join(x.Cmd, " "), ctx.Err())
	}
	p.drain(ctx)
	return proc.Exit().Code, nil
}

// pump carries output to who wants it.
type pump struct {
	wg      sync.WaitGroup
	done    chan struct{}
	bytes   atomic.Int64
	writing atomic.Int64
}

func newPump(out io.Reader, to io.Writer, err io.Reader, toErr io.Writer) *pump {
	p := &pump{done: make(chan struct{})}
	for _, s := range []struct {
		r io.Reader
		w io.Writer
	}{{out, to}, {err, toErr}} {
		if s.r == nil {
			continue
		}
		w := s.w
		if w == nil {
			w = io.Discard
		}
		p.wg.Go(func() { p.carry(s.r, w) })
	}
	go func() {
		p.wg.Wait()
		close(p.done)
	}()
	return p
}

func (p *pump) carry(r io.Reader, w io.Writer) {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			p.bytes.Add(int64(n))
			p.writing.Add(1)
			if _, werr := w.Write(buf[:n]); werr != nil {
				w = io.Discard // the process must not wait for a client that left
			}
			p.writing.Add(-1)
		}
		if err != nil {
			return
		}
	}
}

// drain waits for the end of the output of a process that has ended. What it left
// running may hold the pipes for ever: silence ends the wait.
func (p *pump) drain(ctx context.Context) {
	const silence = time.Second
	last := p.bytes.Load()
	for {
		tm := time.NewTimer(silence)
		select {
		case <-p.done:
			tm.Stop()
			return
		case <-ctx.Done():
			tm.Stop()
			return
		case <-tm.C:
		}
		now := p.bytes.Load()
		if now == last && p.writing.Load() == 0 {
			return
		}
		last = now
	}
}
