package network

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/moby/moby/api/types/network"
)

// Filters are Docker's: key to set of values.
type Filters = map[string]map[string]bool

// List returns the networks that pass the filters, by name.
func (m *Manager) List(ctx context.Context, filters map[string]map[string]bool) ([]network.Inspect, error) {
	m.up()
	pass, err := compile(filters, "driver", "id", "label", "label!", "name", "scope", "type", "dangling", "until")
	if err != nil {
		return nil, err
	}
	m.followCNI()
	m.mu.RLock()
	defer m.mu.RUnlock()
	out := []network.Inspect{}
	for _, n := range m.nets {
		if pass(n) {
			out = append(out, m.inspectLocked(n))
		}
	}
	slices.SortFunc(out, func(a, b network.Inspect) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Inspect returns one network.
func (m *Manager) Inspect(ctx context.Context, nameOrID string) (network.Inspect, error) {
	m.up()
	m.followCNI()
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.findLocked(nameOrID)
	if err != nil {
		return network.Inspect{}, err
	}
	in := m.inspectLocked(n)
	if len(n.pool4)+len(n.pool6) > 0 {
		st := network.SubnetStatuses{}
		for _, p := range append(n.pool4[:len(n.pool4):len(n.pool4)], n.pool6...) {
			used, free := p.Usage()
			st[p.Subnet()] = network.SubnetStatus{IPsInUse: used, DynamicIPsAvailable: free}
		}
		in.Status = &network.Status{IPAM: network.IPAMStatus{Subnets: st}}
	}
	return in, nil
}

func (m *Manager) inspectLocked(n *netw) network.Inspect {
	in := network.Inspect{Network: n.rec.Network, Containers: map[string]network.EndpointResource{}}
	in.IPAM.Config = slices.Clone(n.rec.IPAM.Config)
	if in.IPAM.Config == nil {
		in.IPAM.Config = []network.IPAMConfig{}
	}
	in.Services = n.balance()
	for id, e := range n.eps {
		if !e.HasNS {
			continue
		}
		r := network.EndpointResource{Name: e.ContainerName, EndpointID: e.ID, MacAddress: network.HardwareAddr(e.MAC)}
		if e.IPv4.IsValid() {
			r.IPv4Address = netip.PrefixFrom(e.IPv4, e.Bits4)
		}
		if e.IPv6.IsValid() {
			r.IPv6Address = netip.PrefixFrom(e.IPv6, e.Bits6)
		}
		in.Containers[id] = r
	}
	return in
}

// Prune removes the networks that nobody uses.
func (m *Manager) Prune(ctx context.Context, filters map[string]map[string]bool) (network.PruneReport, error) {
	m.up()
	rep := network.PruneReport{NetworksDeleted: []string{}}
	pass, err := compile(filters, "label", "label!", "until")
	if err != nil {
		return rep, err
	}
	m.mu.RLock()
	var names []string
	for _, n := range m.nets {
		if !predefined(n.rec.Name) && n.rec.Driver != driverCNI && !n.rec.ConfigOnly && m.unusedLocked(n) == nil && pass(n) {
			names = append(names, n.rec.Name)
		}
	}
	m.mu.RUnlock()
	slices.Sort(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return rep, err
		}
		switch err := m.Remove(ctx, name); {
		case err == nil:
			rep.NetworksDeleted = append(rep.NetworksDeleted, name)
		case fault.Is(err, fault.Forbidden) || fault.Is(err, fault.NotFound): // used or gone meanwhile
		default:
			return rep, err
		}
	}
	return rep, nil
}

// compile checks filters and makes them a test of one network.
func compile(f Filters, allowed ...string) (func(*netw) bool, error) {
	var until time.Time
	for k, vs := range f {
		if !slices.Contains(allowed, k) {
			return nil, fault.New(fault.Invalid, "invalid filter '%s'", k)
		}
		for v := range vs {
			switch k {
			case "dangling":
				if _, err := strconv.ParseBool(v); err != nil {
					return nil, fault.New(fault.Invalid, "invalid filter 'dangling=%s'", v)
				}
			case "type":
				if v != "builtin" && v != "custom" {
					return nil, fault.New(fault.Invalid, "invalid filter: 'type'='%s'", v)
				}
			case "scope":
				if v != "local" && v != "global" && v != "swarm" {
					return nil, fault.New(fault.Invalid, "invalid filter 'scope=%s'", v)
				}
			case "until":
				t, err := parseUntil(v)
				if err != nil || len(vs) > 1 {
					return nil, fault.New(fault.Invalid, "invalid filter 'until=%s': give one time or duration", v)
				}
				until = t
			}
		}
	}
	return func(n *netw) bool {
		r := n.rec
		builtin := predefined(r.Name)
		if r.Driver == driverCNI && len(n.eps) == 0 && !asksForCNI(f) {
			return false
		}
		for k, vs := range f {
			if len(vs) == 0 {
				continue
			}
			ok := false
			for v := range vs {
				switch k {
				case "driver":
					ok = ok || r.Driver == v
				case "id":
					ok = ok || strings.HasPrefix(r.ID, v)
				case "name":
					ok = ok || strings.Contains(r.Name, v)
				case "scope":
					ok = ok || r.Scope == v
				case "type":
					ok = ok || builtin == (v == "builtin")
				case "dangling":
					want, _ := strconv.ParseBool(v)
					ok = ok || want == (!builtin && len(n.eps) == 0)
				case "until":
					ok = r.Created.Before(until)
				}
			}
			switch k {
			case "label":
				ok = true
				for v := range vs {
					ok = ok && hasLabel(r.Labels, v)
				}
			case "label!":
				ok = true
				for v := range vs {
					ok = ok && !hasLabel(r.Labels, v)
				}
			}
			if !ok {
				return false
			}
		}
		return true
	}, nil
}

// asksForCNI tells whether a filter means networks of CNI. They are the host's
// configuration, not made by anybody here: clients that remove all networks they
// see must not stumble over those that nothing uses.
func asksForCNI(f Filters) bool {
	for _, k := range []string{"driver", "name", "id"} {
		for v := range f[k] {
			if k == "id" || v == driverCNI || strings.HasPrefix(v, cniPrefix) {
				return true
			}
		}
	}
	return false
}

func hasLabel(labels map[string]string, want string) bool {
	k, v, given := strings.Cut(want, "=")
	have, ok := labels[k]
	return ok && (!given || have == v)
}

// parseUntil reads a point in time: a duration back from now, a Unix time or
// a date.
func parseUntil(s string) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return time.Now().Add(-d), nil
	}
	if f, err := strconv.ParseFloat(s, 64); err == nil {
		return time.Unix(0, int64(f*1e9)), nil
	}
	var err error
	for _, l := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		var t time.Time
		if t, err = time.ParseInLocation(l, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, err
}
