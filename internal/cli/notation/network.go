package notation

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/network"
)

// Network is one --network.
type Network struct {
	Name     string
	Settings network.EndpointSettings
}

// ReadNetwork reads --network: a name, or CSV of name=, alias=, ip=, ip6=,
// link-local-ip=, mac-address=, driver-opt=, gw-priority=.
func ReadNetwork(s string) (Network, error) {
	if !strings.Contains(s, "=") || strings.HasPrefix(s, "container:") {
		return Network{Name: s}, nil
	}
	var n Network
	bad := func(format string, a ...any) (Network, error) {
		return Network{}, fmt.Errorf("network %q: %s", s, fmt.Sprintf(format, a...))
	}
	fs, err := fields(s)
	if err != nil {
		return bad("%v", err)
	}
	for _, f := range fs {
		k, v, has := strings.Cut(f, "=")
		if !has {
			return bad("%q needs a value", k)
		}
		switch strings.ToLower(k) {
		case "name":
			n.Name = v
		case "alias":
			n.Settings.Aliases = append(n.Settings.Aliases, v)
		case "ip":
			err = n.SetIP(v)
		case "ip6":
			err = n.SetIP6(v)
		case "link-local-ip":
			err = n.AddLinkLocal(v)
		case "mac-address":
			err = n.SetMAC(v)
		case "driver-opt":
			dk, dv, derr := KeyValue(v)
			if err = derr; err == nil {
				if n.Settings.DriverOpts == nil {
					n.Settings.DriverOpts = map[string]string{}
				}
				n.Settings.DriverOpts[dk] = dv
			}
		case "gw-priority":
			n.Settings.GwPriority, err = strconv.Atoi(v)
		default:
			return bad("unknown key %q", k)
		}
		if err != nil {
			return bad("%v", err)
		}
	}
	if n.Name == "" {
		return bad("name is missing")
	}
	return n, nil
}

func (n *Network) ipam() *network.EndpointIPAMConfig {
	if n.Settings.IPAMConfig == nil {
		n.Settings.IPAMConfig = &network.EndpointIPAMConfig{}
	}
	return n.Settings.IPAMConfig
}

// SetIP asks for an IPv4 address.
func (n *Network) SetIP(s string) error {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is4() {
		return fmt.Errorf("%q is not an IPv4 address", s)
	}
	n.ipam().IPv4Address = a
	return nil
}

// SetIP6 asks for an IPv6 address.
func (n *Network) SetIP6(s string) error {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is6() {
		return fmt.Errorf("%q is not an IPv6 address", s)
	}
	n.ipam().IPv6Address = a
	return nil
}

// AddLinkLocal asks for a link-local address.
func (n *Network) AddLinkLocal(s string) error {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return fmt.Errorf("%q is not an address", s)
	}
	n.ipam().LinkLocalIPs = append(n.ipam().LinkLocalIPs, a)
	return nil
}

// SetMAC asks for a hardware address.
func (n *Network) SetMAC(s string) error {
	if err := n.Settings.MacAddress.UnmarshalText([]byte(s)); err != nil {
		return fmt.Errorf("%q is not a hardware address", s)
	}
	return nil
}
