package network

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/ipam"
	"github.com/moby/moby/api/types/network"
)

// predefined tells whether a name belongs to a network that always exists or
// to a mode of docker run --network.
func predefined(name string) bool {
	switch name {
	case network.NetworkBridge, network.NetworkHost, network.NetworkNone, network.NetworkDefault, "container":
		return true
	}
	return false
}

// Create makes a network.
func (m *Manager) Create(ctx context.Context, req network.CreateRequest) (network.CreateResponse, error) {
	m.up()
	if !plainName(req.Name, 255) {
		return network.CreateResponse{}, fault.New(fault.Invalid, "invalid network name: %q: letters, digits and _.- are allowed, and the first must be a letter or digit", req.Name)
	}
	if predefined(req.Name) {
		return network.CreateResponse{}, fault.New(fault.Forbidden, "operation is not permitted on predefined %s network", req.Name)
	}
	switch req.Driver {
	case "host", "null", "none":
		return network.CreateResponse{}, fault.New(fault.Forbidden, "only one instance of %q network is allowed", req.Driver)
	}
	if req.Options[optDefault] == "true" {
		return network.CreateResponse{}, fault.New(fault.Forbidden, "cannot create network %s: only the network named bridge is the default bridge", req.Name)
	}
	r, err := m.create(ctx, req, req.Options[optName])
	if err != nil {
		return network.CreateResponse{}, err
	}
	resp := network.CreateResponse{ID: r.ID}
	if w := m.forwardWarning(); w != "" && r.Driver == "bridge" && !r.Internal {
		resp.Warning = w
	}
	return resp, nil
}

func (m *Manager) create(ctx context.Context, req network.CreateRequest, link string) (_ *netRecord, err error) {
	m.makeMu.Lock()
	defer m.makeMu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := m.inherit(&req); err != nil {
		return nil, err
	}
	r := &netRecord{Version: recordVersion, Network: network.Network{
		Name: req.Name, ID: newID(), Created: now(), Scope: "local", Driver: req.Driver,
		Internal: req.Internal, Attachable: req.Attachable, ConfigOnly: req.ConfigOnly,
		Options: maps.Clone(req.Options), Labels: maps.Clone(req.Labels),
	}}
	if req.ConfigFrom != nil {
		r.ConfigFrom = *req.ConfigFrom
	}
	if r.Options == nil {
		r.Options = map[string]string{}
	}
	if r.Labels == nil {
		r.Labels = map[string]string{}
	}
	if r.Driver == "" || r.Driver == "default" {
		r.Driver = "bridge"
	}
	if req.Ingress || req.Scope != "" && req.Scope != "local" {
		return nil, fault.New(fault.Forbidden, "cannot create network %s: swarm networks are not part of this engine", req.Name)
	}
	m.mu.RLock()
	_, taken := m.names[r.Name]
	m.mu.RUnlock()
	if taken {
		return nil, fault.New(fault.Conflict, "network with name %s already exists", r.Name)
	}
	if err := checkOwn(r.Options, optBandwidth, optBandwidthIn, optBandwidthEg, optVIP); err != nil {
		return nil, err
	}
	opts, err := parseOptions(r.Options, r.Internal)
	if err != nil {
		return nil, err
	}
	switch r.Driver {
	case "bridge", "host", "null":
	case "macvlan", "ipvlan":
		r.Parent = opts.parent
	default:
		if m.cfg.Plugins != nil {
			if _, err = m.cfg.Plugins.Find(ctx, kindNetwork, r.Driver); err == nil {
				r.Plugin = true
				break
			} else if !fault.Is(err, fault.NotFound) {
				return nil, fmt.Errorf("cannot create network %s: %w", r.Name, err)
			}
		}
		return nil, fault.New(fault.NotFound, "cannot create network %s: network driver %q not found; there are bridge, macvlan and ipvlan, and plugins", r.Name, r.Driver)
	}
	wired := r.wired()
	if r.Driver == "bridge" && !r.ConfigOnly {
		// From the look at what is taken to the bridge that takes it.
		defer m.turn(ctx)()
	}
	if wired && !r.ConfigOnly {
		if m.broken != nil && !predefined(r.Name) {
			return nil, m.broken
		}
		if err := m.address(ctx, r, req, opts); err != nil {
			return nil, err
		}
		made := r.Pools
		defer func() {
			if err != nil && len(made) > 0 {
				m.releasePools(context.WithoutCancel(ctx), r)
			}
		}()
	} else {
		r.EnableIPv4 = req.EnableIPv4 == nil || *req.EnableIPv4
		r.EnableIPv6 = req.EnableIPv6 != nil && *req.EnableIPv6
		if req.IPAM != nil {
			r.IPAM = *req.IPAM
		}
	}
	if r.IPAM.Driver == "" {
		r.IPAM.Driver = "default"
	}
	if wired && !r.ConfigOnly {
		if r.MTU = opts.mtu; r.MTU == 0 {
			r.MTU = m.cfg.MTU
		}
		if r.MTU == 0 {
			r.MTU = bridge.UplinkMTU()
		}
	}
	if r.Driver == "bridge" && !r.ConfigOnly {
		if r.Link = link; r.Link == "" {
			r.Link = m.bridgePrefix() + r.ID[:8]
		}
		if err := m.linkFree(r.Link); err != nil {
			return nil, err
		}
		// A link that bears our mark was left by a former run.
		r.Foreign = m.links.Index(r.Link) != 0 && !strings.HasPrefix(r.Link, m.vethPrefix()) && !strings.HasPrefix(r.Link, m.bridgePrefix())
		r.MAC = make([]byte, 6)
		rand.Read(r.MAC)
		r.MAC[0] = r.MAC[0]&^1 | 2 // locally administered, not multicast
		if r.Foreign {
			r.MAC = nil
		}
	}
	n, err := newNetw(r)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot create network %s: %w", r.Name, err)
	}
	m.managed(n)
	for _, p := range append(n.pool4[:len(n.pool4):len(n.pool4)], n.pool6...) {
		if _, free := p.Usage(); free == 0 {
			return nil, fault.New(fault.Invalid, "cannot create network %s: subnet %s has no address left for containers", r.Name, p.Subnet())
		}
	}
	if r.lan() && !r.ConfigOnly {
		if err := m.checkParent(n); err != nil {
			return nil, err
		}
	}
	if err := m.disk.saveNetwork(r); err != nil {
		return nil, errors.Join(err, m.fellParent(r))
	}
	if r.Driver == "bridge" && !r.ConfigOnly && m.broken == nil {
		if err := m.raise(n); err != nil {
			m.fell(n)
			return nil, errors.Join(fmt.Errorf("cannot create network %s: %w", r.Name, err), m.disk.dropNetwork(r.ID))
		}
	}
	if r.Plugin && !r.ConfigOnly {
		if err := m.plugIn(ctx, n); err != nil {
			return nil, errors.Join(err, m.disk.dropNetwork(r.ID))
		}
	}
	m.mu.Lock()
	m.nets[r.ID], m.names[r.Name] = n, n
	m.mu.Unlock()
	return r, nil
}

// linkFree refuses a bridge name that another network of ours uses.
func (m *Manager) linkFree(link string) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, o := range m.nets {
		if o.rec.Link == link {
			return fault.New(fault.Conflict, "cannot use bridge %s: network %s has it", link, o.rec.Name)
		}
	}
	return nil
}

// inherit fills a request from the config-only network it names.
func (m *Manager) inherit(req *network.CreateRequest) error {
	if req.ConfigFrom == nil || req.ConfigFrom.Network == "" {
		req.ConfigFrom = nil
		return nil
	}
	if req.ConfigOnly {
		return fault.New(fault.Invalid, "cannot create network %s: a configuration-only network cannot come from another", req.Name)
	}
	from, err := m.find(req.ConfigFrom.Network)
	if err != nil {
		return err
	}
	if !from.rec.ConfigOnly {
		return fault.New(fault.Invalid, "cannot create network %s: %s is not a configuration-only network", req.Name, from.rec.Name)
	}
	if len(req.Options) > 0 || len(req.Labels) > 0 || req.IPAM != nil && len(req.IPAM.Config) > 0 || req.Internal {
		return fault.New(fault.Invalid, "cannot create network %s: options, labels and addresses come from %s and cannot be given", req.Name, from.rec.Name)
	}
	f := from.rec
	req.Options, req.Labels, req.Internal = maps.Clone(f.Options), maps.Clone(f.Labels), f.Internal
	req.EnableIPv4, req.EnableIPv6 = &f.EnableIPv4, &f.EnableIPv6
	i := f.IPAM
	req.IPAM = &i
	return nil
}

// address decides on a network's subnets and gateways.
func (m *Manager) address(ctx context.Context, r *netRecord, req network.CreateRequest, opts options) error {
	var in network.IPAM
	if req.IPAM != nil {
		in = *req.IPAM
	}
	switch in.Driver {
	case "", "default", "host-local":
	case ipamDHCP:
		r.IPAM, r.EnableIPv4 = network.IPAM{Driver: ipamDHCP, Options: maps.Clone(in.Options)}, true
		return checkDHCP(r, in, req)
	case ipamNull:
		r.IPAM = network.IPAM{Driver: ipamNull, Options: maps.Clone(in.Options)}
		return nil
	default:
		err := m.requestPools(ctx, r, in, req)
		if fault.Is(err, fault.NotFound) {
			return fault.New(fault.NotFound, "cannot create network %s: address driver %q not found; there are default, dhcp and null, and plugins", r.Name, in.Driver)
		}
		return err
	}
	ours := m.ourLinks()
	r.EnableIPv4 = req.EnableIPv4 == nil || *req.EnableIPv4
	has6, chosen := false, false
	for _, c := range in.Config {
		chosen = chosen || c.Subnet.IsValid()
		has6 = has6 || c.Subnet.IsValid() && c.Subnet.Addr().Is6()
	}
	switch {
	case req.EnableIPv6 != nil:
		r.EnableIPv6 = *req.EnableIPv6
	case has6 || m.cfg.IPv6 == "on":
		r.EnableIPv6 = true
	case m.cfg.IPv6 != "off" && !chosen: // who names subnets has named all
		r.EnableIPv6 = m.six && r.Driver == "bridge" && bridge.HasIPv6(ours)
	}
	if !r.EnableIPv4 && !r.EnableIPv6 {
		return fault.New(fault.Invalid, "cannot create network %s: IPv4 or IPv6 must be enabled", r.Name)
	}
	if r.EnableIPv6 && !m.six {
		return fault.New(fault.Unsupported, "cannot create network %s: IPv6 is off on this host or in the engine's configuration", r.Name)
	}
	r.IPAM = network.IPAM{Driver: "default", Options: maps.Clone(in.Options)}
	taken := m.subnets()
	four, six := false, false
	for _, c := range in.Config {
		if !c.Subnet.IsValid() {
			if c.IPRange.IsValid() || c.Gateway.IsValid() || len(c.AuxAddress) > 0 {
				return fault.New(fault.Invalid, "cannot create network %s: a range, gateway or auxiliary address needs its subnet", r.Name)
			}
			continue
		}
		if c.Subnet != c.Subnet.Masked() {
			return fault.New(fault.Invalid, "invalid network config: invalid subnet %s: it should be %s", c.Subnet, c.Subnet.Masked())
		}
		if c.Subnet.Addr().Is4In6() {
			return fault.New(fault.Invalid, "invalid network config: invalid subnet %s: it is IPv4 mapped to IPv6", c.Subnet)
		}
		if c.IPRange.IsValid() {
			c.IPRange = c.IPRange.Masked()
			if c.IPRange.Addr().Is4() != c.Subnet.Addr().Is4() || c.IPRange.Bits() < c.Subnet.Bits() || !c.Subnet.Contains(c.IPRange.Addr()) {
				return fault.New(fault.Invalid, "invalid network config: invalid ip-range %s: it is not in subnet %s", c.IPRange, c.Subnet)
			}
		}
		if c.Gateway.IsValid() && !c.Subnet.Contains(c.Gateway) {
			return fault.New(fault.Invalid, "invalid network config: invalid gateway %s: it is not in subnet %s", c.Gateway, c.Subnet)
		}
		for k, a := range c.AuxAddress {
			if !c.Subnet.Contains(a) {
				return fault.New(fault.Invalid, "invalid network config: invalid auxiliary address %s=%s: it is not in subnet %s", k, a, c.Subnet)
			}
		}
		if c.Subnet.Addr().Is4() && !r.EnableIPv4 || c.Subnet.Addr().Is6() && !r.EnableIPv6 {
			return fault.New(fault.Invalid, "cannot create network %s: subnet %s is of a family that is not enabled", r.Name, c.Subnet)
		}
		for _, t := range taken {
			if t.Overlaps(c.Subnet) {
				return fault.New(fault.Forbidden, "invalid pool request: Pool overlaps with other one on this address space: %s and %s", c.Subnet, t)
			}
		}
		taken = append(taken, c.Subnet)
		four, six = four || c.Subnet.Addr().Is4(), six || c.Subnet.Addr().Is6()
		r.IPAM.Config = append(r.IPAM.Config, c)
	}
	if r.EnableIPv4 && !four {
		s := m.cfg.Subnet
		if r.Name != network.NetworkBridge || !s.IsValid() {
			busy, err := bridge.Busy(ours)
			if err != nil {
				return err
			}
			if s, err = ipam.Choose(m.cfg.DefaultPools, append(busy, taken...)); err != nil {
				return fault.New(fault.Exhausted, "cannot create network %s: %w; name a subnet, or give the engine more address pools", r.Name, err)
			}
		}
		r.IPAM.Config = append([]network.IPAMConfig{{Subnet: s.Masked()}}, r.IPAM.Config...)
	}
	if r.EnableIPv6 && !six {
		var seed [7]byte
		rand.Read(seed[:])
		r.IPAM.Config = append(r.IPAM.Config, network.IPAMConfig{Subnet: ipam.ULA(seed)})
	}
	return m.gateways(r, opts)
}

// gateways gives every subnet without one a gateway: the lowest address that
// is free.
func (m *Manager) gateways(r *netRecord, opts options) error {
	for i := range r.IPAM.Config {
		c := &r.IPAM.Config[i]
		if c.Gateway.IsValid() || r.lan() && r.Internal {
			continue
		}
		four := c.Subnet.Addr().Is4()
		if four && opts.noAddress4 || !four && opts.noAddress6 {
			continue
		}
		// Of the whole subnet, not of the range that containers get theirs from.
		p, err := ipam.NewPool(c.Subnet, netip.Prefix{})
		if err != nil {
			return fault.New(fault.Invalid, "cannot create network %s: %w", r.Name, err)
		}
		for _, a := range c.AuxAddress {
			_ = p.Take(a)
		}
		if c.Gateway, err = p.First(); err != nil {
			return fault.New(fault.Exhausted, "cannot create network %s: subnet %s has no room for a gateway", r.Name, c.Subnet)
		}
	}
	return nil
}

// subnets lists those of all our networks.
func (m *Manager) subnets() []netip.Prefix {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var out []netip.Prefix
	for _, n := range m.nets {
		if n.rec.ConfigOnly {
			continue
		}
		for _, c := range n.rec.IPAM.Config {
			out = append(out, c.Subnet)
		}
	}
	return out
}

// ourLinks names the links whose addresses are not the host's own.
func (m *Manager) ourLinks() map[string]bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	out := map[string]bool{m.vethPrefix() + "i0": true, m.vethPrefix() + "i1": true}
	for _, n := range m.nets {
		if n.rec.Link != "" && !n.rec.Foreign {
			out[n.rec.Link] = true
		}
	}
	return out
}

// fell removes what raise made.
func (m *Manager) fell(n *netw) error {
	err := errors.Join(m.table.DelBridge(n.rec.Link), m.revoke(context.Background(), n.rec.Link, false))
	if i := m.links.Index(n.rec.Link); i != 0 && !n.rec.Foreign {
		err = errors.Join(err, m.links.Delete(i))
	}
	return err
}

// ensureBuiltin makes the networks that every engine has.
func (m *Manager) ensureBuiltin(ctx context.Context, names ...string) error {
	for _, d := range []struct{ name, driver string }{{network.NetworkBridge, "bridge"}, {network.NetworkHost, "host"}, {network.NetworkNone, "null"}} {
		if m.names[d.name] != nil || !slices.Contains(names, d.name) {
			continue
		}
		req := network.CreateRequest{Name: d.name, Driver: d.driver}
		link := ""
		if d.driver == "bridge" {
			if link = m.cfg.BridgeName; link == "" {
				link = m.vethPrefix() + "br0"
			} else if !validIfName(link) {
				return fault.New(fault.Invalid, "cannot use %q as the name of a bridge", link)
			}
			req.Options = map[string]string{
				optDefault: "true", optICC: "true", optMasquerade: "true", optHostIP: "0.0.0.0", optName: link,
			}
		}
		if _, err := m.create(ctx, req, link); err != nil {
			if d.driver != "bridge" {
				return err
			}
			// An engine with host and none is better than no engine.
			m.log.Error("the default network could not be made", "cause", err)
			if m.broken == nil {
				m.broken = fault.New(fault.Unsupported, "cannot use bridge networks on this host: %w", err)
			}
		}
	}
	return nil
}

// Remove deletes a network that no container is on.
func (m *Manager) Remove(ctx context.Context, nameOrID string) error {
	m.up()
	m.makeMu.Lock()
	defer m.makeMu.Unlock()
	n, err := m.find(nameOrID)
	if err != nil {
		return err
	}
	if predefined(n.rec.Name) {
		return fault.New(fault.Forbidden, "%s is a pre-defined network and cannot be removed", n.rec.Name)
	}
	if n.rec.Driver == driverCNI {
		return fault.New(fault.Forbidden, "cannot remove network %s: it is CNI configuration; remove %s", n.rec.Name, n.rec.Options[optCNIFile])
	}
	m.mu.Lock()
	if err := m.unusedLocked(n); err != nil {
		m.mu.Unlock()
		return err
	}
	// Out of the books first, so that nobody attaches meanwhile.
	delete(m.nets, n.rec.ID)
	delete(m.names, n.rec.Name)
	m.mu.Unlock()
	back := func(err error) error {
		m.mu.Lock()
		m.nets[n.rec.ID], m.names[n.rec.Name] = n, n
		m.mu.Unlock()
		return fmt.Errorf("cannot remove network %s: %w", n.rec.Name, err)
	}
	if n.rec.Driver == "bridge" && !n.rec.ConfigOnly {
		if err := m.fell(n); err != nil {
			return back(err)
		}
	}
	if err := m.fellParent(n.rec); err != nil {
		return back(err)
	}
	if n.rec.Plugin && !n.rec.ConfigOnly {
		m.later.Wait() // endpoints of it may be on their way out
		if err := m.plugOut(ctx, n); err != nil {
			return back(err)
		}
	}
	if len(n.rec.Pools) > 0 {
		m.releasePools(ctx, n.rec)
	}
	if err := m.disk.dropNetwork(n.rec.ID); err != nil {
		return back(err)
	}
	return nil
}

func (m *Manager) unusedLocked(n *netw) error {
	if len(n.eps) > 0 {
		var who []string
		for _, e := range n.eps {
			who = append(who, fmt.Sprintf("name:%q id:%q", e.ContainerName, e.ID[:12]))
		}
		return fault.New(fault.Forbidden, "network %s has active endpoints (%s)", n.rec.Name, strings.Join(who, ", "))
	}
	for _, o := range m.nets {
		if n.rec.ConfigOnly && o.rec.ConfigFrom.Network == n.rec.Name {
			return fault.New(fault.Forbidden, "configuration network %q is in use by network %q", n.rec.Name, o.rec.Name)
		}
	}
	return nil
}
