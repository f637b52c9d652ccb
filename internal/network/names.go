package network

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/dns"
	"github.com/cloudos-io/cloudos/internal/network/nft"
)

// resolverAddr is where containers on named networks find their server.
var resolverAddr = netip.AddrFrom4([4]byte{127, 0, 0, 11})

// named tells whether containers know one another by name on the network: on
// all but the default ones.
func (n *netw) named() bool {
	return !predefined(n.rec.Name) && n.rec.wired()
}

// names are those under which an endpoint is known on its network; the first
// is the one that its address leads back to.
func (e *endpoint) names(n *netw) []string {
	if !n.named() {
		return nil
	}
	short := e.ContainerID
	if len(short) > 12 {
		short = short[:12]
	}
	var out []string
	for _, s := range append(append([]string{e.ContainerName}, e.Aliases...), short, e.Hostname) {
		if s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	for _, s := range n.services(e) {
		if !slices.ContainsFunc(out, func(o string) bool { return strings.EqualFold(o, s) }) {
			out = append(out, s)
		}
	}
	return out
}

// register and unregister keep the books of an endpoint; the caller holds mu.
func (m *Manager) register(n *netw, b *box, e *endpoint) {
	n.eps[e.ContainerID] = e
	b.eps[n.rec.ID] = e
	for _, s := range e.names(n) {
		k := strings.ToLower(s)
		n.dns[k] = append(n.dns[k], e)
	}
	for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
		if a.IsValid() {
			n.addrs[a] = e
		}
	}
	m.touch(n)
}

func (m *Manager) unregister(n *netw, b *box, e *endpoint) {
	if n.eps[e.ContainerID] == e {
		delete(n.eps, e.ContainerID)
	}
	if b.eps[n.rec.ID] == e {
		delete(b.eps, n.rec.ID)
	}
	for _, s := range e.names(n) {
		k := strings.ToLower(s)
		if l := slices.DeleteFunc(n.dns[k], func(o *endpoint) bool { return o == e }); len(l) == 0 {
			delete(n.dns, k)
		} else {
			n.dns[k] = l
		}
	}
	for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
		if n.addrs[a] == e {
			delete(n.addrs, a)
		}
	}
	m.touch(n)
}

// Rename follows a container's new name in DNS.
func (m *Manager) Rename(ctx context.Context, id, name string) error {
	m.up()
	m.mu.Lock()
	b := m.containers[id]
	if b == nil {
		m.mu.Unlock()
		return nil // on no network
	}
	b.name = name
	for netID, e := range b.eps {
		n := m.nets[netID]
		if n == nil {
			continue
		}
		m.unregister(n, b, e)
		e.ContainerName = name
		m.register(n, b, e)
	}
	m.mu.Unlock()
	return m.save(b)
}

// SetHealthy tells whether names should lead to the container.
func (m *Manager) SetHealthy(id string, healthy bool) {
	m.up()
	m.mu.Lock()
	if b := m.containers[id]; b != nil {
		if b.unhealthy == healthy {
			for id := range b.eps {
				if n := m.nets[id]; n != nil {
					m.touch(n)
				}
			}
		}
		b.unhealthy = !healthy
	}
	m.mu.Unlock()
}

// resolver is a container's name server and its view of the names.
type resolver struct {
	m   *Manager
	b   *box
	ns  *os.File
	srv *dns.Server

	host hostServers
}

func (r *resolver) close() { r.srv.Close() }

// serveNames starts the container's name server when it is on a named network
// and has none. The caller holds b.busy.
func (m *Manager) serveNames(b *box) error {
	m.mu.RLock()
	want := false
	for id, e := range b.eps {
		if n := m.nets[id]; n != nil && e.HasNS && n.named() {
			want = true
		}
	}
	m.mu.RUnlock()
	if !want || b.resolver != nil || b.netns == nil {
		return nil
	}
	r := &resolver{m: m, b: b, ns: b.netns}
	var pc net.PacketConn
	var ln net.Listener
	err := bridge.Inside(b.netns, func() error {
		var err error
		addr := netip.AddrPortFrom(resolverAddr, 0)
		if pc, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr)); err != nil {
			return err
		}
		if ln, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(addr)); err != nil {
			pc.Close()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot serve names to the container: %w", err)
	}
	udp, tcp := pc.LocalAddr().(*net.UDPAddr).Port, ln.Addr().(*net.TCPAddr).Port
	if err := nft.RedirectNames(b.netns, resolverAddr, uint16(udp), uint16(tcp)); err != nil {
		pc.Close()
		ln.Close()
		return err
	}
	r.srv = dns.Serve(dns.Config{Zone: r, Upstreams: r.upstreams, Dial: r.dial, Logger: m.log}, pc, ln)
	m.mu.Lock()
	b.resolver = r
	m.mu.Unlock()
	return nil
}

// Lookup answers from the networks that the container is on.
func (r *resolver) Lookup(name string, six bool) ([]netip.Addr, bool) {
	r.m.mu.RLock()
	defer r.m.mu.RUnlock()
	for id, own := range r.b.eps {
		n := r.m.nets[id]
		if n == nil || !n.named() {
			continue
		}
		if as, ok := n.vip(name, six); ok {
			return as, true
		}
		es := n.dns[name]
		if short, ok := strings.CutSuffix(name, "."+strings.ToLower(n.rec.Name)); ok && len(es) == 0 {
			es = n.dns[short]
		}
		if len(es) == 0 {
			es = r.linked(n, own, name)
		}
		if len(es) == 0 {
			continue
		}
		return r.addresses(es, six), true
	}
	return nil, false
}

// linked finds the container that a legacy link gives the name to.
func (r *resolver) linked(n *netw, own *endpoint, name string) []*endpoint {
	for _, l := range own.Links {
		target, alias, ok := strings.Cut(l, ":")
		if !ok {
			alias = target
		}
		if strings.EqualFold(alias, name) {
			target = strings.ToLower(strings.TrimPrefix(target, "/"))
			if es := n.dns[target]; len(es) > 0 {
				return es
			}
			if len(target) > 12 {
				return n.dns[target[:12]]
			}
		}
	}
	return nil
}

// addresses offers the healthy containers in random order, all if none is.
func (r *resolver) addresses(es []*endpoint, six bool) []netip.Addr {
	pick := func(all bool) (out []netip.Addr) {
		for _, e := range es {
			b := r.m.containers[e.ContainerID]
			if !e.HasNS || !all && b != nil && b.unhealthy {
				continue
			}
			a := e.IPv4
			if six {
				a = e.IPv6
			}
			if a.IsValid() {
				out = append(out, a)
			}
		}
		return out
	}
	out := pick(false)
	if len(out) == 0 {
		out = pick(true)
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// Reverse finds who has an address on the container's networks.
func (r *resolver) Reverse(a netip.Addr) (string, bool) {
	r.m.mu.RLock()
	defer r.m.mu.RUnlock()
	inside := false
	for id := range r.b.eps {
		n := r.m.nets[id]
		if n == nil || !n.named() {
			continue
		}
		if e := n.addrs[a]; e != nil {
			return e.ContainerName + "." + n.rec.Name, true
		}
		inside = inside || bitsOf(n.pools(a.Is4()), a) != 0
	}
	return "", inside
}

// upstreams are the user's servers or the host's. A container that is on
// internal networks alone has none: names would be a way out.
func (r *resolver) upstreams() []dns.Upstream {
	r.m.mu.RLock()
	outside := false
	var servers, learnt []netip.Addr
	for id, e := range r.b.eps {
		n := r.m.nets[id]
		outside = outside || n != nil && e.HasNS && !n.rec.Internal
		if len(servers) == 0 {
			servers = e.DNS
		}
		if n != nil && n.leased() && len(learnt) == 0 {
			learnt = resolversOf(e)
		}
	}
	r.m.mu.RUnlock()
	if !outside {
		return nil
	}
	if len(servers) == 0 {
		servers = learnt
	}
	var out []dns.Upstream
	for _, a := range servers {
		out = append(out, dns.Upstream{Addr: netip.AddrPortFrom(a, 53)})
	}
	if len(out) == 0 {
		for _, a := range r.host.get() {
			// A loopback server of the host is not there in the container's
			// network, and a link-local one is of one of the host's links.
			out = append(out, dns.Upstream{Addr: netip.AddrPortFrom(a, 53), Host: a.IsLoopback() || a.IsLinkLocalUnicast()})
		}
	}
	return out
}

func (r *resolver) dial(ctx context.Context, netw string, u dns.Upstream) (c net.Conn, err error) {
	d := net.Dialer{}
	if u.Host {
		return d.DialContext(ctx, netw, u.Addr.String())
	}
	// The socket must be made on a thread inside; connecting udp is immediate
	// and tcp goes on without the thread.
	if netw == "udp" {
		err = bridge.Inside(r.ns, func() error {
			c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(u.Addr))
			return err
		})
		return c, err
	}
	fd, err := bridge.Socket(r.ns, u.Addr)
	if err != nil {
		return nil, err
	}
	return connect(ctx, fd, u.Addr)
}

// connect finishes a non-blocking tcp connection on a socket.
func connect(ctx context.Context, f *os.File, to netip.AddrPort) (net.Conn, error) {
	defer f.Close()
	if err := bridge.StartConnect(f, to); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	// The connection is under way: writing waits for it, or fails with it.
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	return c, nil
}

// hostServers are the name servers of the host's resolv.conf, read again when
// the file changes.
type hostServers struct {
	mu    sync.Mutex
	stamp time.Time
	size  int64
	list  []netip.Addr
}

func (h *hostServers) get() []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	st, err := os.Stat(hostResolvConf)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})} // what the resolver does without one
		}
		return h.list
	}
	if st.ModTime().Equal(h.stamp) && st.Size() == h.size {
		return h.list
	}
	b, err := os.ReadFile(hostResolvConf)
	if err != nil {
		return h.list
	}
	h.stamp, h.size, h.list = st.ModTime(), st.Size(), parseResolvConf(b).servers
	return h.list
}
