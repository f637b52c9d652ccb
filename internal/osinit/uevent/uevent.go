// Package uevent listens for what the kernel says of devices that come, change
// and go. The first process loads their modules and waits for disks and ports with it.
package uevent

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Event is one message.
type Event struct {
	Action, Path string
	Env          map[string]string
}

// Listener is a socket that events come to.
type Listener struct{ f *os.File }

// Listen begins to listen.
func Listen() (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("cannot listen for devices: %w", err)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20) // a burst at the start; the default holds few
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot listen for devices: %w", err)
	}
	return &Listener{os.NewFile(uintptr(fd), "uevent")}, nil
}

// Next waits for an event. Events may be lost in a burst; that is an empty Event.
func (l *Listener) Next() (Event, error) {
	b := make([]byte, 64<<10)
	c, err := l.f.SyscallConn()
	if err != nil {
		return Event{}, err
	}
	var n int
	var from unix.Sockaddr
	var rerr error
	if err := c.Read(func(fd uintptr) bool {
		n, from, rerr = unix.Recvfrom(int(fd), b, 0)
		return rerr != unix.EAGAIN
	}); err != nil {
		return Event{}, err
	}
	if rerr == unix.ENOBUFS {
		return Event{}, nil
	}
	if rerr != nil {
		return Event{}, rerr
	}
	if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
		return Event{}, nil // not from the kernel
	}
	return parse(b[:n]), nil
}

// parse reads a message: "ACTION@PATH", then "KEY=VALUE" fields, each ended by a zero.
func parse(b []byte) Event {
	e := Event{Env: map[string]string{}}
	for i, f := range bytes.Split(b, []byte{0}) {
		if i == 0 {
			e.Action, e.Path, _ = strings.Cut(string(f), "@")
			continue
		}
		if k, v, ok := strings.Cut(string(f), "="); ok {
			e.Env[k] = v
		}
	}
	return e
}

// Close ends Next.
func (l *Listener) Close() error { return l.f.Close() }
