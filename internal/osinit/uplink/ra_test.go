package uplink

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// userOption is a message of the kernel about an option of an advertisement, with the attribute that follows it.
func userOption(link int32, kind byte, lifetime uint32, value []byte) []byte {
	for (len(value)+8)%8 != 0 {
		value = append(value, 0)
	}
	option := binary.BigEndian.AppendUint32([]byte{kind, byte((len(value) + 8) / 8), 0, 0}, lifetime)
	option = append(option, value...)
	b := []byte{unix.AF_INET6, 0}
	b = binary.NativeEndian.AppendUint16(b, uint16(len(option)))
	b = binary.NativeEndian.AppendUint32(b, uint32(link))
	b = append(b, routerAdvertisement, 0, 0, 0, 0, 0, 0, 0)
	b = append(b, option...)
	return append(b, 20, 0, 1, 0, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
}

func serversOf(list ...string) (b []byte) {
	for _, s := range list {
		a := netip.MustParseAddr(s).As16()
		b = append(b, a[:]...)
	}
	return b
}

func domainsOf(list ...string) (b []byte) {
	for _, d := range list {
		for _, l := range strings.Split(d, ".") {
			b = append(append(b, byte(len(l))), l...)
		}
		b = append(b, 0)
	}
	return b
}

// TestUserOption reads what routers announce, and nothing that only looks so.
func TestUserOption(t *testing.T) {
	const forever = 0xffffffff
	good := userOption(2, optionRDNSS, 600, serversOf("2001:db8::53"))
	changed := func(at int, to byte) []byte { b := slices.Clone(good); b[at] = to; return b }
	long := strings.Repeat("x", 63)
	var many []string
	for i := range 127 {
		many = append(many, fmt.Sprintf("2001:db8::%x", i+1))
	}
	for name, c := range map[string]struct {
		b        []byte
		want     string // servers and domains
		lifetime time.Duration
	}{
		"a server":              {good, "2001:db8::53", 10 * time.Minute},
		"two":                   {userOption(2, optionRDNSS, 0, serversOf("fe80::1", "2001:db8::53")), "fe80::1 2001:db8::53", 0},
		"for ever":              {userOption(2, optionRDNSS, forever, serversOf("2001:db8::53")), "2001:db8::53", maxLifetime},
		"no server's addresses": {userOption(2, optionRDNSS, 1, serversOf("ff02::1", "::1", "::", "::ffff:192.0.2.1")), "", 0},
		"one is good":           {userOption(2, optionRDNSS, 1, serversOf("ff02::1", "2001:db8::1", "2001:db8::1")), "2001:db8::1", time.Second},
		"many":                  {userOption(2, optionRDNSS, 1, serversOf(many...)), strings.Join(many[:maxAnnounced], " "), time.Second},
		"half an address":       {userOption(2, optionRDNSS, 1, append(serversOf("2001:db8::1"), 1, 2, 3, 4, 5, 6, 7, 8)), "2001:db8::1", time.Second},
		"none":                  {userOption(2, optionRDNSS, 1, nil), "", 0},
		"domains":               {userOption(2, optionDNSSL, 60, domainsOf("example.net", "corp.example.org")), "example.net corp.example.org", time.Minute},
		"domains for ever":      {userOption(2, optionDNSSL, forever, domainsOf("example.net")), "example.net", maxLifetime},
		"a bad domain":          {userOption(2, optionDNSSL, 60, domainsOf("a b.net", "x\nnameserver 192_0_2_1", "good.net")), "good.net", time.Minute},
		"a dot in a label":      {userOption(2, optionDNSSL, 60, []byte{3, 'a', '.', 'b', 0}), "", 0},
		"too long a domain":     {userOption(2, optionDNSSL, 60, domainsOf(strings.Join([]string{long, long, long, long}, "."), "good.net")), "good.net", time.Minute},
		"a pointer":             {userOption(2, optionDNSSL, 60, []byte{0xc0, 0}), "", 0},
		"cut off":               {userOption(2, optionDNSSL, 60, []byte{7, 'e', 'x', 'a', 'm', 'p', 'l', 'e', 3, 'n', 'e', 't', 63, 'x', 'x', 'x'}), "", 0},
		"the root":              {userOption(2, optionDNSSL, 60, []byte{0}), "", 0},
		"many domains":          {userOption(2, optionDNSSL, 60, domainsOf(strings.Fields("a b c d e f g h i j k")...)), "a b c d e f g h", time.Minute},
		"another family":        {changed(0, unix.AF_INET), "", 0},
		"another message":       {changed(8, 135), "", 0},
		"another code":          {changed(9, 1), "", 0},
		"another option":        {userOption(2, 3, 600, serversOf("2001:db8::53")), "", 0},
		"no link":               {userOption(0, optionRDNSS, 600, serversOf("2001:db8::53")), "", 0},
		"a link below nothing":  {userOption(-1, optionRDNSS, 600, serversOf("2001:db8::53")), "", 0},
		"lengths that differ":   {changed(sizeUserOption+1, 4), "", 0},
		"more than there is":    {changed(2, 0xff), "", 0},
		"short":                 {good[:20], "", 0},
		"empty":                 {nil, "", 0},
	} {
		a, ok := parseUserOption(c.b)
		var got []string
		for _, s := range a.servers {
			got = append(got, s.String())
		}
		got = append(got, a.domains...)
		if s := strings.Join(got, " "); ok != (c.want != "") || ok && (s != c.want || a.lifetime != c.lifetime || a.link != 2) {
			t.Errorf("%s: %v %q for %v on %d", name, ok, s, a.lifetime, a.link)
		}
	}
}

// TestAnnounced keeps what routers announce as long as they say, and nobody pushes another out.
func TestAnnounced(t *testing.T) {
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	n := New(Options{Resolv: resolv, Log: t.Logf, Changed: func() {}})
	n.links["eth0"], n.links["eth1"] = &link{index: 2}, &link{index: 3}
	now := time.Now()
	tell := func(want bool, options ...[]byte) {
		t.Helper()
		var b []byte
		for _, o := range options {
			size := unix.SizeofNlMsghdr + len(o)
			head := binary.NativeEndian.AppendUint32(nil, uint32(size))
			head = binary.NativeEndian.AppendUint16(head, unix.RTM_NEWNDUSEROPT)
			b = append(append(b, append(head, make([]byte, unix.SizeofNlMsghdr-6)...)...), o...)
			for len(b)%unix.NLMSG_ALIGNTO != 0 {
				b = append(b, 0)
			}
		}
		if got := n.announced(b, now); got != want {
			t.Errorf("changed: %v", got)
		}
		if err := n.writeResolv(); err != nil {
			t.Fatal(err)
		}
	}
	is := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(resolv); err != nil || string(b) != want {
			t.Errorf("resolv.conf is\n%s, want\n%s, %v", b, want, err)
		}
	}
	first, second := userOption(2, optionRDNSS, 600, serversOf("2001:db8::1", "fe80::1")), userOption(3, optionRDNSS, 1200, serversOf("2001:db8::2"))
	tell(true, first, second, userOption(2, optionDNSSL, 900, domainsOf("example.net")), userOption(9, optionRDNSS, 900, serversOf("2001:db8::9")))
	is("nameserver 2001:db8::1\nnameserver fe80::1%eth0\nnameserver 2001:db8::2\nsearch example.net\n")
	tell(false, first, second)
	tell(true, userOption(3, optionRDNSS, 0, serversOf("2001:db8::2")))
	tell(false, userOption(3, optionRDNSS, 0, serversOf("2001:db8::2")))
	is("nameserver 2001:db8::1\nnameserver fe80::1%eth0\nsearch example.net\n")
	var flood []string
	for i := range 100 {
		flood = append(flood, fmt.Sprintf("2001:db8:bad::%x", i+1))
	}
	for i := range 100 {
		n.announced(nil, now)
		tell(i < maxAnnounced-2, userOption(2, optionRDNSS, 0xffffffff, serversOf(flood[i])))
	}
	if b, err := os.ReadFile(resolv); err != nil || !bytes.Contains(b, []byte("nameserver 2001:db8::1\nnameserver 2001:db8:bad::1\n")) || bytes.Count(b, []byte("nameserver")) != maxAnnounced {
		t.Errorf("after a flood resolv.conf is\n%s", b)
	}
	if end := n.nextEnd(); !end.Equal(now.Add(600 * time.Second)) {
		t.Errorf("the next end is in %v", end.Sub(now))
	}
	now = now.Add(601 * time.Second)
	tell(true)
	now = now.Add(maxLifetime)
	tell(true)
	is("")
	if end := n.nextEnd(); !end.IsZero() {
		t.Errorf("something ends at %v", end)
	}
	// Who names servers is given no others.
	n.cfg.DNS = []netip.Addr{netip.MustParseAddr("192.0.2.53")}
	tell(true, first)
	is("nameserver 192.0.2.53\n")
}

// FuzzUserOption reads what anybody on a link may say: what comes out is bounded and can be written to resolv.conf.
func FuzzUserOption(f *testing.F) {
	f.Add(userOption(2, optionRDNSS, 600, serversOf("2001:db8::1", "fe80::1"))[sizeUserOption:])
	f.Add(userOption(2, optionDNSSL, 0, domainsOf("example.net", "a.b"))[sizeUserOption:])
	f.Add([]byte{31, 2, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xc0, 0x0c, 63, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, option []byte) {
		b := append([]byte{unix.AF_INET6, 0}, binary.NativeEndian.AppendUint16(nil, uint16(len(option)))...)
		b = append(append(b, 2, 0, 0, 0, routerAdvertisement, 0, 0, 0, 0, 0, 0, 0), option...)
		a, ok := parseUserOption(b)
		if !ok {
			return
		}
		if len(a.servers) > maxAnnounced || len(a.domains) > maxAnnounced || a.lifetime < 0 || a.lifetime > maxLifetime {
			t.Errorf("%+v", a)
		}
		for _, d := range a.domains {
			if d == "" || len(d) > 253 || strings.ContainsAny(d, " \n\t#;\x00") {
				t.Errorf("a domain %q", d)
			}
		}
		for _, s := range a.servers {
			if !s.Is6() || s.Zone() != "" || s.IsMulticast() {
				t.Errorf("a server %s", s)
			}
		}
	})
}
