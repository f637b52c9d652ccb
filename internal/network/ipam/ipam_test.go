package ipam

import (
	"errors"
	"net/netip"
	"testing"
)

func TestPool(t *testing.T) {
	for _, c := range []struct {
		subnet, rng string
		first, last string
		n           int
	}{
		{"10.0.0.0/29", "", "10.0.0.1", "10.0.0.6", 6},
		{"10.0.0.0/30", "", "10.0.0.1", "10.0.0.2", 2},
		{"10.0.0.0/31", "", "10.0.0.0", "10.0.0.1", 2},
		{"10.0.0.7/32", "", "10.0.0.7", "10.0.0.7", 1},
		{"10.0.0.0/24", "10.0.0.128/30", "10.0.0.128", "10.0.0.131", 4},
		{"10.0.0.0/24", "10.0.0.252/30", "10.0.0.252", "10.0.0.254", 3},
		{"255.255.255.248/29", "", "255.255.255.249", "255.255.255.254", 6},
		{"fd00::/125", "", "fd00::1", "fd00::7", 7},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127", "", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 2},
	} {
		var rng netip.Prefix
		if c.rng != "" {
			rng = netip.MustParsePrefix(c.rng)
		}
		p, err := NewPool(netip.MustParsePrefix(c.subnet), rng)
		if err != nil {
			t.Fatal(err)
		}
		if _, free := p.Usage(); free != uint64(c.n) {
			t.Errorf("%s: %d free, want %d", c.subnet, free, c.n)
		}
		var got []netip.Addr
		for {
			a, err := p.Next()
			if errors.Is(err, ErrExhausted) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, a)
		}
		if len(got) != c.n || got[0].String() != c.first || got[len(got)-1].String() != c.last {
			t.Errorf("%s: got %v", c.subnet, got)
		}
		if err := p.Take(got[0]); !errors.Is(err, ErrInUse) {
			t.Errorf("%s: got %v", c.subnet, err)
		}
		p.Free(got[0])
		if a, err := p.Next(); err != nil || a != got[0] {
			t.Errorf("%s: got %v, %v", c.subnet, a, err)
		}
	}
	p, _ := NewPool(netip.MustParsePrefix("10.0.0.0/24"), netip.Prefix{})
	if err := p.Take(netip.MustParseAddr("10.0.1.1")); !errors.Is(err, ErrOutside) {
		t.Error(err)
	}
	a, _ := p.Next()
	p.Free(a)
	if b, _ := p.Next(); b == a {
		t.Error("an address was reused at once")
	}
	for _, bad := range [][2]string{{"10.0.0.1/24", "10.0.0.0/25"}, {"10.0.0.0/24", "10.0.1.0/25"}, {"10.0.0.0/24", "10.0.0.0/8"}, {"10.0.0.0/24", "fd00::/64"}} {
		if _, err := NewPool(netip.MustParsePrefix(bad[0]), netip.MustParsePrefix(bad[1])); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}

func TestChoose(t *testing.T) {
	busy := []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16"), netip.MustParsePrefix("172.18.5.0/24"), netip.MustParsePrefix("172.19.0.0/15")}
	got, err := Choose(DefaultBlocks(), busy)
	if err != nil || got.String() != "172.20.0.0/16" {
		// 172.19.0.0/15 is 172.18.0.0/15.
		t.Fatalf("got %v, %v", got, err)
	}
	got, err = Choose(DefaultBlocks(), []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/19")})
	if err != nil || got.String() != "192.168.32.0/20" {
		t.Fatalf("got %v, %v", got, err)
	}
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	if got, err := Choose(DefaultBlocks(), all); err == nil {
		t.Fatalf("got %v", got)
	}
}

func TestMirror(t *testing.T) {
	a, ok := Mirror(netip.MustParsePrefix("fd12::/64"), netip.MustParsePrefix("172.17.0.0/16"), netip.MustParseAddr("172.17.1.2"))
	if !ok || a.String() != "fd12::102" {
		t.Fatalf("got %v", a)
	}
}
