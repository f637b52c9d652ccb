package network

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/nft"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Host ports for bindings that name none.
const firstEphemeral, lastEphemeral = 32768, 60999

// HostPorts is what publishing takes where the engine's network namespace is
// joined to the host's by a user-mode network.
type HostPorts struct {
	// First is the lowest port that the user may bind on the host.
	First uint16
	// Listen: the network forwards the ports that something listens on, so
	// reservations do (they still answer nobody).
	Listen bool
	// Arrive is where connections come in, whatever the host's address that they
	// were made to; the zero address is that one itself.
	Arrive netip.Addr
	// Forward asks the network for a port of the host, and gives the way to end
	// that; nil: it needs no asking. Failure is a port that somebody else has.
	Forward func(proto string, host netip.AddrPort) (end func() error, err error)
}

// at is the address in this namespace that stands for one of the host's.
func (h HostPorts) at(host netip.Addr) netip.Addr {
	if h.Arrive.IsValid() && host.Is4() && !host.IsUnspecified() {
		return h.Arrive
	}
	return host
}

// reservations are bound sockets, one for each published port: they receive
// nothing, but make conflicts with the host's own processes show.
type reservations struct {
	mu   sync.Mutex
	held map[portKey]int // descriptor, -1 where the host has no such socket
	next uint16
	host HostPorts
	ends map[portKey]func() error // what HostPorts.Forward gave
	// answered tells which sockets somebody takes connections from; may be nil.
	answered func(portKey) bool
}

type portKey struct {
	host  netip.Addr
	proto string
	port  uint16
}

func (k portKey) String() string {
	return netip.AddrPortFrom(k.host, k.port).String()
}

func newReservations(h HostPorts) *reservations {
	return &reservations{held: map[portKey]int{}, host: h, ends: map[portKey]func() error{}, next: uint16(firstEphemeral + rand.IntN(lastEphemeral-firstEphemeral))}
}

var errPortTaken = errors.New("port is already allocated")

// reserve binds the socket of a port.
func (r *reservations) reserve(k portKey) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reserveLocked(k)
}

func (r *reservations) reserveLocked(k portKey) error {
	if _, ok := r.held[k]; ok {
		return errPortTaken
	}
	if k.port < r.host.First {
		return fault.New(fault.Unsupported, "cannot publish port %d: an ordinary user may not bind ports below %d; take a higher one, or permit it with: sysctl net.ipv4.ip_unprivileged_port_start=%d", k.port, r.host.First, k.port)
	}
	if err := r.bind(k); err != nil {
		return err
	}
	if r.host.Forward == nil || !k.host.Is4() {
		return nil
	}
	end, err := r.host.Forward(k.proto, netip.AddrPortFrom(k.host, k.port))
	if err != nil {
		r.releaseLocked(k)
		return errPortTaken
	}
	r.ends[k] = end
	return nil
}

// bind makes the socket of a port.
func (r *reservations) bind(k portKey) error {
	typ, proto := unix.SOCK_STREAM, 0
	switch k.proto {
	case "udp":
		typ = unix.SOCK_DGRAM
	case "sctp":
		proto = unix.IPPROTO_SCTP
	}
	fam := unix.AF_INET
	var sa unix.Sockaddr
	if at := r.host.at(k.host); at.Is4() {
		sa = &unix.SockaddrInet4{Port: int(k.port), Addr: at.As4()}
	} else {
		fam = unix.AF_INET6
		sa = &unix.SockaddrInet6{Port: int(k.port), Addr: k.host.As16()}
	}
	fd, err := unix.Socket(fam, typ|unix.SOCK_CLOEXEC, proto)
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT):
		// Nobody else can use such a port on this host either.
		if r.overlaps(k) {
			return errPortTaken
		}
		r.held[k] = -1
		return nil
	case errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE):
		return fault.New(fault.Exhausted, "cannot reserve port %s/%s: the engine has as many descriptors open as it may; publish fewer ports or raise its limit of open files", k, k.proto)
	case err != nil:
		return fmt.Errorf("cannot reserve port %s/%s: %w", k, k.proto, err)
	}
	if fam == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			unix.Close(fd)
			return fmt.Errorf("cannot reserve port %s/%s: %w", k, k.proto, err)
		}
	}
	if k.proto == "udp" {
		// Datagrams that reach the socket are for nobody and must not pile up.
		if err := dropAll(fd); err != nil {
			unix.Close(fd)
			return fmt.Errorf("cannot reserve port %s/%s: %w", k, k.proto, err)
		}
	}
	if r.answered != nil && r.answered(k) {
		err = bindListening(fd, sa)
	} else if r.host.Listen && k.proto == "tcp" {
		err = bindOver(fd, sa)
	} else if err = unix.Bind(fd, sa); errors.Is(err, unix.EADDRINUSE) && k.proto == "tcp" {
		err = bindOver(fd, sa)
	}
	if err != nil {
		unix.Close(fd)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			return errPortTaken
		case errors.Is(err, unix.EADDRNOTAVAIL):
			return fault.New(fault.Invalid, "cannot publish at %s/%s: cannot assign requested address: the host has no address %s", k, k.proto, k.host)
		}
		return fmt.Errorf("cannot reserve port %s/%s: %w", k, k.proto, err)
	}
	r.held[k] = fd
	return nil
}

// bindOver binds a port on which only closed connections linger. The socket
// must listen then, or another could do the same beside it; it answers nobody.
func bindOver(fd int, sa unix.Sockaddr) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := dropAll(fd); err != nil {
		return err
	}
	if err := unix.Bind(fd, sa); err != nil {
		return err
	}
	return unix.Listen(fd, 1)
}

// bindListening is for a port whose connections are taken: former ones may
// linger on it, and whoever else listens there is in the way.
func bindListening(fd int, sa unix.Sockaddr) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, sa); err != nil {
		return err
	}
	return unix.Listen(fd, 1024)
}

// socket is the descriptor of a port, -1 if there is none.
func (r *reservations) socket(k portKey) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if fd, ok := r.held[k]; ok {
		return fd
	}
	return -1
}

// adopt holds a port by a socket that is bound to it already.
func (r *reservations) adopt(k portKey, fd int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.releaseLocked(k)
	r.held[k] = fd
}

// mute lets a listening socket refuse connections; the port stays reserved.
func (r *reservations) mute(k portKey) {
	if fd := r.socket(k); fd >= 0 {
		_ = unix.Shutdown(fd, unix.SHUT_RD)
	}
}

// dropAll attaches a filter that lets nothing in.
func dropAll(fd int) error {
	raw, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 0}})
	if err != nil {
		return err
	}
	f := []unix.SockFilter{{Code: raw[0].Op, Jt: raw[0].Jt, Jf: raw[0].Jf, K: raw[0].K}}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &f[0]})
}

// overlaps looks for a conflict where there is no socket to find it.
func (r *reservations) overlaps(k portKey) bool {
	for o := range r.held {
		if o.proto == k.proto && o.port == k.port && o.host.Is4() == k.host.Is4() &&
			(o.host == k.host || o.host.IsUnspecified() || k.host.IsUnspecified()) {
			return true
		}
	}
	return false
}

func (r *reservations) release(ks ...portKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range ks {
		r.releaseLocked(k)
	}
}

func (r *reservations) releaseLocked(k portKey) {
	if fd, ok := r.held[k]; ok {
		if fd >= 0 {
			unix.Close(fd)
		}
		delete(r.held, k)
	}
	if end := r.ends[k]; end != nil {
		_ = end() // it is gone with the network otherwise
		delete(r.ends, k)
	}
}

func (r *reservations) closeAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, fd := range r.held {
		if fd >= 0 {
			unix.Close(fd)
		}
		delete(r.held, k)
	}
}

// room tells whether n more ports can be reserved within the descriptor limit.
func (r *reservations) room(n int) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return nil
	}
	r.mu.Lock()
	held := len(r.held)
	r.mu.Unlock()
	// Half of the descriptors stay for everything else.
	if limit := int(min(l.Cur/2, 1<<20)); held+n > limit {
		return fault.New(fault.Exhausted, "cannot publish %d ports: %d are published, and %d is the most that the engine's limit of %d open files allows; publish a smaller range or raise that limit", n, held, limit, l.Cur)
	}
	return nil
}

// wanted is a port to publish before its host port is known.
type wanted struct {
	container network.Port
	hosts     []netip.Addr // the same port on each
	first     uint16       // 0: any
	last      uint16
}

// expand understands port bindings. Hosts of families that the endpoint does
// not have are left out; with relay, one that has IPv4 alone is reached over IPv6
// all the same.
func expand(pm network.PortMap, fallback netip.Addr, e *endpoint, relay bool) ([]wanted, error) {
	var out []wanted
	for p, bs := range pm {
		switch p.Proto() {
		case network.TCP, network.UDP, network.SCTP:
		default:
			return nil, fault.New(fault.Invalid, "cannot publish %s: the protocol is none of tcp, udp and sctp", p)
		}
		if p.Num() == 0 {
			return nil, fault.New(fault.Invalid, "cannot publish %s: a container's port is from 1 to 65535", p)
		}
		for _, b := range bs {
			w := wanted{container: p}
			if b.HostPort != "" {
				r, err := network.ParsePortRange(b.HostPort)
				if err != nil || strings.Contains(b.HostPort, "/") {
					return nil, fault.New(fault.Invalid, "cannot publish %s: invalid host port %q", p, b.HostPort)
				}
				w.first, w.last = r.Start(), r.End()
			}
			host := b.HostIP.Unmap()
			if !host.IsValid() && fallback.IsValid() && !fallback.IsUnspecified() {
				host = fallback
			}
			if host.Zone() != "" {
				return nil, fault.New(fault.Invalid, "cannot publish %s: host address %s has a zone", p, host)
			}
			four, six := e.IPv4.IsValid(), e.IPv6.IsValid() || relay && p.Proto() == network.TCP
			switch {
			case !host.IsValid():
				if four {
					w.hosts = append(w.hosts, netip.IPv4Unspecified())
				}
				if six {
					w.hosts = append(w.hosts, netip.IPv6Unspecified())
				}
			case host.Is4() && four, host.Is6() && six:
				w.hosts = append(w.hosts, host)
			default:
				return nil, fault.New(fault.Invalid, "cannot publish %s at %s: the network gives the container no address of that family", p, host)
			}
			if len(w.hosts) > 0 {
				out = append(out, w)
			}
		}
	}
	// Fixed ports first, then in order, so that a range or an ephemeral port
	// does not take what is named elsewhere.
	slices.SortFunc(out, func(a, b wanted) int {
		open := func(w wanted) int {
			if w.first == 0 {
				return 1 << 17
			}
			return int(w.last - w.first)
		}
		return cmp.Or(cmp.Compare(open(a), open(b)), cmp.Compare(a.container.Num(), b.container.Num()),
			strings.Compare(string(a.container.Proto()), string(b.container.Proto())), cmp.Compare(a.first, b.first))
	})
	return out, nil
}

// publish reserves host ports for an endpoint and writes the rules.
func (m *Manager) publish(n *netw, e *endpoint, pm network.PortMap, through bool) (err error) {
	if len(pm) == 0 || n.rec.Internal {
		return nil
	}
	ws, err := expand(pm, n.opts.hostIP, e, m.relay != nil)
	if err != nil || len(ws) == 0 {
		return err
	}
	count := 0
	for _, w := range ws {
		count += len(w.hosts)
	}
	if err := m.ports.room(count); err != nil {
		return err
	}
	var held []portKey
	defer func() {
		if err != nil {
			for _, k := range held {
				_ = m.drop(k)
			}
			m.ports.release(held...)
			e.Ports = nil
		}
	}()
	for _, w := range ws {
		var translated []netip.Addr
		for _, h := range w.hosts {
			mode, to := n.opts.mode4, e.IPv4
			if h.Is6() {
				mode, to = n.opts.mode6, e.IPv6
			}
			if h.Is6() && !to.IsValid() {
				if n.opts.mode4 == modeRouted || n.opts.mode4 == modeIsolated {
					continue
				}
				mode, to = n.opts.mode4, e.IPv4
			}
			if mode == modeRouted || mode == modeIsolated {
				e.Ports = append(e.Ports, published{Proto: string(w.container.Proto()), Container: w.container.Num(), To: to, Routed: true})
				continue
			}
			translated = append(translated, h)
		}
		if len(translated) == 0 {
			continue
		}
		port, err := m.pick(w, translated)
		if err != nil {
			return err
		}
		for _, h := range translated {
			held = append(held, portKey{h, string(w.container.Proto()), port})
			to := e.IPv4
			if h.Is6() && e.IPv6.IsValid() {
				to = e.IPv6
			}
			e.Ports = append(e.Ports, published{Host: h, Proto: string(w.container.Proto()), HostPort: port, Container: w.container.Num(), To: to, Through: through})
		}
	}
	if err := m.table.AddPorts(m.rules(e.Ports)); err != nil {
		if errors.Is(err, nft.ErrNoInjection) {
			return fault.New(fault.Unsupported, "cannot publish ports: %w", err)
		}
		return fmt.Errorf("cannot publish ports: %w", err)
	}
	for _, p := range e.Ports {
		if !p.Routed {
			m.carry(p, portKey{p.Host, p.Proto, p.HostPort})
		}
	}
	return nil
}

// pick reserves one port on all the hosts.
func (m *Manager) pick(w wanted, hosts []netip.Addr) (uint16, error) {
	proto := string(w.container.Proto())
	try := func(port uint16) error {
		for i, h := range hosts {
			if err := m.ports.reserve(portKey{h, proto, port}); err != nil {
				for _, o := range hosts[:i] {
					m.ports.release(portKey{o, proto, port})
				}
				if errors.Is(err, errPortTaken) {
					return fault.New(fault.Conflict, "Bind for %s failed: %w", portKey{h, proto, port}, err)
				}
				return err
			}
		}
		return nil
	}
	if w.first != 0 {
		var err error
		for p := int(w.first); p <= int(w.last); p++ {
			if err = try(uint16(p)); err == nil {
				return uint16(p), nil
			}
			if !errors.Is(err, errPortTaken) {
				return 0, err
			}
		}
		return 0, err
	}
	for range lastEphemeral - firstEphemeral + 1 {
		p := m.ports.ephemeral()
		err := try(p)
		if err == nil {
			return p, nil
		}
		if !errors.Is(err, errPortTaken) {
			return 0, err
		}
	}
	return 0, fault.New(fault.Exhausted, "cannot publish %s: all ports from %d to %d are in use", w.container, firstEphemeral, lastEphemeral)
}

func (r *reservations) ephemeral() uint16 {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.next
	if r.next++; r.next > lastEphemeral {
		r.next = firstEphemeral
	}
	return p
}

// rules is what the table must know of published ports.
func (m *Manager) rules(ps []published) []nft.Port {
	out := make([]nft.Port, 0, len(ps))
	for _, p := range ps {
		if p.untranslated() && !p.Routed || p.Delegated {
			continue
		}
		proto := nft.TCP
		switch p.Proto {
		case "udp":
			proto = nft.UDP
		case "sctp":
			proto = nft.SCTP
		}
		out = append(out, nft.Port{Host: m.cfg.HostPorts.at(p.Host), Proto: proto, Port: p.HostPort, To: netip.AddrPortFrom(p.To, p.Container), Through: p.Through, Routed: p.Routed})
	}
	return out
}

// portMap is what the API shows of published ports.
func portMap(ps []published) network.PortMap {
	if len(ps) == 0 {
		return nil
	}
	out := network.PortMap{}
	for _, p := range ps {
		k, _ := network.PortFrom(p.Container, network.IPProtocol(p.Proto))
		if p.Routed {
			if _, ok := out[k]; !ok {
				out[k] = nil
			}
			continue
		}
		out[k] = append(out[k], network.PortBinding{HostIP: p.Host, HostPort: strconv.Itoa(int(p.HostPort))})
	}
	return out
}

// unpublish takes an endpoint's ports back.
func (m *Manager) unpublish(e *endpoint) error {
	if len(e.Ports) == 0 {
		return nil
	}
	m.undelegate(e)
	err := m.table.DelPorts(m.rules(e.Ports))
	for _, p := range e.Ports {
		if !p.Routed {
			k := portKey{p.Host, p.Proto, p.HostPort}
			err = errors.Join(err, m.drop(k))
			m.ports.release(k)
		}
	}
	return err
}
