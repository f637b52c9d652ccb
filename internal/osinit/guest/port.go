// Package guest is the machine's side of what its host asks: the *port* with its
// streams, and the control API over HTTP, both described in docs/flows/vm-image.md. What
// the API does is done by a Machine, the first process, which imports this package.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Port serves the streams of a virtio-serial port.
type Port struct {
	// Control serves the control API.
	Control *Control
	// Engine connects to the engine's API, waiting for it where it is on its way.
	Engine func(ctx context.Context) (net.Conn, error)
	// Log takes what goes wrong.
	Log func(format string, args ...any)

	streams atomic.Int64
}

// Streams counts the streams for the engine and for published ports.
func (p *Port) Streams() int { return int(p.streams.Load()) }

// find returns the device of the port with our name.
func find() (string, bool) {
	ports, err := os.ReadDir("/sys/class/virtio-ports")
	if err != nil {
		return "", false
	}
	for _, d := range ports {
		b, err := os.ReadFile(filepath.Join("/sys/class/virtio-ports", d.Name(), "name"))
		if err == nil && strings.TrimSpace(string(b)) == vmwire.Port {
			return "/dev/" + d.Name(), true
		}
	}
	return "", false
}

// Run waits for the port and serves it until ctx is done; come gets a value when
// devices came.
func (p *Port) Run(ctx context.Context, come <-chan struct{}) error {
	path, ok := find()
	for !ok {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-come:
		case <-time.After(5 * time.Second):
		}
		path, ok = find()
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open the port: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	// The kernel tells by a signal that the host came or went.
	moved := make(chan os.Signal, 1)
	signal.Notify(moved, unix.SIGIO)
	defer signal.Stop(moved)
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETOWN, os.Getpid()); err == nil {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err == nil {
			unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_ASYNC)
		}
	}
	for ctx.Err() == nil {
		if !connected(fd) {
			select {
			case <-ctx.Done():
			case <-moved:
			case <-time.After(2 * time.Second):
			}
			continue
		}
		s, err := vmwire.Guest(kept{f})
		if err != nil {
			if !errors.Is(err, io.EOF) {
				p.Log("the port: %v", err)
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
			continue
		}
		p.serve(ctx, s)
	}
	return ctx.Err()
}

// kept is not closed by the end of a conversation: that would drop what the next
// host has said already.
type kept struct{ *os.File }

func (kept) Close() error { return nil }

func connected(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&unix.POLLHUP == 0
}

// serve answers streams until the conversation ends.
func (p *Port) serve(ctx context.Context, s *vmwire.Session) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { s.Close() })
	for {
		in, err := s.Accept()
		if err != nil {
			break
		}
		wg.Go(func() { p.stream(ctx, in) })
	}
	cancel()
	stop()
	s.Close()
	wg.Wait()
}

func (p *Port) stream(ctx context.Context, in *vmwire.Incoming) {
	defer in.Close()
	what, err := in.Purpose(30 * time.Second)
	if err != nil {
		in.Answer(err)
		return
	}
	if what.Kind == vmwire.Control {
		if in.Answer(nil) == nil {
			p.Control.Serve(ctx, in)
		}
		return
	}
	p.streams.Add(1)
	defer p.streams.Add(-1)
	var c net.Conn
	switch what.Kind {
	case vmwire.API:
		c, err = p.Engine(ctx)
	case vmwire.TCP:
		c, err = (&net.Dialer{Timeout: 30 * time.Second}).DialContext(ctx, "tcp", what.Address)
	case vmwire.UDP:
		c, err = (&net.Dialer{Timeout: 30 * time.Second}).DialContext(ctx, "udp", what.Address)
	}
	if err != nil {
		in.Answer(err)
		return
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if in.Answer(nil) != nil {
		return
	}
	if what.Kind == vmwire.UDP {
		datagrams(in, c)
		return
	}
	join(in, c)
}

// join copies both directions, ending each by itself.
func join(in *vmwire.Incoming, c net.Conn) {
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := io.Copy(c, in)
		if half, ok := c.(interface{ CloseWrite() error }); ok && err == nil {
			half.CloseWrite()
			return
		}
		c.Close()
	})
	_, err := io.Copy(in, c)
	if err != nil {
		in.Reset()
	} else {
		in.CloseWrite()
	}
	wg.Wait()
}

// idle ends a UDP stream that nothing came over from the host for so long; the host
// opens another when there is more.
const idle = 5 * time.Minute

func datagrams(in *vmwire.Incoming, c net.Conn) {
	var wg sync.WaitGroup
	wg.Go(func() {
		defer c.Close()
		buf := make([]byte, vmwire.MaxDatagram)
		for {
			in.SetReadDeadline(time.Now().Add(idle))
			n, err := vmwire.ReadDatagram(in, buf)
			if err != nil {
				return
			}
			c.Write(buf[:n]) // refused ones are lost, as datagrams are
		}
	})
	buf := make([]byte, vmwire.MaxDatagram+2)
	for {
		n, err := c.Read(buf[2:])
		if err != nil {
			if errors.Is(err, unix.ECONNREFUSED) {
				continue
			}
			break
		}
		if vmwire.WriteDatagram(in, buf, n) != nil {
			break
		}
	}
	in.Close()
	c.Close()
	wg.Wait()
}
