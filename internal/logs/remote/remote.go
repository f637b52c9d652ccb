// Package remote sends the records of the drivers journald, syslog and fluentd
// to where they belong. The monitor writes every container's records to a file,
// whoever they are for; a Shipper of the engine follows the files of remote
// drivers and hands their records on, keeping a durable cursor for each, so that
// neither a restart of the engine nor an outage of the other side loses what the
// files still hold. Delivery is at least once: after a break the last batch may
// come twice.
//
// A *sink* is the connection to one remote for one container. The engine is the
// importer; package driver checks options.
package remote

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/logs/driver"
)

// Entry is one record to be sent.
type Entry struct {
	Time    time.Time
	Stderr  bool
	Line    []byte // without its newline
	Partial *Partial
}

// Partial marks a piece of a line that was too long for one record.
type Partial struct {
	ID      string
	Ordinal int // from 1
	Last    bool
}

// sink delivers entries. Only one goroutine uses it; it connects when it has to.
type sink interface {
	// send returns how many entries, from the first, the other side has for
	// certain; fewer than all with an error.
	send(ctx context.Context, batch []Entry) (int, error)
	close()
}

// Source is what a sink says about where records come from. It is stored beside
// the log, so that what is left of a container that is gone can be sent.
type Source struct {
	Driver  string            `json:"driver"`
	Options map[string]string `json:"options,omitempty"`
	ID      string            `json:"id"`
	Name    string            `json:"name"` // without a slash
	Image   string            `json:"image"`
	Tag     string            `json:"tag"`
	Attrs   map[string]string `json:"attrs,omitempty"`
}

// NewSource renders what the options ask for of a container.
func NewSource(name string, options map[string]string, c driver.Container) (Source, error) {
	s := Source{Driver: name, Options: options, ID: c.ContainerID, Name: strings.TrimPrefix(c.ContainerName, "/"), Image: c.ContainerImageName}
	var rename func(string) string
	if name == driver.Journald {
		rename = journalField
	}
	s.Attrs = c.Attrs(options, rename)
	var err error
	s.Tag, err = c.Tag(options, "{{.ID}}")
	return s, err
}

// writeTimeout bounds how long a remote may take nothing at all.
const writeTimeout = 30 * time.Second

var errClosed = errors.New("the other side closed the connection")

// stream is a connected byte stream that knows when the other side is gone.
type stream struct {
	net.Conn
	raw  syscall.RawConn
	dead chan struct{} // closed when the other side ended it
}

// newStream takes a connection over; raw is the socket below it. Unless the
// caller reads answers itself, what comes is discarded.
func newStream(c net.Conn, below net.Conn, discard bool) (*stream, error) {
	s := &stream{Conn: c, dead: make(chan struct{})}
	sc, ok := below.(syscall.Conn)
	if !ok {
		return nil, errors.New("cannot use a connection without a socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	s.raw = raw
	if discard {
		// Ends with the connection, which its sink closes.
		go func() {
			_, _ = io.Copy(io.Discard, c)
			close(s.dead)
		}()
	}
	return s, nil
}

// put writes and waits until the other side's system has all of it.
func (s *stream) put(ctx context.Context, b []byte) error {
	select {
	case <-s.dead:
		return errClosed
	default:
	}
	stop := context.AfterFunc(ctx, func() { _ = s.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = s.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := s.Write(b); err != nil {
		return err
	}
	return s.drained(ctx)
}

func (s *stream) drained(ctx context.Context) error {
	end := time.Now().Add(writeTimeout)
	for wait := 100 * time.Microsecond; ; wait = min(wait*2, 50*time.Millisecond) {
		left, soErr := 0, 0
		var err error
		cerr := s.raw.Control(func(fd uintptr) {
			if left, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
				soErr, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
			}
		})
		switch {
		case cerr != nil:
			return cerr
		case err != nil:
			return err
		case soErr != 0:
			return syscall.Errno(soErr)
		}
		select {
		case <-s.dead:
			return errClosed
		default:
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(end) {
			return os.ErrDeadlineExceeded
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
