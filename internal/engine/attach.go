package engine

import (
	"context"
	"io"
	"sync"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/logs"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// attachment is a client that attached before the container started: its reads
// and writes wait for the start.
type attachment struct {
	opts   runtime.AttachOptions
	ready  chan struct{} // closed once streams or err are set
	closed chan struct{}

	mu      sync.Mutex
	streams runtime.Streams
	err     error
	isReady bool
	isShut  bool
}

func newAttachment(o runtime.AttachOptions) *attachment {
	return &attachment{opts: o, ready: make(chan struct{}), closed: make(chan struct{})}
}

func (a *attachment) set(s runtime.Streams, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.isShut {
		if s.Close != nil {
			_ = s.Close()
		}
		return
	}
	if !a.isReady {
		a.streams, a.err, a.isReady = s, err, true
		close(a.ready)
	}
}

// Close ends the attachment.
func (a *attachment) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.isShut {
		return nil
	}
	a.isShut = true
	close(a.closed)
	if a.isReady && a.streams.Close != nil {
		return a.streams.Close()
	}
	return nil
}

// wait blocks until the container was started.
func (a *attachment) wait() (runtime.Streams, error) {
	select {
	case <-a.ready:
		if a.err != nil {
			return runtime.Streams{}, io.EOF // the start's caller is told why
		}
		return a.streams, nil
	case <-a.closed:
		return runtime.Streams{}, io.EOF
	}
}

type lateReader struct {
	a      *attachment
	stderr bool
}

func (r lateReader) Read(p []byte) (int, error) {
	s, err := r.a.wait()
	if err != nil {
		return 0, err
	}
	from := s.Stdout
	if r.stderr {
		from = s.Stderr
	}
	if from == nil {
		return 0, io.EOF
	}
	return from.Read(p)
}

type lateWriter struct{ a *attachment }

func (w lateWriter) Write(p []byte) (int, error) {
	s, err := w.a.wait()
	if err != nil {
		return 0, io.ErrClosedPipe
	}
	if s.Stdin == nil {
		return len(p), nil
	}
	return s.Stdin.Write(p)
}

func (w lateWriter) Close() error {
	s, err := w.a.wait()
	if err != nil || s.Stdin == nil {
		return nil
	}
	return s.Stdin.Close()
}

// pending are the clients that a start has to connect.
type pending struct {
	clients []*attachment
	first   *runtime.AttachOptions
}

// takePending takes over the clients that wait for the start.
func (e *Engine) takePending(u *unit, run *attachment) *pending {
	u.mu.Lock()
	defer u.mu.Unlock()
	p := &pending{clients: u.pending}
	u.pending = nil
	if run != nil {
		p.clients = append([]*attachment{run}, p.clients...)
	}
	if len(p.clients) > 0 {
		p.first = &p.clients[0].opts
	}
	return p
}

// more reports clients beyond the one that the driver connects by itself.
func (p *pending) more() bool { return len(p.clients) > 1 }

func (p *pending) connect(ctx context.Context, t runtime.Task) error {
	for i, a := range p.clients {
		s, err := t.Attach(ctx, a.opts)
		a.set(s, err)
		if err != nil {
			for _, rest := range p.clients[i+1:] {
				rest.set(runtime.Streams{}, err)
			}
			return err
		}
	}
	return nil
}

func (p *pending) fail(err error) {
	for _, a := range p.clients {
		a.set(runtime.Streams{}, err)
	}
}

// stdinFor gives the client's end of standard input: its Close ends the
// process's input only where the container says so.
type stdinFor struct {
	io.Writer
	end func() error
}

func (s stdinFor) Close() error {
	if s.end == nil {
		return nil
	}
	return s.end()
}

// streamsFor shows streams to the edge.
func streamsFor(r *container.Record, s runtime.Streams) Attached {
	a := Attached{Terminal: r.Config.Tty, Stdout: s.Stdout, Stderr: s.Stderr, Close: s.Close}
	in := stdinFor{Writer: io.Discard}
	if s.Stdin != nil {
		in.Writer = s.Stdin
		if r.Config.StdinOnce && !r.Config.Tty {
			in.end = s.Stdin.Close
		}
	}
	a.Stdin = in
	return a
}

func attachOptions(r *container.Record, req AttachRequest) runtime.AttachOptions {
	return runtime.AttachOptions{Stdin: req.Stdin && r.Config.OpenStdin, Stdout: req.Stdout, Stderr: req.Stderr && !r.Config.Tty}
}

// ContainerAttach connects a client. Where the container does not run, the
// streams wait for its next start.
func (e *Engine) ContainerAttach(ctx context.Context, name string, req AttachRequest) (Attached, error) {
	u, err := e.lookup(name)
	if err != nil {
		return Attached{}, err
	}
	r := u.rec.Load()
	if r.State.Status == mcontainer.StatePaused {
		return Attached{}, fault.New(fault.Conflict, "container %s is paused, unpause the container before attach", u.id)
	}
	o := attachOptions(r, req)
	var past *io.PipeReader
	if req.Logs {
		past = e.pastOutput(r, u, o)
	}
	if !req.Stream {
		return replay(r, past), nil
	}
	u.mu.Lock()
	task := u.task
	if task == nil {
		a := newAttachment(o)
		u.pending = append(u.pending, a)
		u.mu.Unlock()
		s := runtime.Streams{Stdin: lateWriter{a}}
		// An output that was not asked for must not look like one that ended: a
		// client with input alone would be sent away.
		if o.Stdout {
			s.Stdout = lateReader{a: a}
		}
		if o.Stderr {
			s.Stderr = lateReader{a: a, stderr: true}
		}
		s.Close = func() error {
			e.forget(u, a)
			return a.Close()
		}
		e.publish(u, events.ActionAttach, nil)
		return withPast(streamsFor(r, s), past), nil
	}
	u.mu.Unlock()
	s, err := task.Attach(ctx, o)
	if err != nil {
		return Attached{}, err
	}
	e.publish(u, events.ActionAttach, nil)
	return withPast(streamsFor(r, s), past), nil
}

// forget drops a client that went away before the start.
func (e *Engine) forget(u *unit, a *attachment) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, o := range u.pending {
		if o == a {
			u.pending = append(u.pending[:i:i], u.pending[i+1:]...)
			return
		}
	}
}

// pastOutput replays what the log holds now.
func (e *Engine) pastOutput(r *container.Record, u *unit, o runtime.AttachOptions) *io.PipeReader {
	pr, pw := io.Pipe()
	set, _ := e.logSettings(r.HostConfig.LogConfig)
	l, err := logs.Open(u.log, set.Format, e.logs)
	if err != nil {
		pw.Close()
		return pr
	}
	e.spawn(func() {
		err := l.Read(e.ctx, logs.Options{Stdout: o.Stdout, Stderr: o.Stderr, Tail: -1}, func(rec logs.Record) error {
			_, err := pw.Write(rec.Line)
			return err
		})
		pw.CloseWithError(err)
	})
	return pr
}

func replay(r *container.Record, past *io.PipeReader) Attached {
	a := Attached{Terminal: r.Config.Tty, Stdin: stdinFor{Writer: io.Discard}, Stdout: eof{}, Stderr: eof{}, Close: func() error { return nil }}
	return withPast(a, past)
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

// withPast puts the past in front of standard output; which stream a line came
// from is then lost, as it is with a terminal.
func withPast(a Attached, past *io.PipeReader) Attached {
	if past == nil {
		return a
	}
	end := a.Close
	if a.Stdout == nil {
		a.Stdout = eof{}
	}
	a.Stdout = io.MultiReader(past, a.Stdout)
	a.Close = func() error {
		past.Close()
		return end()
	}
	return a
}

// ContainerResize sets the size of a running container's terminal.
func (e *Engine) ContainerResize(ctx context.Context, name string, width, height uint16) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	t, err := u.needTask()
	if err != nil {
		return err
	}
	// Without a terminal there is nothing to do, and clients do not ask first.
	if u.rec.Load().Config.Tty {
		if err := t.Resize(ctx, width, height); err != nil {
			return err
		}
	}
	e.publish(u, events.ActionResize, map[string]string{"height": itoa(int(height)), "width": itoa(int(width))})
	return nil
}

// IsTerminal tells how attach and logs streams of the container are framed.
func (e *Engine) IsTerminal(_ context.Context, name string) (bool, error) {
	u, err := e.lookup(name)
	if err != nil {
		return false, err
	}
	return u.rec.Load().Config.Tty, nil
}
