package network

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	mnetwork "github.com/moby/moby/api/types/network"
)

func create(t testing.TB, m *Manager, req mnetwork.CreateRequest) mnetwork.Inspect {
	t.Helper()
	r, err := m.Create(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	in, err := m.Inspect(context.Background(), r.ID)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func reach(t testing.TB, from *os.File, to Attachment, want bool) {
	t.Helper()
	addr := to.Settings.IPAddress.String() + ":80"
	if _, err := ask(from, "tcp", addr); (err == nil) != want {
		t.Errorf("reaching %s: %v; want %v", addr, err, want)
	}
}

func TestIsolation(t *testing.T) {
	wire := outside(t)
	echo(t, wire, ":80")
	m := newManager(t, nil)
	create(t, m, mnetwork.CreateRequest{Name: "one"})
	create(t, m, mnetwork.CreateRequest{Name: "inside", Internal: true})
	create(t, m, mnetwork.CreateRequest{Name: "apart", Options: map[string]string{optICC: "false"}})
	create(t, m, mnetwork.CreateRequest{Name: "routed", Options: map[string]string{optMode4: "routed"}})
	create(t, m, mnetwork.CreateRequest{Name: "open", Options: map[string]string{optMode4: "nat-unprotected"}})
	type place struct {
		ns *os.File
		at Attachment
	}
	p := map[string]place{}
	for _, n := range []string{"bridge", "one", "inside", "apart", "routed", "open"} {
		for _, i := range []string{"1", "2"} {
			ns := newNS(t)
			a := attach(t, m, ns, n+i, n, func(r *AttachRequest) {
				if n == "routed" && i == "1" {
					r.Ports = ports(t, ":80/tcp")
				}
			})
			echo(t, ns, ":80")
			p[n+i] = place{ns, a}
		}
	}
	for _, n := range []string{"bridge", "one", "inside", "routed", "open"} {
		reach(t, p[n+"1"].ns, p[n+"2"].at, true)
	}
	reach(t, p["apart1"].ns, p["apart2"].at, false)
	reach(t, p["bridge1"].ns, p["one1"].at, false)
	reach(t, p["one1"].ns, p["inside1"].at, false)
	reach(t, p["inside1"].ns, p["one1"].at, false)
	// To the outside, with the host's address unless routed.
	for n, want := range map[string]string{"bridge1": host4, "one1": host4, "apart1": host4, "open1": host4, "routed1": p["routed1"].at.Settings.IPAddress.String(), "inside1": ""} {
		got, err := ask(p[n].ns, "tcp", client4+":80")
		if want != got || (want == "") != (err != nil) {
			t.Errorf("%s to the outside: got %q, %v; want %q", n, got, err, want)
		}
	}
	// From the outside by the containers' own addresses.
	for n, want := range map[string]bool{"bridge1": false, "one1": false, "inside1": false, "open1": true, "routed1": true, "routed2": false} {
		reach(t, wire, p[n].at, want)
	}
	// Another container's packets to the host's loopback, by way of the bridge.
	in(t, p["bridge1"].ns, func() error {
		out, err := exec.Command("ip", "route", "add", "127.9.9.9/32", "via", p["bridge1"].at.Settings.Gateway.String()).CombinedOutput()
		if err != nil {
			t.Logf("%s", out)
		}
		return nil
	})
}

func TestSettings(t *testing.T) {
	m := newManager(t, nil)
	ctx := context.Background()
	pre := func(s string) netip.Prefix { return netip.MustParsePrefix(s) }
	ad := netip.MustParseAddr
	in := create(t, m, mnetwork.CreateRequest{Name: "net", Labels: map[string]string{"a": "b"}, IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{
		{Subnet: pre("10.7.0.0/24"), IPRange: pre("10.7.0.64/30"), Gateway: ad("10.7.0.254"), AuxAddress: map[string]netip.Addr{"x": ad("10.7.0.65")}}}}})
	if in.IPAM.Config[0].Gateway != ad("10.7.0.254") || in.Driver != "bridge" || in.Scope != "local" {
		t.Fatalf("got %+v", in)
	}
	var got []string
	for i := range 3 {
		a := attach(t, m, newNS(t), fmt.Sprint("c", i), "net", nil)
		got = append(got, a.Settings.IPAddress.String())
		if a.Settings.Gateway != ad("10.7.0.254") || a.Settings.IPPrefixLen != 24 {
			t.Fatalf("got %+v", a.Settings)
		}
	}
	if !slices.Equal(got, []string{"10.7.0.64", "10.7.0.66", "10.7.0.67"}) {
		t.Fatalf("got %v", got)
	}
	try := func(name string, s *mnetwork.EndpointSettings, netw string) (Attachment, error) {
		return m.Attach(ctx, AttachRequest{ContainerID: name, ContainerName: name, Network: netw, NetNS: newNS(t), Settings: s, Ephemeral: true})
	}
	if _, err := try("d", nil, "net"); !fault.Is(err, fault.Exhausted) {
		t.Fatalf("got %v", err)
	}
	fixed := &mnetwork.EndpointSettings{IPAMConfig: &mnetwork.EndpointIPAMConfig{IPv4Address: ad("10.7.0.9")}, MacAddress: mnetwork.HardwareAddr{2, 3, 4, 5, 6, 7}}
	a, err := try("d", fixed, "net")
	if err != nil || a.Settings.IPAddress != ad("10.7.0.9") || a.Settings.MacAddress.String() != "02:03:04:05:06:07" {
		t.Fatalf("got %+v, %v", a.Settings, err)
	}
	for name, c := range map[string]struct {
		s    *mnetwork.EndpointSettings
		net  string
		kind fault.Kind
	}{
		"taken":   {fixed, "net", fault.Conflict},
		"outside": {&mnetwork.EndpointSettings{IPAMConfig: &mnetwork.EndpointIPAMConfig{IPv4Address: ad("10.8.0.9")}}, "net", fault.Invalid},
		"default": {&mnetwork.EndpointSettings{IPAMConfig: &mnetwork.EndpointIPAMConfig{IPv4Address: ad("172.17.0.9")}}, "bridge", fault.Invalid},
		"alias":   {&mnetwork.EndpointSettings{Aliases: []string{"x"}}, "bridge", fault.Invalid},
		"mac":     {&mnetwork.EndpointSettings{MacAddress: mnetwork.HardwareAddr{1, 3, 4, 5, 6, 7}}, "net", fault.Invalid},
		"none":    {nil, "nosuch", fault.NotFound},
	} {
		if _, err := try("e", c.s, c.net); !fault.Is(err, c.kind) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := try("d", nil, "net"); !fault.Is(err, fault.Forbidden) && !fault.Is(err, fault.Exhausted) {
		t.Fatalf("got %v", err)
	}
	for name, c := range map[string]struct {
		r    mnetwork.CreateRequest
		kind fault.Kind
	}{
		"name":      {mnetwork.CreateRequest{Name: "a b"}, fault.Invalid},
		"slash":     {mnetwork.CreateRequest{Name: "../x"}, fault.Invalid},
		"taken":     {mnetwork.CreateRequest{Name: "net"}, fault.Conflict},
		"builtin":   {mnetwork.CreateRequest{Name: "host"}, fault.Forbidden},
		"driver":    {mnetwork.CreateRequest{Name: "x", Driver: "overlay"}, fault.NotFound},
		"overlap":   {mnetwork.CreateRequest{Name: "x", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: pre("10.7.0.0/16")}}}}, fault.Forbidden},
		"bits":      {mnetwork.CreateRequest{Name: "x", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: pre("10.9.1.0/16")}}}}, fault.Invalid},
		"gateway":   {mnetwork.CreateRequest{Name: "x", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: pre("10.9.0.0/16"), Gateway: ad("10.10.0.1")}}}}, fault.Invalid},
		"no subnet": {mnetwork.CreateRequest{Name: "x", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Gateway: ad("10.10.0.1")}}}}, fault.Invalid},
		"option":    {mnetwork.CreateRequest{Name: "x", Options: map[string]string{optMTU: "many"}}, fault.Invalid},
		"link":      {mnetwork.CreateRequest{Name: "x", Options: map[string]string{optName: "a/b"}}, fault.Invalid},
		"tiny":      {mnetwork.CreateRequest{Name: "x", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: pre("10.9.0.0/32")}}}}, fault.Invalid},
		"whole":     {mnetwork.CreateRequest{Name: "x", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: pre("0.0.0.0/0")}}}}, fault.Forbidden},
		"scope":     {mnetwork.CreateRequest{Name: "x", Scope: "swarm"}, fault.Forbidden},
	} {
		if _, err := m.Create(ctx, c.r); !fault.Is(err, c.kind) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := m.Remove(ctx, "net"); !fault.Is(err, fault.Forbidden) || !strings.Contains(err.Error(), "active endpoints") {
		t.Fatalf("got %v", err)
	}
	if err := m.Remove(ctx, "bridge"); !fault.Is(err, fault.Forbidden) {
		t.Fatalf("got %v", err)
	}
	create(t, m, mnetwork.CreateRequest{Name: "unused"})
	for f, want := range map[string][]string{
		"dangling=true": {"unused"}, "type=builtin": {"bridge", "host", "none"}, "label=a=b": {"net"}, "label=a": {"net"},
		"name=us": {"unused"}, "driver=null": {"none"}, "id=" + in.ID[:6]: {"net"},
	} {
		k, v, _ := strings.Cut(f, "=")
		l, err := m.List(ctx, Filters{k: {v: true}})
		var names []string
		for _, n := range l {
			names = append(names, n.Name)
		}
		if err != nil || !slices.Equal(names, want) {
			t.Errorf("%s: got %v, %v; want %v", f, names, err, want)
		}
	}
	if _, err := m.List(ctx, Filters{"nosuch": {"x": true}}); !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
	rep, err := m.Prune(ctx, nil)
	if err != nil || !slices.Equal(rep.NetworksDeleted, []string{"unused"}) {
		t.Fatalf("got %v, %v", rep, err)
	}
	// Addresses of the ended are had again, also when there are no others.
	for i := range 3 {
		if err := m.Release(ctx, fmt.Sprint("c", i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := try("f", nil, "net"); err != nil {
		t.Fatal(err)
	}
}

func gateway(t *testing.T, ns *os.File) string {
	t.Helper()
	var out []byte
	in(t, ns, func() (err error) {
		out, err = exec.Command("ip", "route", "show", "default").Output()
		return err
	})
	f := strings.Fields(string(out))
	if len(f) < 5 {
		return ""
	}
	return f[2] + " " + f[4]
}

func TestConnectDisconnect(t *testing.T) {
	m := newManager(t, nil)
	ctx := context.Background()
	for _, n := range []string{"aa", "bb"} {
		create(t, m, mnetwork.CreateRequest{Name: n})
	}
	create(t, m, mnetwork.CreateRequest{Name: "in", Internal: true})
	ns := newNS(t)
	attach(t, m, ns, "c", "in", nil)
	if g := gateway(t, ns); g != "" {
		t.Fatalf("an internal network gave a default route: %s", g)
	}
	b := attach(t, m, ns, "c", "bb", nil)
	if g := gateway(t, ns); g != b.Settings.Gateway.String()+" eth1" {
		t.Fatalf("got %q", g)
	}
	a := attach(t, m, ns, "c", "aa", nil)
	if g := gateway(t, ns); g != a.Settings.Gateway.String()+" eth2" {
		t.Fatalf("got %q", g)
	}
	if err := m.Detach(ctx, "c", "bb"); err != nil {
		t.Fatal(err)
	}
	b = attach(t, m, ns, "c", "bb", func(r *AttachRequest) { r.Settings = &mnetwork.EndpointSettings{GwPriority: 5} })
	if g := gateway(t, ns); g != b.Settings.Gateway.String()+" eth1" {
		t.Fatalf("got %q", g)
	}
	if err := m.Detach(ctx, "c", "bb"); err != nil {
		t.Fatal(err)
	}
	if g := gateway(t, ns); g != a.Settings.Gateway.String()+" eth2" {
		t.Fatalf("got %q", g)
	}
	if err := m.Detach(ctx, "c", "bb"); !fault.Is(err, fault.NotFound) {
		t.Fatalf("got %v", err)
	}
	if _, err := m.Attach(ctx, AttachRequest{ContainerID: "c", ContainerName: "c", Network: "aa", NetNS: ns}); !fault.Is(err, fault.Forbidden) {
		t.Fatalf("got %v", err)
	}
	for _, n := range []string{"aa", "in"} {
		if err := m.Detach(ctx, "c", n); err != nil {
			t.Fatal(err)
		}
		if err := m.Remove(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	if len(m.containers) != 0 {
		t.Fatalf("left %v", m.containers)
	}
}

func TestReservation(t *testing.T) {
	m := newManager(t, nil)
	ctx := context.Background()
	create(t, m, mnetwork.CreateRequest{Name: "n"})
	want := attach(t, m, nil, "c", "n", func(r *AttachRequest) { r.Ephemeral = false }).Settings.IPAddress
	if other := attach(t, m, newNS(t), "d", "n", nil).Settings.IPAddress; other == want {
		t.Fatal("a reserved address was given to another")
	}
	m.Close()
	m2, err := New(ctx, m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m2.Destroy(ctx)
	if err := m2.Restore(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if got := attach(t, m2, newNS(t), "c", "n", nil).Settings.IPAddress; got != want {
		t.Fatalf("got %s, reserved was %s", got, want)
	}
}

func TestRestore(t *testing.T) {
	wire := outside(t)
	m := newManager(t, nil)
	ctx := context.Background()
	create(t, m, mnetwork.CreateRequest{Name: "n"})
	live, dead, ns2 := newNS(t), newNS(t), newNS(t)
	l := attach(t, m, live, "live", "n", func(r *AttachRequest) { r.Ports = ports(t, "8080:80/tcp") })
	attach(t, m, dead, "dead", "n", func(r *AttachRequest) { r.Ports = ports(t, "8081:80/tcp") })
	if _, err := m.PrepareLink(ctx, ns2); err != nil {
		t.Fatal(err)
	}
	echo(t, live, ":80")
	echo(t, dead, ":80")
	if _, err := ask(wire, "tcp", host4+":8081"); err != nil {
		t.Fatal(err)
	}
	m.Close()
	if _, err := ask(wire, "tcp", host4+":8080"); err != nil {
		t.Fatal("a container lost its port with the daemon:", err)
	}
	m2, err := New(ctx, m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m2.Destroy(ctx)
	if err := m2.Restore(ctx, []Live{{"live", live}}); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(wire, "tcp", host4+":8080"); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(wire, "tcp", host4+":8081"); err == nil {
		t.Fatal("the port of a dead container is served")
	}
	links, _ := bridge.Named(m2.vethPrefix() + "v")
	if len(links) != 1 {
		t.Fatalf("links are %v", links)
	}
	if _, err := m2.Attach(ctx, AttachRequest{ContainerID: "x", ContainerName: "x", Network: "bridge", NetNS: newNS(t), Ports: ports(t, "8080:80/tcp")}); !fault.Is(err, fault.Conflict) {
		t.Fatalf("got %v", err)
	}
	nw := newNS(t)
	attach(t, m2, nw, "new", "n", nil)
	if got, err := lookup(nw, "live", "ip4"); err != nil || !slices.Equal(got, []string{l.Settings.IPAddress.String()}) {
		t.Fatalf("got %v, %v", got, err)
	}
	if got, err := lookup(live, "new", "ip4"); err != nil || len(got) != 1 {
		t.Fatalf("got %v, %v", got, err)
	}
}

func TestDestroyLeavesNothing(t *testing.T) {
	snapshot := func() string {
		out, _ := exec.Command("sh", "-c", "ip -o link | sed 's/^[0-9]*: //;s/@.*//'; ip rule; ip route show table all; nft list tables; cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding").CombinedOutput()
		return string(out)
	}
	bridge.SetSysctl("net/ipv4/conf/all/rp_filter", "1")
	defer bridge.SetSysctl("net/ipv4/conf/all/rp_filter", "0")
	bridge.SetSysctl("net/ipv4/ip_forward", "0")
	bridge.SetSysctl("net/ipv6/conf/all/forwarding", "0")
	policy(t, `table inet admin { chain f { type filter hook forward priority 0; policy drop; } ; }`)
	before := snapshot()
	m := newManager(t, func(c *Config) { c.IPv6 = "on" })
	ctx := context.Background()
	create(t, m, mnetwork.CreateRequest{Name: "n", Options: map[string]string{optBandwidth: "100mbit", optVIP: "true"}})
	if _, err := m.AllowForward(ctx, actions(m)); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		attach(t, m, newNS(t), fmt.Sprint(i), "n", func(r *AttachRequest) { r.Ports = ports(t, ":80/tcp") })
	}
	if _, err := m.PrepareLink(ctx, newNS(t)); err != nil {
		t.Fatal(err)
	}
	if err := m.Destroy(ctx); err != nil {
		t.Fatal(err)
	}
	if after := snapshot(); after != before {
		t.Fatalf("before:\n%s\nafter:\n%s", before, after)
	}
	if out, _ := exec.Command("nft", "list", "table", "inet", "admin").CombinedOutput(); strings.Contains(string(out), "accept") && strings.Contains(string(out), "ifname") {
		t.Fatalf("accepts are left:\n%s", out)
	}
}

func TestManyLeaveNothing(t *testing.T) {
	m := newManager(t, nil)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	fds := func() int { es, _ := os.ReadDir("/proc/self/fd"); return len(es) }
	create(t, m, mnetwork.CreateRequest{Name: "n"})
	cycle := func(i int) {
		id := fmt.Sprint("c", i)
		f := newNS(t)
		netw := []string{"bridge", "n"}[i%2]
		attach(t, m, f, id, netw, func(r *AttachRequest) { r.Ports = ports(t, ":80/tcp", ":53/udp") })
		f.Close()
		if err := m.Release(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	cycle(0)
	before := fds()
	for i := range 200 {
		cycle(i)
	}
	deadline := time.Now().Add(10 * time.Second)
	inUse := func() (n uint64) {
		for _, w := range m.nets {
			for _, p := range w.pool4 {
				used, _ := p.Usage()
				n += used - 3 // network, gateway, broadcast
			}
		}
		return n
	}
	for {
		m.mu.RLock()
		left := len(m.dying)
		m.mu.RUnlock()
		links, _ := bridge.Named(m.vethPrefix() + "v")
		if left == 0 && len(links) == 0 && inUse() == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d endpoints, %d addresses and links %v are left", left, inUse(), links)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if n := fds(); n > before+2 {
		t.Errorf("%d descriptors before, %d after", before, n)
	}
	if len(m.containers) != 0 || len(m.ports.held) != 0 {
		t.Errorf("left: %v, %v", m.containers, m.ports.held)
	}
	if s := ruleset(); strings.Contains(s, "tcp . ") {
		t.Errorf("elements are left:\n%s", s)
	}
	for _, d := range []string{m.disk.running, m.disk.reserved} {
		if es, _ := os.ReadDir(d); len(es) != 0 {
			t.Errorf("records are left: %v", es)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestAddressOfTheDying asks for an address while the reaper is just giving it back.
func TestAddressOfTheDying(t *testing.T) {
	m := newManager(t, nil)
	if _, err := m.Create(context.Background(), mnetwork.CreateRequest{Name: "n", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: netip.MustParsePrefix("10.78.0.0/24")}}}}); err != nil {
		t.Fatal(err)
	}
	n, err := m.find("n")
	if err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.78.0.99")
	if err := n.take(a); err != nil {
		t.Fatal(err)
	}
	for range 2000 {
		m.bury(n, &endpoint{Outer: "gone0", IPv4: a})
		reaped := make(chan struct{})
		go func() { defer close(reaped); m.reapOnce() }()
		if _, err := m.pickAddr(n, n.pool4, a, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
		<-reaped
	}
}

// TestCollision has another link take a network's addresses after the network.
func TestCollision(t *testing.T) {
	m := newManager(t, nil)
	n, err := m.Create(context.Background(), mnetwork.CreateRequest{Name: "n", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: netip.MustParsePrefix("10.77.0.0/16")}}}})
	if err != nil {
		t.Fatal(err)
	}
	if fs := m.Doctor(context.Background()); len(fs) != 0 {
		t.Fatalf("network %s has findings: %+v", n.ID, fs)
	}
	run(t, "ip", "link", "add", "tun7", "type", "bridge")
	t.Cleanup(func() { run(t, "ip", "link", "del", "tun7") })
	run(t, "ip", "address", "add", "dev", "tun7", "10.1.2.3/8") // wider: takes nothing away
	run(t, "ip", "link", "set", "tun7", "up")
	if fs := m.Doctor(context.Background()); len(fs) != 0 {
		t.Fatalf("got %+v", fs)
	}
	run(t, "ip", "route", "add", "dev", "tun7", "10.77.3.0/24")
	if fs := m.Doctor(context.Background()); len(fs) != 1 || !strings.Contains(fs[0].Detail, "network n has 10.77.0.0/16, and 10.77.3.0/24 is") {
		t.Fatalf("got %+v", fs)
	}
}

func TestForwardDrop(t *testing.T) {
	wire := outside(t)
	echo(t, wire, ":80")
	m := newManager(t, nil)
	ns := newNS(t)
	attach(t, m, ns, "c", "bridge", nil)
	for _, f := range m.Doctor(context.Background()) {
		t.Errorf("a host without a firewall has a finding: %+v", f)
	}
	policy(t, `table inet admin { chain f { type filter hook forward priority 0; policy drop; ct state established,related accept; }; }`)
	if _, err := ask(ns, "tcp", client4+":80"); err == nil {
		t.Fatal("the firewall does nothing")
	}
	fs := m.Doctor(context.Background())
	if len(fs) != 1 || !strings.Contains(fs[0].Detail, "inet admin f") {
		t.Fatalf("got %+v", fs)
	}
	r, err := m.Create(context.Background(), mnetwork.CreateRequest{Name: "n"})
	if err != nil || !strings.Contains(r.Warning, "inet admin f") {
		t.Fatalf("got %+v, %v", r, err)
	}
	if _, err := m.AllowForward(context.Background(), actions(m)); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(ns, "tcp", client4+":80"); err != nil {
		t.Fatal(err)
	}
	if fs := m.Doctor(context.Background()); len(fs) != 0 {
		t.Fatalf("got %+v", fs)
	}
}

func TestMacvlan(t *testing.T) {
	wire := outside(t)
	echo(t, wire, ":80")
	m := newManager(t, nil)
	ctx := context.Background()
	req := mnetwork.CreateRequest{Name: "mv", Driver: "macvlan", Options: map[string]string{optParent: "wire0"}, IPAM: &mnetwork.IPAM{
		Config: []mnetwork.IPAMConfig{{Subnet: netip.MustParsePrefix("198.51.100.0/24"), IPRange: netip.MustParsePrefix("198.51.100.128/25"), Gateway: netip.MustParseAddr(host4)}}}}
	for _, bad := range []map[string]string{{optParent: "nosuch"}, {optParent: "wire0", optMacvlan: "x"}} {
		r := req
		r.Options = bad
		if _, err := m.Create(ctx, r); !fault.Is(err, fault.Invalid) {
			t.Errorf("%v: got %v", bad, err)
		}
	}
	create(t, m, req)
	a, b := newNS(t), newNS(t)
	aa := attach(t, m, a, "a", "mv", nil)
	attach(t, m, b, "b", "mv", nil)
	echo(t, a, ":80")
	reach(t, b, aa, true)
	reach(t, wire, aa, true)
	if got, err := ask(b, "tcp", client4+":80"); err != nil || got != "198.51.100.129" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := lookup(b, "a", "ip4"); err != nil || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
	for _, c := range []string{"a", "b"} {
		if err := m.Detach(ctx, c, "mv"); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Remove(ctx, "mv"); err != nil {
		t.Fatal(err)
	}
}

func TestIPv6Only(t *testing.T) {
	m := newManager(t, func(c *Config) { c.IPv6 = "auto" })
	no, yes := false, true
	in := create(t, m, mnetwork.CreateRequest{Name: "six", EnableIPv4: &no, EnableIPv6: &yes})
	if len(in.IPAM.Config) != 1 || !in.IPAM.Config[0].Subnet.Addr().Is6() || in.EnableIPv4 {
		t.Fatalf("got %+v", in)
	}
	a, b := newNS(t), newNS(t)
	aa := attach(t, m, a, "a", "six", func(r *AttachRequest) { r.Ports = ports(t, "8080:80/tcp") })
	attach(t, m, b, "b", "six", nil)
	if aa.Settings.IPAddress.IsValid() || !aa.Settings.GlobalIPv6Address.IsValid() {
		t.Fatalf("got %+v", aa.Settings)
	}
	for p, bs := range aa.Ports {
		if len(bs) != 1 || !bs[0].HostIP.Is6() {
			t.Errorf("%s: got %v", p, bs)
		}
	}
	if got, err := lookup(b, "a", "ip6"); err != nil || !slices.Equal(got, []string{aa.Settings.GlobalIPv6Address.String()}) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := m.Create(context.Background(), mnetwork.CreateRequest{Name: "x", EnableIPv4: &no, EnableIPv6: &no}); !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
}

// A network keeps its subnet, name and link over a restart, and one whose
// record is damaged does not take the others down.
func TestRecords(t *testing.T) {
	m := newManager(t, nil)
	ctx := context.Background()
	want := create(t, m, mnetwork.CreateRequest{Name: "n", Labels: map[string]string{"a": "b"}, Options: map[string]string{optMTU: "1300"}})
	m.Close()
	for name, data := range map[string]string{"bad.json": "{", "0123.json": `{"Version":1,"Id":"else","Name":"x"}`, "0124.json": `{"Version":99,"Id":"0124","Name":"new"}`, ".torn.json.new": "{\"Id\""} {
		if err := os.WriteFile(m.disk.networks+"/"+name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m2, err := New(ctx, m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m2.Destroy(ctx)
	got, err := m2.Inspect(ctx, "n")
	if err != nil || fmt.Sprint(got.Network) != fmt.Sprint(want.Network) {
		t.Fatalf("got %+v, %v; want %+v", got, err, want)
	}
	if l, _ := m2.List(ctx, nil); len(l) != 4 {
		t.Fatalf("got %v", l)
	}
	if _, err := os.Stat(m.disk.networks + "/.torn.json.new"); err == nil {
		t.Error("a torn record is kept")
	}
}
