package network

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/dhcp"
	"github.com/moby/moby/api/types/network"
)

// ipamDHCP is the address driver that asks the DHCP server of the network which
// containers are on; ipamNull gives out no addresses.
const (
	ipamDHCP = "dhcp"
	ipamNull = "null"
)

// leaseEvery is how often leases are looked after, as long as there are any: what
// the keeper was given is taken over, and a keeper that was killed is replaced.
const leaseEvery = 10 * time.Second

func (m *Manager) newKeeper() *dhcp.Keeper {
	return &dhcp.Keeper{Dir: filepath.Join(m.cfg.RunRoot, "dhcp")}
}

// checkDHCP refuses what a server of others cannot give.
func checkDHCP(r *netRecord, in network.IPAM, req network.CreateRequest) error {
	for _, c := range in.Config {
		if c.Subnet.IsValid() || c.IPRange.IsValid() || c.Gateway.IsValid() || len(c.AuxAddress) > 0 {
			return fault.New(fault.Invalid, "cannot create network %s: subnets, ranges and gateways are the DHCP server's to say", r.Name)
		}
	}
	if req.EnableIPv6 != nil && *req.EnableIPv6 {
		return fault.New(fault.Unsupported, "cannot create network %s: the address driver dhcp gives out IPv4 addresses alone", r.Name)
	}
	if req.EnableIPv4 != nil && !*req.EnableIPv4 {
		return fault.New(fault.Invalid, "cannot create network %s: IPv4 or IPv6 must be enabled", r.Name)
	}
	if r.Driver == "ipvlan" && r.Options[optIPvlan] != "" && r.Options[optIPvlan] != "l2" {
		return fault.New(fault.Invalid, "cannot create network %s: DHCP needs ipvlan_mode l2", r.Name)
	}
	return nil
}

// leased tells whether an endpoint's address comes by DHCP.
func (n *netw) leased() bool { return n.rec.IPAM.Driver == ipamDHCP }

// stableMAC is the same for a container whenever it starts, so that it is given
// the same address again.
func stableMAC(n *netw, e *endpoint) net.HardwareAddr {
	h := sha256.Sum256([]byte(n.rec.ID + "\x00" + e.ContainerID))
	return net.HardwareAddr{0x02, 0x42, h[0], h[1], h[2], h[3]}
}

// lease gets an endpoint's address and sets it. The caller holds b.busy.
func (m *Manager) lease(ctx context.Context, n *netw, b *box, e *endpoint, ns *os.File) error {
	h, err := handleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(e.IfName)
	if err != nil {
		return fmt.Errorf("cannot find link %s: %w", e.IfName, err)
	}
	sum := sha256.Sum256([]byte(e.ContainerID + "\x00" + n.rec.ID))
	id := dhcp.Identity{IfName: e.IfName, MAC: link.Attrs().HardwareAddr, Hostname: e.Hostname, ClientID: sum[:16]}
	if e.IPAM != nil {
		id.Want = e.IPAM.IPv4Address
	}
	l, err := dhcp.Acquire(ctx, ns, id)
	if err != nil {
		return err
	}
	m.mu.Lock()
	taken := n.addrs[l.Addr.Addr()]
	m.mu.Unlock()
	if taken != nil && taken != e {
		return errors.Join(fault.New(fault.Conflict, "the DHCP server gave out %s, which container %s has", l.Addr.Addr(), taken.ContainerName), dhcp.Release(ns, id, l))
	}
	p := l.Addr
	if err := h.AddrReplace(link, &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}}); err != nil {
		return errors.Join(fmt.Errorf("cannot set address %s: %w", p, err), dhcp.Release(ns, id, l))
	}
	m.learnLease(n, e, id, l)
	if err := m.keeper.Keep(ctx, e.entry(ns)); err != nil {
		return errors.Join(fmt.Errorf("cannot have the lease kept: %w", err), dhcp.Release(ns, id, l))
	}
	select {
	case m.leases <- struct{}{}:
	default:
	}
	return nil
}

// learnLease takes a lease into the books.
func (m *Manager) learnLease(n *netw, e *endpoint, id dhcp.Identity, l dhcp.Lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n.addrs[e.IPv4] == e {
		delete(n.addrs, e.IPv4)
	}
	e.IPv4, e.Bits4, e.Gateway4 = l.Addr.Addr(), l.Addr.Bits(), l.Gateway
	e.Lease = &leaseRecord{Identity: id, Lease: l}
	e.Resolvers = nil
	for _, a := range l.DNS {
		e.Resolvers = append(e.Resolvers, a.String())
	}
	n.addrs[e.IPv4] = e
}

// leaseRecord is an endpoint's lease as it was when it was last looked at.
type leaseRecord struct {
	Identity dhcp.Identity
	Lease    dhcp.Lease
	NetNS    uint64
}

func (e *endpoint) entry(ns *os.File) dhcp.Entry {
	e.Lease.NetNS = dhcp.Inode(ns)
	return dhcp.Entry{Key: e.ID, NetNS: e.Lease.NetNS, Identity: e.Lease.Identity, Lease: e.Lease.Lease}
}

// unlease gives an address back, from within the namespace if that is still
// there. It does not wait for anybody.
func (m *Manager) unlease(b *box, e *endpoint) {
	r := e.Lease
	if r == nil {
		return
	}
	var ns *os.File
	if b.netns != nil {
		if fd, err := unix.FcntlInt(b.netns.Fd(), unix.F_DUPFD_CLOEXEC, 3); err == nil {
			ns = os.NewFile(uintptr(fd), "netns")
		}
	}
	m.later.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := m.keeper.Drop(ctx, e.ID); err != nil {
			m.log.Warn("the DHCP keeper does not answer", "cause", err)
		}
		if ns != nil {
			_ = dhcp.Release(ns, r.Identity, r.Lease) // else it ends by itself
			ns.Close()
		}
	})
}

// leasesOf lists the endpoints of running containers that have leases.
func (m *Manager) leasesOf() (bs []*box, es []*endpoint) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, b := range m.containers {
		for _, e := range b.eps {
			if e.Lease != nil && e.HasNS && b.netns != nil {
				bs, es = append(bs, b), append(es, e)
			}
		}
	}
	return bs, es
}

// followLeases takes over what the keeper was given, until ctx ends.
func (m *Manager) followLeases(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.leases:
		}
		for {
			bs, es := m.leasesOf()
			if len(es) == 0 {
				break
			}
			m.syncLeases(ctx, bs, es)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(leaseEvery):
			}
		}
	}
}

func (m *Manager) syncLeases(ctx context.Context, bs []*box, es []*endpoint) {
	have, err := m.keeper.List(ctx)
	if err != nil {
		m.log.Warn("the DHCP keeper does not answer", "cause", err)
		return
	}
	for i, e := range es {
		b := bs[i]
		at := slices.IndexFunc(have, func(x dhcp.Entry) bool { return x.Key == e.ID })
		b.busy.Lock()
		if b.netns == nil || e.Lease == nil {
			b.busy.Unlock()
			continue
		}
		if at < 0 { // it was killed
			if err := m.keeper.Keep(ctx, e.entry(b.netns)); err != nil {
				m.log.Error("a container's lease is not kept", "container", e.ContainerID, "cause", err)
			}
		} else if l := have[at].Lease; l.Got.After(e.Lease.Lease.Got) {
			m.mu.RLock()
			n := m.nets[e.NetworkID]
			m.mu.RUnlock()
			if n != nil {
				m.learnLease(n, e, e.Lease.Identity, l)
				if err := m.save(b); err != nil {
					m.log.Warn(err.Error())
				}
			}
		}
		b.busy.Unlock()
	}
}

// resolversOf are name servers that endpoints learnt of.
func resolversOf(e *endpoint) (out []netip.Addr) {
	for _, s := range e.Resolvers {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}
