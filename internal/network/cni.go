package network

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/cni"
)

// A configured CNI network shows as a network named cni:NAME of the driver cni.
// It is not made or removed here: it comes and goes with its configuration.
const (
	cniPrefix = "cni:"
	driverCNI = "cni"
	// Driver options of an endpoint: a capability as JSON, and an item of CNI_ARGS.
	optCNICapability = "cni.capability."
	optCNIArg        = "cni.arg."
	// Options that describe the network.
	optCNIPlugins = "cni.plugins"
	optCNIFile    = "cni.file"
)

// cniNetwork is the record of a configured network. Its id follows from its
// name, so that endpoints find it again.
func cniNetwork(c cni.Network) *netRecord {
	sum := sha256.Sum256([]byte(cniPrefix + c.Name))
	return &netRecord{Version: recordVersion, Network: network.Network{
		Name: cniPrefix + c.Name, ID: hex.EncodeToString(sum[:]), Created: now(), Scope: "local", Driver: driverCNI, EnableIPv4: true,
		IPAM: network.IPAM{Driver: driverCNI}, Labels: map[string]string{},
		Options: map[string]string{optCNIPlugins: strings.Join(c.Plugins, ","), optCNIFile: c.File},
	}}
}

// followCNI lets the books follow the configuration: networks that are new in it
// appear, and those that are gone disappear when nobody is on them.
func (m *Manager) followCNI() {
	if m.cfg.CNI == nil {
		return
	}
	gen := m.cfg.CNI.Generation()
	m.mu.Lock()
	defer m.mu.Unlock()
	if gen == m.cniSeen {
		return
	}
	have := map[string]bool{}
	stay := false
	for _, c := range m.cfg.CNI.Networks() {
		r := cniNetwork(c)
		if have[r.ID] {
			continue // the second of a name
		}
		have[r.ID] = true
		if old := m.nets[r.ID]; old != nil && (len(old.eps) > 0 || maps.Equal(old.rec.Options, r.Options)) {
			continue // what describes it may be old while somebody is on it
		}
		n, err := newNetw(r)
		if err != nil {
			m.log.Warn("a CNI network cannot be listed", "network", r.Name, "cause", err)
			continue
		}
		m.nets[r.ID], m.names[r.Name] = n, n
	}
	for id, n := range m.nets {
		if n.rec.Driver != driverCNI || have[id] {
			continue
		}
		if len(n.eps) > 0 {
			stay = true // look again
			continue
		}
		delete(m.nets, id)
		delete(m.names, n.rec.Name)
		if err := m.disk.dropNetwork(id); err != nil {
			m.log.Warn("the record of a CNI network stays", "network", n.rec.Name, "cause", err)
		}
	}
	if !stay {
		m.cniSeen = gen
	}
}

// plug connects an endpoint through its network's plugins.
func (m *Manager) plug(ctx context.Context, n *netw, e *endpoint, req AttachRequest, set *network.EndpointSettings) (warnings []string, err error) {
	if m.cfg.CNI == nil {
		return nil, fault.New(fault.Unsupported, "cannot connect to network %s: CNI is off", n.rec.Name)
	}
	name := strings.TrimPrefix(n.rec.Name, cniPrefix)
	conf, err := m.cfg.CNI.Network(name)
	if err != nil {
		return nil, err
	}
	q := cni.Request{
		Owner: cni.Containers, ContainerID: e.ContainerID, IfName: e.IfName, Network: name, NS: req.NetNS,
		Args: [][2]string{{"IgnoreUnknown", "1"}}, Extra: map[string]json.RawMessage{},
	}
	if warnings, err = asked(&q, conf, e, set); err != nil {
		return nil, err
	}
	// Which networks the endpoint needs after a restart must be on the disk.
	if err := m.disk.saveNetwork(n.rec); err != nil {
		return nil, err
	}
	if err := bridge.LoopbackUp(req.NetNS); err != nil {
		return nil, err
	}
	if err := m.delegate(n, e, conf, req.Ports, &q); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.undelegate(e)
		}
	}()
	res, err := m.cfg.CNI.Add(ctx, q)
	if err != nil {
		return nil, err
	}
	if err := m.learn(n, e, res, set); err != nil {
		m.unplug(context.WithoutCancel(ctx), e)
		return nil, err
	}
	return warnings, nil
}

// asked turns what the user asked for into capabilities and arguments.
func asked(q *cni.Request, conf cni.Network, e *endpoint, set *network.EndpointSettings) (warnings []string, err error) {
	if c := set.IPAMConfig; c != nil {
		for _, a := range []netip.Addr{c.IPv4Address, c.IPv6Address} {
			if a.IsValid() {
				q.IPs = append(q.IPs, a.Unmap().String())
			}
		}
	}
	if len(q.IPs) > 0 && !conf.Has(cni.IPs) {
		// host-local and others take one this way, too.
		q.Args = append(q.Args, [2]string{"IP", q.IPs[0]})
	}
	if len(set.MacAddress) > 0 {
		q.MAC = set.MacAddress.String()
		if !conf.Has(cni.MAC) {
			q.Args = append(q.Args, [2]string{"MAC", q.MAC})
		}
	}
	if q.Aliases = e.Aliases; len(q.Aliases) > 0 && !conf.Has(cni.Aliases) {
		warnings = append(warnings, fmt.Sprintf("aliases mean nothing on network %s%s: none of its plugins has the capability aliases", cniPrefix, conf.Name))
	}
	for k, v := range e.DriverOpts {
		if c, ok := strings.CutPrefix(k, optCNICapability); ok {
			if !conf.Has(c) {
				return nil, fault.New(fault.Invalid, "cannot use driver option %s: no plugin of network %s%s has that capability", k, cniPrefix, conf.Name)
			}
			q.Extra[c] = json.RawMessage(v)
		} else if a, ok := strings.CutPrefix(k, optCNIArg); ok {
			q.Args = append(q.Args, [2]string{a, v})
		}
	}
	return warnings, nil
}

// delegate reserves the ports to publish on the host and leaves them to the
// plugins.
func (m *Manager) delegate(n *netw, e *endpoint, conf cni.Network, pm network.PortMap, q *cni.Request) (err error) {
	if len(pm) == 0 {
		return nil
	}
	if !conf.Has(cni.PortMappings) {
		return fault.New(fault.Unsupported, "cannot publish ports on network %s: none of its plugins has the capability portMappings; add portmap to %s", n.rec.Name, conf.File)
	}
	// The addresses are not known yet; hosts of either family may be named.
	ws, err := expand(pm, netip.Addr{}, &endpoint{IPv4: netip.IPv4Unspecified(), IPv6: netip.IPv6Unspecified()}, false)
	if err != nil {
		return err
	}
	if err := m.ports.room(len(ws)); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			m.undelegate(e)
		}
	}()
	for _, w := range ws {
		host := w.hosts[0] // 0.0.0.0 where none is named: the plugin takes that for all
		port := w.first
		if host.Is4() || port == 0 {
			if host.Is6() {
				host = netip.IPv4Unspecified()
			}
			if port, err = m.pick(w, []netip.Addr{host}); err != nil {
				return err
			}
		}
		p := published{Host: w.hosts[0], Proto: string(w.container.Proto()), HostPort: port, Container: w.container.Num(), Delegated: true, Held: host}
		e.Ports = append(e.Ports, p)
		pmap := cni.PortMapping{HostPort: port, ContainerPort: p.Container, Protocol: p.Proto}
		if !w.hosts[0].IsUnspecified() {
			pmap.HostIP = w.hosts[0].String()
		}
		q.PortMappings = append(q.PortMappings, pmap)
	}
	return nil
}

// undelegate gives the reservations of an endpoint's ports back.
func (m *Manager) undelegate(e *endpoint) {
	e.Ports = slices.DeleteFunc(e.Ports, func(p published) bool {
		if p.Delegated {
			m.ports.release(portKey{p.Held, p.Proto, p.HostPort})
		}
		return p.Delegated
	})
}

// learn takes over what the plugins did, and checks that it is what was asked
// for: those that ignore a fixed address do so silently.
func (m *Manager) learn(n *netw, e *endpoint, res cni.Result, set *network.EndpointSettings) error {
	var four, six cni.IP
	for _, ip := range res.Inside() {
		a := ip.Address.Addr()
		if a.Is4() && !four.Address.IsValid() {
			four = ip
		} else if a.Is6() && !six.Address.IsValid() {
			six = ip
		}
	}
	if c := set.IPAMConfig; c != nil {
		for _, want := range []netip.Addr{c.IPv4Address, c.IPv6Address} {
			if want.IsValid() && want.Unmap() != four.Address.Addr() && want.Unmap() != six.Address.Addr() {
				return fault.New(fault.Invalid, "cannot use address %s on network %s: its plugins give out another", want, n.rec.Name)
			}
		}
	}
	mac := res.MAC(e.IfName)
	if len(set.MacAddress) > 0 && mac.String() != set.MacAddress.String() {
		return fault.New(fault.Invalid, "cannot use MAC address %s on network %s: its plugins do not set it", set.MacAddress, n.rec.Name)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e.MAC = mac
	if four.Address.IsValid() {
		e.IPv4, e.Bits4, e.Gateway4 = four.Address.Addr(), four.Address.Bits(), four.Gateway
		n.addrs[e.IPv4] = e
	}
	if six.Address.IsValid() {
		e.IPv6, e.Bits6, e.Gateway6 = six.Address.Addr(), six.Address.Bits(), six.Gateway
		n.addrs[e.IPv6] = e
	}
	e.Resolvers = res.DNS.Servers
	for i, p := range e.Ports {
		if e.Ports[i].To = e.IPv4; p.Host.Is6() || !e.IPv4.IsValid() {
			e.Ports[i].To = e.IPv6
		}
	}
	return nil
}

// unplug undoes plug as far as the plugins are concerned. What they fail to do
// is tried again in the background.
func (m *Manager) unplug(ctx context.Context, e *endpoint) {
	if m.cfg.CNI == nil || e.IfName == "" {
		return
	}
	if err := m.cfg.CNI.DelInterface(ctx, e.ContainerID, e.IfName); err != nil {
		m.log.Warn("a container could not be disconnected from a CNI network; it will be tried again", "container", e.ContainerID, "cause", err)
	}
}

// readoptCNI reserves the ports of a live container again.
func (m *Manager) readoptCNI(e *endpoint) {
	for _, p := range e.Ports {
		if !p.Delegated || p.Held.Is6() {
			continue
		}
		if err := m.ports.reserve(portKey{p.Held, p.Proto, p.HostPort}); err != nil && !errors.Is(err, errPortTaken) {
			m.log.Warn("a published port could not be reserved again", "port", p.HostPort, "cause", err)
		}
	}
}

// restoreCNI hands the plugins' service the containers that live.
func (m *Manager) restoreCNI(alive map[string]*os.File) {
	if m.cfg.CNI != nil {
		m.cfg.CNI.Restore(cni.Containers, func(id string) bool { return alive[id] != nil })
	}
}
