package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// Handed is a listener for connections that the engine accepted, read a request
// from, and hands over.
type Handed struct{ conn *net.UnixConn }

// NewHanded listens on the inherited socket.
func NewHanded() (*Handed, error) {
	f := os.NewFile(contract.FDHanded, "handed")
	c, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("cannot take connections from the engine: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, errors.New("cannot take connections from the engine: that is no unix socket")
	}
	return &Handed{u}, nil
}

// Accept waits for a connection. One that cannot be taken is closed, which the engine sees.
func (l *Handed) Accept() (net.Conn, error) {
	buf, oob := make([]byte, contract.MaxHanded), make([]byte, unix.CmsgSpace(2*4))
	for {
		n, oobn, _, _, err := l.conn.ReadMsgUnix(buf, oob)
		if err == nil && n == 0 && oobn == 0 {
			err = io.EOF
		}
		if err != nil {
			return nil, err
		}
		fds := rights(oob[:oobn])
		if fds == nil {
			continue
		}
		f, done := os.NewFile(uintptr(fds[0]), "client"), os.NewFile(uintptr(fds[1]), "done")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			_ = done.Close()
			continue
		}
		return &handedConn{Conn: c, read: bytes.NewReader(bytes.Clone(buf[:n])), done: done}, nil
	}
}

// rights are the two descriptors of a message, or nil.
func rights(oob []byte) []int {
	var fds []int
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	if len(fds) == 2 {
		return fds
	}
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
	return nil
}

// Close ends the listener.
func (l *Handed) Close() error { return l.conn.Close() }

// Addr is that of the socket to the engine.
func (l *Handed) Addr() net.Addr { return l.conn.LocalAddr() }

// handedConn reads first what the engine has read already.
type handedConn struct {
	net.Conn
	read *bytes.Reader
	done *os.File
}

func (c *handedConn) Read(p []byte) (int, error) {
	if c.read.Len() > 0 {
		return c.read.Read(p)
	}
	return c.Conn.Read(p)
}

// Close tells the engine, too.
func (c *handedConn) Close() error {
	err := c.Conn.Close()
	_ = c.done.Close()
	return err
}
