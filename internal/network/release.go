package network

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/dhcp"
	"github.com/moby/moby/api/types/network"
)

// PrepareLink makes a link of the default network in a parked sandbox's
// namespace, with an address that the container will have, so that attaching
// is only to put its outer end on the bridge.
func (m *Manager) PrepareLink(ctx context.Context, netns *os.File) (*Link, error) {
	m.up()
	if m.broken != nil {
		return nil, m.broken
	}
	n, err := m.find(network.NetworkBridge)
	if err != nil {
		return nil, err
	}
	e := &endpoint{}
	if err := m.allocate(n, e, &network.EndpointSettings{}); err != nil {
		return nil, err
	}
	e.Bits4, e.Bits6 = bitsOf(n.pool4, e.IPv4), bitsOf(n.pool6, e.IPv6)
	l := &Link{Outer: m.newVeth(), NetNS: netns}
	// In the books before it is in the kernel, so that nobody takes it for a
	// stray.
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		n.free(e.IPv4, e.IPv6)
		return nil, fault.New(fault.Unavailable, "cannot prepare a link: the engine is shutting down")
	}
	p := &parked{net: n, ip4: e.IPv4, ip6: e.IPv6, mac: e.MAC}
	m.parked[l.Outer] = p
	m.mu.Unlock()
	i, err := m.links.Pair(netns, l.Outer, bridge.Interface{Name: parkedName, MAC: e.MAC, MTU: n.rec.MTU, Addrs: e.prefixes(), Gateways: n.gateways()})
	if err != nil {
		m.unpark(l.Outer)
		n.free(e.IPv4, e.IPv6)
		return nil, err
	}
	m.links.Settle(l.Outer)
	m.mu.Lock()
	p.index = i
	m.mu.Unlock()
	l.Index = i
	return l, nil
}

// inner describes the inner end of a parked link as it was made.
func (p *parked) inner() bridge.Interface {
	e := &endpoint{IPv4: p.ip4, IPv6: p.ip6, Bits4: bitsOf(p.net.pool4, p.ip4), Bits6: bitsOf(p.net.pool6, p.ip6)}
	return bridge.Interface{Name: parkedName, MAC: p.mac, MTU: p.net.rec.MTU, Addrs: e.prefixes()}
}

func (m *Manager) unpark(outer string) *parked {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.parked[outer]
	delete(m.parked, outer)
	return p
}

// DropLink gives up a link that was never used. Its removal is left to Run,
// or to the end of the sandbox's namespace, whichever comes first.
func (m *Manager) DropLink(ctx context.Context, l *Link) error {
	m.up()
	if l == nil {
		return nil
	}
	if p := m.unpark(l.Outer); p != nil {
		m.bury(p.net, &endpoint{Outer: l.Outer, Index: p.index, IPv4: p.ip4, IPv6: p.ip6})
	}
	return nil
}

// bury leaves the rest of an endpoint to Run: its link, which mostly goes with
// its namespace, and then its addresses, which must not be given to another
// while the old link still answers for them.
func (m *Manager) bury(n *netw, e *endpoint) {
	c := &corpse{outer: e.Outer, index: e.Index, net: n, shaped: e.Shaped}
	for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
		if a.IsValid() {
			c.addrs = append(c.addrs, a)
		}
	}
	for _, p := range e.Ports {
		c.udp = c.udp || p.Proto == "udp"
	}
	if c.outer == "" && !c.udp {
		n.free(c.addrs...)
		return
	}
	m.mu.Lock()
	m.dying = append(m.dying, c)
	m.mu.Unlock()
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// exhume finishes the dying endpoints of a network at once, for somebody who
// needs an address. What is being finished already is waited for.
func (m *Manager) exhume(n *netw) {
	m.reaping.Lock()
	defer m.reaping.Unlock()
	m.mu.Lock()
	var mine []*corpse
	m.dying = slices.DeleteFunc(m.dying, func(c *corpse) bool {
		if c.net == n {
			mine = append(mine, c)
			return true
		}
		return false
	})
	m.mu.Unlock()
	m.finish(mine)
}

// finish removes links and frees addresses.
func (m *Manager) finish(cs []*corpse) {
	var gone []int
	for _, c := range cs {
		// By name: the index may be another link's by now.
		if c.outer != "" {
			if i := m.links.Index(c.outer); i != 0 {
				gone = append(gone, i)
			}
		}
		if c.shaped {
			if i := m.links.Index(m.ifbOf(c.outer)); i != 0 {
				gone = append(gone, i)
			}
		}
	}
	if err := m.links.DeleteAll(gone); err != nil {
		m.log.Warn("links of ended containers stay", "cause", err)
	}
	for _, c := range cs {
		if c.udp {
			forgetAddrs(c.addrs)
		}
		c.net.free(c.addrs...)
	}
}

// reapEvery is how often Run looks whether the links of ended containers went
// with their namespaces; after reapTries times it removes them itself.
const (
	reapEvery = 100 * time.Millisecond
	reapTries = 20
)

// reap does the deferred part of releasing, until ctx ends.
func (m *Manager) reap(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.kick:
		}
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(reapEvery):
			}
			if m.reapOnce() == 0 {
				break
			}
		}
	}
}

// reapOnce finishes what can be finished and tells how many are left.
func (m *Manager) reapOnce() int {
	m.reaping.Lock()
	defer m.reaping.Unlock()
	var ready []*corpse
	m.mu.Lock()
	m.dying = slices.DeleteFunc(m.dying, func(c *corpse) bool {
		c.tries++
		if c.outer == "" || c.tries >= reapTries || m.links.Index(c.outer) == 0 {
			ready = append(ready, c)
			return true
		}
		return false
	})
	left := len(m.dying)
	m.mu.Unlock()
	m.finish(ready)
	return left
}

// Detach undoes one Attach. The container's namespace may be gone.
func (m *Manager) Detach(ctx context.Context, id, nameOrID string) error {
	m.up()
	n, err := m.find(nameOrID)
	if err != nil {
		return err
	}
	m.mu.RLock()
	b := m.containers[id]
	var e *endpoint
	if b != nil {
		e = b.eps[n.rec.ID]
	}
	m.mu.RUnlock()
	if e == nil {
		return fault.New(fault.NotFound, "container %s is not connected to network %s", id, n.rec.Name)
	}
	b.busy.Lock()
	defer b.busy.Unlock()
	err = m.unpublish(e)
	if e.Lease != nil && b.netns != nil {
		_ = dhcp.Release(b.netns, e.Lease.Identity, e.Lease.Lease)
		if kerr := m.keeper.Drop(ctx, e.ID); kerr != nil {
			m.log.Warn("the DHCP keeper does not answer", "cause", kerr)
		}
	}
	if e.Outer != "" {
		// Now, because the container goes on and may want the name again.
		if i := m.links.Index(e.Outer); i != 0 {
			err = errors.Join(err, m.links.Delete(i))
		}
		if e.Shaped {
			err = errors.Join(err, m.unshape(e.Outer))
		}
	} else if n.rec.Driver == driverCNI {
		m.unplug(ctx, e)
	} else if n.rec.Plugin && e.HasNS {
		if e.SrcName != "" && b.netns != nil {
			err = errors.Join(err, bringOut(b.netns, e))
		}
		if berr := m.bid(ctx, farewell{n.rec.Driver, n.rec.ID, e.ID}); berr != nil {
			m.log.Warn("a network driver could not be told that a container is gone; it will be tried again", "driver", n.rec.Driver, "cause", berr)
		}
	} else if e.HasNS && e.IfName != "" && b.netns != nil {
		err = errors.Join(err, bridge.DeleteInside(b.netns, e.IfName), bridge.DeleteInside(b.netns, ifbInside(e.IfName)))
	}
	m.mu.Lock()
	m.unregister(n, b, e)
	if b.gw4 == n.rec.ID {
		b.gw4 = ""
	}
	if b.gw6 == n.rec.ID {
		b.gw6 = ""
	}
	left := len(b.eps)
	if left == 0 {
		delete(m.containers, id)
	}
	m.mu.Unlock()
	m.finish([]*corpse{{net: n, addrs: addrsOf(e), udp: hasUDP(e)}})
	if left > 0 && b.netns != nil {
		err = errors.Join(err, m.regate(b))
	}
	err = errors.Join(err, m.save(b))
	if left == 0 {
		b.close()
	}
	return err
}

func addrsOf(e *endpoint) (out []netip.Addr) {
	for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

func hasUDP(e *endpoint) bool {
	return slices.ContainsFunc(e.Ports, func(p published) bool { return p.Proto == "udp" })
}

// Release undoes all of a container's attachments. Published ports are free
// when it returns; links and addresses follow.
func (m *Manager) Release(ctx context.Context, id string) error {
	if m.putOff(func() {
		if err := m.release(context.Background(), id); err != nil {
			m.log.Warn("a container's network could not be given back", "container", id, "cause", err)
		}
	}) {
		return nil
	}
	m.up()
	return m.release(ctx, id)
}

func (m *Manager) release(ctx context.Context, id string) error {
	m.mu.Lock()
	b := m.containers[id]
	if b == nil {
		m.mu.Unlock()
		return nil
	}
	delete(m.containers, id)
	type pair struct {
		n *netw
		e *endpoint
	}
	var eps []pair
	for netID, e := range b.eps {
		if n := m.nets[netID]; n != nil {
			eps = append(eps, pair{n, e})
		}
	}
	for _, p := range eps {
		m.unregister(p.n, b, p.e)
	}
	m.mu.Unlock()
	b.busy.Lock()
	defer b.busy.Unlock()
	var err error
	durable := false
	for _, p := range eps {
		err = errors.Join(err, m.unpublish(p.e))
		if p.n.rec.Driver == driverCNI && p.e.HasNS {
			m.unplug(ctx, p.e)
		}
		m.unlease(b, p.e)
		if p.n.rec.Plugin && p.e.HasNS {
			m.depart(p.n, p.e)
		}
		m.bury(p.n, p.e)
		durable = durable || !p.e.HasNS && !p.e.Ephemeral
	}
	b.close()
	err = errors.Join(err, removeRecord(m.disk.running, id+".json", false))
	if durable {
		err = errors.Join(err, removeRecord(m.disk.reserved, id+".json", true))
	}
	return err
}
