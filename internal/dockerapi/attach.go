package dockerapi

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"

	"golang.org/x/net/websocket"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// attachRequest reads the parameters of both attach routes.
func attachRequest(r *request) (req AttachRequest, keys []byte, err error) {
	req = AttachRequest{
		Stdin: r.flag("stdin"), Stdout: r.flag("stdout"), Stderr: r.flag("stderr"),
		Stream: r.flag("stream"), Logs: r.flag("logs"), DetachKeys: r.query.Get("detachKeys"),
	}
	keys, err = parseDetachKeys(req.DetachKeys)
	return req, keys, err
}

// upgrades tells whether the client asked for an upgrade of the connection.
func upgrades(r *request) bool { return r.Header.Get("Upgrade") != "" }

// streamType is the content type of an attached stream.
func streamType(r *request, mux bool) string {
	if mux && r.version >= 42 {
		return contentTypeMultiplexed
	}
	return contentTypeRaw
}

func (a containersAPI) attach(w *response, r *request) error {
	req, keys, err := attachRequest(r)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, 512)) // ahead of the takeover
	ctx, cancel := r.streaming()
	defer cancel()
	at, err := a.b.ContainerAttach(ctx, r.name, req)
	if err != nil {
		return plainError(w, r, err)
	}
	return serveStreams(ctx, w, r, at, !at.Terminal, keys)
}

// plainError answers an attach that failed: clients that asked for a stream
// read the reason as text.
func plainError(w *response, r *request, cause error) error {
	d, err := takeOver(w)
	if err != nil {
		return err
	}
	defer d.finish()
	status := statusOf(cause)
	_, _ = fmt.Fprintf(d, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nConnection: close\r\n\r\n%s\r\n",
		status, http.StatusText(status), streamType(r, true), printable(cause.Error()))
	return cause
}

// serveStreams takes the connection over and connects it with the streams, with
// mux in frames.
func serveStreams(ctx context.Context, w *response, r *request, at Attached, mux bool, keys []byte) error {
	d, err := takeOver(w)
	if err != nil {
		if at.Close != nil {
			_ = at.Close()
		}
		return err
	}
	defer d.finish()
	if err := d.accept(upgrades(r), streamType(r, mux), w.Header(), nil); err != nil {
		d.gone.Store(true)
	}
	d.pump(ctx, at, mux, keys, nil)
	return nil
}

// attachWS is attach over a websocket: output is not framed there.
func (a containersAPI) attachWS(w *response, r *request) error {
	req, keys, err := attachRequest(r)
	if err != nil {
		return err
	}
	if r.version < 42 {
		req.Stdin, req.Stdout, req.Stderr = true, true, true
	}
	at, err := a.b.ContainerAttach(r.Context(), r.name, req)
	if err != nil {
		return err
	}
	closeStreams := sync.OnceFunc(func() {
		if at.Close != nil {
			_ = at.Close()
		}
	})
	defer closeStreams()
	w.began, w.hijacked = true, true
	// Who may connect was decided by guard; websocket's own check of Origin
	// would refuse clients that send none.
	websocket.Server{Handler: func(c *websocket.Conn) {
		if r.version >= 28 {
			c.PayloadType = websocket.BinaryFrame
		}
		d := &duplex{in: c}
		input := make(chan struct{})
		go func() {
			defer close(input)
			// A websocket cannot be half-closed: its end is the end.
			d.copyIn(at, keys)
			closeStreams()
		}()
		var wg sync.WaitGroup
		for _, src := range []io.Reader{at.Stdout, at.Stderr} {
			if src != nil {
				wg.Go(func() { _ = copyOut(c, 0, src) })
			}
		}
		wg.Wait()
		if at.Stdout == nil && at.Stderr == nil {
			<-input
		}
		closeStreams()
		_ = c.Close()
		<-input
	}}.ServeHTTP(w.ResponseWriter, r.Request)
	return nil
}

// userChecker is the optional ability to look a container's user up.
type userChecker interface {
	ExecUser(ctx context.Context, container, user string) error
}

// execAPI serves processes run in started containers.
type execAPI struct{ b Containers }

func (a execAPI) create(w *response, r *request) error {
	var req container.ExecCreateRequest
	if err := r.decode(w, &req); err != nil {
		return err
	}
	if r.version < 42 {
		req.ConsoleSize = nil
	}
	if err := checkExec(&req); err != nil {
		return err
	}
	// Since 1.52 an unknown user is an error of the creation. For older clients it
	// is one of the start, with the exit code that their command line passes on.
	if c, ok := a.b.(userChecker); ok && r.version >= 52 && req.User != "" {
		if err := c.ExecUser(r.Context(), r.name, req.User); err != nil {
			return err
		}
	}
	r.noteExec(&req)
	id, err := a.b.ExecCreate(r.Context(), r.name, req)
	if err != nil {
		return err
	}
	r.entry.Note("id", id)
	return w.json(http.StatusCreated, container.ExecCreateResponse{ID: id})
}

func checkExec(req *container.ExecCreateRequest) error {
	if len(req.Cmd) == 0 {
		return fault.New(fault.Invalid, "No exec command specified")
	}
	if _, err := parseDetachKeys(req.DetachKeys); err != nil {
		return err
	}
	return checkConsole(req.ConsoleSize)
}

func checkConsole(s *[2]uint) error {
	if s != nil && (s[0] > 65535 || s[1] > 65535) {
		return fault.New(fault.Invalid, "invalid ConsoleSize: at most 65535 by 65535")
	}
	return nil
}

func (a execAPI) start(w *response, r *request) error {
	var req container.ExecStartRequest
	if err := r.decode(w, &req); err != nil {
		return err
	}
	if r.version < 42 || !req.Tty {
		req.ConsoleSize = nil
	}
	if err := checkConsole(req.ConsoleSize); err != nil {
		return err
	}
	ctx, cancel := r.streaming()
	defer cancel()
	at, err := a.b.ExecStart(ctx, r.name, req)
	if req.Detach {
		if err != nil {
			return err
		}
		w.WriteHeader(http.StatusOK)
		return nil
	}
	if err != nil {
		switch fault.Of(err) {
		case fault.NotFound, fault.Conflict, fault.Unavailable, fault.Unauthorized, fault.Forbidden:
			return err
		}
		// The process could not be executed. Clients expect the reason in the
		// stream and the exit code (126, 127) from the inspection of the exec.
		return streamError(w, r, req.Tty, err)
	}
	keys, kerr := parseDetachKeys(at.DetachKeys)
	if kerr != nil {
		keys = defaultDetachKeys
	}
	// How the output is framed is said by this request, whatever the exec's
	// creation said of a terminal.
	return serveStreams(ctx, w, r, at, !req.Tty, keys)
}

// streamError opens the stream only to say what went wrong.
func streamError(w *response, r *request, tty bool, cause error) error {
	d, err := takeOver(w)
	if err != nil {
		return err
	}
	defer d.finish()
	msg := []byte(cause.Error() + "\r\n")
	if !tty {
		msg = appendFrame(nil, frameStdout, msg)
	}
	_ = d.accept(upgrades(r), streamType(r, !tty), w.Header(), msg)
	return cause
}

func (a execAPI) inspect(w *response, r *request) error {
	e, err := a.b.ExecInspect(r.Context(), r.name)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, e)
}

func (a execAPI) resize(w *response, r *request) error {
	height, err := r.size("h", "height")
	if err != nil {
		return err
	}
	width, err := r.size("w", "width")
	if err != nil {
		return err
	}
	if err := a.b.ExecResize(r.Context(), r.name, width, height); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}
