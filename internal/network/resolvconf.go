package network

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const hostResolvConf = "/etc/resolv.conf"

// resolvConf is what we understand of a resolv.conf (resolv.conf(5)).
type resolvConf struct {
	servers []netip.Addr
	search  []string
	options []string
}

func parseResolvConf(b []byte) resolvConf {
	var c resolvConf
	for line := range bytes.Lines(b) {
		s := strings.TrimSpace(string(line))
		if s == "" || s[0] == '#' || s[0] == ';' {
			continue
		}
		f := strings.Fields(s)
		switch f[0] {
		case "nameserver":
			if len(f) > 1 {
				if a, err := netip.ParseAddr(f[1]); err == nil {
					c.servers = append(c.servers, a.Unmap())
				}
			}
		case "search":
			c.search = f[1:] // the last one counts
		case "domain":
			if len(f) > 1 {
				c.search = f[1:2]
			}
		case "options":
			c.options = append(c.options, f[1:]...)
		}
	}
	return c
}

// BuildResolvConf makes a container's resolv.conf. host is the host's file.
// dns, search and options are what the user gave (a search of "." means none)
// and attachment is the one that the container starts with. Without a server
// of the engine's the host's loopback servers are left out, since the
// container has another loopback.
func BuildResolvConf(host []byte, dns, search, options []string, attachment Attachment) ([]byte, error) {
	h := parseResolvConf(host)
	var servers []string
	for _, s := range dns {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fault.New(fault.Invalid, "cannot use %q as a name server: an IP address is wanted", s)
		}
		servers = append(servers, a.Unmap().String())
	}
	if len(attachment.DNS) > 0 {
		servers = attachment.DNS
	} else if len(servers) == 0 {
		for _, a := range h.servers {
			if !a.IsLoopback() && a.Zone() == "" {
				servers = append(servers, a.String())
			}
		}
	}
	for _, s := range append(slices.Clone(search), options...) {
		if s == "" || strings.ContainsAny(s, " \t\r\n\x00") {
			return nil, fault.New(fault.Invalid, "cannot use %q in resolv.conf: it is empty or has blanks", s)
		}
	}
	if len(search) == 0 {
		search = h.search
	}
	if slices.Contains(search, ".") {
		search = nil
	}
	if len(options) == 0 {
		options = slices.Clone(h.options)
		if len(attachment.DNS) > 0 {
			options = slices.DeleteFunc(options, func(o string) bool {
				// Of the host's stub server, not of ours.
				return o == "edns0" || o == "trust-ad" || strings.HasPrefix(o, "ndots:")
			})
		}
	}
	if len(attachment.DNS) > 0 && !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
		// Names of one label are containers' and go unqualified.
		options = append(slices.Clone(options), "ndots:0")
	}
	var b bytes.Buffer
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(search) > 0 {
		b.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	if len(options) > 0 {
		b.WriteString("options " + strings.Join(options, " ") + "\n")
	}
	return b.Bytes(), nil
}

// Hosts says what a container's /etc/hosts holds.
type Hosts struct {
	Hostname, Domainname string
	// Attachments in the order in which the container got them; the host name
	// stands for their addresses.
	Attachments []Attachment
	// Extra are the user's --add-host entries, NAME:ADDRESS or NAME=ADDRESS,
	// where host-gateway stands for Gateway.
	Extra   []string
	Gateway netip.Addr
	// Links are legacy links: a name or names, and the address.
	Links []HostsEntry
}

// HostsEntry is a line of /etc/hosts.
type HostsEntry struct {
	Addr  netip.Addr
	Names []string
}

// BuildHosts makes a container's /etc/hosts.
func BuildHosts(h Hosts) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	line := func(a netip.Addr, names ...string) error {
		for _, n := range names {
			if n == "" || strings.ContainsAny(n, " \t\r\n\x00#") {
				return fault.New(fault.Invalid, "cannot use %q in /etc/hosts: it is empty or has blanks", n)
			}
		}
		b.WriteString(a.String() + "\t" + strings.Join(names, " ") + "\n")
		return nil
	}
	for _, x := range h.Extra {
		i := strings.IndexAny(x, ":=")
		if i <= 0 {
			return nil, fault.New(fault.Invalid, "bad format for add-host: %q: NAME:ADDRESS is wanted", x)
		}
		name, addr := x[:i], strings.Trim(x[i+1:], "[]")
		a := h.Gateway
		if addr != "host-gateway" {
			var err error
			if a, err = netip.ParseAddr(addr); err != nil {
				return nil, fault.New(fault.Invalid, "invalid IP address in add-host: %q", addr)
			}
		} else if !a.IsValid() {
			return nil, fault.New(fault.Invalid, "cannot find an address for host-gateway: the container is on no network that has one")
		}
		if err := line(a, name); err != nil {
			return nil, err
		}
	}
	for _, l := range h.Links {
		if err := line(l.Addr, l.Names...); err != nil {
			return nil, err
		}
	}
	if h.Hostname != "" {
		names := []string{h.Hostname}
		if h.Domainname != "" {
			names = []string{h.Hostname + "." + h.Domainname, h.Hostname}
		}
		for _, at := range h.Attachments {
			for _, a := range []netip.Addr{at.Settings.IPAddress, at.Settings.GlobalIPv6Address} {
				if a.IsValid() {
					if err := line(a, names...); err != nil {
						return nil, err
					}
				}
			}
		}
	}
	return b.Bytes(), nil
}
