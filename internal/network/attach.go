package network

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/ipam"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

var containerID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// Attach connects a container to a network. On failure nothing is left.
func (m *Manager) Attach(ctx context.Context, req AttachRequest) (Attachment, error) {
	if !containerID.MatchString(req.ContainerID) {
		return Attachment{}, fault.New(fault.Invalid, "cannot attach %q: that is no container id", req.ContainerID)
	}
	if err := ctx.Err(); err != nil {
		return Attachment{}, err
	}
	n, err := m.find(req.Network)
	if err != nil {
		return Attachment{}, err
	}
	if n.rec.ConfigOnly {
		return Attachment{}, fault.New(fault.Forbidden, "cannot connect container to network %s: it only holds configuration for others", n.rec.Name)
	}
	wired := n.rec.Driver == "bridge" || n.rec.Driver == "macvlan"
	if wired && m.broken != nil {
		return Attachment{}, m.broken
	}
	set := req.Settings
	if set == nil {
		set = &network.EndpointSettings{}
	}
	if err := checkSettings(n, set, req); err != nil {
		return Attachment{}, err
	}
	e := &endpoint{
		ID: newID(), NetworkID: n.rec.ID, ContainerID: req.ContainerID, ContainerName: req.ContainerName, Hostname: req.Hostname,
		IPAM: set.IPAMConfig.Copy(), Aliases: slices.Clone(set.Aliases), Links: slices.Clone(set.Links), DNS: slices.Clone(req.DNS),
		DriverOpts: maps.Clone(set.DriverOpts), GwPriority: set.GwPriority, HasNS: req.NetNS != nil, Ephemeral: req.Ephemeral,
	}
	var use *parked
	if req.Link != nil {
		use = m.unpark(req.Link.Outer)
		if use == nil {
			return Attachment{}, fault.New(fault.NotFound, "cannot attach by link %s: it was not prepared or is used up", req.Link.Outer)
		}
	}
	usable := use != nil && use.net == n && req.NetNS != nil && len(set.MacAddress) == 0 &&
		(req.IfName == "" || req.IfName == parkedName) && set.DriverOpts[optIfName] == ""
	undo := []func(){}
	fail := func(err error) (Attachment, error) {
		for _, f := range slices.Backward(undo) {
			f()
		}
		return Attachment{}, err
	}
	switch {
	case use == nil:
	case usable:
		if old := m.claim(n, e); old != nil {
			n.free(old.IPv4, old.IPv6)
			undo = append(undo, func() { m.unclaim(n, old) })
		}
		e.IPv4, e.IPv6, e.MAC, e.Outer, e.Index, e.IfName = use.ip4, use.ip6, use.mac, req.Link.Outer, use.index, parkedName
		undo = append(undo, func() { m.bury(n, e) })
	default:
		use.net.free(use.ip4, use.ip6)
		if n.rec.Driver != "bridge" || req.NetNS == nil {
			// The pair must make room: its inner end may have the name wanted.
			if err := m.links.Delete(use.index); err != nil {
				m.log.Warn("an unused link stays", "link", req.Link.Outer, "cause", err)
			}
			use = nil
			break
		}
		e.Outer, e.Index = req.Link.Outer, use.index
		undo = append(undo, func() { m.bury(n, e) })
	}
	if wired && !usable {
		if old := m.claim(n, e); old != nil {
			// What was reserved for the container is now used by it.
			set = set.Copy()
			undo = append(undo, func() { m.unclaim(n, old) })
			m.inheritReservation(n, e, old, set)
		}
		if err := m.allocate(n, e, set); err != nil {
			return fail(err)
		}
		if use == nil {
			undo = append(undo, func() { m.bury(n, e) })
		}
	}
	if len(n.pool4) > 0 {
		e.Bits4 = bitsOf(n.pool4, e.IPv4)
	}
	if len(n.pool6) > 0 {
		e.Bits6 = bitsOf(n.pool6, e.IPv6)
	}

	b, err := m.enter(n, e, req)
	if err != nil {
		return fail(err)
	}
	undo = append(undo, func() { m.leave(n, b, e) })
	b.busy.Lock()
	defer b.busy.Unlock()
	if !m.current(n, e) {
		return fail(fault.New(fault.Conflict, "cannot connect container to network %s: it was released meanwhile", n.rec.Name))
	}

	if err := m.publish(n, e, req.Ports, req.PublishThrough); err != nil {
		return fail(err)
	}
	if len(e.Ports) > 0 {
		undo = append(undo, func() { _ = m.unpublish(e) })
		m.forgetFlows(e)
	}
	if req.NetNS != nil {
		if err := m.wire(n, b, e, req.NetNS, use, usable); err != nil {
			return fail(fmt.Errorf("cannot connect container to network %s: %w", n.rec.Name, err))
		}
	}
	if req.NetNS != nil {
		if err := m.regate(b); err != nil {
			return fail(err)
		}
		if err := m.serveNames(b); err != nil {
			return fail(err)
		}
	}
	if err := m.save(b); err != nil {
		return fail(err)
	}
	return m.attachment(n, b, e), nil
}

// current tells whether an endpoint is in the books.
func (m *Manager) current(n *netw, e *endpoint) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return n.eps[e.ContainerID] == e
}

// parkedName is the name of the inner end of a prepared link.
const parkedName = "eth0"

func bitsOf(pools []*ipam.Pool, a netip.Addr) int {
	for _, p := range pools {
		if p.Subnet().Contains(a) {
			return p.Subnet().Bits()
		}
	}
	return 0
}

func checkSettings(n *netw, set *network.EndpointSettings, req AttachRequest) error {
	if len(set.MacAddress) != 0 && (len(set.MacAddress) != 6 || set.MacAddress[0]&1 == 1) {
		return fault.New(fault.Invalid, "cannot use MAC address %s: it must have 6 bytes and not be multicast", set.MacAddress)
	}
	for _, name := range []string{req.IfName, set.DriverOpts[optIfName]} {
		if name != "" && (!validIfName(name) || name == "lo") {
			return fault.New(fault.Invalid, "cannot use %q as the name of a link", name)
		}
	}
	for _, l := range set.Links {
		if name, alias, ok := strings.Cut(l, ":"); name == "" || ok && alias == "" {
			return fault.New(fault.Invalid, "cannot use link %q: NAME or NAME:ALIAS is wanted", l)
		}
	}
	c := set.IPAMConfig
	fixed := c != nil && (c.IPv4Address.IsValid() || c.IPv6Address.IsValid())
	if fixed && n.rec.Name == network.NetworkBridge {
		return fault.New(fault.Invalid, "user specified IP address is supported on user defined networks only")
	}
	if len(set.Aliases) > 0 && n.rec.Name == network.NetworkBridge {
		return fault.New(fault.Invalid, "network-scoped aliases are only supported for user-defined networks")
	}
	if fixed && n.rec.Driver != "bridge" && n.rec.Driver != "macvlan" {
		return fault.New(fault.Invalid, "cannot use a fixed address on network %s: it gives out none", n.rec.Name)
	}
	if !fixed {
		return nil
	}
	for _, a := range []netip.Addr{c.IPv4Address, c.IPv6Address} {
		if !a.IsValid() {
			continue
		}
		if bitsOf(n.pools(a.Unmap().Is4()), a.Unmap()) == 0 {
			return fault.New(fault.Invalid, "invalid endpoint settings: no configured subnet or ip-range contain the IP address %s", a)
		}
	}
	return nil
}

// allocate gives an endpoint its addresses and MAC.
func (m *Manager) allocate(n *netw, e *endpoint, set *network.EndpointSettings) error {
	var want4, want6 netip.Addr
	if set.IPAMConfig != nil {
		want4, want6 = set.IPAMConfig.IPv4Address.Unmap(), set.IPAMConfig.IPv6Address
	}
	var err error
	if len(n.pool4) > 0 {
		if e.IPv4, err = m.pickAddr(n, n.pool4, want4, netip.Addr{}); err != nil {
			return err
		}
	}
	if len(n.pool6) > 0 {
		var mirror netip.Addr
		if e.IPv4.IsValid() && !want6.IsValid() {
			mirror, _ = ipam.Mirror(n.pool6[0].Range(), n.pool4[0].Subnet(), e.IPv4)
		}
		if e.IPv6, err = m.pickAddr(n, n.pool6, want6, mirror); err != nil {
			n.free(e.IPv4)
			e.IPv4 = netip.Addr{}
			return err
		}
	}
	if e.MAC = net.HardwareAddr(slices.Clone(set.MacAddress)); len(e.MAC) == 0 {
		e.MAC = macOf(e.IPv4, e.IPv6)
	}
	return nil
}

// claim takes the reservation that e's container has on the network out of
// the books, if it has one and is now running.
func (m *Manager) claim(n *netw, e *endpoint) *endpoint {
	if !e.HasNS {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.containers[e.ContainerID]
	if b == nil {
		return nil
	}
	old := b.eps[n.rec.ID]
	if old == nil || old.HasNS {
		return nil
	}
	m.unregister(n, b, old)
	return old
}

// inheritReservation frees the reserved addresses and asks for the same ones,
// unless others were asked for.
func (m *Manager) inheritReservation(n *netw, e, old *endpoint, set *network.EndpointSettings) {
	n.free(old.IPv4, old.IPv6)
	if set.IPAMConfig == nil {
		set.IPAMConfig = &network.EndpointIPAMConfig{}
	}
	if !set.IPAMConfig.IPv4Address.IsValid() {
		set.IPAMConfig.IPv4Address = old.IPv4
	}
	if !set.IPAMConfig.IPv6Address.IsValid() {
		set.IPAMConfig.IPv6Address = old.IPv6
	}
	if len(set.MacAddress) == 0 {
		set.MacAddress = network.HardwareAddr(old.MAC)
	}
	if len(e.Aliases) == 0 {
		e.Aliases = old.Aliases
	}
}

// unclaim puts a reservation back after a failed attach.
func (m *Manager) unclaim(n *netw, old *endpoint) {
	_ = n.take(old.IPv4)
	if old.IPv6.IsValid() {
		_ = n.take(old.IPv6)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.containers[old.ContainerID]
	if b == nil {
		b = &box{id: old.ContainerID, name: old.ContainerName, eps: map[string]*endpoint{}}
		m.containers[old.ContainerID] = b
	}
	m.register(n, b, old)
}

func (m *Manager) pickAddr(n *netw, pools []*ipam.Pool, want, rather netip.Addr) (netip.Addr, error) {
	if want.IsValid() {
		err := n.take(want)
		if errors.Is(err, ipam.ErrInUse) && m.exhume(n) {
			err = n.take(want)
		}
		switch {
		case errors.Is(err, ipam.ErrInUse):
			return want, fault.New(fault.Conflict, "Address already in use: %s on network %s", want, n.rec.Name)
		case err != nil:
			return want, fault.New(fault.Invalid, "cannot use address %s on network %s: %w", want, n.rec.Name, err)
		}
		return want, nil
	}
	if rather.IsValid() && n.take(rather) == nil {
		return rather, nil
	}
	for again := true; ; again = false {
		for _, p := range pools {
			if a, err := p.Next(); err == nil {
				return a, nil
			}
		}
		if !again || !m.exhume(n) {
			return netip.Addr{}, fault.New(fault.Exhausted, "cannot give an address on network %s: %w", n.rec.Name, ipam.ErrExhausted)
		}
	}
}

// macOf derives a MAC from the address, so that whoever gets an address again
// is known under the same MAC, and no neighbour's entry goes stale.
func macOf(a4, a6 netip.Addr) net.HardwareAddr {
	h := net.HardwareAddr{0x02, 0x42, 0, 0, 0, 0}
	switch {
	case a4.IsValid():
		b := a4.As4()
		copy(h[2:], b[:])
	case a6.IsValid():
		b := a6.As16()
		copy(h[2:], b[12:])
	default:
		rand.Read(h[2:])
	}
	return h
}

// enter puts an endpoint into the books.
func (m *Manager) enter(n *netw, e *endpoint, req AttachRequest) (*box, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, fault.New(fault.Unavailable, "cannot attach: the engine is shutting down")
	}
	if m.nets[n.rec.ID] != n {
		return nil, fault.New(fault.NotFound, "network %s not found", n.rec.Name)
	}
	b := m.containers[req.ContainerID]
	if b == nil {
		b = &box{id: req.ContainerID, name: req.ContainerName, eps: map[string]*endpoint{}}
	}
	if old := b.eps[n.rec.ID]; old != nil {
		if old.HasNS || req.NetNS == nil {
			return nil, fault.New(fault.Forbidden, "endpoint with name %s already exists in network %s", req.ContainerName, n.rec.Name)
		}
		return nil, fault.New(fault.Conflict, "container %s is being attached to network %s already", req.ContainerName, n.rec.Name)
	}
	if e.IfName == "" && req.NetNS != nil && (n.rec.Driver == "bridge" || n.rec.Driver == "macvlan") {
		switch {
		case req.IfName != "":
			e.IfName = req.IfName
		case e.DriverOpts[optIfName] != "":
			e.IfName = e.DriverOpts[optIfName]
		default:
			e.IfName = b.freeName(n.opts.prefix)
		}
	}
	for _, o := range b.eps {
		if e.IfName != "" && o.IfName == e.IfName {
			return nil, fault.New(fault.Conflict, "cannot name a link %s: the container has one of that name", e.IfName)
		}
	}
	if req.NetNS != nil && b.netns == nil {
		fd, err := unix.FcntlInt(req.NetNS.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, fmt.Errorf("cannot keep the network namespace open: %w", err)
		}
		b.netns = os.NewFile(uintptr(fd), "netns")
	}
	m.containers[req.ContainerID] = b
	m.register(n, b, e)
	return b, nil
}

func (b *box) freeName(prefix string) string {
	for i := 0; ; i++ {
		name := prefix + strconv.Itoa(i)
		taken := false
		for _, o := range b.eps {
			taken = taken || o.IfName == name
		}
		if !taken {
			return name
		}
	}
}

// leave takes an endpoint out of the books.
func (m *Manager) leave(n *netw, b *box, e *endpoint) {
	m.mu.Lock()
	m.unregister(n, b, e)
	last := len(b.eps) == 0
	if last && m.containers[b.id] == b {
		delete(m.containers, b.id)
	}
	m.mu.Unlock()
	if last {
		b.close()
	}
}

// wire makes the container's link.
func (m *Manager) wire(n *netw, b *box, e *endpoint, ns *os.File, use *parked, prepared bool) error {
	switch n.rec.Driver {
	case "bridge":
	case "macvlan":
		return m.wireMacvlan(n, e, ns)
	case "null":
		return bridge.LoopbackUp(ns)
	default:
		return nil
	}
	if prepared {
		if len(m.endpointsOf(b)) == 1 {
			m.setGates(b, n, e)
		}
		return m.links.Plug(e.Index, n.index, m.portOf(n, e))
	}
	in := bridge.Interface{Name: e.IfName, MAC: e.MAC, MTU: n.rec.MTU, Addrs: e.prefixes()}
	if len(m.endpointsOf(b)) == 1 {
		in.Gateways = n.gateways()
	}
	if use != nil {
		if err := m.links.Reconfigure(ns, use.index, use.inner(), in); err != nil {
			return err
		}
	} else {
		outer := m.newVeth()
		i, err := m.links.Pair(ns, outer, in)
		if err != nil {
			return err
		}
		m.mu.Lock()
		e.Outer, e.Index = outer, i
		m.mu.Unlock()
	}
	if len(in.Gateways) > 0 {
		m.setGates(b, n, e)
	}
	if err := m.links.Plug(e.Index, n.index, m.portOf(n, e)); err != nil {
		return err
	}
	m.links.Settle(e.Outer)
	return nil
}

// portOf is how the endpoint's link is on its bridge. Where frames on bridges
// pass through the IP rules (br_netfilter), a container that calls its own
// published port has its frames sent back to it by the bridge itself.
func (m *Manager) portOf(n *netw, e *endpoint) bridge.Port {
	p := bridge.Port{Isolated: n.opts.noICC, Addrs: addrsOf(e), MAC: e.MAC}
	if len(e.Ports) > 0 {
		for _, f := range []string{"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"} {
			v, err := bridge.Sysctl(f)
			p.Hairpin = p.Hairpin || err == nil && v == "1"
		}
	}
	return p
}

func (m *Manager) endpointsOf(b *box) []*endpoint {
	m.mu.RLock()
	defer m.mu.RUnlock()
	out := make([]*endpoint, 0, len(b.eps))
	for _, e := range b.eps {
		out = append(out, e)
	}
	return out
}

// prefixes are the endpoint's addresses with the lengths of their subnets.
func (e *endpoint) prefixes() (out []netip.Prefix) {
	if e.IPv4.IsValid() {
		out = append(out, netip.PrefixFrom(e.IPv4, e.Bits4))
	}
	if e.IPv6.IsValid() {
		out = append(out, netip.PrefixFrom(e.IPv6, e.Bits6))
	}
	if e.IPAM != nil {
		for _, a := range e.IPAM.LinkLocalIPs {
			bits := 16
			if a.Is6() {
				bits = 64
			}
			if a.IsLinkLocalUnicast() {
				out = append(out, netip.PrefixFrom(a, bits))
			}
		}
	}
	return out
}

// gateways are the next hops that the network offers; an internal one offers
// none.
func (n *netw) gateways() (out []netip.Addr) {
	if n.rec.Internal {
		return nil
	}
	if n.gw4.IsValid() && !n.opts.noAddress4 {
		out = append(out, n.gw4)
	}
	if n.gw6.IsValid() && !n.opts.noAddress6 {
		out = append(out, n.gw6)
	}
	return out
}

func (m *Manager) setGates(b *box, n *netw, e *endpoint) {
	for _, g := range n.gateways() {
		if g.Is4() && e.IPv4.IsValid() {
			b.gw4 = n.rec.ID
		} else if g.Is6() && e.IPv6.IsValid() {
			b.gw6 = n.rec.ID
		}
	}
}

// regate lets the default routes lead where the priorities of a container's
// endpoints say. The caller holds b.busy.
func (m *Manager) regate(b *box) error {
	type cand struct {
		n *netw
		e *endpoint
	}
	var cs []cand
	m.mu.RLock()
	for id, e := range b.eps {
		if n := m.nets[id]; n != nil && e.HasNS && e.IfName != "" {
			cs = append(cs, cand{n, e})
		}
	}
	m.mu.RUnlock()
	slices.SortFunc(cs, func(a, b cand) int {
		if a.e.GwPriority != b.e.GwPriority {
			return b.e.GwPriority - a.e.GwPriority
		}
		return strings.Compare(a.n.rec.Name, b.n.rec.Name)
	})
	for _, six := range []bool{false, true} {
		have, family := &b.gw4, 4
		if six {
			have, family = &b.gw6, 6
		}
		var win *cand
		var gw netip.Addr
		for i, c := range cs {
			for _, g := range c.n.gateways() {
				if g.Is6() == six && (six && c.e.IPv6.IsValid() || !six && c.e.IPv4.IsValid()) {
					win, gw = &cs[i], g
					break
				}
			}
			if win != nil {
				break
			}
		}
		switch {
		case win == nil && *have != "":
			*have = ""
			if err := m.links.DropGateway(b.netns, family); err != nil {
				return err
			}
		case win != nil && *have != win.n.rec.ID:
			if *have != "" && six {
				// IPv6 keeps a second default route beside the first.
				if err := m.links.DropGateway(b.netns, family); err != nil {
					return err
				}
			}
			if err := m.links.SetGateways(b.netns, win.e.IfName, win.e.prefixes(), []netip.Addr{gw}); err != nil {
				return err
			}
			*have = win.n.rec.ID
		}
	}
	return nil
}

func (m *Manager) save(b *box) error { return m.disk.saveContainer(b.id, m.endpointsOf(b)) }

// attachment describes an endpoint to the engine.
func (m *Manager) attachment(n *netw, b *box, e *endpoint) Attachment {
	a := Attachment{
		Settings: network.EndpointSettings{
			IPAMConfig: e.IPAM.Copy(), Links: e.Links, Aliases: e.Aliases, DriverOpts: e.DriverOpts, GwPriority: e.GwPriority,
			NetworkID: n.rec.ID, EndpointID: e.ID, IPAddress: e.IPv4, IPPrefixLen: e.Bits4,
			GlobalIPv6Address: e.IPv6, GlobalIPv6PrefixLen: e.Bits6, MacAddress: network.HardwareAddr(e.MAC), DNSNames: e.names(n),
		},
		Ports: portMap(e.Ports),
	}
	if !n.rec.Internal {
		if e.IPv4.IsValid() && !n.opts.noAddress4 {
			a.Settings.Gateway = n.gw4
		}
		if e.IPv6.IsValid() && !n.opts.noAddress6 {
			a.Settings.IPv6Gateway = n.gw6
		}
	}
	if n.named() {
		a.DNS = []string{resolverAddr.String()}
	}
	return a
}
