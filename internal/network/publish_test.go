package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	mnetwork "github.com/moby/moby/api/types/network"
)

// The host's address on the outside wire and that of a client there.
const (
	host4, client4 = "198.51.100.1", "198.51.100.2"
	host6, client6 = "2001:db8:1::1", "2001:db8:1::2"
)

// outside makes a network namespace that is wired to the host, as a client
// elsewhere is.
func outside(t testing.TB) *os.File {
	t.Helper()
	ns := newNS(t)
	l, err := bridge.New()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	i, err := l.Pair(ns, "wire0", bridge.Interface{Name: "eth0",
		Addrs:    []netip.Prefix{netip.MustParsePrefix(client4 + "/24"), netip.MustParsePrefix(client6 + "/64")},
		Gateways: []netip.Addr{netip.MustParseAddr(host4), netip.MustParseAddr(host6)}})
	if err != nil {
		t.Fatal(err)
	}
	l.Settle("wire0")
	t.Cleanup(func() {
		l, _ := bridge.New()
		l.Delete(i)
		l.Close()
	})
	for _, a := range []string{host4 + "/24", host6 + "/64", "fe80::1/64"} {
		run(t, "ip", "address", "add", a, "dev", "wire0", "nodad")
	}
	return ns
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if name == "ip" && args[0] == "address" && strings.Contains(args[2], ".") {
		args = args[:len(args)-1] // no nodad for IPv4
	}
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// policy loads an nftables ruleset as an administrator would, in place of
// other rulesets of administrators.
func policy(t testing.TB, rules string) {
	t.Helper()
	c := exec.Command("nft", "-f", "-")
	c.Stdin = strings.NewReader("table inet admin\ndelete table inet admin\n" + rules)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("nft", "delete", "table", "inet", "admin").Run() })
}

func ports(t testing.TB, specs ...string) mnetwork.PortMap {
	t.Helper()
	pm := mnetwork.PortMap{}
	for _, s := range specs { // [ip|]hostport:port/proto
		ip, rest, ok := strings.Cut(s, "|")
		var a netip.Addr
		if ok {
			a = netip.MustParseAddr(ip)
		} else {
			rest = s
		}
		hp, cp, _ := strings.Cut(rest, ":")
		p := mnetwork.MustParsePort(cp)
		pm[p] = append(pm[p], mnetwork.PortBinding{HostIP: a, HostPort: hp})
	}
	return pm
}

const dropAllInput = `table inet admin { chain in { type filter hook input priority 0; policy drop; iifname "lo" accept; ct state established,related accept; %s; }; }`

func TestPublish(t *testing.T) {
	wire := outside(t)
	for _, rp := range []string{"0", "1", "2"} {
		for _, six := range []bool{false, true} {
			t.Run(fmt.Sprintf("rp_filter=%s,six=%v", rp, six), func(t *testing.T) {
				if err := bridge.SetSysctl("net/ipv4/conf/all/rp_filter", rp); err != nil {
					t.Fatal(err)
				}
				defer bridge.SetSysctl("net/ipv4/conf/all/rp_filter", "0")
				testPublish(t, wire, six)
			})
		}
	}
}

func testPublish(t *testing.T, wire *os.File, six bool) {
	m := newManager(t, func(c *Config) {
		if six {
			c.IPv6 = "on"
		}
	})
	host, client := host4, client4
	if six {
		host, client = host6, client6
	}
	c, d := newNS(t), newNS(t)
	ca := attach(t, m, c, "c", "bridge", func(r *AttachRequest) {
		r.Ports = ports(t, "8080:80/tcp", "8080:80/udp", "127.0.0.1|8081:80/tcp", host4+"|8082:80/tcp")
	})
	da := attach(t, m, d, "d", "bridge", nil)
	if _, err := m.Create(context.Background(), mnetwork.CreateRequest{Name: "other"}); err != nil {
		t.Fatal(err)
	}
	o := newNS(t)
	oa := attach(t, m, o, "o", "other", nil)
	echo(t, c, ":80")
	own := func(a Attachment) string {
		if six {
			return a.Settings.GlobalIPv6Address.String()
		}
		return a.Settings.IPAddress.String()
	}
	gw := ca.Settings.Gateway.String()
	if six {
		gw = ca.Settings.IPv6Gateway.String()
	}
	at := func(port string) string { return net.JoinHostPort(host, port) }
	ask2 := func(ns *os.File, proto, addr, want string) {
		t.Helper()
		// The kernel completes an IPv6 address a moment after it was given, and
		// lost first packets are sent again after a second.
		patience := 4 * time.Second
		if want == "" {
			patience = 250 * time.Millisecond
		}
		got, err := askFor(ns, proto, addr, patience)
		if want == "" && err == nil {
			t.Errorf("%s %s: reached although it should not be", proto, addr)
		} else if want != "" && (err != nil || got != want) {
			t.Errorf("%s %s: got %q, %v; want %q", proto, addr, got, err, want)
		}
	}
	accept := fmt.Sprintf(dropAllInput, "meta l4proto { tcp, udp } th dport { 8080, 8081, 8082 } accept; meta l4proto ipv6-icmp accept")
	for name, rules := range map[string]string{"no firewall": "", "accepting": accept} {
		t.Run(name, func(t *testing.T) {
			policy(t, rules)
			ask2(wire, "tcp", at("8080"), client)
			ask2(wire, "udp", at("8080"), client)
			if !six {
				ask2(wire, "tcp", at("8082"), client)
				ask2(wire, "tcp", at("8081"), "") // 127.0.0.1 alone
				ask2(nil, "tcp", "127.0.0.1:8081", gw)
				ask2(nil, "tcp", "127.0.0.1:8080", gw)
				ask2(nil, "udp", "127.0.0.1:8080", gw)
				ask2(nil, "tcp", "127.0.0.1:8082", "")
			}
			ask2(nil, "tcp", at("8080"), host)
			// A container by way of the host: itself, a neighbour and one of
			// another network.
			ask2(c, "tcp", at("8080"), gw)
			ask2(d, "tcp", at("8080"), gw)
			ask2(d, "udp", at("8080"), gw)
			ask2(o, "tcp", at("8080"), own(oa))
			// Not published, or not by way of the host.
			ask2(wire, "tcp", at("80"), "")
			ask2(wire, "tcp", net.JoinHostPort(own(ca), "80"), "")
			ask2(o, "tcp", net.JoinHostPort(own(ca), "80"), "")
			ask2(d, "tcp", net.JoinHostPort(own(ca), "80"), own(da))
		})
	}
	t.Run("dropping", func(t *testing.T) {
		policy(t, fmt.Sprintf(dropAllInput, "meta l4proto ipv6-icmp accept"))
		ask2(wire, "tcp", at("8080"), "")
		ask2(wire, "udp", at("8080"), "")
		ask2(d, "tcp", at("8080"), "")
		ask2(nil, "tcp", at("8080"), host)
	})
	t.Run("through", func(t *testing.T) {
		policy(t, fmt.Sprintf(dropAllInput, "meta l4proto ipv6-icmp accept"))
		e := newNS(t)
		attach(t, m, e, "e", "bridge", func(r *AttachRequest) {
			r.Ports, r.PublishThrough = ports(t, "9090:80/tcp"), true
		})
		defer m.Release(context.Background(), "e")
		echo(t, e, ":80")
		ask2(wire, "tcp", at("9090"), client)
		ask2(d, "tcp", at("9090"), gw)
		ask2(o, "tcp", at("9090"), own(oa))
	})
	if err := m.Release(context.Background(), "c"); err != nil {
		t.Fatal(err)
	}
	ask2(wire, "tcp", at("8080"), "")
}

func TestPublishConflicts(t *testing.T) {
	m := newManager(t, nil)
	ln, err := net.Listen("tcp4", "0.0.0.0:7070")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	try := func(name string, pm mnetwork.PortMap) (Attachment, error) {
		return m.Attach(context.Background(), AttachRequest{ContainerID: name, ContainerName: name, Network: "bridge", NetNS: newNS(t), Ports: pm, Ephemeral: true})
	}
	if _, err := try("a", ports(t, "7070:80/tcp")); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "Bind for 0.0.0.0:7070 failed: port is already allocated") {
		t.Fatalf("got %v", err)
	}
	if _, err := try("a", ports(t, "7071:80/tcp", "7070:81/tcp")); err == nil {
		t.Fatal("half a publication succeeded")
	}
	a, err := try("a", ports(t, "7071:80/tcp", "7070-7080:81/tcp", ":82/tcp", "7071:80/udp"))
	if err != nil {
		t.Fatal(err)
	}
	got := a.Ports[mnetwork.MustParsePort("81/tcp")][0].HostPort
	if got == "7070" || got == "7071" {
		t.Fatalf("a range gave the port %s, which is taken", got)
	}
	if len(a.Ports) != 4 {
		t.Fatalf("got %v", a.Ports)
	}
	if _, err := net.Listen("tcp4", "127.0.0.1:7071"); err == nil {
		t.Fatal("a published port can be listened on by others")
	}
	if _, err := try("b", ports(t, "127.0.0.1|7071:80/tcp")); !fault.Is(err, fault.Conflict) {
		t.Fatalf("got %v", err)
	}
	if err := m.Release(context.Background(), "a"); err != nil {
		t.Fatal(err)
	}
	ln2, err := net.Listen("tcp4", "127.0.0.1:7071")
	if err != nil {
		t.Fatal("a released port is still taken:", err)
	}
	ln2.Close()
	for _, bad := range []mnetwork.PortMap{
		{mnetwork.MustParsePort("80/tcp"): {{HostPort: "99999"}}},
		{mnetwork.MustParsePort("80/tcp"): {{HostPort: "80-70"}}},
		{mnetwork.MustParsePort("80/tcp"): {{HostPort: "x"}}},
		{mnetwork.MustParsePort("80/icmp"): {{HostPort: "1"}}},
		{mnetwork.MustParsePort("0/tcp"): {{HostPort: "1"}}},
		{mnetwork.MustParsePort("80/tcp"): {{HostIP: netip.MustParseAddr("203.0.113.77"), HostPort: "1234"}}},
		{mnetwork.MustParsePort("80/tcp"): {{HostIP: netip.MustParseAddr("::1"), HostPort: "1234"}}},
	} {
		if _, err := try("c", bad); !fault.Is(err, fault.Invalid) {
			t.Errorf("%v: got %v", bad, err)
		}
	}
	many := mnetwork.PortMap{}
	for i := range 60000 {
		p, _ := mnetwork.PortFrom(uint16(i+1), "tcp")
		many[p] = []mnetwork.PortBinding{{}}
	}
	if _, err := try("c", many); !fault.Is(err, fault.Exhausted) {
		t.Fatalf("got %v", err)
	}
	if len(m.containers) != 0 || len(m.ports.held) != 0 {
		t.Fatalf("failed attempts left %v, %v", m.containers, m.ports.held)
	}
}

func TestFlushIsRestored(t *testing.T) {
	wire := outside(t)
	m := newManager(t, nil)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	c := newNS(t)
	attach(t, m, c, "c", "bridge", func(r *AttachRequest) { r.Ports = ports(t, "8080:80/tcp") })
	echo(t, c, ":80")
	for _, harm := range [][]string{{"flush", "ruleset"}, {"flush", "table", "ip", "servin_" + t.Name()}, {"delete", "chain", "ip", "servin_" + t.Name(), "deliver"},
		{"delete", "element", "ip", "servin_" + t.Name(), "in", "{ tcp . 8080 }"}} {
		if _, err := ask(wire, "tcp", host4+":8080"); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("nft", harm...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", harm, out)
		}
		var err error
		for range 40 {
			time.Sleep(50 * time.Millisecond)
			if _, err = ask(wire, "tcp", host4+":8080"); err == nil {
				break
			}
		}
		if err != nil {
			t.Fatalf("%v was not made good: %v\n%s", harm, err, ruleset())
		}
	}
	stop()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
