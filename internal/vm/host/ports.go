package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

const (
	maxPorts       = 4096 // published ports at a time
	maxConnections = 1024 // through one of them
	maxClients     = 256  // of one UDP port
	udpIdle        = 90 * time.Second
	reservation    = 30 * time.Second // for a container that is being started
)

// place is where a port is published.
type place struct {
	addr  netip.AddrPort
	proto string // tcp, udp
}

func (p place) String() string { return p.addr.String() + "/" + p.proto }

// ports publishes on this host what containers publish in the guest. A port is reserved
// before its container starts, so that one that is taken here fails the start.
type ports struct {
	l   *live
	log *slog.Logger

	mu     sync.Mutex
	open   map[place]*forward
	failed map[place]string
	owner  map[place]string // containers' names
	closed bool
}

// forward is a published port.
type forward struct {
	place
	closer   io.Closer
	reserved time.Time // not to be closed before, though no container has it
	cancel   context.CancelFunc
}

func newPorts(l *live, log *slog.Logger) *ports {
	return &ports{l: l, log: log, open: map[place]*forward{}, failed: map[place]string{}, owner: map[place]string{}}
}

// reserve binds the places for a container that is about to start, all or none.
func (p *ports) reserve(want []place) (release func(), err error) {
	var got []place
	release = func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, w := range got {
			if f := p.open[w]; f != nil && p.owner[w] == "" {
				p.drop(f)
			}
		}
	}
	for _, w := range want {
		fresh, err := p.bind(w, time.Now().Add(reservation))
		if err != nil {
			release()
			return nil, fault.New(fault.Internal, "failed to bind host port for %s: %w", w, err)
		}
		if fresh {
			got = append(got, w)
		}
	}
	return release, nil
}

// bind listens at a place if nobody of us does yet.
func (p *ports) bind(w place, reserved time.Time) (fresh bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false, net.ErrClosed
	}
	if f := p.open[w]; f != nil {
		if reserved.After(f.reserved) {
			f.reserved = reserved
		}
		return false, nil
	}
	if len(p.open) >= maxPorts {
		return false, fault.New(fault.Exhausted, "%d ports are published already", maxPorts)
	}
	// Binding is no I/O that waits.
	ctx, cancel := context.WithCancel(p.l.ctx)
	f := &forward{place: w, reserved: reserved, cancel: cancel}
	family := "4"
	if w.addr.Addr().Is6() {
		family = "6" // v6 alone: the v4 wildcard is a place of its own
	}
	switch w.proto {
	case "tcp":
		var l net.Listener
		if l, err = net.Listen("tcp"+family, w.addr.String()); err == nil {
			f.closer = l
			go p.serveTCP(ctx, f, l)
		}
	case "udp":
		var c net.PacketConn
		if c, err = net.ListenPacket("udp"+family, w.addr.String()); err == nil {
			f.closer = c
			go p.serveUDP(ctx, f, c)
		}
	default:
		err = fault.New(fault.Unsupported, "%s is not forwarded to virtual machines", w.proto)
	}
	if err != nil {
		cancel()
		return false, why(err)
	}
	p.open[w] = f
	return true, nil
}

// why drops what repeats the address.
func why(err error) error {
	var se syscall.Errno
	if errors.As(err, &se) {
		if se == syscall.EACCES {
			return fmt.Errorf("%w: ports below 1024 are for root alone here", se)
		}
		return se
	}
	return err
}

func (p *ports) drop(f *forward) {
	f.cancel()
	f.closer.Close()
	delete(p.open, f.place)
	delete(p.owner, f.place)
}

// sync publishes exactly what is wanted, and what is reserved.
func (p *ports) sync(want map[place]string) {
	for w, name := range want {
		_, err := p.bind(w, time.Time{})
		p.mu.Lock()
		switch {
		case err == nil:
			p.owner[w] = name
			if f := p.open[w]; f != nil {
				f.reserved = time.Time{} // its container has it now
			}
			delete(p.failed, w)
		case errors.Is(err, net.ErrClosed):
		case w.addr.Addr().Is6() && w.addr.Addr().IsUnspecified() && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)):
			// A host without IPv6: the v4 place is enough.
		default:
			if p.failed[w] == "" {
				p.log.Warn("cannot publish a port", "port", w.String(), "container", name, "error", err)
			}
			p.failed[w] = err.Error()
			p.owner[w] = name
		}
		p.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for w, f := range p.open {
		if _, ok := want[w]; !ok {
			p.owner[w] = ""
			if time.Now().After(f.reserved) {
				p.drop(f)
			}
		}
	}
	for w := range p.failed {
		if _, ok := want[w]; !ok {
			delete(p.failed, w)
			delete(p.owner, w)
		}
	}
}

// list tells what is published.
func (p *ports) list() []api.VMPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []api.VMPort
	for w := range p.open {
		if p.owner[w] != "" {
			out = append(out, api.VMPort{IP: w.addr.Addr().String(), Port: w.addr.Port(), Protocol: w.proto, Container: p.owner[w]})
		}
	}
	for w, e := range p.failed {
		out = append(out, api.VMPort{IP: w.addr.Addr().String(), Port: w.addr.Port(), Protocol: w.proto, Container: p.owner[w], Error: e})
	}
	slices.SortFunc(out, func(a, b api.VMPort) int {
		if a.Port != b.Port {
			return int(a.Port) - int(b.Port)
		}
		return slices.Compare([]string{a.Protocol, a.IP}, []string{b.Protocol, b.IP})
	})
	return out
}

func (p *ports) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, f := range p.open {
		p.drop(f)
	}
}

// target is the port in the guest: its engine publishes it on the loopback, too,
// unless it was published for one address.
func target(w place) string {
	host := "127.0.0.1"
	if a := w.addr.Addr(); a.Is6() {
		host = "::1"
	} else if a.IsLoopback() {
		host = a.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(w.addr.Port())))
}

func (p *ports) serveTCP(ctx context.Context, f *forward, l net.Listener) {
	slots := make(chan struct{}, maxConnections)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(50 * time.Millisecond) // descriptors may be short
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		go func() {
			defer func() { <-slots }()
			p.connect(ctx, f, conn.(*net.TCPConn))
		}()
	}
}

func (p *ports) connect(ctx context.Context, f *forward, conn *net.TCPConn) {
	s, _, _ := p.l.conversation()
	if s == nil {
		conn.Close()
		return
	}
	octx, cancel := context.WithTimeout(ctx, 30*time.Second)
	stream, err := s.Open(octx, vmwire.Purpose{Kind: vmwire.TCP, Address: target(f.place)})
	cancel()
	if err != nil {
		conn.SetLinger(0) // as a refused one looks
		conn.Close()
		return
	}
	splice(ctx, conn, stream)
}

// half is a connection of which one direction can end.
type half interface {
	net.Conn
	CloseWrite() error
}

// splice joins two connections until both directions have ended.
func splice(ctx context.Context, a half, b vmwire.Stream) {
	stop := context.AfterFunc(ctx, func() { a.Close(); b.Reset() })
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := io.Copy(b, a); err != nil {
			b.Reset()
			return
		}
		b.CloseWrite()
	}()
	if _, err := io.Copy(a, b); err != nil {
		a.Close()
		b.Reset()
	} else {
		a.CloseWrite()
	}
	<-done
	a.Close()
	b.Close()
}

// serveUDP keeps one stream for each client.
func (p *ports) serveUDP(ctx context.Context, f *forward, c net.PacketConn) {
	type client struct {
		stream vmwire.Stream
		last   time.Time
	}
	var mu sync.Mutex
	clients := map[string]*client{}
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for _, k := range clients {
			k.stream.Close()
		}
	}()
	buf := make([]byte, 2+vmwire.MaxDatagram)
	for {
		n, from, err := c.ReadFrom(buf[2:])
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error of an earlier answer
		}
		key := from.String()
		mu.Lock()
		k := clients[key]
		if k == nil && len(clients) >= maxClients {
			var oldest string
			for a, o := range clients {
				if oldest == "" || o.last.Before(clients[oldest].last) {
					oldest = a
				}
			}
			clients[oldest].stream.Reset()
			delete(clients, oldest)
		}
		mu.Unlock()
		if k == nil {
			s, _, _ := p.l.conversation()
			if s == nil {
				continue
			}
			octx, cancel := context.WithTimeout(ctx, 5*time.Second)
			stream, err := s.Open(octx, vmwire.Purpose{Kind: vmwire.UDP, Address: target(f.place)})
			cancel()
			if err != nil {
				continue
			}
			k = &client{stream: stream}
			mu.Lock()
			clients[key] = k
			mu.Unlock()
			go func() { // its answers
				back := make([]byte, vmwire.MaxDatagram)
				for {
					stream.SetReadDeadline(time.Now().Add(udpIdle))
					n, err := vmwire.ReadDatagram(stream, back)
					if err != nil {
						mu.Lock()
						idle := time.Since(k.last) >= udpIdle
						var timeout net.Error
						if !idle && errors.As(err, &timeout) && timeout.Timeout() {
							mu.Unlock()
							continue
						}
						if clients[key] == k {
							delete(clients, key)
						}
						mu.Unlock()
						stream.Close()
						return
					}
					mu.Lock()
					k.last = time.Now()
					mu.Unlock()
					c.WriteTo(back[:n], from)
				}
			}()
		}
		mu.Lock()
		k.last = time.Now()
		mu.Unlock()
		k.stream.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if err := vmwire.WriteDatagram(k.stream, buf, n); err != nil {
			k.stream.Reset()
			mu.Lock()
			if clients[key] == k {
				delete(clients, key)
			}
			mu.Unlock()
		}
	}
}
