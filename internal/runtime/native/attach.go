package native

import (
	"context"
	"errors"
	"io"
	"os"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/shim"
)

func newClient(o contract.AttachOptions, terminal bool) (*shim.Client, contract.Streams, error) {
	c, err := shim.NewClient(o.Stdin, o.Stdout || terminal && o.Stderr, o.Stderr && !terminal)
	if err != nil {
		return nil, contract.Streams{}, err
	}
	s := contract.Streams{Close: c.Close}
	// Interfaces that hold nil pointers would not be nil.
	if c.Stdin != nil {
		s.Stdin = c.Stdin
	}
	if c.Stdout != nil {
		s.Stdout = c.Stdout
	}
	if c.Stderr != nil {
		s.Stderr = c.Stderr
	}
	return c, s, nil
}

func (s *start) attachFirst() (*contract.Streams, error) {
	c, streams, err := newClient(*s.req.Stdio.Attach, s.req.Stdio.Terminal)
	if err != nil {
		return nil, err
	}
	defer c.Sent()
	c.Theirs.Lossless = true
	if _, err := s.sb.mon.Attach(c.Theirs); err != nil {
		c.Close()
		return nil, err
	}
	return &streams, nil
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
	c, streams, err := newClient(o, t.terminal)
	if err != nil {
		return contract.Streams{}, err
	}
	defer c.Sent()
	p, err := t.mon.Attach(c.Theirs)
	if err == nil {
		err = p.Done(ctx)
	}
	if err != nil {
		c.Close()
		return contract.Streams{}, t.requestError("attach", err)
	}
	return streams, nil
}

// ptyFile makes the end of a terminal look like the end of a file.
type ptyFile struct{ *os.File }

func (p ptyFile) Read(b []byte) (int, error) {
	n, err := p.File.Read(b)
	if errors.Is(err, syscall.EIO) {
		err = io.EOF
	}
	return n, err
}
