package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"

	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Run restores the rules when somebody flushed them and finishes what Release
// left, until ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	m.up()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.reap(ctx) })
	g.Go(func() error { return m.rebalance(ctx) })
	g.Go(func() error { return m.followLeases(ctx) })
	g.Go(func() error { return m.retryFarewells(ctx) })
	if m.broken == nil {
		g.Go(func() error {
			if err := m.reallow(ctx, false); err != nil {
				m.log.Error("accepts in the host's firewall could not be put back", "cause", err)
			}
			return nil
		})
		g.Go(func() error {
			return m.table.Watch(ctx, func(err error) {
				if err != nil {
					m.log.Error("the engine's nftables rules were changed by another program and could not be restored", "cause", err)
					return
				}
				m.log.Warn("the engine's nftables rules were changed by another program and have been restored")
				if err := m.reallow(ctx, true); err != nil {
					m.log.Error("accepts in the host's firewall could not be put back", "cause", err)
				}
			})
		})
	}
	return g.Wait()
}

// Restore takes back the containers that live and forgets the others. What
// bears this engine's mark and belongs to nobody is removed.
func (m *Manager) Restore(ctx context.Context, live []Live) error {
	if len(live) == 0 && m.putOff(func() {
		if err := m.restore(context.Background(), nil); err != nil {
			m.log.Warn("cannot restore all networks", "cause", err)
		}
	}) {
		return nil
	}
	m.up()
	return m.restore(ctx, live)
}

func (m *Manager) restore(_ context.Context, live []Live) error {
	alive := map[string]*os.File{}
	for _, l := range live {
		alive[l.ContainerID] = l.NetNS
	}
	m.mu.RLock()
	boxes := make([]*box, 0, len(m.containers))
	for _, b := range m.containers {
		boxes = append(boxes, b)
	}
	m.mu.RUnlock()
	var errs error
	for _, b := range boxes {
		ns, ok := alive[b.id]
		if !ok || ns == nil {
			errs = errors.Join(errs, m.forgetDead(b))
			continue
		}
		if err := m.readopt(b, ns); err != nil {
			m.log.Error("a running container's network could not be taken back whole", "container", b.id, "cause", err)
		}
	}
	if m.relay != nil {
		m.relay.Sweep()
	}
	m.restoreCNI(alive)
	return errors.Join(errs, m.sweep())
}

// forgetDead drops the links of a container that does not run and keeps what
// is reserved for it.
func (m *Manager) forgetDead(b *box) error {
	m.mu.Lock()
	var dead []*corpse
	var err error
	for id, e := range b.eps {
		if !e.HasNS {
			continue
		}
		n := m.nets[id]
		m.unregister(n, b, e)
		m.unlease(b, e)
		if n.rec.Plugin {
			m.depart(n, e)
		}
		dead = append(dead, &corpse{outer: e.Outer, shaped: e.Shaped, net: n, addrs: addrsOf(e), udp: hasUDP(e)})
		m.mu.Unlock()
		err = errors.Join(err, m.unpublish(e))
		m.mu.Lock()
	}
	if len(b.eps) == 0 {
		delete(m.containers, b.id)
	}
	m.mu.Unlock()
	m.finish(dead)
	return errors.Join(err, m.save(b))
}

// readopt checks a live container's links against the books and opens anew
// what the former daemon held open.
func (m *Manager) readopt(b *box, ns *os.File) error {
	b.busy.Lock()
	defer b.busy.Unlock()
	fd, err := unix.FcntlInt(ns.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fmt.Errorf("cannot keep the network namespace open: %w", err)
	}
	m.mu.Lock()
	if b.netns != nil {
		b.netns.Close()
	}
	b.netns = os.NewFile(uintptr(fd), "netns")
	m.mu.Unlock()
	var errs error
	for _, e := range m.endpointsOf(b) {
		m.mu.RLock()
		n := m.nets[e.NetworkID]
		m.mu.RUnlock()
		if !e.HasNS || n == nil {
			continue
		}
		if e.Outer != "" {
			i := m.links.Index(e.Outer)
			if i == 0 {
				errs = errors.Join(errs, fmt.Errorf("cannot find link %s of network %s", e.Outer, n.rec.Name))
				continue
			}
			m.mu.Lock()
			e.Index = i
			m.mu.Unlock()
			if err := m.links.Plug(i, n.index, m.portOf(n, e)); err != nil {
				errs = errors.Join(errs, err)
			}
		}
		m.readoptCNI(e)
		if e.Lease != nil {
			// The keeper may be gone, after it was killed or the engine was away.
			if err := m.keeper.Keep(context.Background(), e.entry(b.netns)); err != nil {
				errs = errors.Join(errs, fmt.Errorf("cannot have a lease kept: %w", err))
			}
			select {
			case m.leases <- struct{}{}:
			default:
			}
		}
		for _, p := range e.Ports {
			if p.Routed || p.Delegated {
				continue
			}
			k := portKey{p.Host, p.Proto, p.HostPort}
			if m.retake(p, k) {
				continue
			}
			if err := m.ports.reserve(k); err != nil {
				// Traffic is translated all the same.
				m.log.Warn("a published port could not be reserved again", "port", k.String()+"/"+p.Proto, "cause", err)
				continue
			}
			m.carry(p, k)
		}
	}
	// Which routes the namespace has is not in the books: setting them anew
	// does no harm.
	b.gw4, b.gw6 = "", ""
	return errors.Join(errs, m.regate(b), m.serveNames(b), m.spread(b))
}

// sweep removes links that bear this engine's mark and belong to nobody.
func (m *Manager) sweep() error {
	// Meanwhile sandboxes are parked and used: a link is in the books before it is
	// in the kernel, and goes from one book to another. So what exists is listed
	// between two looks at the books, and a stray is in neither.
	owned := map[string]bool{m.vethPrefix() + "i0": true, m.vethPrefix() + "i1": true}
	m.own(owned)
	found := map[string]int{}
	for _, prefix := range []string{m.vethPrefix(), m.bridgePrefix()} {
		links, err := bridge.Named(prefix)
		if err != nil {
			return err
		}
		maps.Copy(found, links)
	}
	m.own(owned)
	var stray []int
	for name, i := range found {
		if !owned[name] {
			stray = append(stray, i)
		}
	}
	return m.links.DeleteAll(stray)
}

// own adds the names of the links in the books.
func (m *Manager) own(owned map[string]bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, b := range m.containers {
		for _, e := range b.eps {
			owned[e.Outer] = true
			if e.Shaped {
				owned[m.ifbOf(e.Outer)] = true
			}
		}
	}
	for outer := range m.parked {
		owned[outer] = true
	}
	for _, c := range m.dying {
		owned[c.outer], owned[m.ifbOf(c.outer)] = true, true
	}
	for _, n := range m.nets {
		owned[n.rec.Link] = true
	}
}

// Destroy removes every link, rule and address of this engine and puts back
// the kernel settings it changed, unless another engine needs them. The
// Manager is closed by it; records of networks stay.
func (m *Manager) Destroy(ctx context.Context) error {
	m.up()
	m.mu.Lock()
	m.closed = true
	boxes := m.containers
	m.containers, m.parked, m.dying = map[string]*box{}, map[string]*parked{}, nil
	var own []string
	for _, n := range m.nets {
		if n.rec.Link != "" && !n.rec.Foreign {
			own = append(own, n.rec.Link)
		}
		if n.rec.OwnParent {
			own = append(own, n.rec.Parent)
		}
	}
	m.mu.Unlock()
	for _, b := range boxes {
		b.busy.Lock()
		b.close()
		b.busy.Unlock()
	}
	errs := m.keeper.Quit(ctx)
	m.later.Wait()
	errs = errors.Join(errs, os.RemoveAll(m.keeper.Dir))
	if m.cfg.CNI != nil {
		errs = errors.Join(errs, m.cfg.CNI.Destroy(ctx))
	}
	if m.broken == nil {
		errs = errors.Join(errs, m.table.Delete(), m.revoke(ctx, "", true))
	}
	var all []int
	for _, name := range own {
		if i := m.links.Index(name); i != 0 {
			all = append(all, i)
		}
	}
	for _, prefix := range []string{m.vethPrefix(), m.bridgePrefix()} {
		links, err := bridge.Named(prefix)
		errs = errors.Join(errs, err)
		for name, i := range links {
			// The peer goes with its pair.
			if name != m.vethPrefix()+"i1" {
				all = append(all, i)
			}
		}
	}
	errs = errors.Join(errs, m.links.DeleteAll(dedupe(all)))
	mark, table := m.injectIDs()
	bridge.RestoreReverse(m.vethPrefix()+"i0", m.vethPrefix()+"i1", mark, table)
	if m.othersForward() {
		errs = errors.Join(errs, m.host.forget())
	} else {
		errs = errors.Join(errs, m.host.restore())
	}
	for id := range boxes {
		errs = errors.Join(errs, removeRecord(m.disk.running, id+".json", false))
	}
	if m.relay != nil {
		m.relay.Destroy()
	}
	m.ports.closeAll()
	m.table.Close()
	m.links.Close()
	return errs
}

func dedupe(in []int) []int {
	seen := map[int]bool{}
	out := in[:0]
	for _, i := range in {
		if !seen[i] {
			seen[i] = true
			out = append(out, i)
		}
	}
	return out
}

// othersForward tells whether another container engine is on this host, which
// would lose its network with forwarding.
func (m *Manager) othersForward() bool {
	links, err := netlink.LinkList()
	if err != nil {
		return true
	}
	for _, l := range links {
		name := l.Attrs().Name
		if l.Type() != "bridge" && !strings.HasSuffix(name, "i0") {
			continue
		}
		if strings.HasPrefix(name, m.vethPrefix()) || strings.HasPrefix(name, m.bridgePrefix()) {
			continue
		}
		return true // somebody's bridge or injection link: docker0, virbr0, ours
	}
	return false
}
