package network

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/network/bridge"
	mnetwork "github.com/moby/moby/api/types/network"
)

// ask tells what the echo server at addr says to a client in ns, or the
// failure.
func ask(ns *os.File, proto, addr string) (string, error) {
	return askFor(ns, proto, addr, time.Second)
}

func askFor(ns *os.File, proto, addr string, patience time.Duration) (string, error) {
	var c net.Conn
	dial := func() (err error) {
		c, err = net.DialTimeout(proto, addr, patience)
		return err
	}
	var err error
	if ns == nil {
		err = dial()
	} else {
		err = bridge.Inside(ns, dial)
	}
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if proto == "udp" {
		c.Write([]byte("?"))
		b := make([]byte, 100)
		n, err := c.Read(b)
		return string(b[:n]), err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// TestSixAtOnce: an IPv6 address is the container's own, and the gateway's the host's,
// when they are said to be: the kernel, which does that later, has been waited for.
func TestSixAtOnce(t *testing.T) {
	m := newManager(t, func(c *Config) { c.IPv6 = "auto" })
	here, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	local := func(h *netlink.Handle, a netip.Addr) {
		t.Helper()
		if rs, err := h.RouteGet(a.AsSlice()); err != nil || len(rs) != 1 || rs[0].Type != unix.RTN_LOCAL {
			t.Errorf("%v is not local yet: %v %v", a, rs, err)
		}
	}
	no, yes := false, true
	for i := range 5 {
		n := fmt.Sprint("n", i)
		create(t, m, mnetwork.CreateRequest{Name: n, EnableIPv4: &no, EnableIPv6: &yes})
		in, err := m.Inspect(context.Background(), n)
		if err != nil || len(in.IPAM.Config) != 1 {
			t.Fatalf("%+v %v", in.IPAM, err)
		}
		local(here, in.IPAM.Config[0].Gateway)
		for j := range 4 {
			ns := newNS(t)
			h, err := handleAt(ns)
			if err != nil {
				t.Fatal(err)
			}
			a := attach(t, m, ns, fmt.Sprintf("c%d-%d", i, j), n, nil)
			local(h, a.Settings.GlobalIPv6Address)
			h.Close()
		}
	}
}

func TestDefaultBridge(t *testing.T) {
	m := newManager(t, nil)
	a, b := newNS(t), newNS(t)
	l, err := m.PrepareLink(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	aa := attach(t, m, a, "a", "bridge", func(r *AttachRequest) { r.Link = l })
	ba := attach(t, m, b, "b", "bridge", nil)
	t.Log(aa.Settings.IPAddress, ba.Settings.IPAddress)
	echo(t, a, ":80")
	got, err := ask(b, "tcp", aa.Settings.IPAddress.String()+":80")
	if err != nil || got != ba.Settings.IPAddress.String() {
		t.Fatalf("got %q, %v", got, err)
	}
	got, err = ask(nil, "tcp", aa.Settings.IPAddress.String()+":80")
	if err != nil || got != aa.Settings.Gateway.String() {
		t.Fatalf("got %q, %v", got, err)
	}
	if os.Getenv("SHOW") != "" {
		t.Log(ruleset())
	}
}

// TestParkedElsewhere uses a link that was prepared for the default network on
// another, with another name, MAC and MTU.
func TestParkedElsewhere(t *testing.T) {
	m := newManager(t, func(c *Config) { c.IPv6 = "on" })
	create(t, m, mnetwork.CreateRequest{Name: "n", Options: map[string]string{optMTU: "1400"}})
	for _, netw := range []string{"n", "bridge"} {
		a, b := newNS(t), newNS(t)
		l, err := m.PrepareLink(context.Background(), a)
		if err != nil {
			t.Fatal(err)
		}
		aa := attach(t, m, a, "a"+netw, netw, func(r *AttachRequest) {
			r.Link, r.IfName = l, "net0"
			r.Settings = &mnetwork.EndpointSettings{MacAddress: mnetwork.HardwareAddr{2, 9, 9, 9, 9, 9}}
		})
		ba := attach(t, m, b, "b"+netw, netw, nil)
		echo(t, a, ":80")
		for _, x := range [][2]string{{aa.Settings.IPAddress.String(), ba.Settings.IPAddress.String()}, {aa.Settings.GlobalIPv6Address.String(), ba.Settings.GlobalIPv6Address.String()}} {
			// The kernel joins an address's multicast group a moment after it
			// has the address, and asks for a neighbour once a second.
			got, err := ask(b, "tcp", net.JoinHostPort(x[0], "80"))
			if err != nil {
				got, err = ask(b, "tcp", net.JoinHostPort(x[0], "80"))
			}
			if err != nil || got != x[1] {
				t.Errorf("%s: got %q, %v; want %q", netw, got, err, x[1])
			}
		}
		in(t, a, func() error {
			ifs, err := net.Interfaces()
			if err != nil {
				return err
			}
			if len(ifs) != 2 || ifs[1].Name != "net0" || ifs[1].HardwareAddr.String() != "02:09:09:09:09:09" || netw == "n" && ifs[1].MTU != 1400 {
				t.Errorf("got %+v", ifs)
			}
			as, _ := ifs[1].Addrs()
			if len(as) != 3 { // IPv4, IPv6, link-local
				t.Errorf("got addresses %v", as)
			}
			return nil
		})
		if g := gateway(t, a); g != aa.Settings.Gateway.String()+" net0" {
			t.Errorf("got %q", g)
		}
	}
	if len(m.parked) != 0 {
		t.Errorf("left %v", m.parked)
	}
}

func BenchmarkAttach(b *testing.B) {
	m := newManager(b, nil)
	ctx := context.Background()
	run := func(b *testing.B, park bool, netw string) {
		var park_, at, rel time.Duration
		for b.Loop() {
			b.StopTimer()
			ns := newNS(b)
			var l *Link
			t := time.Now()
			if park {
				var err error
				if l, err = m.PrepareLink(ctx, ns); err != nil {
					b.Fatal(err)
				}
			}
			park_ += time.Since(t)
			b.StartTimer()
			t = time.Now()
			attach(b, m, ns, "x", netw, func(r *AttachRequest) { r.Link = l })
			at += time.Since(t)
			t = time.Now()
			if err := m.Release(ctx, "x"); err != nil {
				b.Fatal(err)
			}
			rel += time.Since(t)
			b.StopTimer()
			ns.Close()
			b.StartTimer()
		}
		n := float64(b.N) * 1000
		b.ReportMetric(float64(park_.Nanoseconds())/n, "µs/prepare")
		b.ReportMetric(float64(at.Nanoseconds())/n, "µs/attach")
		b.ReportMetric(float64(rel.Nanoseconds())/n, "µs/release")
	}
	b.Run("parked", func(b *testing.B) { run(b, true, "bridge") })
	b.Run("cold", func(b *testing.B) { run(b, false, "bridge") })
	if _, err := m.Create(ctx, mnetwork.CreateRequest{Name: "n"}); err != nil {
		b.Fatal(err)
	}
	b.Run("named", func(b *testing.B) { run(b, false, "n") })
	b.Run("named parked", func(b *testing.B) { run(b, true, "n") })
}
