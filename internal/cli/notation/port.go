package notation

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/network"
)

// maxPublished bounds what one option may expand to.
const maxPublished = 65536

// Ports reads published ports and gives what they expose and bind:
//
//	[[ip:][host[-host]]:]container[-container][/proto]
//	target=80,published=8080,protocol=tcp,host_ip=…
func Ports(list []string) (network.PortSet, network.PortMap, error) {
	set, bound := network.PortSet{}, network.PortMap{}
	for _, s := range list {
		if err := port(s, set, bound); err != nil {
			return nil, nil, err
		}
	}
	return set, bound, nil
}

func port(s string, set network.PortSet, bound network.PortMap) error {
	bad := func(why string) error { return fmt.Errorf("cannot publish %q: %s", s, why) }
	var ipText, host, cont, proto string
	if strings.Contains(s, "=") {
		for _, f := range strings.Split(s, ",") {
			k, v, ok := strings.Cut(f, "=")
			if !ok {
				return bad("write key=value")
			}
			switch strings.ToLower(k) {
			case "target":
				cont = v
			case "published":
				host = v
			case "protocol":
				proto = v
			case "host_ip":
				ipText = v
			case "mode":
				if v != "host" && v != "ingress" {
					return bad("mode is host or ingress")
				}
			case "name", "app_protocol":
			default:
				return bad(fmt.Sprintf("unknown key %q", k))
			}
		}
		if cont == "" {
			return bad("target is missing")
		}
	} else {
		rest := s
		rest, proto, _ = strings.Cut(rest, "/")
		if strings.HasPrefix(rest, "[") {
			i := strings.IndexByte(rest, ']')
			if i < 0 || !strings.HasPrefix(rest[i+1:], ":") {
				return bad("an IPv6 address is written [::1]:8080:80")
			}
			ipText, rest = rest[1:i], rest[i+2:]
			if strings.Count(rest, ":") != 1 {
				return bad("the container's port is missing")
			}
			host, cont, _ = strings.Cut(rest, ":")
		} else {
			parts := strings.Split(rest, ":")
			n := len(parts)
			cont = parts[n-1]
			if n > 1 {
				host = parts[n-2]
			}
			if n > 2 { // an IPv6 address without brackets is taken too
				ipText = strings.Join(parts[:n-2], ":")
			}
			if n == 2 && strings.Contains(host, ".") { // ip::port without the host's port
				return bad("write ip::container or ip:host:container")
			}
		}
	}
	proto = strings.ToLower(proto)
	switch proto {
	case "":
		proto = "tcp"
	case "tcp", "udp", "sctp":
	default:
		return bad(fmt.Sprintf("%q is none of tcp, udp, sctp", proto))
	}
	var ip netip.Addr
	if ipText != "" {
		var err error
		if ip, err = netip.ParseAddr(ipText); err != nil {
			return bad(fmt.Sprintf("%q is not an address", ipText))
		}
	}
	c0, c1, err := portRange(cont, false)
	if err != nil {
		return bad("the container's " + err.Error())
	}
	var h0, h1 int
	if host != "" {
		if h0, h1, err = portRange(host, true); err != nil {
			return bad("the host's " + err.Error())
		}
		if c1 != c0 && h1-h0 != c1-c0 {
			return bad("the two ranges differ in length")
		}
	}
	if len(set)+c1-c0 >= maxPublished*2 {
		return bad("too many ports")
	}
	for i := c0; i <= c1; i++ {
		p, _ := network.PortFrom(uint16(i), network.IPProtocol(proto))
		b := network.PortBinding{HostIP: ip}
		switch {
		case host == "" || h0 == 0 && h1 == 0:
		case c0 == c1 && h0 != h1: // any of a range
			b.HostPort = strconv.Itoa(h0) + "-" + strconv.Itoa(h1)
		default:
			b.HostPort = strconv.Itoa(h0 + i - c0)
		}
		set[p] = struct{}{}
		bound[p] = append(bound[p], b)
	}
	return nil
}

func portRange(s string, zero bool) (from, to int, err error) {
	a, b, has := strings.Cut(s, "-")
	if from, err = portNumber(a, zero); err != nil {
		return 0, 0, err
	}
	to = from
	if has {
		if to, err = portNumber(b, zero); err != nil {
			return 0, 0, err
		}
		if to < from {
			return 0, 0, fmt.Errorf("range %q runs backwards", s)
		}
	}
	return from, to, nil
}

func portNumber(s string, zero bool) (int, error) {
	if s == "" {
		return 0, fmt.Errorf("port is missing")
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 && !zero {
		return 0, fmt.Errorf("port %q is not a number from 1 to 65535", s)
	}
	return int(n), nil
}

// Expose reads port[-port][/proto] into set.
func Expose(s string, set network.PortSet) error {
	r, proto, _ := strings.Cut(s, "/")
	if proto == "" {
		proto = "tcp"
	}
	proto = strings.ToLower(proto)
	if proto != "tcp" && proto != "udp" && proto != "sctp" {
		return fmt.Errorf("cannot expose %q: %q is none of tcp, udp, sctp", s, proto)
	}
	from, to, err := portRange(r, false)
	if err != nil {
		return fmt.Errorf("cannot expose %q: %w", s, err)
	}
	for i := from; i <= to; i++ {
		p, _ := network.PortFrom(uint16(i), network.IPProtocol(proto))
		set[p] = struct{}{}
	}
	return nil
}
