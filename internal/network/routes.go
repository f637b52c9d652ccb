package network

import (
	"net/netip"
	"slices"
	"strings"
)

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

// gatewaysOf are those of an endpoint that learnt of its own.
func (n *netw) gatewaysOf(e *endpoint) []netip.Addr {
	if !n.leased() && !n.rec.Plugin {
		return n.gateways()
	}
	if n.rec.Internal {
		return nil
	}
	var out []netip.Addr
	for _, g := range []netip.Addr{e.Gateway4, e.Gateway6} {
		if g.IsValid() {
			out = append(out, g)
		}
	}
	return out
}

func (m *Manager) setGates(b *box, n *netw, e *endpoint) {
	for _, g := range n.gatewaysOf(e) {
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
			for _, g := range c.n.gatewaysOf(c.e) {
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
