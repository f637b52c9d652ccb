package network

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgetFlows drops the kernel's memory of datagrams sent to ports before they
// were published: such a flow would never be translated.
func (m *Manager) forgetFlows(e *endpoint) {
	ports := map[bool]map[uint16]bool{false: {}, true: {}}
	for _, p := range e.Ports {
		if p.Proto == "udp" && !p.Routed {
			ports[p.Host.Is6()][p.HostPort] = true
		}
	}
	for six, set := range ports {
		if len(set) > 0 {
			forget(six, func(f *netlink.ConntrackFlow) bool {
				return f.Forward.Protocol == unix.IPPROTO_UDP && set[f.Forward.DstPort]
			})
		}
	}
}

// forgetAddrs drops flows that were translated to addresses which nobody has
// any more. Datagrams of a client that goes on sending keep such a flow alive,
// and would reach whoever gets the address next.
func forgetAddrs(addrs []netip.Addr) {
	for _, six := range []bool{false, true} {
		set := map[netip.Addr]bool{}
		for _, a := range addrs {
			if a.Is6() == six {
				set[a] = true
			}
		}
		if len(set) == 0 {
			continue
		}
		forget(six, func(f *netlink.ConntrackFlow) bool {
			a, _ := netip.AddrFromSlice(f.Reverse.SrcIP)
			return f.Forward.Protocol == unix.IPPROTO_UDP && set[a.Unmap()]
		})
	}
}

type flowFilter func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow makes a flowFilter what the netlink library wants.
func (f flowFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool { return f(flow) }

func forget(six bool, match flowFilter) {
	fam := netlink.InetFamily(unix.AF_INET)
	if six {
		fam = unix.AF_INET6
	}
	// Failing leaves flows that end by themselves in half a minute.
	_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, fam, match)
}
