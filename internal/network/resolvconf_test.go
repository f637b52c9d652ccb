package network

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
	mnetwork "github.com/moby/moby/api/types/network"
)

func TestBuildResolvConf(t *testing.T) {
	const host = "# x\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\ndomain a.org\nsearch b.org c.org\noptions edns0 trust-ad timeout:3\n"
	named := Attachment{DNS: []string{"127.0.0.11"}}
	for name, c := range map[string]struct {
		dns, search, options []string
		at                   Attachment
		want                 string
	}{
		"host's": {want: "nameserver 192.0.2.1\nsearch b.org c.org\noptions edns0 trust-ad timeout:3\n"},
		"user's": {dns: []string{"127.0.0.1", "::1"}, search: []string{"x.org"}, options: []string{"ndots:2"},
			want: "nameserver 127.0.0.1\nnameserver ::1\nsearch x.org\noptions ndots:2\n"},
		"no search": {search: []string{"."}, want: "nameserver 192.0.2.1\noptions edns0 trust-ad timeout:3\n"},
		"named":     {at: named, dns: []string{"192.0.2.9"}, want: "nameserver 127.0.0.11\nsearch b.org c.org\noptions timeout:3 ndots:0\n"},
		"named with options": {at: named, options: []string{"ndots:5"},
			want: "nameserver 127.0.0.11\nsearch b.org c.org\noptions ndots:5\n"},
	} {
		got, err := BuildResolvConf([]byte(host), c.dns, c.search, c.options, c.at)
		if err != nil || string(got) != c.want {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
	for _, bad := range [][]string{{"x"}, {"1.2.3.4\nnameserver 6.6.6.6"}, {""}} {
		if _, err := BuildResolvConf(nil, bad, nil, nil, Attachment{}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: got %v", bad, err)
		}
	}
	if _, err := BuildResolvConf(nil, nil, []string{"a\nnameserver 6.6.6.6"}, nil, Attachment{}); !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
}

func TestBuildHosts(t *testing.T) {
	at := Attachment{Settings: mnetwork.EndpointSettings{IPAddress: netip.MustParseAddr("172.17.0.2"), GlobalIPv6Address: netip.MustParseAddr("fd00::2")}}
	got, err := BuildHosts(Hosts{Hostname: "h", Domainname: "d.org", Attachments: []Attachment{at},
		Extra: []string{"a:192.0.2.1", "b=[fd00::9]", "gw:host-gateway"}, Gateway: netip.MustParseAddr("172.17.0.1"),
		Links: []HostsEntry{{netip.MustParseAddr("172.17.0.3"), []string{"db", "x"}}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"127.0.0.1\tlocalhost\n", "192.0.2.1\ta\n", "fd00::9\tb\n", "172.17.0.1\tgw\n", "172.17.0.3\tdb x\n", "172.17.0.2\th.d.org h\n", "fd00::2\th.d.org h\n"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("%q is missing in %q", want, got)
		}
	}
	for _, bad := range []string{"a", ":1.2.3.4", "a:x", "a b:1.2.3.4", "a\n6.6.6.6\tx:1.2.3.4"} {
		if _, err := BuildHosts(Hosts{Extra: []string{bad}}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: got %v", bad, err)
		}
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 127.0.0.53\nsearch a b\noptions ndots:1\n"))
	f.Add([]byte("nameserver fe80::1%x\ndomain\nnameserver\n;\n\x00"))
	f.Fuzz(func(t *testing.T, host []byte) {
		out, err := BuildResolvConf(host, nil, nil, nil, Attachment{})
		if err != nil {
			t.Fatal(err)
		}
		again, err := BuildResolvConf(out, nil, nil, nil, Attachment{})
		if err != nil || !bytes.Equal(out, again) {
			t.Fatalf("%q became %q", out, again)
		}
		for _, a := range parseResolvConf(out).servers {
			if a.IsLoopback() {
				t.Fatalf("a loopback server is left: %s", a)
			}
		}
	})
}
