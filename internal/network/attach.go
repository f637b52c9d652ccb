package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// plainName tells whether s is made of letters, digits and _.-, the first no sign.
// Regular expressions that count take a hundred kilobytes each, for good.
func plainName(s string, most int) bool {
	for i, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return s != "" && len(s) <= most
}

// Attach connects a container to a network. On failure nothing is left.
func (m *Manager) Attach(ctx context.Context, req AttachRequest) (Attachment, error) {
	m.up()
	if !plainName(req.ContainerID, 128) {
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
	wired := n.rec.wired()
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

	if err := m.serve(n, e); err != nil {
		return fail(err)
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

	var warnings []string
	if n.rec.Driver == driverCNI && req.NetNS != nil {
		if warnings, err = m.plug(ctx, n, e, req, set); err != nil {
			return fail(err)
		}
		undo = append(undo, func() { m.unplug(context.WithoutCancel(ctx), e); m.undelegate(e) })
	} else if n.rec.Plugin {
		if req.NetNS != nil {
			undo = append(undo, func() { m.depart(n, e) })
			if err := m.join(ctx, n, b, e, req.NetNS, req.Ports); err != nil {
				return fail(fmt.Errorf("cannot connect container to network %s: %w", n.rec.Name, err))
			}
		}
	} else if err := m.publish(n, e, req.Ports, req.PublishThrough); err != nil {
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
		if n.rec.lan() {
			undo = append(undo, func() { _ = bridge.DeleteInside(req.NetNS, e.IfName) })
		}
		if n.leased() {
			if err := m.lease(ctx, n, b, e, req.NetNS); err != nil {
				return fail(fmt.Errorf("cannot connect container to network %s: %w", n.rec.Name, err))
			}
			undo = append(undo, func() { m.unlease(b, e) })
		}
	}
	if req.NetNS != nil {
		if err := m.regate(b); err != nil {
			return fail(err)
		}
		if err := m.serveNames(b); err != nil {
			return fail(err)
		}
		if err := m.spread(b); err != nil {
			return fail(err)
		}
	}
	if err := m.save(b); err != nil {
		return fail(err)
	}
	a := m.attachment(n, b, e)
	a.Warnings = warnings
	if n.rec.Plugin {
		a.Ports = req.Ports
	}
	return a, nil
}

// current tells whether an endpoint is in the books.
func (m *Manager) current(n *netw, e *endpoint) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return n.eps[e.ContainerID] == e
}

// parkedName is the name of the inner end of a prepared link.
const parkedName = "eth0"

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
	if n.rec.Driver == driverCNI {
		return nil // its plugins decide
	}
	c := set.IPAMConfig
	fixed := c != nil && (c.IPv4Address.IsValid() || c.IPv6Address.IsValid())
	if fixed && n.rec.Name == network.NetworkBridge {
		return fault.New(fault.Invalid, "user specified IP address is supported on user defined networks only")
	}
	if len(set.Aliases) > 0 && n.rec.Name == network.NetworkBridge {
		return fault.New(fault.Invalid, "network-scoped aliases are only supported for user-defined networks")
	}
	if err := checkOwn(set.DriverOpts, optBandwidth, optBandwidthIn, optBandwidthEg, optEndpointVIP); err != nil {
		return err
	}
	if _, err := parseBandwidth(shaping{}, set.DriverOpts); err != nil {
		return err
	}
	if fixed && !n.rec.wired() {
		return fault.New(fault.Invalid, "cannot use a fixed address on network %s: it gives out none", n.rec.Name)
	}
	if !fixed {
		return nil
	}
	for _, a := range []netip.Addr{c.IPv4Address, c.IPv6Address} {
		if !a.IsValid() || n.leased() && a.Is4() {
			continue
		}
		if bitsOf(n.pools(a.Unmap().Is4()), a.Unmap()) == 0 {
			return fault.New(fault.Invalid, "invalid endpoint settings: no configured subnet or ip-range contain the IP address %s", a)
		}
	}
	return nil
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
	if e.IfName == "" && req.NetNS != nil && (n.rec.wired() || n.rec.Driver == driverCNI) {
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
	case "macvlan", "ipvlan":
		if err := m.wireLAN(n, e, ns); err != nil {
			return err
		}
		if err := m.shape(n, e, ns); err != nil {
			return errors.Join(err, bridge.DeleteInside(ns, e.IfName))
		}
		return nil
	case "null":
		return bridge.LoopbackUp(ns)
	default:
		if n.rec.Plugin && e.SrcName != "" {
			return m.shape(n, e, ns)
		}
		return nil
	}
	if prepared {
		if len(m.endpointsOf(b)) == 1 {
			m.setGates(b, n, e)
		}
		if err := m.links.Plug(e.Index, n.index, m.portOf(n, e)); err != nil {
			return err
		}
		m.settle(n)
		return m.shape(n, e, ns)
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
	m.settle(n)
	return m.shape(n, e, ns)
}

// settle makes a bridge ready to send when it has just got its first port:
// until then it had no carrier.
func (m *Manager) settle(n *netw) {
	m.mu.RLock()
	first := len(n.eps) == 1
	m.mu.RUnlock()
	if first {
		m.links.Settle(n.rec.Link)
	}
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
	if e.Gateway4.IsValid() && !n.rec.Internal {
		a.Settings.Gateway = e.Gateway4
	}
	if e.Gateway6.IsValid() {
		a.Settings.IPv6Gateway = e.Gateway6
	}
	a.DNS = e.Resolvers
	if n.named() {
		a.DNS = []string{resolverAddr.String()}
	}
	return a
}
