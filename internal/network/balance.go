package network

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/nft"
	"github.com/moby/moby/api/types/network"
)

// Service addresses. An alias that several containers bear can have an address
// of its own (VIP), which names lead to; in the network namespace of each
// container on the network, connections to it are spread in the kernel over the
// containers that run and are healthy. Asked for by the network (every alias) or
// by an endpoint (the aliases named).
const (
	optVIP         = "com.servin.network.vip"  // of a network: true, false, sticky
	optEndpointVIP = "com.servin.endpoint.vip" // of an endpoint: alias[,alias]
)

// maxServices bounds the services of a network.
const maxServices = 256

// serviceRecord is a service's addresses: they stay as long as the network, for
// clients keep in mind what a name led to.
type serviceRecord struct {
	IPv4 netip.Addr `json:",omitzero"`
	IPv6 netip.Addr `json:",omitzero"`
}

// services are the aliases of an endpoint that are to have a service address.
func (n *netw) services(e *endpoint) (out []string) {
	add := func(s string) {
		if s = strings.ToLower(strings.TrimSpace(s)); s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	for s := range strings.SplitSeq(e.DriverOpts[optEndpointVIP], ",") {
		add(s)
	}
	if n.opts.vip {
		for _, s := range e.Aliases {
			// What names this container alone is no service.
			if s != e.ContainerName && s != e.Hostname && !strings.HasPrefix(e.ContainerID, s) {
				add(s)
			}
		}
	}
	return out
}

// serve gives the services of an endpoint that begins to run their addresses.
func (m *Manager) serve(n *netw, e *endpoint) error {
	if !e.HasNS || !n.named() {
		if e.DriverOpts[optEndpointVIP] != "" && !n.named() {
			return fault.New(fault.Invalid, "cannot give a service address on network %s: only user-defined bridge, macvlan and ipvlan networks have names", n.rec.Name)
		}
		return nil
	}
	want := n.services(e)
	if len(want) == 0 {
		return nil
	}
	m.serviceMu.Lock()
	defer m.serviceMu.Unlock()
	m.mu.RLock()
	recs := maps.Clone(n.rec.Services)
	m.mu.RUnlock()
	var fresh []netip.Addr
	undo := func(err error) error {
		n.free(fresh...)
		return err
	}
	for _, s := range want {
		if _, ok := recs[s]; ok {
			continue
		}
		if len(recs) >= maxServices {
			return undo(fault.New(fault.Exhausted, "cannot give %s a service address: network %s has %d services already", s, n.rec.Name, maxServices))
		}
		var r serviceRecord
		var err error
		if len(n.pool4) > 0 {
			if r.IPv4, err = m.pickAddr(n, n.pool4, netip.Addr{}, netip.Addr{}); err != nil {
				return undo(err)
			}
			fresh = append(fresh, r.IPv4)
		}
		if len(n.pool6) > 0 {
			if r.IPv6, err = m.pickAddr(n, n.pool6, netip.Addr{}, netip.Addr{}); err != nil {
				return undo(err)
			}
			fresh = append(fresh, r.IPv6)
		}
		if len(fresh) == 0 {
			return fault.New(fault.Unsupported, "cannot give %s a service address: network %s gives out none", s, n.rec.Name)
		}
		if recs == nil {
			recs = map[string]serviceRecord{}
		}
		recs[s] = r
	}
	if len(fresh) == 0 {
		return nil
	}
	// Durable before anybody is told of it.
	c := *n.rec
	c.Services = recs
	if err := m.disk.saveNetwork(&c); err != nil {
		return undo(err)
	}
	m.mu.Lock()
	n.rec.Services = recs
	m.mu.Unlock()
	return nil
}

// vip answers a name with its service address; the caller holds mu.
func (n *netw) vip(name string, six bool) ([]netip.Addr, bool) {
	r, ok := n.rec.Services[name]
	if !ok || !slices.ContainsFunc(n.dns[name], func(e *endpoint) bool { return e.HasNS && slices.Contains(n.services(e), name) }) {
		return nil, false
	}
	a := r.IPv4
	if six {
		a = r.IPv6
	}
	if !a.IsValid() {
		return nil, true
	}
	return []netip.Addr{a}, true
}

// view is what a container is to see: the services of all its networks; the
// caller holds mu.
func (m *Manager) view(b *box) (out []nft.Service) {
	for id, own := range b.eps {
		n := m.nets[id]
		if n == nil || !own.HasNS || len(n.rec.Services) == 0 {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(n.rec.Services)) {
			r := n.rec.Services[name]
			var well, ill []*endpoint
			for _, e := range n.dns[name] {
				if !e.HasNS || !slices.Contains(n.services(e), name) {
					continue
				}
				if o := m.containers[e.ContainerID]; o != nil && o.unhealthy {
					ill = append(ill, e)
				} else {
					well = append(well, e)
				}
			}
			if len(well) == 0 {
				well = ill // an ill one may answer; nobody surely does not
			}
			slices.SortFunc(well, func(a, b *endpoint) int { return strings.Compare(a.ContainerID, b.ContainerID) })
			for _, vip := range []netip.Addr{r.IPv4, r.IPv6} {
				if !vip.IsValid() {
					continue
				}
				s := nft.Service{VIP: vip, Sticky: n.opts.sticky}
				for _, e := range well {
					a := e.IPv4
					if vip.Is6() {
						a = e.IPv6
					}
					if a.IsValid() {
						s.Backends = append(s.Backends, a)
					}
				}
				out = append(out, s)
			}
		}
	}
	return out
}

// spread brings the services that a container sees up to date. The caller holds
// b.busy.
func (m *Manager) spread(b *box) error {
	m.mu.RLock()
	want := m.view(b)
	ns := b.netns
	m.mu.RUnlock()
	b.serviceMu.Lock()
	defer b.serviceMu.Unlock()
	if ns == nil || slices.EqualFunc(want, b.seen, sameService) && b.spreadSet {
		return nil
	}
	if len(want) == 0 && b.services == nil {
		return nil
	}
	if b.services == nil {
		s, err := nft.OpenServices(ns, m.six)
		if err != nil {
			return err
		}
		b.services = s
	}
	if err := b.services.Set(want); err != nil {
		return err
	}
	gone := lostBackends(b.seen, want)
	b.seen, b.spreadSet = want, true
	if len(gone) > 0 {
		forgetInside(b, gone)
	}
	return nil
}

func sameService(a, b nft.Service) bool {
	return a.VIP == b.VIP && a.Sticky == b.Sticky && slices.Equal(a.Backends, b.Backends)
}

// lostBackends are addresses that served and no longer do.
func lostBackends(old, now []nft.Service) map[netip.Addr]bool {
	gone := map[netip.Addr]bool{}
	for _, s := range old {
		for _, a := range s.Backends {
			gone[a] = true
		}
	}
	for _, s := range now {
		for _, a := range s.Backends {
			delete(gone, a)
		}
	}
	return gone
}

// forgetInside drops a client's datagram flows to backends that are gone: they
// would go on for as long as the client sends.
func forgetInside(b *box, gone map[netip.Addr]bool) {
	h, err := netlink.NewHandleAt(netns.NsHandle(b.netns.Fd()), unix.NETLINK_NETFILTER)
	if err != nil {
		return
	}
	defer h.Close()
	for _, fam := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		_, _ = h.ConntrackDeleteFilters(netlink.ConntrackTable, fam, flowFilter(func(f *netlink.ConntrackFlow) bool {
			a, _ := netip.AddrFromSlice(f.Reverse.SrcIP)
			return f.Forward.Protocol == unix.IPPROTO_UDP && gone[a.Unmap()]
		}))
	}
}

// touch says that who serves on a network has changed; the caller holds mu.
func (m *Manager) touch(n *netw) {
	if len(n.rec.Services) == 0 {
		return
	}
	if m.touched == nil {
		m.touched = map[string]bool{}
	}
	m.touched[n.rec.ID] = true
	select {
	case m.balance <- struct{}{}:
	default:
	}
}

// gather is how long changes are gathered before containers are told.
const gather = 20 * time.Millisecond

// rebalance tells the containers of a network who serves, until ctx ends.
func (m *Manager) rebalance(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.balance:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(gather):
		}
		m.mu.Lock()
		nets := m.touched
		m.touched = nil
		var who []*box
		for _, b := range m.containers {
			for id, e := range b.eps {
				if nets[id] && e.HasNS && b.netns != nil {
					who = append(who, b)
					break
				}
			}
		}
		m.mu.Unlock()
		for _, b := range who {
			b.busy.Lock()
			err := m.spread(b)
			b.busy.Unlock()
			if err != nil && !errors.Is(err, unix.ENOENT) {
				m.log.Warn("a container does not see who serves at present", "container", b.id, "cause", err)
			}
		}
	}
}

// Balance tells of the services of a network, for inspect.
func (n *netw) balance() map[string]network.ServiceInfo {
	if len(n.rec.Services) == 0 {
		return nil
	}
	out := map[string]network.ServiceInfo{}
	for name, r := range n.rec.Services {
		s := network.ServiceInfo{VIP: r.IPv4, Ports: []string{}, Tasks: []network.Task{}}
		if !s.VIP.IsValid() {
			s.VIP = r.IPv6
		}
		for _, e := range n.dns[name] {
			if e.HasNS && slices.Contains(n.services(e), name) {
				a := e.IPv4
				if !a.IsValid() {
					a = e.IPv6
				}
				s.Tasks = append(s.Tasks, network.Task{Name: e.ContainerName, EndpointID: e.ID, EndpointIP: a, Info: map[string]string{}})
			}
		}
		out[name] = s
	}
	return out
}
