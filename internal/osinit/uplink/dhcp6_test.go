package uplink

import (
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// asking is a request, and answering an answer to it.
func asking(t testing.TB) *dhcpv6.Message {
	m, err := dhcpv6.NewMessage(dhcpv6.WithClientID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}))
	if err != nil {
		t.Fatal(err)
	}
	m.MessageType = dhcpv6.MessageTypeInformationRequest
	m.TransactionID = dhcpv6.TransactionID{1, 2, 3}
	return m
}

func answering(t testing.TB, ask *dhcpv6.Message, with ...dhcpv6.Modifier) *dhcpv6.Message {
	m, err := dhcpv6.NewReplyFromMessage(ask, append([]dhcpv6.Modifier{dhcpv6.WithServerID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: net.HardwareAddr{2, 0, 0, 0, 0, 2}})}, with...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestInformation reads a server's answer, and nobody else's.
func TestInformation(t *testing.T) {
	ask := asking(t)
	ips := func(list ...string) (out []net.IP) {
		for _, s := range list {
			out = append(out, net.ParseIP(s).To16())
		}
		return out
	}
	for name, c := range map[string]struct {
		with    []dhcpv6.Modifier
		change  func(*dhcpv6.Message)
		want    string
		refresh time.Duration
		refused bool
	}{
		"servers":            {with: []dhcpv6.Modifier{dhcpv6.WithDNS(ips("2001:db8::53", "fe80::1")...)}, want: "2001:db8::53 fe80::1", refresh: maxLifetime},
		"domains":            {with: []dhcpv6.Modifier{dhcpv6.WithDomainSearchList("example.net", "b.example")}, want: "example.net b.example", refresh: maxLifetime},
		"bad ones":           {with: []dhcpv6.Modifier{dhcpv6.WithDNS(ips("ff02::1", "::", "192.0.2.1", "2001:db8::1", "2001:db8::1")...), dhcpv6.WithDomainSearchList("a b", "good")}, want: "2001:db8::1 good", refresh: maxLifetime},
		"nothing":            {refresh: maxLifetime},
		"soon again":         {with: []dhcpv6.Modifier{dhcpv6.WithInformationRefreshTime(time.Second)}, refresh: leastRefresh},
		"in an hour":         {with: []dhcpv6.Modifier{dhcpv6.WithInformationRefreshTime(time.Hour)}, refresh: time.Hour},
		"never again":        {with: []dhcpv6.Modifier{dhcpv6.WithInformationRefreshTime(0xffffffff * time.Second)}, refresh: maxLifetime},
		"to another request": {change: func(m *dhcpv6.Message) { m.TransactionID[0]++ }, refused: true},
		"no reply":           {change: func(m *dhcpv6.Message) { m.MessageType = dhcpv6.MessageTypeAdvertise }, refused: true},
		"no server":          {change: func(m *dhcpv6.Message) { m.Options.Del(dhcpv6.OptionServerID) }, refused: true},
		"to another client": {change: func(m *dhcpv6.Message) {
			m.UpdateOption(dhcpv6.OptClientID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}}))
		}, refused: true},
		"a failure": {with: []dhcpv6.Modifier{dhcpv6.WithOption(&dhcpv6.OptStatusCode{StatusCode: iana.StatusUnspecFail})}, refused: true},
	} {
		m := answering(t, ask, c.with...)
		if c.change != nil {
			c.change(m)
		}
		a, refresh, ok := parseInformation(m.ToBytes(), ask)
		var got []string
		for _, s := range a.servers {
			got = append(got, s.String())
		}
		if s := strings.Join(append(got, a.domains...), " "); ok == c.refused || s != c.want || refresh != c.refresh || ok && a.lifetime <= refresh {
			t.Errorf("%s: %v %q, again in %v, until %v", name, ok, s, refresh, a.lifetime)
		}
	}
}

// FuzzInformation reads what anybody on a link may answer.
func FuzzInformation(f *testing.F) {
	ask := asking(f)
	f.Add(answering(f, ask, dhcpv6.WithDNS(net.ParseIP("2001:db8::1")), dhcpv6.WithDomainSearchList("example.net"), dhcpv6.WithInformationRefreshTime(time.Hour)).ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		a, refresh, ok := parseInformation(b, ask)
		if !ok {
			return
		}
		if len(a.servers) > maxAnnounced || len(a.domains) > maxAnnounced || refresh < leastRefresh || refresh > maxLifetime || len(names(a.domains)) != len(slices.Compact(slices.Clone(a.domains))) {
			t.Errorf("%+v, again in %v", a, refresh)
		}
	})
}
