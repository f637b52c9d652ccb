package uplink

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Routers announce name servers and search domains beside addresses (RFC 8106). Anybody on a link can say that he is
// one, so little is believed of it: only so many of each, only for so long, and nothing where the configuration names
// servers itself.

const (
	// maxAnnounced bounds the servers and the domains of a link, each. A resolver uses three and six.
	maxAnnounced = 8
	// maxLifetime bounds what is announced for longer, or for ever. Routers repeat themselves at least
	// every 18.2 hours (RFC 8319, 65535 s).
	maxLifetime = 24 * time.Hour
	// Options of a router advertisement, RFC 8106 section 5.
	optionRDNSS, optionDNSSL = 25, 31
	// sizeUserOption is that of struct nduseroptmsg (linux/rtnetlink.h), which an option follows.
	sizeUserOption = 16
	// routerAdvertisement is its ICMPv6 type (RFC 4861 section 4.2).
	routerAdvertisement = 134
)

// announcement is one option of an advertisement.
type announcement struct {
	link     int // its index
	servers  []netip.Addr
	domains  []string
	lifetime time.Duration // 0 withdraws
}

// parseUserOption reads a message of the kernel (RTM_NEWNDUSEROPT, without netlink's header): the kernel has checked the
// advertisement (RFC 4861 section 6.1.2: the hop limit is 255, the sender's address the link's), the option is as it came.
func parseUserOption(b []byte) (a announcement, ok bool) {
	if len(b) < sizeUserOption || b[0] != unix.AF_INET6 || b[8] != routerAdvertisement || b[9] != 0 {
		return a, false
	}
	size := int(binary.NativeEndian.Uint16(b[2:]))
	a.link = int(int32(binary.NativeEndian.Uint32(b[4:])))
	if b = b[sizeUserOption:]; size > len(b) || size < 8 || a.link <= 0 {
		return a, false
	}
	b = b[:size]
	if int(b[1])*8 != size {
		return a, false
	}
	a.lifetime = min(time.Duration(binary.BigEndian.Uint32(b[4:]))*time.Second, maxLifetime)
	switch value := b[8:]; b[0] {
	case optionRDNSS:
		a.servers = addresses(value)
		return a, len(a.servers) > 0
	case optionDNSSL:
		a.domains = domains(value)
		return a, len(a.domains) > 0
	}
	return a, false
}

// addresses are those of servers one after the other.
func addresses(b []byte) (out []netip.Addr) {
	for ; len(b) >= 16 && len(out) < maxAnnounced; b = b[16:] {
		a := netip.AddrFrom16([16]byte(b))
		if a.Is4In6() || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || slices.Contains(out, a) {
			continue
		}
		out = append(out, a)
	}
	return out
}

// domains are names as the DNS has them, without compression, padded with zeros.
func domains(b []byte) (out []string) {
	for len(b) > 0 && b[0] != 0 && len(out) < maxAnnounced {
		var labels []string
		for {
			if len(b) == 0 {
				return out // cut off
			}
			n := int(b[0])
			b = b[1:]
			if n == 0 {
				break
			}
			if n > 63 || n > len(b) {
				return out
			}
			labels = append(labels, string(b[:n]))
			b = b[n:]
		}
		name := strings.Join(labels, ".")
		// As strict as with DHCP's, and no dots within a label.
		if len(names([]string{name})) == 0 || slices.ContainsFunc(labels, func(l string) bool { return strings.Contains(l, ".") }) {
			continue
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

// announced is what routers of a link have announced, each with its end.
type announced struct {
	servers map[netip.Addr]time.Time
	domains map[string]time.Time
}

// take notes an announcement and says whether there is anything new. What is known stays until its end: somebody who
// announces much pushes nobody out.
func (t *announced) take(a announcement, now time.Time) bool {
	if t.servers == nil {
		t.servers, t.domains = map[netip.Addr]time.Time{}, map[string]time.Time{}
	}
	changed := t.expire(now)
	changed = note(t.servers, a.servers, a.lifetime, now) || changed
	return note(t.domains, a.domains, a.lifetime, now) || changed
}

func note[K comparable](known map[K]time.Time, keys []K, lifetime time.Duration, now time.Time) (changed bool) {
	for _, k := range keys {
		_, had := known[k]
		switch {
		case lifetime == 0 && had:
			delete(known, k)
			changed = true
		case lifetime > 0 && (had || len(known) < maxAnnounced):
			known[k] = now.Add(lifetime)
			changed = changed || !had
		}
	}
	return changed
}

// expire drops what is over, and says whether there was any.
func (t *announced) expire(now time.Time) bool {
	before := len(t.servers) + len(t.domains)
	over := func(end time.Time) bool { return !end.After(now) }
	maps.DeleteFunc(t.servers, func(_ netip.Addr, end time.Time) bool { return over(end) })
	maps.DeleteFunc(t.domains, func(_ string, end time.Time) bool { return over(end) })
	return len(t.servers)+len(t.domains) != before
}

// ends are when things are over.
func (t *announced) ends() []time.Time {
	return slices.AppendSeq(slices.Collect(maps.Values(t.servers)), maps.Values(t.domains))
}

// list is what holds, in an order that does not change by itself. Addresses of the link have its zone.
func (t *announced) list(link string) (servers []netip.Addr, domains []string) {
	for a := range t.servers {
		if a.IsLinkLocalUnicast() {
			a = a.WithZone(link)
		}
		servers = append(servers, a)
	}
	for d := range t.domains {
		domains = append(domains, d)
	}
	slices.SortFunc(servers, netip.Addr.Compare)
	slices.Sort(domains)
	return servers, domains
}

// announced is what routers and DHCPv6 say of a link.
func (l *link) announced(name string) (servers []netip.Addr, domains []string) {
	servers, domains = l.routers.list(name)
	more, further := l.told.list(name)
	for _, s := range more {
		if !slices.Contains(servers, s) {
			servers = append(servers, s)
		}
	}
	return servers, append(domains, further...)
}
