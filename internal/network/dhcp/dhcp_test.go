package dhcp

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

func ack(t testing.TB, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithMessageType(dhcpv4.MessageTypeAck), dhcpv4.WithYourIP(net.IPv4(10, 0, 0, 9)), dhcpv4.WithNetmask(net.CIDRMask(24, 32))}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestParse(t *testing.T) {
	now := time.Unix(1e9, 0)
	l, err := parse(ack(t), ack(t, dhcpv4.WithRouter(net.IPv4(10, 0, 0, 1)), dhcpv4.WithDNS(net.IPv4(1, 1, 1, 1)), dhcpv4.WithLeaseTime(600)), now)
	if err != nil || l.Addr.String() != "10.0.0.9/24" || l.Gateway.String() != "10.0.0.1" || len(l.DNS) != 1 || l.Renew.Sub(now) != 5*time.Minute || l.End.Sub(now) != 10*time.Minute {
		t.Errorf("got %+v, %v", l, err)
	}
	// A gateway elsewhere, or none of this network's, is not used.
	l, err = parse(ack(t), ack(t, dhcpv4.WithRouter(net.IPv4(10, 9, 0, 1)), dhcpv4.WithLeaseTime(1)), now)
	if err != nil || l.Gateway.IsValid() || l.End.Sub(now) != shortest {
		t.Errorf("got %+v, %v", l, err)
	}
	for name, m := range map[string]dhcpv4.Modifier{
		"unspecified": dhcpv4.WithYourIP(net.IPv4zero), "loopback": dhcpv4.WithYourIP(net.IPv4(127, 0, 0, 1)), "multicast": dhcpv4.WithYourIP(net.IPv4(224, 0, 0, 1)),
		"broadcast": dhcpv4.WithYourIP(net.IPv4bcast), "mask": dhcpv4.WithNetmask(net.IPMask{0, 0, 0, 0}), "holes": dhcpv4.WithNetmask(net.IPMask{255, 0, 255, 0}),
	} {
		if l, err := parse(ack(t), ack(t, m), now); err == nil {
			t.Errorf("%s: got %+v", name, l)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(ack(f).ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		now := time.Now()
		l, err := parse(m, m, now)
		if err != nil {
			return
		}
		if !l.Addr.Addr().Is4() || l.Renew.Before(now) || !l.End.After(now) || l.Rebind.After(l.End) || l.Gateway.IsValid() && !l.Addr.Contains(l.Gateway) {
			t.Errorf("%x gives %+v", b, l)
		}
		if _, err := l.messages(); err != nil {
			t.Errorf("a lease cannot be read back: %v", err)
		}
	})
}

func TestFindNamespace(t *testing.T) {
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	got, err := find(Inode(ns))
	if err != nil || Inode(got) != Inode(ns) {
		t.Fatalf("got %v", err)
	}
	got.Close()
	if _, err := find(1); err == nil {
		t.Error("a namespace that is not there was found")
	}
}

func TestStoredLease(t *testing.T) {
	if _, err := (Lease{Offer: "!", ACK: "!"}).messages(); err == nil {
		t.Error("a damaged lease is read")
	}
	if !validHost("web-1") || validHost("a b") || validHost("") {
		t.Error("host names")
	}
}
