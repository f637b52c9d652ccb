package shim

import (
	"errors"
	"io"
	"os"
	"sync"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// Client is an attached client: our ends of its streams and, until they are
// sent, the monitor's. Streams that were not asked for are nil.
type Client struct {
	Stdin          *Input
	Stdout, Stderr *os.File
	// Theirs goes to Monitor.Attach; call Sent afterwards.
	Theirs  AttachRequest
	closers []io.Closer
	once    sync.Once
}

// NewClient makes the streams.
func NewClient(stdin, stdout, stderr bool) (*Client, error) {
	c := &Client{Theirs: AttachRequest{Stdin: -1, Stdout: -1, Stderr: -1}}
	err := c.open(stdin, stdout, stderr)
	if err != nil {
		c.Close()
		c.Sent()
		return nil, fault.New(fault.Exhausted, "cannot attach: %w", err)
	}
	return c, nil
}

func (c *Client) open(stdin, stdout, stderr bool) (err error) {
	if stdin {
		if c.Stdin, c.Theirs.Stdin, err = newInput(); err != nil {
			return err
		}
		c.closers = append(c.closers, c.Stdin.c.f)
	}
	for _, o := range []struct {
		want   bool
		ours   **os.File
		theirs *int
	}{{stdout, &c.Stdout, &c.Theirs.Stdout}, {stderr, &c.Stderr, &c.Theirs.Stderr}} {
		if !o.want {
			continue
		}
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return os.NewSyscallError("pipe2", err)
		}
		*o.theirs, *o.ours = p[1], os.NewFile(uintptr(p[0]), "output")
		c.closers = append(c.closers, *o.ours)
	}
	return nil
}

// Sent closes the monitor's ends on this side.
func (c *Client) Sent() {
	for _, fd := range []*int{&c.Theirs.Stdin, &c.Theirs.Stdout, &c.Theirs.Stderr} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// Close leaves. It sends no end of file.
func (c *Client) Close() (err error) {
	c.once.Do(func() {
		for _, x := range c.closers {
			err = errors.Join(err, x.Close())
		}
	})
	return err
}

// Input is an attached client's way to standard input.
type Input struct {
	c    *conn
	once sync.Once
}

func newInput() (in *Input, theirs int, err error) {
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, os.NewSyscallError("socketpair", err)
	}
	c, err := newConn(sp[0])
	if err != nil {
		unix.Close(sp[1])
		return nil, -1, err
	}
	return &Input{c: c}, sp[1], nil
}

const inputChunk = 16384

// Write sends data; it waits while the container does not read.
func (i *Input) Write(p []byte) (n int, err error) {
	for n < len(p) {
		part := p[n:min(len(p), n+inputChunk)]
		if err := i.c.send([][]byte{{0}, part}, nil); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// Close sends end of file.
func (i *Input) Close() (err error) {
	i.once.Do(func() { err = i.c.send([][]byte{{1}}, nil) })
	return err
}
