package network

import (
	"crypto/rand"
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/ipam"
	"github.com/moby/moby/api/types/network"
)

func bitsOf(pools []*ipam.Pool, a netip.Addr) int {
	for _, p := range pools {
		if p.Subnet().Contains(a) {
			return p.Subnet().Bits()
		}
	}
	return 0
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
	if e.MAC = net.HardwareAddr(slices.Clone(set.MacAddress)); len(e.MAC) == 0 && n.leased() {
		e.MAC = stableMAC(n, e)
	} else if len(e.MAC) == 0 {
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
	if n.giveBack != nil {
		return m.pickManaged(n, len(pools) > 0 && pools[0].Subnet().Addr().Is6(), want, "")
	}
	if want.IsValid() {
		err := n.take(want)
		if errors.Is(err, ipam.ErrInUse) {
			m.exhume(n)
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
		if !again {
			return netip.Addr{}, fault.New(fault.Exhausted, "cannot give an address on network %s: %w", n.rec.Name, ipam.ErrExhausted)
		}
		m.exhume(n)
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
