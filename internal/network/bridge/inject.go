package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Injection is a veth pair of the host's own namespace. What is sent to To4
// or To6 by way of Out arrives on In as if from a wire.
type Injection struct {
	Out, In  string
	OutIndex int
	To4, To6 netip.Addr
}

// hop6 and self6 are link-local, so they clash with nothing.
var (
	self6 = netip.MustParseAddr("fe80::1")
	hop6  = netip.MustParseAddr("fe80::2")
)

// EnsureInjection makes the pair, or completes one left by a former run. seed
// chooses where in 169.254/16 the search for a free /29 begins.
func EnsureInjection(out, in string, seed uint32, six bool) (*Injection, error) {
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: out, MTU: 65535}, PeerName: in, PeerMTU: 65535}
	if err := netlink.LinkAdd(veth); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("cannot create link %s: %w", out, err)
	}
	lo, err := netlink.LinkByName(out)
	if err != nil {
		return nil, fmt.Errorf("cannot find link %s: %w", out, err)
	}
	li, err := netlink.LinkByName(in)
	if err != nil {
		return nil, fmt.Errorf("cannot find link %s: %w", in, err)
	}
	i := &Injection{Out: out, In: in, OutIndex: lo.Attrs().Index}
	base, err := freeLinkLocal(seed, out, in)
	if err != nil {
		return nil, err
	}
	// .1 sends, .2 is the next hop that exists only as a neighbour entry, and
	// .5 is there because loose reverse-path filtering refuses what arrives on
	// a link without an address.
	self := netip.PrefixFrom(base.Addr().Next(), 30)
	i.To4 = self.Addr().Next()
	far := netip.PrefixFrom(i.To4.Next().Next().Next(), 32)
	for _, l := range []string{out, in} {
		// Neither end is for anybody to talk to.
		_ = SetSysctl("net/ipv6/conf/"+l+"/accept_ra", "0")
		_ = SetSysctl("net/ipv6/conf/"+l+"/addr_gen_mode", "1")
	}
	for _, s := range [][2]string{{"rp_filter", "0"}, {"accept_local", "1"}, {"forwarding", "1"}, {"arp_ignore", "8"}, {"send_redirects", "0"}} {
		if err := SetSysctl("net/ipv4/conf/"+in+"/"+s[0], s[1]); err != nil {
			return nil, err
		}
	}
	for l, a := range map[netlink.Link]netip.Prefix{lo: self, li: far} {
		if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: ipnet(a), Scope: unix.RT_SCOPE_LINK}); err != nil {
			return nil, fmt.Errorf("cannot add address %s to %s: %w", a, l.Attrs().Name, err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return nil, fmt.Errorf("cannot bring up %s: %w", l.Attrs().Name, err)
		}
	}
	hops := []netip.Addr{i.To4}
	if six {
		a := netip.PrefixFrom(self6, 64)
		err := netlink.AddrReplace(lo, &netlink.Addr{IPNet: ipnet(a), Flags: unix.IFA_F_NODAD, Scope: unix.RT_SCOPE_LINK})
		if err == nil {
			_ = SetSysctl("net/ipv6/conf/"+in+"/forwarding", "1")
			i.To6, hops = hop6, append(hops, hop6)
		} else if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("cannot add address %s to %s: %w", a, out, err)
		}
	}
	for _, h := range hops {
		n := &netlink.Neigh{LinkIndex: lo.Attrs().Index, State: netlink.NUD_PERMANENT, IP: h.AsSlice(), HardwareAddr: li.Attrs().HardwareAddr}
		if err := netlink.NeighSet(n); err != nil {
			return nil, fmt.Errorf("cannot add neighbour %s to %s: %w", h, out, err)
		}
	}
	return i, nil
}

// freeLinkLocal finds a /29 of 169.254/16 that no other link of the host uses.
func freeLinkLocal(seed uint32, own ...string) (netip.Prefix, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("cannot list links: %w", err)
	}
	var taken []netip.Prefix
	for _, i := range ifs {
		as, _ := i.Addrs()
		for _, a := range as {
			p, err := netip.ParsePrefix(a.String())
			if err != nil || !p.Addr().Is4() || !p.Addr().IsLinkLocalUnicast() {
				continue
			}
			if i.Name == own[0] {
				return netip.PrefixFrom(p.Addr(), 29).Masked(), nil
			}
			if i.Name != own[1] {
				taken = append(taken, p.Masked())
			}
		}
	}
	// 169.254.1.0 to 169.254.254.255 is the part that RFC 3927 leaves for use.
	const slots = 254 * 32
next:
	for n := range uint32(slots) {
		s := (seed + n) % slots
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{169, 254, byte(1 + s/32), byte(s % 32 * 8)}), 29)
		for _, t := range taken {
			// A whole 169.254/16 on a link (as clouds and zeroconf have it)
			// is no obstacle: ours is the longer prefix.
			if t.Bits() > 16 && t.Overlaps(p) {
				continue next
			}
		}
		return p, nil
	}
	return netip.Prefix{}, errors.New("cannot find a free link-local subnet for published ports")
}

// LoosenReverse makes strict reverse-path filtering (which all links inherit
// from conf/all) accept injected packets, and only those. The kernel looks
// their source up under their mark, and as if they came from where they go to;
// a rule for the mark answers with the link they came by. The forward lookup,
// which is made for that link, jumps over the rule.
func LoosenReverse(out, in string, mark uint32, table int) error {
	l, err := netlink.LinkByName(in)
	if err != nil {
		return fmt.Errorf("cannot find link %s: %w", in, err)
	}
	if err := SetSysctl("net/ipv4/conf/"+in+"/src_valid_mark", "1"); err != nil {
		return err
	}
	all := net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &all, Table: table, Scope: unix.RT_SCOPE_LINK}); err != nil {
		return fmt.Errorf("cannot add the reverse route of %s: %w", in, err)
	}
	for _, r := range reverseRules(out, in, mark, table) {
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("cannot add the reverse rule of %s: %w", in, err)
		}
	}
	return nil
}

// RestoreReverse undoes LoosenReverse.
func RestoreReverse(out, in string, mark uint32, table int) {
	for _, r := range reverseRules(out, in, mark, table) {
		for netlink.RuleDel(r) == nil {
		}
	}
}

// reverseRules are in the order in which they must be made: the last is what
// the second jumps to, and matches nothing.
func reverseRules(out, in string, mark uint32, table int) []*netlink.Rule {
	const at = 90
	rule := func(prio int, iif string) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.IifName, r.Mark = netlink.FAMILY_V4, prio, iif, mark
		return r
	}
	end, jump, back := rule(at+1, out), rule(at-1, in), rule(at, "")
	jump.Goto = at + 1
	end.Table, back.Table = table, table
	return []*netlink.Rule{end, jump, back}
}

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
