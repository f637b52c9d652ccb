package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plugin"
	"github.com/moby/moby/api/types/network"
)

// Address management by a plugin (IpamDriver.*). Its pools are also kept here, as
// those of others: what a plugin gives out twice shows.

const (
	kindIPAM = "IpamDriver"
	// What libnetwork calls these options.
	ipamRequestType = "RequestAddressType"
	ipamGateway     = "com.docker.network.gateway"
	ipamMAC         = "com.docker.network.endpoint.macaddress"
)

// poolRecord is a pool that a plugin gave out.
type poolRecord struct {
	ID     string
	Subnet netip.Prefix
}

// requestPools asks a plugin for a network's subnets.
func (m *Manager) requestPools(ctx context.Context, r *netRecord, in network.IPAM, req network.CreateRequest) (err error) {
	r.IPAM = network.IPAM{Driver: in.Driver, Options: maps.Clone(in.Options)}
	r.EnableIPv4 = req.EnableIPv4 == nil || *req.EnableIPv4
	r.EnableIPv6 = req.EnableIPv6 != nil && *req.EnableIPv6
	var spaces struct{ LocalDefaultAddressSpace, GlobalDefaultAddressSpace string }
	if err := m.ask(ctx, kindIPAM, in.Driver, "GetDefaultAddressSpaces", nil, &spaces); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			m.releasePools(context.WithoutCancel(ctx), r)
			r.Pools = nil
		}
	}()
	configs := in.Config
	has := map[bool]bool{}
	for _, c := range configs {
		if c.Subnet.IsValid() {
			has[c.Subnet.Addr().Is6()] = true
			r.EnableIPv6 = r.EnableIPv6 || c.Subnet.Addr().Is6()
		}
	}
	if r.EnableIPv4 && !has[false] {
		configs = append(configs, network.IPAMConfig{})
	}
	six := len(configs)
	if r.EnableIPv6 && !has[true] {
		configs = append(configs, network.IPAMConfig{})
	}
	taken := m.subnets()
	for i, c := range configs {
		type request struct {
			AddressSpace, Pool, SubPool string
			Options                     map[string]string
			V6                          bool
		}
		q := request{AddressSpace: spaces.LocalDefaultAddressSpace, Options: in.Options, V6: i >= six || c.Subnet.IsValid() && c.Subnet.Addr().Is6()}
		if c.Subnet.IsValid() {
			q.Pool = c.Subnet.String()
		}
		if c.IPRange.IsValid() {
			q.SubPool = c.IPRange.String()
		}
		var got struct {
			PoolID, Pool string
			Data         map[string]string
		}
		if err := m.ask(ctx, kindIPAM, in.Driver, "RequestPool", q, &got); err != nil {
			return err
		}
		p, perr := netip.ParsePrefix(got.Pool)
		if perr != nil || p.Addr().Is6() != q.V6 || c.Subnet.IsValid() && p != c.Subnet {
			return fault.New(fault.Internal, "cannot create network %s: address driver %s gives out the pool %q for %q", r.Name, in.Driver, got.Pool, q.Pool)
		}
		c.Subnet = p.Masked()
		r.Pools = append(r.Pools, poolRecord{got.PoolID, c.Subnet})
		for _, t := range taken {
			if t.Overlaps(c.Subnet) {
				return fault.New(fault.Forbidden, "invalid pool request: Pool overlaps with other one on this address space: %s and %s", c.Subnet, t)
			}
		}
		taken = append(taken, c.Subnet)
		if g, gerr := netip.ParsePrefix(got.Data[ipamGateway]); gerr == nil && !c.Gateway.IsValid() {
			c.Gateway = g.Addr()
		} else {
			a, err := m.requestAddress(ctx, in.Driver, got.PoolID, c.Gateway, map[string]string{ipamRequestType: ipamGateway})
			if err != nil {
				return err
			}
			c.Gateway = a
		}
		if !c.Subnet.Contains(c.Gateway) {
			return fault.New(fault.Internal, "cannot create network %s: address driver %s gives out the gateway %s in %s", r.Name, in.Driver, c.Gateway, c.Subnet)
		}
		for k, a := range c.AuxAddress {
			if _, err := m.requestAddress(ctx, in.Driver, got.PoolID, a, nil); err != nil {
				return fmt.Errorf("auxiliary address %s: %w", k, err)
			}
		}
		r.IPAM.Config = append(r.IPAM.Config, c)
	}
	return nil
}

func (m *Manager) requestAddress(ctx context.Context, driver, pool string, want netip.Addr, options map[string]string) (netip.Addr, error) {
	type request struct {
		PoolID, Address string
		Options         map[string]string
	}
	q := request{PoolID: pool, Options: options}
	if want.IsValid() {
		q.Address = want.String()
	}
	var got struct{ Address string }
	if err := m.ask(ctx, kindIPAM, driver, "RequestAddress", q, &got); err != nil {
		var no *plugin.Refused
		if errors.As(err, &no) {
			return netip.Addr{}, fault.As(fault.Exhausted, err)
		}
		return netip.Addr{}, err
	}
	p, err := netip.ParsePrefix(got.Address)
	if err != nil || want.IsValid() && p.Addr() != want.Unmap() {
		return netip.Addr{}, fault.New(fault.Internal, "address driver %s gives out %q for %q", driver, got.Address, q.Address)
	}
	return p.Addr(), nil
}

func (m *Manager) releaseAddress(ctx context.Context, r *netRecord, a netip.Addr) {
	for _, p := range r.Pools {
		if p.Subnet.Contains(a) {
			if err := m.ask(ctx, kindIPAM, r.IPAM.Driver, "ReleaseAddress", map[string]string{"PoolID": p.ID, "Address": a.String()}, nil); err != nil {
				m.log.Warn("an address driver does not take an address back", "network", r.Name, "address", a, "cause", err)
			}
			return
		}
	}
}

// releasePools gives a network's subnets back.
func (m *Manager) releasePools(ctx context.Context, r *netRecord) {
	for _, c := range r.IPAM.Config {
		if c.Gateway.IsValid() {
			m.releaseAddress(ctx, r, c.Gateway)
		}
	}
	for _, p := range r.Pools {
		if err := m.ask(ctx, kindIPAM, r.IPAM.Driver, "ReleasePool", map[string]string{"PoolID": p.ID}, nil); err != nil {
			m.log.Warn("an address driver does not take a pool back", "network", r.Name, "pool", p.Subnet, "cause", err)
		}
	}
}

// managed connects a network with the plugin that manages its addresses.
func (m *Manager) managed(n *netw) {
	if len(n.rec.Pools) == 0 {
		return
	}
	n.giveBack = func(a netip.Addr) { m.releaseAddress(context.Background(), n.rec, a) }
}

// pickManaged asks a network's plugin for an address.
func (m *Manager) pickManaged(n *netw, six bool, want netip.Addr, mac string) (netip.Addr, error) {
	var options map[string]string
	if mac != "" {
		options = map[string]string{ipamMAC: mac}
	}
	var last error = fault.New(fault.Exhausted, "cannot give an address on network %s: it has no pool", n.rec.Name)
	for _, p := range n.rec.Pools {
		if p.Subnet.Addr().Is6() != six || want.IsValid() && !p.Subnet.Contains(want) {
			continue
		}
		a, err := m.requestAddress(context.Background(), n.rec.IPAM.Driver, p.ID, want, options)
		if err != nil {
			last = err
			continue
		}
		if err := n.take(a); err != nil {
			return a, fault.New(fault.Conflict, "address driver %s gives out %s: %w", n.rec.IPAM.Driver, a, err)
		}
		return a, nil
	}
	return netip.Addr{}, last
}
