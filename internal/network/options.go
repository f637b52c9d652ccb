package network

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Options of the bridge driver, by Docker's names.
const (
	optName       = "com.docker.network.bridge.name"
	optDefault    = "com.docker.network.bridge.default_bridge"
	optICC        = "com.docker.network.bridge.enable_icc"
	optMasquerade = "com.docker.network.bridge.enable_ip_masquerade"
	optHostIP     = "com.docker.network.bridge.host_binding_ipv4"
	optMode4      = "com.docker.network.bridge.gateway_mode_ipv4"
	optMode6      = "com.docker.network.bridge.gateway_mode_ipv6"
	optMTU        = "com.docker.network.driver.mtu"
	optPrefix     = "com.docker.network.container_iface_prefix"
	optIfName     = "com.docker.network.endpoint.ifname"
	optParent     = "parent"
	optMacvlan    = "macvlan_mode"
	optIPvlan     = "ipvlan_mode"
	optIPvlanFlag = "ipvlan_flag"
)

type gatewayMode uint8

const (
	modeNAT gatewayMode = iota
	modeRouted
	modeUnprotected
	modeIsolated
)

// options are a network's driver options, understood.
type options struct {
	link         string
	noICC        bool
	noMasquerade bool
	hostIP       netip.Addr
	mode4, mode6 gatewayMode
	// noAddress4 and noAddress6: the bridge has no address of the family.
	noAddress4, noAddress6 bool
	mtu                    int
	prefix                 string
	parent, macvlan        string
	ipvlan, ipvlanFlag     string
	bandwidth              shaping
	vip, sticky            bool // aliases have service addresses
}

func parseOptions(o map[string]string, internal bool) (options, error) {
	out := options{prefix: "eth"}
	bad := func(k, v, want string) error {
		return fault.New(fault.Invalid, "cannot use option %s=%q: %s", k, v, want)
	}
	for k, v := range o {
		switch k {
		case optName:
			if !validIfName(v) {
				return out, bad(k, v, "a link's name has 1 to 15 characters without blanks, slashes and colons")
			}
			out.link = v
		case optICC, optMasquerade, optDefault:
			b, err := strconv.ParseBool(v)
			if err != nil {
				return out, bad(k, v, "true or false is wanted")
			}
			if k == optICC {
				out.noICC = !b
			} else if k == optMasquerade {
				out.noMasquerade = !b
			}
		case optHostIP:
			a, err := netip.ParseAddr(v)
			if err != nil || !a.Is4() {
				return out, bad(k, v, "an IPv4 address is wanted")
			}
			out.hostIP = a
		case optMode4, optMode6:
			mode, ok := map[string]gatewayMode{"": modeNAT, "nat": modeNAT, "routed": modeRouted, "nat-unprotected": modeUnprotected, "isolated": modeIsolated}[v]
			if !ok {
				return out, bad(k, v, "nat, nat-unprotected, routed and isolated are allowed")
			}
			if mode == modeIsolated && !internal {
				return out, bad(k, v, "only an internal network can be isolated from its gateway")
			}
			if k == optMode4 {
				out.mode4, out.noAddress4 = mode, mode == modeIsolated
			} else {
				out.mode6, out.noAddress6 = mode, mode == modeIsolated
			}
		case optMTU:
			n, err := strconv.Atoi(v)
			if err != nil || n != 0 && (n < 68 || n > 65535) {
				return out, bad(k, v, "a number of bytes from 68 to 65535 is wanted")
			}
			out.mtu = n
		case optPrefix:
			if !validIfName(v) || len(v) > 12 {
				return out, bad(k, v, "a short link name is wanted")
			}
			out.prefix = v
		case optParent:
			out.parent = v
		case optMacvlan:
			out.macvlan = v
		case optIPvlan:
			out.ipvlan = v
		case optIPvlanFlag:
			out.ipvlanFlag = v
		case optVIP:
			if out.sticky = v == "sticky"; out.sticky {
				out.vip = true
				continue
			}
			b, err := strconv.ParseBool(v)
			if err != nil {
				return out, bad(k, v, "true, false or sticky is wanted")
			}
			out.vip = b
		}
	}
	var err error
	out.bandwidth, err = parseBandwidth(shaping{}, o)
	return out, err
}

// own is how options begin that are ours: those of others are kept, unread.
const own = "com.servin."

// checkOwn refuses what is none of our options, for it would have no effect.
func checkOwn(o map[string]string, known ...string) error {
	for k := range o {
		if strings.HasPrefix(k, own) && !slices.Contains(known, k) {
			return fault.New(fault.Invalid, "there is no option %q: known are %s", k, strings.Join(known, ", "))
		}
	}
	return nil
}

// validIfName tells whether the kernel takes s as the name of a link.
func validIfName(s string) bool {
	if s == "" || len(s) > 15 || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c == '/' || c == ':' || c == '%' || c >= 0x7f {
			return false
		}
	}
	return true
}
