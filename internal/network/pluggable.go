package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/plugin"
	"github.com/moby/moby/api/types/network"
)

// Network drivers that are plugins, by the protocol of libnetwork's remote driver
// (NetworkDriver.*): the plugin makes a link in the host's namespace and says how
// it is to be in the container's; putting it there is ours.

const (
	kindNetwork = "NetworkDriver"
	// driverPatience bounds one question to a plugin.
	driverPatience = 30 * time.Second
)

// Drivers lists the plugins that are network drivers.
func (m *Manager) Drivers(ctx context.Context) []string {
	if m.cfg.Plugins == nil {
		return nil
	}
	return m.cfg.Plugins.Names(ctx, kindNetwork)
}

func (m *Manager) ask(ctx context.Context, kind, name, method string, in, out any) error {
	if m.cfg.Plugins == nil {
		return fault.New(fault.NotFound, "plugin %q not found", name)
	}
	ctx, cancel := context.WithTimeout(ctx, driverPatience)
	defer cancel()
	p, err := m.cfg.Plugins.Find(ctx, kind, name)
	if err != nil {
		return err
	}
	return p.Call(ctx, kind+"."+method, in, out)
}

// poolData is what a driver is told of a subnet.
type poolData struct {
	AddressSpace string
	Pool         string
	Gateway      string `json:",omitempty"`
	AuxAddresses map[string]string
}

// plugIn tells the driver of a new network.
func (m *Manager) plugIn(ctx context.Context, n *netw) error {
	r := n.rec
	type request struct {
		NetworkID          string
		Options            map[string]any
		IPv4Data, IPv6Data []poolData
	}
	q := request{NetworkID: r.ID, Options: map[string]any{"com.docker.network.generic": r.Options, "com.docker.network.enable_ipv6": r.EnableIPv6, "com.docker.network.internal": r.Internal},
		IPv4Data: []poolData{}, IPv6Data: []poolData{}}
	for _, c := range r.IPAM.Config {
		d := poolData{AddressSpace: "LocalDefault", Pool: c.Subnet.String(), AuxAddresses: map[string]string{}}
		if c.Gateway.IsValid() {
			d.Gateway = netip.PrefixFrom(c.Gateway, c.Subnet.Bits()).String()
		}
		for k, a := range c.AuxAddress {
			d.AuxAddresses[k] = netip.PrefixFrom(a, c.Subnet.Bits()).String()
		}
		if c.Subnet.Addr().Is4() {
			q.IPv4Data = append(q.IPv4Data, d)
		} else {
			q.IPv6Data = append(q.IPv6Data, d)
		}
	}
	if err := m.ask(ctx, kindNetwork, r.Driver, "CreateNetwork", q, nil); err != nil {
		return fmt.Errorf("cannot create network %s: %w", r.Name, err)
	}
	return nil
}

// plugOut tells the driver that a network goes. What it does not know of is gone.
func (m *Manager) plugOut(ctx context.Context, n *netw) error {
	err := m.ask(ctx, kindNetwork, n.rec.Driver, "DeleteNetwork", map[string]string{"NetworkID": n.rec.ID}, nil)
	var no *plugin.Refused
	if errors.As(err, &no) {
		m.log.Warn("a network's driver does not remove it", "network", n.rec.Name, "cause", err)
		return nil
	}
	return err
}

// driverInterface is a container's link as a driver is told of it.
type driverInterface struct {
	Address, AddressIPv6, MacAddress string
}

// driverPort is a published port as a driver is told of it.
type driverPort struct {
	Proto                 int
	IP                    string
	Port                  uint16
	HostIP                string
	HostPort, HostPortEnd uint16
}

type staticRoute struct {
	Destination string
	RouteType   int // 0 by NextHop, 1 through the link
	NextHop     string
}

type joined struct {
	InterfaceName struct{ SrcName, DstPrefix, DstName string }
	Gateway       string
	GatewayIPv6   string
	StaticRoutes  []staticRoute
	// DisableGatewayService: the driver sees to the way outside itself.
	DisableGatewayService bool
}

type endpointOf struct {
	NetworkID, EndpointID string
}

// join has a driver connect an endpoint. The caller holds b.busy.
func (m *Manager) join(ctx context.Context, n *netw, b *box, e *endpoint, ns *os.File, ports network.PortMap) (err error) {
	name, of := n.rec.Driver, endpointOf{n.rec.ID, e.ID}
	prefix := func(a netip.Addr, bits int) string {
		if !a.IsValid() {
			return ""
		}
		return netip.PrefixFrom(a, bits).String()
	}
	given := driverInterface{prefix(e.IPv4, e.Bits4), prefix(e.IPv6, e.Bits6), e.MAC.String()}
	options := map[string]any{}
	for k, v := range e.DriverOpts {
		options[k] = v
	}
	bound := portsOf(ports)
	if len(bound) > 0 {
		options["com.docker.network.portmap"] = bound
	}
	type create struct {
		endpointOf
		Options   map[string]any
		Interface driverInterface
	}
	// From here on the driver may know the endpoint: it is told of its end
	// whatever happens.
	if err := m.oweFarewell(n, e); err != nil {
		return err
	}
	var made struct{ Interface *driverInterface }
	if err := m.ask(ctx, kindNetwork, name, "CreateEndpoint", create{of, options, given}, &made); err != nil {
		return err
	}
	if made.Interface != nil {
		if err := m.adopt(n, e, given, *made.Interface); err != nil {
			return err
		}
	}
	type join struct {
		endpointOf
		SandboxKey string
		Options    map[string]any
	}
	var j joined
	key := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())
	if err := m.ask(ctx, kindNetwork, name, "Join", join{of, key, options}, &j); err != nil {
		return err
	}
	if j.InterfaceName.SrcName != "" {
		if err := m.bringIn(b, e, ns, j); err != nil {
			return fmt.Errorf("cannot use the link of driver %s: %w", name, err)
		}
	}
	m.mu.Lock()
	e.Gateway4, _ = netip.ParseAddr(strings.TrimSpace(j.Gateway))
	e.Gateway6, _ = netip.ParseAddr(strings.TrimSpace(j.GatewayIPv6))
	m.mu.Unlock()
	if len(bound) > 0 {
		type external struct {
			endpointOf
			Options map[string]any
		}
		err := m.ask(ctx, kindNetwork, name, "ProgramExternalConnectivity", external{of, options}, nil)
		var no *plugin.Refused
		if errors.As(err, &no) && no.Status == 404 {
			return fault.New(fault.Unsupported, "cannot publish ports on network %s: its driver %s cannot", n.rec.Name, name)
		}
		return err
	}
	return nil
}

func portsOf(pm network.PortMap) (out []driverPort) {
	proto := map[network.IPProtocol]int{network.TCP: unix.IPPROTO_TCP, network.UDP: unix.IPPROTO_UDP, network.SCTP: unix.IPPROTO_SCTP}
	for p, bs := range pm {
		for _, b := range bs {
			d := driverPort{Proto: proto[p.Proto()], Port: p.Num()}
			if b.HostIP.IsValid() {
				d.HostIP = b.HostIP.String()
			}
			first, last, _ := strings.Cut(b.HostPort, "-")
			_, _ = fmt.Sscan(first, &d.HostPort)
			d.HostPortEnd = d.HostPort
			if last != "" {
				_, _ = fmt.Sscan(last, &d.HostPortEnd)
			}
			out = append(out, d)
		}
	}
	return out
}

// adopt takes over what a driver chose, where that was left to it.
func (m *Manager) adopt(n *netw, e *endpoint, given, got driverInterface) error {
	contradicts := func(what, a, b string) error {
		return fault.New(fault.Internal, "driver %s gives the container the %s %q, which was to be %q", n.rec.Driver, what, b, a)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range []struct {
		what, given, got string
		set              func(netip.Prefix)
	}{
		{"address", given.Address, got.Address, func(p netip.Prefix) { e.IPv4, e.Bits4 = p.Addr(), p.Bits() }},
		{"IPv6 address", given.AddressIPv6, got.AddressIPv6, func(p netip.Prefix) { e.IPv6, e.Bits6 = p.Addr(), p.Bits() }},
	} {
		if x.got == "" || x.got == x.given {
			continue
		}
		if x.given != "" {
			return contradicts(x.what, x.given, x.got)
		}
		p, err := netip.ParsePrefix(x.got)
		if err != nil || p.Addr().Is4() != (x.what == "address") {
			return fault.New(fault.Internal, "driver %s gives the container %q, which is no %s", n.rec.Driver, x.got, x.what)
		}
		x.set(p)
		n.addrs[p.Addr()] = e
	}
	if got.MacAddress != "" && !strings.EqualFold(got.MacAddress, given.MacAddress) {
		mac, err := net.ParseMAC(got.MacAddress)
		if err != nil || len(mac) != 6 {
			return fault.New(fault.Internal, "driver %s gives the container the MAC address %q", n.rec.Driver, got.MacAddress)
		}
		e.MAC = mac
	}
	return nil
}

// bringIn moves a link of the host's namespace into the container's and makes it
// what the driver says. It must be a link of the host's that is not ours.
func (m *Manager) bringIn(b *box, e *endpoint, ns *os.File, j joined) error {
	src := j.InterfaceName.SrcName
	if !validIfName(src) || src == "lo" || strings.HasPrefix(src, m.vethPrefix()) || strings.HasPrefix(src, m.bridgePrefix()) {
		return fault.New(fault.Invalid, "%q is no link that a driver may give away", src)
	}
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer host.Close()
	link, err := host.LinkByName(src)
	if err != nil {
		return fmt.Errorf("cannot find %s: %w", src, err)
	}
	m.mu.Lock()
	if want := j.InterfaceName; e.DriverOpts[optIfName] == "" && (want.DstName != "" || want.DstPrefix != "" && want.DstPrefix != "eth") {
		e.IfName = ""
		if validIfName(want.DstName) {
			e.IfName = want.DstName
		} else if validIfName(want.DstPrefix) && len(want.DstPrefix) <= 12 {
			e.IfName = b.freeName(want.DstPrefix)
		}
	}
	dst := e.IfName
	e.SrcName = src
	m.mu.Unlock()
	if dst == "" {
		return fault.New(fault.Invalid, "%q is no name of a link", j.InterfaceName.DstName+j.InterfaceName.DstPrefix)
	}
	if err := host.LinkSetDown(link); err != nil {
		return err
	}
	if err := host.LinkSetNsFd(link, int(ns.Fd())); err != nil {
		return fmt.Errorf("cannot move %s into the container: %w", src, err)
	}
	h, err := handleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	if link, err = h.LinkByName(src); err != nil {
		return err
	}
	if src != dst {
		if err := h.LinkSetName(link, dst); err != nil {
			return fmt.Errorf("cannot name the link %s: %w", dst, err)
		}
	}
	if len(e.MAC) == 6 && link.Attrs().HardwareAddr.String() != e.MAC.String() {
		if err := h.LinkSetHardwareAddr(link, e.MAC); err != nil {
			return fmt.Errorf("cannot set the MAC address %s: %w", e.MAC, err)
		}
	}
	if err := bridge.Configure(ns, bridge.Interface{Name: dst, MAC: e.MAC, Addrs: e.prefixes()}); err != nil {
		return err
	}
	for _, r := range j.StaticRoutes {
		to, err := netip.ParsePrefix(r.Destination)
		if err != nil {
			return fault.New(fault.Invalid, "%q is no destination of a route", r.Destination)
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: to.Masked().Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}, Scope: netlink.SCOPE_LINK}
		if r.RouteType == 0 {
			hop, err := netip.ParseAddr(r.NextHop)
			if err != nil {
				return fault.New(fault.Invalid, "%q is no next hop", r.NextHop)
			}
			route.Gw, route.Scope = hop.AsSlice(), netlink.SCOPE_UNIVERSE
		}
		if err := h.RouteReplace(route); err != nil {
			return fmt.Errorf("cannot route %s: %w", to, err)
		}
	}
	return nil
}

// bringOut gives a link back to the host's namespace, under its former name, when
// a running container is disconnected.
func bringOut(ns *os.File, e *endpoint) error {
	h, err := handleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(e.IfName)
	if err != nil {
		return nil // it is gone
	}
	own, err := netns.Get()
	if err != nil {
		return err
	}
	defer own.Close()
	if err := h.LinkSetDown(link); err != nil {
		return err
	}
	if e.SrcName != e.IfName {
		if err := h.LinkSetName(link, e.SrcName); err != nil {
			return err
		}
	}
	return h.LinkSetNsFd(link, int(own))
}

// farewell is what a driver must still be told of an endpoint.
type farewell struct {
	Driver                string
	NetworkID, EndpointID string
}

func (m *Manager) farewells() string { return filepath.Join(m.cfg.RunRoot, "farewells") }

// oweFarewell records that a driver is to be told of an endpoint's end. The record
// of an endpoint that lives is there, too: what counts is whether it is in the
// books.
func (m *Manager) oweFarewell(n *netw, e *endpoint) error {
	if err := os.MkdirAll(m.farewells(), 0o700); err != nil {
		return fmt.Errorf("cannot make the directory of network records: %w", err)
	}
	return writeRecord(m.farewells(), e.ID+".json", farewell{n.rec.Driver, n.rec.ID, e.ID}, durable.Nothing)
}

// bid tells a driver that an endpoint is gone.
func (m *Manager) bid(ctx context.Context, f farewell) error {
	of := endpointOf{f.NetworkID, f.EndpointID}
	for _, method := range []string{"RevokeExternalConnectivity", "Leave", "DeleteEndpoint"} {
		err := m.ask(ctx, kindNetwork, f.Driver, method, of, nil)
		var no *plugin.Refused
		if err != nil && !errors.As(err, &no) { // what it does not know is as good as gone
			return err
		}
	}
	return removeRecord(m.farewells(), f.EndpointID+".json", false)
}

// depart does so behind the caller's back.
func (m *Manager) depart(n *netw, e *endpoint) {
	f := farewell{n.rec.Driver, n.rec.ID, e.ID}
	m.later.Go(func() {
		if err := m.bid(context.Background(), f); err != nil {
			m.log.Warn("a network driver could not be told that a container is gone; it will be tried again", "driver", f.Driver, "cause", err)
		}
	})
}

// retryFarewells tells drivers what they were not told, until ctx ends.
func (m *Manager) retryFarewells(ctx context.Context) error {
	if m.cfg.Plugins == nil {
		return nil
	}
	for {
		if _, err := os.Stat(m.farewells()); err == nil {
			list, _ := os.ReadDir(m.farewells())
			for _, d := range list {
				var f farewell
				b, err := os.ReadFile(filepath.Join(m.farewells(), d.Name()))
				if err != nil || d.Name()[0] == '.' || json.Unmarshal(b, &f) != nil {
					continue
				}
				if !m.lives(f) && ctx.Err() == nil {
					_ = m.bid(ctx, f)
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Minute):
		}
	}
}

// lives tells whether an endpoint is in the books.
func (m *Manager) lives(f farewell) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.nets[f.NetworkID]
	if n == nil {
		return false
	}
	for _, e := range n.eps {
		if e.ID == f.EndpointID {
			return true
		}
	}
	return false
}
