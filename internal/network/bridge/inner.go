package bridge

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Interface describes the inner end of a pair.
type Interface struct {
	Name  string
	MAC   net.HardwareAddr
	MTU   int
	Addrs []netip.Prefix
	// Gateways are the next hops of the default routes, one per family.
	Gateways []netip.Addr
}

// Pair makes a veth pair: outer here, on no bridge, and the inner one, as
// described and with its addresses, in ns. Both ends are up, so that joining
// a bridge is all that is left to do. The loopback link of ns comes up too.
func (l *Links) Pair(ns *os.File, outer string, in Interface) (index int, err error) {
	r := &request{b: make([]byte, 0, 512)}
	r.begin("create link "+outer, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	r.ifinfo(0, 0, 0)
	r.attrString(unix.IFLA_IFNAME, outer)
	if in.MTU > 0 {
		r.attr32(unix.IFLA_MTU, uint32(in.MTU))
	}
	info := r.nest(unix.IFLA_LINKINFO)
	r.attr(unix.IFLA_INFO_KIND, []byte("veth"))
	data := r.nest(unix.IFLA_INFO_DATA)
	peer := r.nest(1) // VETH_INFO_PEER
	r.ifinfo(0, 0, 0)
	r.attrString(unix.IFLA_IFNAME, in.Name)
	r.attr32(unix.IFLA_NET_NS_FD, uint32(ns.Fd()))
	if in.MTU > 0 {
		r.attr32(unix.IFLA_MTU, uint32(in.MTU))
	}
	if len(in.MAC) == 6 {
		r.attr(unix.IFLA_ADDRESS, in.MAC)
	}
	r.endNest(peer)
	r.endNest(data)
	r.endNest(info)
	r.end()
	r.noAutoAddress(0, outer)
	r.begin("bring up link "+outer, unix.RTM_NEWLINK, 0)
	r.ifinfo(0, unix.IFF_UP, unix.IFF_UP)
	r.attrString(unix.IFLA_IFNAME, outer)
	r.end()
	if err := l.c.do(r); err != nil {
		return 0, err
	}
	if index, err = l.c.index(outer); err != nil {
		return 0, err
	}
	if err := configure(ns, in, nil); err != nil {
		l.Delete(index)
		return 0, err
	}
	return index, nil
}

// Reconfigure makes an inner end that Pair has set up into another.
func (l *Links) Reconfigure(ns *os.File, outer int, old, in Interface) error {
	if in.MTU > 0 && in.MTU != old.MTU {
		r := &request{}
		r.begin("set the MTU of a link", unix.RTM_NEWLINK, 0)
		r.ifinfo(outer, 0, 0)
		r.attr32(unix.IFLA_MTU, uint32(in.MTU))
		r.end()
		if err := l.c.do(r); err != nil {
			return err
		}
	}
	return configure(ns, in, &old)
}

// configure brings up the link of ns, which is still as old says if that is
// not nil.
func configure(ns *os.File, in Interface, old *Interface) error {
	c, err := dialAt(ns)
	if err != nil {
		return err
	}
	defer c.close()
	name := in.Name
	if old != nil {
		name = old.Name
	}
	i, err := c.index(name)
	if err != nil {
		return err
	}
	r := &request{b: make([]byte, 0, 768)}
	if old != nil {
		// Down it loses its routes and IPv6 addresses and can be renamed.
		r.begin("take down "+name, unix.RTM_NEWLINK, 0)
		r.ifinfo(i, 0, unix.IFF_UP)
		r.end()
		for _, a := range old.Addrs {
			r.dropAddress(i, a)
		}
		r.begin("set up "+in.Name, unix.RTM_NEWLINK, 0)
		r.ifinfo(i, 0, 0)
		if len(in.MAC) == 6 {
			r.attr(unix.IFLA_ADDRESS, in.MAC)
		}
		if in.MTU > 0 {
			r.attr32(unix.IFLA_MTU, uint32(in.MTU))
		}
		if in.Name != old.Name {
			r.attrString(unix.IFLA_IFNAME, in.Name)
		}
		r.end()
	}
	r.noAutoAddress(i, "")
	r.begin("bring up loopback", unix.RTM_NEWLINK, 0)
	r.ifinfo(1, unix.IFF_UP, unix.IFF_UP)
	r.end()
	six := false
	for _, a := range in.Addrs {
		six = six || a.Addr().Is6()
	}
	r.begin("bring up "+in.Name, unix.RTM_NEWLINK, 0)
	r.ifinfo(i, unix.IFF_UP, unix.IFF_UP)
	r.end()
	if six && len(in.MAC) == 6 {
		r.address(i, linkLocal(in.MAC))
	}
	for _, a := range in.Addrs {
		r.address(i, a)
	}
	for _, g := range in.Gateways {
		r.defaultRoute(i, g, !onLink(in.Addrs, g))
	}
	if err := c.do(r); err != nil {
		return err
	}
	if six {
		c.awaitLocal(in.Addrs)
	}
	return nil
}

// awaitLocal waits until the kernel takes what is sent to IPv6 addresses for its own.
// It acknowledges an address, and sends from it, before its work queue has joined the
// group by which neighbours ask for it and made its local route: on a busy machine the
// first answers came in between and were lost, which costs the one who asks a second.
func (c *conn) awaitLocal(addrs []netip.Prefix) {
	var waited time.Duration
	for _, a := range addrs {
		for wait := 20 * time.Microsecond; a.Addr().Is6() && waited < longestLocal && !c.local(a.Addr()); wait = min(2*wait, 5*time.Millisecond) {
			time.Sleep(wait)
			waited += wait
		}
	}
}

// longestLocal bounds the wait: the address works some time, at any rate.
const longestLocal = time.Second

// local tells whether an IPv6 address is the namespace's own already. It is where it
// cannot be told.
func (c *conn) local(a netip.Addr) bool {
	r := &request{}
	r.begin("look up "+a.String(), unix.RTM_GETROUTE, 0)
	r.b = append(r.b, unix.AF_INET6, 128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	r.attrAddr(unix.RTA_DST, a)
	r.end()
	typ := byte(unix.RTN_LOCAL)
	_ = c.exchange(r, func(t uint16, body []byte) {
		if t == unix.RTM_NEWROUTE && len(body) >= unix.SizeofRtMsg {
			typ = body[7] // rtm_type
		}
	})
	return typ == unix.RTN_LOCAL
}

func onLink(addrs []netip.Prefix, g netip.Addr) bool {
	for _, a := range addrs {
		if a.Masked().Contains(g) {
			return true
		}
	}
	return false
}

// linkLocal is the modified EUI-64 link-local address of a MAC (RFC 4291,
// appendix A). The kernel would make it itself, but with duplicate address
// detection, which a container should not wait for.
func linkLocal(m net.HardwareAddr) netip.Prefix {
	b := [16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]}
	return netip.PrefixFrom(netip.AddrFrom16(b), 64)
}

// SetGateways makes the default routes of ns lead through the named link;
// without gateways the namespace's default routes of that link go.
func (l *Links) SetGateways(ns *os.File, name string, addrs []netip.Prefix, gws []netip.Addr) error {
	c, err := dialAt(ns)
	if err != nil {
		return err
	}
	defer c.close()
	i, err := c.index(name)
	if err != nil {
		return err
	}
	r := &request{}
	for _, g := range gws {
		r.defaultRoute(i, g, !onLink(addrs, g))
	}
	if len(r.what) == 0 {
		return nil
	}
	return c.do(r)
}

// DropGateway removes the default route of a family (4 or 6) from ns.
func (l *Links) DropGateway(ns *os.File, family int) error {
	c, err := dialAt(ns)
	if err != nil {
		return err
	}
	defer c.close()
	r := &request{}
	f := byte(unix.AF_INET)
	if family == 6 {
		f = unix.AF_INET6
	}
	r.begin("remove the default route", unix.RTM_DELROUTE, 0)
	r.b = append(r.b, f, 0, 0, 0, unix.RT_TABLE_MAIN, 0, 0, 0, 0, 0, 0, 0)
	r.end()
	r.allow(unix.ESRCH)
	return c.do(r)
}

func (r *request) defaultRoute(index int, gw netip.Addr, onlink bool) {
	r.begin("add default route via "+gw.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	f := byte(unix.AF_INET)
	if gw.Is6() {
		f = unix.AF_INET6
	}
	r.b = append(r.b, f, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST)
	var flags uint32
	if onlink {
		flags = unix.RTNH_F_ONLINK
	}
	r.b = binary.NativeEndian.AppendUint32(r.b, flags)
	r.attrAddr(unix.RTA_GATEWAY, gw)
	r.attr32(unix.RTA_OIF, uint32(index))
	if gw.Is6() {
		r.attr32(unix.RTA_PRIORITY, 1024)
	}
	r.end()
}

func (r *request) address(index int, a netip.Prefix) {
	r.begin("add address "+a.String(), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	r.addressBody(index, a)
}

func (r *request) dropAddress(index int, a netip.Prefix) {
	r.begin("remove address "+a.String(), unix.RTM_DELADDR, 0)
	r.addressBody(index, a)
	r.allow(unix.EADDRNOTAVAIL)
}

func (r *request) addressBody(index int, a netip.Prefix) {
	f, flags, scope := byte(unix.AF_INET), byte(0), byte(unix.RT_SCOPE_UNIVERSE)
	if a.Addr().Is6() {
		f, flags = unix.AF_INET6, unix.IFA_F_NODAD
		if a.Addr().IsLinkLocalUnicast() {
			scope = unix.RT_SCOPE_LINK
		}
	}
	r.b = append(r.b, f, byte(a.Bits()), flags, scope)
	r.b = binary.NativeEndian.AppendUint32(r.b, uint32(index))
	r.attrAddr(unix.IFA_LOCAL, a.Addr())
	r.attrAddr(unix.IFA_ADDRESS, a.Addr())
	if a.Addr().Is4() && a.Bits() < 31 {
		x := a.Addr().As4()
		v := binary.BigEndian.Uint32(x[:]) | ^uint32(0)>>a.Bits()
		binary.BigEndian.PutUint32(x[:], v)
		r.attr(unix.IFA_BROADCAST, x[:])
	}
	r.end()
}

// noAutoAddress keeps the kernel from giving the link an IPv6 address of its
// own making; a kernel without IPv6 need not be told.
func (r *request) noAutoAddress(index int, name string) {
	r.begin("set address generation", unix.RTM_NEWLINK, 0)
	r.ifinfo(index, 0, 0)
	if name != "" {
		r.attrString(unix.IFLA_IFNAME, name)
	}
	spec := r.nest(unix.IFLA_AF_SPEC)
	six := r.nest(unix.AF_INET6)
	r.attr8(unix.IFLA_INET6_ADDR_GEN_MODE, 1) // IN6_ADDR_GEN_MODE_NONE
	r.endNest(six)
	r.endNest(spec)
	r.end()
	r.allow(anyErrno)
}

// Configure brings up a link that is in ns already.
func Configure(ns *os.File, in Interface) error { return configure(ns, in, nil) }

// DeleteInside removes a link of ns; one that is gone already is fine.
func DeleteInside(ns *os.File, name string) error {
	c, err := dialAt(ns)
	if err != nil {
		return err
	}
	defer c.close()
	i, err := c.index(name)
	if err != nil {
		if errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	}
	return (&Links{c: c}).Delete(i)
}
