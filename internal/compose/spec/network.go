package spec

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// interfaceName is the endpoint option for the name of a container's interface.
const interfaceName = "com.docker.network.endpoint.ifname"

// networks finds a service's network mode and the endpoints to make.
func networks(p *types.Project, s *types.ServiceConfig, name string, o *Options) (container.NetworkMode, *network.NetworkingConfig, error) {
	if s.NetworkMode != "" {
		return container.NetworkMode(s.NetworkMode), nil, nil
	}
	if len(s.Networks) == 0 {
		return network.NetworkNone, nil, nil
	}
	keys := s.NetworksByPriority()
	cfg := &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{}}
	for i, key := range keys {
		n, ok := p.Networks[key]
		if !ok {
			return "", nil, fmt.Errorf("network %q is not defined", key)
		}
		e, err := endpoint(s, name, key, o)
		if err != nil {
			return "", nil, fmt.Errorf("network %q: %w", key, err)
		}
		if i == 0 && s.MacAddress != "" {
			if c := s.Networks[key]; c != nil && c.MacAddress != "" && c.MacAddress != s.MacAddress {
				return "", nil, fmt.Errorf("the service and its network %q have different MAC addresses", key)
			}
			hw, err := net.ParseMAC(s.MacAddress)
			if err != nil {
				return "", nil, fmt.Errorf("%q is not a MAC address", s.MacAddress)
			}
			e.MacAddress = network.HardwareAddr(hw)
		}
		cfg.EndpointsConfig[n.Name] = e
	}
	return container.NetworkMode(p.Networks[keys[0]].Name), cfg, nil
}

// Endpoint is what a container of a service gets in one of its networks.
func Endpoint(p *types.Project, s *types.ServiceConfig, key string, o Options) (*network.EndpointSettings, error) {
	return endpoint(s, model.ContainerName(p.Name, s, o.Separator, o.Number), key, &o)
}

func endpoint(s *types.ServiceConfig, name, key string, o *Options) (*network.EndpointSettings, error) {
	c := s.Networks[key]
	e := &network.EndpointSettings{Aliases: []string{name}, Links: o.Links}
	if o.Aliases {
		e.Aliases = append(e.Aliases, s.Name)
		if c != nil {
			e.Aliases = append(e.Aliases, c.Aliases...)
		}
	}
	if c == nil {
		return e, nil
	}
	var err error
	ipam := &network.EndpointIPAMConfig{}
	if ipam.IPv4Address, err = address(c.Ipv4Address); err != nil {
		return nil, err
	}
	if ipam.IPv6Address, err = address(c.Ipv6Address); err != nil {
		return nil, err
	}
	if ipam.LinkLocalIPs, err = addresses(c.LinkLocalIPs); err != nil {
		return nil, err
	}
	if ipam.IPv4Address.IsValid() || ipam.IPv6Address.IsValid() || len(ipam.LinkLocalIPs) > 0 {
		e.IPAMConfig = ipam
	}
	if c.MacAddress != "" {
		hw, err := net.ParseMAC(c.MacAddress)
		if err != nil {
			return nil, fmt.Errorf("%q is not a MAC address", c.MacAddress)
		}
		e.MacAddress = network.HardwareAddr(hw)
	}
	e.DriverOpts = maps.Clone(map[string]string(c.DriverOpts))
	if c.InterfaceName != "" {
		if v, ok := e.DriverOpts[interfaceName]; ok && v != c.InterfaceName {
			return nil, fmt.Errorf("interface_name and the driver option %s differ", interfaceName)
		}
		if e.DriverOpts == nil {
			e.DriverOpts = map[string]string{}
		}
		e.DriverOpts[interfaceName] = c.InterfaceName
	}
	e.GwPriority = c.GatewayPriority
	return e, nil
}

func address(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, fmt.Errorf("%q is not an address", s)
	}
	return a, nil
}

// Network is the request for a network of a project.
func Network(p *types.Project, key string) (network.CreateRequest, error) {
	n := p.Networks[key]
	out := network.CreateRequest{Name: n.Name, Driver: n.Driver, Options: n.DriverOpts, Internal: n.Internal, Attachable: n.Attachable,
		EnableIPv4: n.EnableIPv4, EnableIPv6: n.EnableIPv6}
	h, err := model.NetworkHash(n)
	if err != nil {
		return out, err
	}
	out.Labels = labels(n.Labels, map[string]string{model.LabelNetwork: key, model.LabelProject: p.Name, model.LabelVersion: model.Version, model.LabelHash: h})
	if n.Ipam.Driver == "" && len(n.Ipam.Config) == 0 && len(n.Ipam.Options) == 0 {
		return out, nil
	}
	out.IPAM = &network.IPAM{Driver: n.Ipam.Driver, Options: n.Ipam.Options}
	for _, pool := range n.Ipam.Config {
		c, err := ipamPool(pool)
		if err != nil {
			return out, fmt.Errorf("cannot use network %q: %w", key, err)
		}
		out.IPAM.Config = append(out.IPAM.Config, c)
	}
	return out, nil
}

func ipamPool(pool *types.IPAMPool) (c network.IPAMConfig, err error) {
	prefix := func(s string) (netip.Prefix, error) {
		if s == "" {
			return netip.Prefix{}, nil
		}
		v, err := netip.ParsePrefix(s)
		if err != nil {
			return v, fmt.Errorf("%q is not a subnet", s)
		}
		return v, nil
	}
	if c.Subnet, err = prefix(pool.Subnet); err != nil {
		return c, err
	}
	if c.IPRange, err = prefix(pool.IPRange); err != nil {
		return c, err
	}
	if c.Gateway, err = address(pool.Gateway); err != nil {
		return c, err
	}
	for _, k := range slices.Sorted(maps.Keys(pool.AuxiliaryAddresses)) {
		a, err := address(pool.AuxiliaryAddresses[k])
		if err != nil {
			return c, err
		}
		if c.AuxAddress == nil {
			c.AuxAddress = map[string]netip.Addr{}
		}
		c.AuxAddress[k] = a
	}
	return c, nil
}

// Volume is the request for a volume of a project.
func Volume(p *types.Project, key string) (volume.CreateRequest, error) {
	v := p.Volumes[key]
	h, err := model.VolumeHash(v)
	if err != nil {
		return volume.CreateRequest{}, err
	}
	return volume.CreateRequest{Name: v.Name, Driver: v.Driver, DriverOpts: v.DriverOpts,
		Labels: labels(v.Labels, map[string]string{model.LabelVolume: key, model.LabelProject: p.Name, model.LabelVersion: model.Version, model.LabelHash: h})}, nil
}

func labels(ms ...map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range ms {
		maps.Copy(out, m)
	}
	return out
}
