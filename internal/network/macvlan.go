package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The drivers macvlan and ipvlan put containers on the network of one of the
// host's links, their parent.

// lan tells whether a network is of such a driver.
func (r *netRecord) lan() bool { return r.Driver == "macvlan" || r.Driver == "ipvlan" }

// checkParent refuses a network whose parent link or mode is wrong, and makes
// what is missing: a VLAN that the name asks for (eth0.50), or, for a network
// without a parent, a link that leads nowhere.
func (m *Manager) checkParent(n *netw) error {
	r := n.rec
	fail := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "cannot create network %s: %s", r.Name, fmt.Sprintf(format, args...))
	}
	if _, err := macvlanMode(n.opts.macvlan); err != nil {
		return err
	}
	if _, _, err := ipvlanMode(n.opts); err != nil {
		return err
	}
	if r.Driver == "ipvlan" {
		if err := probeIPvlan(); err != nil {
			return fault.New(fault.Unsupported, "cannot create network %s: %w", r.Name, err)
		}
	}
	if r.Parent == "lo" {
		return fail("loopback interface is not a valid %s parent link", r.Driver)
	}
	if r.Parent == "" {
		r.Parent, r.OwnParent = "dm-"+r.ID[:12], true
		r.Internal = true // it leads nowhere
	}
	if r.Driver == "macvlan" {
		// One link cannot be a parent of both kinds, nor of two that differ in
		// their way.
		m.mu.RLock()
		defer m.mu.RUnlock()
		for _, o := range m.nets {
			if o.rec.Parent == r.Parent && o.rec.lan() && !o.rec.ConfigOnly && (o.rec.Driver != r.Driver || n.opts.macvlan == "passthru") {
				return fail("network %s has the parent link %s", o.rec.Name, r.Parent)
			}
		}
	}
	if _, err := net.InterfaceByName(r.Parent); err == nil {
		r.OwnParent = r.OwnParent && strings.HasPrefix(r.Parent, "dm-")
		return nil
	}
	base, id, ok := cutVLAN(r.Parent)
	if !ok && !r.OwnParent {
		return fail("cannot find parent link %s", r.Parent)
	}
	if ok {
		if _, err := net.InterfaceByName(base); err != nil {
			return fail("cannot find link %s, which VLAN %d would be of", base, id)
		}
	}
	r.OwnParent = true
	return m.raiseParent(r)
}

// cutVLAN reads names such as eth0.50.
func cutVLAN(name string) (base string, id int, ok bool) {
	i := strings.LastIndexByte(name, '.')
	if i <= 0 {
		return "", 0, false
	}
	id, err := strconv.Atoi(name[i+1:])
	return name[:i], id, err == nil && id > 0 && id < 4095
}

// raiseParent makes a parent link that is ours, unless it is there.
func (m *Manager) raiseParent(r *netRecord) error {
	if !r.OwnParent {
		return nil
	}
	if _, err := netlink.LinkByName(r.Parent); err == nil {
		return m.links.Up(r.Parent)
	}
	var l netlink.Link = &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: r.Parent}}
	if base, id, ok := cutVLAN(r.Parent); ok {
		p, err := netlink.LinkByName(base)
		if err != nil {
			return fmt.Errorf("cannot find link %s: %w", base, err)
		}
		l = &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: r.Parent, ParentIndex: p.Attrs().Index}, VlanId: id}
	}
	if err := netlink.LinkAdd(l); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fault.New(fault.Unsupported, "cannot make parent link %s: this kernel has no links of kind %s (modprobe %s)", r.Parent, l.Type(), map[string]string{"vlan": "8021q", "dummy": "dummy"}[l.Type()])
		}
		return fmt.Errorf("cannot make parent link %s: %w", r.Parent, err)
	}
	return m.links.Up(r.Parent)
}

// fellParent removes a parent link that is ours and no other network's.
func (m *Manager) fellParent(r *netRecord) error {
	if !r.OwnParent {
		return nil
	}
	m.mu.RLock()
	shared := false
	for _, o := range m.nets {
		shared = shared || o.rec != r && o.rec.lan() && o.rec.Parent == r.Parent
	}
	m.mu.RUnlock()
	if i := m.links.Index(r.Parent); i != 0 && !shared {
		return m.links.Delete(i)
	}
	return nil
}

func macvlanMode(s string) (netlink.MacvlanMode, error) {
	switch s {
	case "", "bridge":
		return netlink.MACVLAN_MODE_BRIDGE, nil
	case "private":
		return netlink.MACVLAN_MODE_PRIVATE, nil
	case "vepa":
		return netlink.MACVLAN_MODE_VEPA, nil
	case "passthru":
		return netlink.MACVLAN_MODE_PASSTHRU, nil
	}
	return 0, fault.New(fault.Invalid, "cannot use macvlan_mode %q: bridge, private, vepa and passthru are allowed", s)
}

func ipvlanMode(o options) (netlink.IPVlanMode, netlink.IPVlanFlag, error) {
	mode, ok := map[string]netlink.IPVlanMode{"": netlink.IPVLAN_MODE_L2, "l2": netlink.IPVLAN_MODE_L2, "l3": netlink.IPVLAN_MODE_L3, "l3s": netlink.IPVLAN_MODE_L3S}[o.ipvlan]
	if !ok {
		return 0, 0, fault.New(fault.Invalid, "cannot use ipvlan_mode %q: l2, l3 and l3s are allowed", o.ipvlan)
	}
	flag, ok := map[string]netlink.IPVlanFlag{"": netlink.IPVLAN_FLAG_BRIDGE, "bridge": netlink.IPVLAN_FLAG_BRIDGE, "private": netlink.IPVLAN_FLAG_PRIVATE, "vepa": netlink.IPVLAN_FLAG_VEPA}[o.ipvlanFlag]
	if !ok {
		return 0, 0, fault.New(fault.Invalid, "cannot use ipvlan_flag %q: bridge, private and vepa are allowed", o.ipvlanFlag)
	}
	return mode, flag, nil
}

// probeIPvlan asks the kernel for a link on a parent that cannot be: it looks for
// the kind first.
func probeIPvlan() error {
	err := netlink.LinkAdd(&netlink.IPVlan{LinkAttrs: netlink.LinkAttrs{Name: "sv-probe", ParentIndex: 1 << 30}})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return errors.New("this kernel has no ipvlan (CONFIG_IPVLAN); load the module with modprobe ipvlan, or use the driver macvlan")
	}
	if err == nil {
		if l, lerr := netlink.LinkByName("sv-probe"); lerr == nil {
			_ = netlink.LinkDel(l)
		}
	}
	return nil
}

// routedLAN tells whether containers send without neighbours: ipvlan above the
// link layer.
func (n *netw) routedLAN() bool {
	return n.rec.Driver == "ipvlan" && (n.opts.ipvlan == "l3" || n.opts.ipvlan == "l3s")
}

// wireLAN makes the container's link directly in its namespace.
func (m *Manager) wireLAN(n *netw, e *endpoint, ns *os.File) error {
	parent, err := netlink.LinkByName(n.rec.Parent)
	if err != nil {
		return fmt.Errorf("cannot find parent link %s: %w", n.rec.Parent, err)
	}
	attrs := netlink.LinkAttrs{Name: e.IfName, ParentIndex: parent.Attrs().Index, HardwareAddr: e.MAC, Namespace: netlink.NsFd(int(ns.Fd()))}
	if n.opts.mtu != 0 {
		attrs.MTU = n.opts.mtu
	}
	var l netlink.Link
	if n.rec.Driver == "ipvlan" {
		mode, flag, err := ipvlanMode(n.opts)
		if err != nil {
			return err
		}
		attrs.HardwareAddr = nil // its parent's
		l = &netlink.IPVlan{LinkAttrs: attrs, Mode: mode, Flag: flag}
	} else {
		mode, err := macvlanMode(n.opts.macvlan)
		if err != nil {
			return err
		}
		if mode == netlink.MACVLAN_MODE_PASSTHRU {
			attrs.HardwareAddr = nil
		}
		l = &netlink.Macvlan{LinkAttrs: attrs, Mode: mode}
	}
	if err := netlink.LinkAdd(l); err != nil {
		return fmt.Errorf("cannot create a %s link on %s: %w", n.rec.Driver, n.rec.Parent, err)
	}
	in := bridge.Interface{Name: e.IfName, MAC: e.MAC, Addrs: e.prefixes()}
	if n.rec.Driver == "ipvlan" {
		in.MAC = nil
	}
	err = bridge.Configure(ns, in)
	if err == nil && n.routedLAN() && !n.rec.Internal {
		err = routeAll(ns, e)
	}
	if err != nil {
		return errors.Join(err, bridge.DeleteInside(ns, e.IfName))
	}
	return nil
}

// routeAll sends everything through a link that has no neighbours.
func routeAll(ns *os.File, e *endpoint) error {
	h, err := handleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	l, err := h.LinkByName(e.IfName)
	if err != nil {
		return err
	}
	for _, p := range e.prefixes() {
		dst := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		if p.Addr().Is6() {
			dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		if err := h.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("cannot route through %s: %w", e.IfName, err)
		}
	}
	return nil
}

// handleAt opens rtnetlink in a namespace.
func handleAt(ns *os.File) (*netlink.Handle, error) {
	return netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
}
