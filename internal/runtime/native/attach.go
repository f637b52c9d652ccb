package native

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/shim"
	"golang.org/x/sys/unix"
)

// client is an attached client: our ends and, until they are sent, the monitor's.
type client struct {
	streams contract.Streams
	theirs  shim.AttachRequest
}

func newClient(o contract.AttachOptions, terminal bool) (*client, error) {
	c := &client{theirs: shim.AttachRequest{Stdin: -1, Stdout: -1, Stderr: -1}}
	var closers []io.Closer
	fail := func(err error) (*client, error) {
		for _, x := range closers {
			x.Close()
		}
		c.sent()
		return nil, fault.New(fault.Exhausted, "cannot attach: %w", err)
	}
	if o.Stdin {
		in, theirs, err := shim.NewInput()
		if err != nil {
			return fail(err)
		}
		c.streams.Stdin, c.theirs.Stdin = in, theirs
		closers = append(closers, in.Abandon())
	}
	out := func(theirs *int) (*os.File, error) {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return nil, err
		}
		*theirs = p[1]
		f := os.NewFile(uintptr(p[0]), "output")
		closers = append(closers, f)
		return f, nil
	}
	if o.Stdout || terminal && o.Stderr {
		f, err := out(&c.theirs.Stdout)
		if err != nil {
			return fail(err)
		}
		c.streams.Stdout = f
	}
	if o.Stderr && !terminal {
		f, err := out(&c.theirs.Stderr)
		if err != nil {
			return fail(err)
		}
		c.streams.Stderr = f
	}
	var once sync.Once
	c.streams.Close = func() (err error) {
		once.Do(func() {
			for _, x := range closers {
				err = errors.Join(err, x.Close())
			}
		})
		return err
	}
	return c, nil
}

// sent closes the monitor's ends here.
func (c *client) sent() {
	for _, fd := range []*int{&c.theirs.Stdin, &c.theirs.Stdout, &c.theirs.Stderr} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

func (s *start) attachFirst() (*contract.Streams, error) {
	c, err := newClient(*s.req.Stdio.Attach, s.req.Stdio.Terminal)
	if err != nil {
		return nil, err
	}
	defer c.sent()
	c.theirs.Lossless = true
	if _, err := s.sb.mon.Attach(c.theirs); err != nil {
		c.streams.Close()
		return nil, err
	}
	return &c.streams, nil
}

// Attach implements runtime.Task. The first call after a start with
// Stdio.Attach gets the client that was connected then.
func (t *task) Attach(ctx context.Context, o contract.AttachOptions) (contract.Streams, error) {
	t.mu.Lock()
	first := t.first
	t.first = nil
	t.mu.Unlock()
	if first != nil {
		return *first, nil
	}
	select {
	case <-t.exited:
		return contract.Streams{}, fault.New(fault.Conflict, "cannot attach: the container is not running")
	default:
	}
	c, err := newClient(o, t.terminal)
	if err != nil {
		return contract.Streams{}, err
	}
	defer c.sent()
	p, err := t.mon.Attach(c.theirs)
	if err == nil {
		err = p.Done(ctx)
	}
	if err != nil {
		c.streams.Close()
		return contract.Streams{}, t.requestError("attach", err)
	}
	return c.streams, nil
}

// ptyReader makes the end of a terminal look like the end of a file.
type ptyFile struct{ *os.File }

func (p ptyFile) Read(b []byte) (int, error) {
	n, err := p.File.Read(b)
	if errors.Is(err, syscall.EIO) {
		err = io.EOF
	}
	return n, err
}
