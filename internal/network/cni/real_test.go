package cni

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/cni/cnitest"
)

// newRealBed is a bed with the reference plugins.
func newRealBed(t *testing.T) *bed {
	bin := cnitest.Plugins(t)
	// Nothing may stay in the namespace but what plugins never remove.
	before := links(t)
	t.Cleanup(func() {
		for name := range links(t) {
			if !before[name] {
				t.Errorf("link %s stays", name)
			}
		}
		if out, _ := exec.Command("iptables-save", "-t", "nat").CombinedOutput(); strings.Contains(string(out), "10.88.") {
			t.Errorf("rules stay:\n%s", out)
		}
	})
	return newBed(t, func(c *Config) { c.BinDirs = []string{bin} })
}

func links(t *testing.T) map[string]bool {
	t.Helper()
	ls, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, l := range ls {
		out[l.Attrs().Name] = true
	}
	return out
}

// greet serves "hello" on a TCP port of a namespace.
func greet(t *testing.T, ns *os.File, port int) {
	t.Helper()
	var ln net.Listener
	inside(t, ns, func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	})
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "hello")
			c.Close()
		}
	}()
}

func greeted(addr string) error {
	c, err := net.DialTimeout("tcp", addr, 3*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	b, err := io.ReadAll(c)
	if err == nil && string(b) != "hello" {
		err = fmt.Errorf("it said %q", b)
	}
	return err
}

func (b *bed) bridged(version, name, link string) string {
	return chain(version, name,
		`{"type":"bridge","bridge":"`+link+`","isGateway":true,"hairpinMode":true,"capabilities":{"mac":true,"ips":true,"ipRanges":true},
		 "ipam":{"type":"host-local","dataDir":"`+b.dir+`/leases","ranges":[[{"subnet":"10.88.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}`,
		`{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}`,
		`{"type":"bandwidth","capabilities":{"bandwidth":true}}`,
		`{"type":"firewall","backend":"iptables"}`,
		`{"type":"tuning","sysctl":{"net.ipv4.conf.IFNAME.arp_filter":"1"}}`)
}

func (b *bed) leases() (out []string) {
	es, _ := filepath.Glob(filepath.Join(b.dir, "leases", "*", "10.*"))
	for _, e := range es {
		out = append(out, filepath.Base(e))
	}
	return out
}

func dropLink(t *testing.T, name string) {
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
}

// The chain that most hosts have: connections, published ports, limits, checks
// and teardown.
func TestRealBridge(t *testing.T) {
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			b := newRealBed(t)
			dropLink(t, "cnireal0")
			b.list("10-a.conflist", b.bridged(version, "pods", "cnireal0"))
			ctx := context.Background()
			if err := b.Status(ctx, ""); err != nil {
				t.Fatal(err)
			}
			one, two := newNS(t), newNS(t)
			q1 := b.ask("one", one)
			q1.PortMappings = []PortMapping{{HostPort: 18080, ContainerPort: 80, Protocol: "tcp"}}
			q1.Bandwidth = &Bandwidth{IngressRate: 8e6, IngressBurst: 8e6, EgressRate: 4e6, EgressBurst: 4e6}
			r1, err := b.Add(ctx, q1)
			if err != nil {
				t.Fatal(err)
			}
			r2, err := b.Add(ctx, b.ask("two", two))
			if err != nil {
				t.Fatal(err)
			}
			a1, a2 := r1.Inside()[0].Address.Addr(), r2.Inside()[0].Address.Addr()
			if a1 == a2 || len(b.leases()) != 2 {
				t.Errorf("addresses %s and %s, leases %v", a1, a2, b.leases())
			}
			greet(t, one, 80)
			inside(t, two, func() error { return greeted(a1.String() + ":80") })
			if err := greeted(a1.String() + ":80"); err != nil {
				t.Errorf("from the host: %v", err)
			}
			gw := r1.Inside()[0].Gateway.String()
			for _, at := range []string{"127.0.0.1", gw} {
				if err := greeted(at + ":18080"); err != nil {
					t.Errorf("published at %s: %v", at, err)
				}
			}
			inside(t, two, func() error { return greeted(gw + ":18080") })
			inside(t, one, func() error { return greeted(gw + ":18080") }) // hairpin
			if got := rates(t); !strings.Contains(got, "1000000") || !strings.Contains(got, "500000") {
				t.Errorf("rates in bytes per second: %s", got)
			}
			if err := b.Check(ctx, "one"); err != nil {
				t.Errorf("check: %v", err)
			}
			inside(t, two, func() error {
				l, err := netlink.LinkByName("eth0")
				if err == nil {
					err = netlink.LinkDel(l)
				}
				return err
			})
			if err := b.Check(ctx, "two"); err == nil {
				t.Error("a link that is gone passes the check")
			}
			for _, id := range []string{"two", "one"} {
				if err := b.Del(ctx, id); err != nil {
					t.Error(err)
				}
			}
			if err := greeted(gw + ":18080"); err == nil {
				t.Error("the port is published still")
			}
			if l := b.leases(); len(l) > 0 {
				t.Errorf("leases stay: %v", l)
			}
			if got := rates(t); got != "" {
				t.Errorf("limits stay: %s", got)
			}
			b.clean()
			l, err := netlink.LinkByName("cnireal0")
			if err == nil {
				err = netlink.LinkDel(l)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// rates are those of the token buckets of this namespace, in bytes per second.
func rates(t *testing.T) string {
	t.Helper()
	ls, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range ls {
		qs, err := netlink.QdiscList(l)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			err = nil
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range qs {
			if tbf, ok := q.(*netlink.Tbf); ok {
				out = append(out, fmt.Sprintf("%s=%d", l.Attrs().Name, tbf.Rate))
			}
		}
	}
	return strings.Join(out, " ")
}

// What a runtime may ask for: ranges, addresses, a MAC address.
func TestRealCapabilities(t *testing.T) {
	b := newRealBed(t)
	dropLink(t, "cnireal1")
	// The bridge has no address, since it can have one of one range alone.
	b.list("10-a.conflist", strings.Replace(b.bridged("1.0.0", "pods", "cnireal1"), `"isGateway":true,`, "", 1))
	ctx := context.Background()
	q := b.ask("ranged", newNS(t))
	q.IPRanges = [][]IPRange{{{Subnet: "10.88.77.0/24", RangeStart: "10.88.77.50", RangeEnd: "10.88.77.50"}}}
	q.MAC = "02:00:00:00:00:42"
	res, err := b.Add(ctx, q)
	if err != nil {
		t.Fatal(err)
	}
	if in := res.Inside(); len(in) != 2 || in[0].Address.String() != "10.88.77.50/24" || res.MAC("eth0").String() != q.MAC {
		t.Errorf("result %+v", res)
	}
	fixed := b.ask("fixed", newNS(t))
	fixed.IPs = []string{"10.88.0.99"}
	if res, err := b.Add(ctx, fixed); err != nil || res.Inside()[0].Address.Addr() != netip.MustParseAddr("10.88.0.99") {
		t.Errorf("fixed address: %+v %v", res, err)
	}
	// Taken: the plugin refuses, and nothing of the attempt stays.
	again := b.ask("again", newNS(t))
	again.IPs = []string{"10.88.0.99"}
	if _, err := b.Add(ctx, again); err == nil || !strings.Contains(err.Error(), "10.88.0.99") {
		t.Errorf("an address given twice: %v", err)
	}
	for _, id := range []string{"ranged", "fixed"} {
		if err := b.Del(ctx, id); err != nil {
			t.Error(err)
		}
	}
	if l := b.leases(); len(l) > 0 {
		t.Errorf("leases stay: %v", l)
	}
	b.clean()
	l, _ := netlink.LinkByName("cnireal1")
	_ = netlink.LinkDel(l)
}

// The other reference plugins that this kernel can run.
func TestRealOthers(t *testing.T) {
	for _, c := range []struct{ name, plugin string }{
		{"ptp", `{"type":"ptp","ipMasq":true,"ipam":{"type":"host-local","dataDir":"DIR/leases","subnet":"10.88.3.0/24"}}`},
		{"macvlan", `{"type":"macvlan","master":"cniparent","ipam":{"type":"static","addresses":[{"address":"10.88.4.9/24"}]}}`},
		{"loopback", `{"type":"loopback"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cniparent"}}); err != nil {
				t.Fatal(err)
			}
			dropLink(t, "cniparent")
			b := newRealBed(t)
			b.list("10-a.conflist", chain("1.0.0", "x", strings.ReplaceAll(c.plugin, "DIR", b.dir)))
			ns := newNS(t)
			q := b.ask("one", ns)
			if c.name == "loopback" {
				q.IfName = "lo"
			}
			res, err := b.Add(context.Background(), q)
			if err != nil {
				t.Fatal(err)
			}
			inside(t, ns, func() error {
				l, err := netlink.LinkByName(q.IfName)
				if err != nil {
					return err
				}
				as, err := netlink.AddrList(l, netlink.FAMILY_V4)
				if err != nil {
					return err
				}
				if want := res.Inside()[0].Address.String(); len(as) == 0 || as[0].IPNet.String() != want {
					return fmt.Errorf("addresses %v, want %s", as, want)
				}
				return nil
			})
			if err := b.Check(context.Background(), "one"); err != nil {
				t.Error(err)
			}
			if err := b.Del(context.Background(), "one"); err != nil {
				t.Error(err)
			}
			b.clean()
		})
	}
}

// The namespace is gone before DEL: what is on the host goes all the same.
func TestRealLateDel(t *testing.T) {
	b := newRealBed(t)
	dropLink(t, "cnireal2")
	b.list("10-a.conflist", b.bridged("1.0.0", "pods", "cnireal2"))
	ns := newNS(t)
	q := b.ask("one", ns)
	q.PortMappings = []PortMapping{{HostPort: 18081, ContainerPort: 80, Protocol: "tcp"}}
	if _, err := b.Add(context.Background(), q); err != nil {
		t.Fatal(err)
	}
	ns.Close()
	if err := b.pins.drop("one"); err != nil {
		t.Fatal(err)
	}
	b.open(func(c *Config) { c.BinDirs = []string{cnitest.Plugins(t)} })
	b.run()
	b.Restore(Containers, func(string) bool { return false })
	eventually(t, "undoing", func() bool { return !b.Has("one") })
	if l := b.leases(); len(l) > 0 {
		t.Errorf("leases stay: %v", l)
	}
	b.clean()
	l, _ := netlink.LinkByName("cnireal2")
	_ = netlink.LinkDel(l)
}

// GC is told what is valid. The reference plugins of this version have nothing
// to do for it, but must not be upset.
func TestCollect(t *testing.T) {
	b := newRealBed(t)
	dropLink(t, "cnireal3")
	real := filepath.Join(b.dir, "net.d", "20-b.conflist")
	write(t, real, b.bridged("1.1.0", "real", "cnireal3"))
	b.reload()
	ctx := context.Background()
	if err := b.Collect(ctx, "real"); err != nil {
		t.Error(err)
	}

	s := newBed(t, nil)
	s.script("p", `[ $CNI_COMMAND = GC ] && echo "$conf" >>$L.gc`+"\n"+good)
	conf := chain("1.1.0", "x", "p")
	s.list("10-a.conflist", conf)
	if _, err := s.Add(ctx, s.ask("one", newNS(t))); err != nil {
		t.Fatal(err)
	}
	told := func() string { data, _ := os.ReadFile(s.dir + "/log.gc"); return string(data) }
	s.list("10-a.conflist", strings.Replace(conf, `"name"`, `"disableGC":true,"name"`, 1))
	if err := s.Collect(ctx, "x"); err != nil || told() != "" {
		t.Errorf("with disableGC: %v, %s", err, told())
	}
	s.list("10-a.conflist", conf)
	// Not while plugins run for the network.
	_ = s.gate("x").Acquire(ctx, 1)
	if err := s.Collect(ctx, "x"); !fault.Is(err, fault.Unavailable) || told() != "" {
		t.Errorf("beside an ADD: %v", err)
	}
	s.gate("x").Release(1)
	s.run()
	s.CollectSoon("x")
	eventually(t, "collecting", func() bool { return told() != "" })
	if want := `"cni.dev/valid-attachments":[{"containerID":"one","ifname":"eth0"}]`; !strings.Contains(told(), want) {
		t.Errorf("told %s", told())
	}
	if err := s.Del(ctx, "one"); err != nil {
		t.Error(err)
	}
	s.clean()
}
