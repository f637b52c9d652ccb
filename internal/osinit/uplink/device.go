package uplink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// set makes the link if it is a VLAN or a bond, and gives it what is fixed.
func (n *Net) set(l Link) error {
	fail := func(err error) error { return fmt.Errorf("cannot set the link %s up: %w", l.Name, err) }
	dev, err := n.device(l)
	if err != nil {
		return fail(err)
	}
	n.mu.Lock()
	n.links[l.Name].index = dev.Attrs().Index
	n.mu.Unlock()
	if l.MTU > 0 {
		if err := netlink.LinkSetMTU(dev, l.MTU); err != nil {
			return fail(err)
		}
	}
	// Forwarding, which containers need, would else end router advertisements.
	os.WriteFile("/proc/sys/net/ipv6/conf/"+l.Name+"/accept_ra", []byte("2"), 0)
	if err := netlink.LinkSetUp(dev); err != nil {
		return fail(err)
	}
	if dev.Attrs().Flags&net.FlagUp != 0 {
		if err := solicit(&net.Interface{Index: dev.Attrs().Index}); err != nil {
			n.log("cannot ask the routers of %s for name servers: %v", l.Name, err)
		}
	}
	for _, a := range l.Addresses {
		if err := netlink.AddrReplace(dev, &netlink.Addr{IPNet: ipnet(a, false)}); err != nil {
			return fail(fmt.Errorf("address %s: %w", a, err))
		}
	}
	routes := slices.Clone(l.Routes)
	if l.Gateway.IsValid() {
		routes = append(routes, Route{Via: l.Gateway})
	}
	return n.route(dev, routes, 0)
}

// device makes the link, if it is a VLAN or a bond.
func (n *Net) device(l Link) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.Name
	switch {
	case l.VLAN != nil:
		parent, err := netlink.LinkByName(l.VLAN.Parent)
		if err != nil {
			return nil, err
		}
		if err := netlink.LinkSetUp(parent); err != nil {
			return nil, err
		}
		attrs.ParentIndex = parent.Attrs().Index
		if err := netlink.LinkAdd(&netlink.Vlan{LinkAttrs: attrs, VlanId: l.VLAN.ID}); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("VLAN %d of %s: %w", l.VLAN.ID, l.VLAN.Parent, err)
		}
		dev, err := netlink.LinkByName(l.Name)
		if err != nil {
			return nil, err
		}
		if v, ok := dev.(*netlink.Vlan); !ok || v.VlanId != l.VLAN.ID || v.ParentIndex != attrs.ParentIndex {
			return nil, fmt.Errorf("there is another link of this name (%s)", dev.Type())
		}
		return dev, nil
	case l.Bond != nil:
		b := netlink.NewLinkBond(attrs)
		b.Miimon = 100
		b.Mode = netlink.BOND_MODE_ACTIVE_BACKUP
		if l.Bond.Mode != "" {
			b.Mode = netlink.StringToBondMode(l.Bond.Mode)
		}
		if err := netlink.LinkAdd(b); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("bond: %w", err)
		}
		dev, err := netlink.LinkByName(l.Name)
		if err != nil {
			return nil, err
		}
		if have, ok := dev.(*netlink.Bond); !ok || have.Mode != b.Mode || have.Miimon != b.Miimon {
			return nil, fmt.Errorf("there is another link of this name (%s)", dev.Type())
		}
		for _, m := range l.Bond.Members {
			if err := join(dev, m); err != nil {
				return nil, err
			}
		}
		return dev, nil
	}
	return netlink.LinkByName(l.Name)
}

// join makes a link a member of a bond.
func join(bond netlink.Link, name string) error {
	member, err := netlink.LinkByName(name)
	if err != nil || member.Attrs().MasterIndex == bond.Attrs().Index {
		return err
	}
	if err := netlink.LinkSetDown(member); err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(member, bond); err != nil {
		return fmt.Errorf("member %s: %w", name, err)
	}
	return netlink.LinkSetUp(member)
}

func ipnet(p netip.Prefix, masked bool) *net.IPNet {
	a := p.Addr()
	if masked {
		a = p.Masked().Addr()
	}
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(p.Bits(), a.BitLen())}
}

// leased is the metric of routes that are DHCP's; what is fixed has 0.
const leased = 100

// route sets routes through a link; one without To is the default route.
func (n *Net) route(dev netlink.Link, routes []Route, metric int) error {
	for _, r := range routes {
		nr := &netlink.Route{LinkIndex: dev.Attrs().Index, Priority: metric}
		if r.To.IsValid() {
			nr.Dst = ipnet(r.To, true)
		}
		if r.Via.IsValid() {
			nr.Gw = r.Via.AsSlice()
			nr.Flags = int(netlink.FLAG_ONLINK)
		} else {
			nr.Scope = netlink.SCOPE_LINK
		}
		if err := netlink.RouteReplace(nr); err != nil {
			return fmt.Errorf("cannot set the route to %s through %s: %w", r.To, dev.Attrs().Name, err)
		}
	}
	return nil
}
