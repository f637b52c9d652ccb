package network

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plugin"
	mnetwork "github.com/moby/moby/api/types/network"
)

// driverPlugin is a real network and address plugin: a bridge for each network,
// a veth pair for each endpoint, addresses counted up.
type driverPlugin struct {
	t     *testing.T
	mu    sync.Mutex
	calls []string
	eps   map[string]string // endpoint to the name of its link
	given map[string]bool
	next  byte
	fail  string // method that is refused
	srv   *http.Server
}

func (p *driverPlugin) start(dir string) {
	p.eps, p.given, p.next = map[string]string{}, map[string]bool{}, 2
	p.listen(dir)
}

func (p *driverPlugin) listen(dir string) {
	l, err := net.Listen("unix", filepath.Join(dir, "wires.sock"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.srv = &http.Server{Handler: p}
	go func() { _ = p.srv.Serve(l) }()
	p.t.Cleanup(func() { _ = p.srv.Close() })
}

func (p *driverPlugin) seen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.calls)
}

func (p *driverPlugin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	method := strings.TrimPrefix(r.URL.Path, "/")
	var q struct {
		NetworkID, EndpointID, Pool, PoolID, Address, SandboxKey string
		Options                                                  map[string]any
		IPv4Data                                                 []struct{ Pool, Gateway string }
		Interface                                                struct{ Address, MacAddress string }
	}
	_ = json.NewDecoder(r.Body).Decode(&q)
	p.calls = append(p.calls, method)
	answer := func(v any) { _ = json.NewEncoder(w).Encode(v) }
	if method == p.fail {
		answer(map[string]string{"Err": "not today"})
		return
	}
	bridgeOf := func() string { return "tp" + q.NetworkID[:8] }
	must := func(err error) bool {
		if err != nil {
			answer(map[string]string{"Err": err.Error()})
		}
		return err == nil
	}
	switch method {
	case "Plugin.Activate":
		answer(map[string][]string{"Implements": {"NetworkDriver", "IpamDriver"}})
	case "NetworkDriver.CreateNetwork":
		g, _ := netlink.ParseAddr(q.IPv4Data[0].Gateway)
		l := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeOf()}}
		if must(netlink.LinkAdd(l)) && must(netlink.AddrAdd(l, g)) && must(netlink.LinkSetUp(l)) {
			answer(struct{}{})
		}
	case "NetworkDriver.DeleteNetwork":
		if l, err := netlink.LinkByName(bridgeOf()); must(err) && must(netlink.LinkDel(l)) {
			answer(struct{}{})
		}
	case "NetworkDriver.CreateEndpoint":
		if q.Interface.Address == "" {
			answer(map[string]any{"Interface": map[string]string{"Address": "10.99.0.77/24"}})
			return
		}
		answer(map[string]any{"Interface": nil})
	case "NetworkDriver.Join":
		br, err := netlink.LinkByName(bridgeOf())
		if !must(err) {
			return
		}
		name := "tv" + q.EndpointID[:8]
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name + "h", MasterIndex: br.Attrs().Index}, PeerName: name}
		if !must(netlink.LinkAdd(v)) || !must(netlink.LinkSetUp(v)) {
			return
		}
		if _, err := os.Stat(q.SandboxKey); !must(err) {
			return
		}
		p.eps[q.EndpointID] = name
		as, _ := netlink.AddrList(br, netlink.FAMILY_V4)
		gw := ""
		if len(as) > 0 {
			gw = as[0].IP.String()
		}
		answer(map[string]any{"InterfaceName": map[string]string{"SrcName": name, "DstPrefix": "net"}, "Gateway": gw,
			"StaticRoutes": []map[string]any{{"Destination": "203.0.113.0/24", "RouteType": 1}}})
	case "NetworkDriver.Leave":
		if l, err := netlink.LinkByName(p.eps[q.EndpointID] + "h"); err == nil {
			_ = netlink.LinkDel(l)
		}
		answer(struct{}{})
	case "NetworkDriver.DeleteEndpoint":
		delete(p.eps, q.EndpointID)
		answer(struct{}{})
	case "NetworkDriver.ProgramExternalConnectivity", "NetworkDriver.RevokeExternalConnectivity":
		answer(struct{}{})
	case "IpamDriver.GetDefaultAddressSpaces":
		answer(map[string]string{"LocalDefaultAddressSpace": "here", "GlobalDefaultAddressSpace": "there"})
	case "IpamDriver.RequestPool":
		if q.Pool == "" {
			q.Pool = "10.88.0.0/24"
		}
		answer(map[string]any{"PoolID": "here/" + q.Pool, "Pool": q.Pool})
	case "IpamDriver.RequestAddress":
		if q.Address == "" {
			_, n, _ := net.ParseCIDR(strings.TrimPrefix(q.PoolID, "here/"))
			q.Address = fmt.Sprintf("%d.%d.%d.%d", n.IP[0], n.IP[1], n.IP[2], p.next)
			p.next++
		}
		if p.given[q.Address] {
			answer(map[string]string{"Err": "address in use"})
			return
		}
		p.given[q.Address] = true
		answer(map[string]string{"Address": q.Address + "/24"})
	case "IpamDriver.ReleaseAddress":
		delete(p.given, q.Address)
		answer(struct{}{})
	case "IpamDriver.ReleasePool":
		answer(struct{}{})
	default:
		http.NotFound(w, r)
	}
}

func TestDriverPlugin(t *testing.T) {
	dir := t.TempDir()
	p := &driverPlugin{t: t}
	p.start(dir)
	dirs := [2]string{t.TempDir(), t.TempDir()}
	edit := func(c *Config) {
		c.Root, c.RunRoot = dirs[0], dirs[1]
		c.Plugins = plugin.New(plugin.Config{Dirs: []string{dir}, Patience: time.Second})
	}
	m := newManager(t, edit)
	runManager(t, m)
	ctx := context.Background()
	if l := m.Drivers(ctx); !slices.Equal(l, []string{"wires"}) {
		t.Errorf("drivers: %v", l)
	}
	if _, err := m.Create(ctx, mnetwork.CreateRequest{Name: "x", Driver: "nosuch"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("got %v", err)
	}
	p.fail = "NetworkDriver.CreateNetwork"
	if _, err := m.Create(ctx, mnetwork.CreateRequest{Name: "x", Driver: "wires"}); err == nil || !strings.Contains(err.Error(), "not today") {
		t.Errorf("got %v", err)
	}
	p.fail = ""
	in := create(t, m, mnetwork.CreateRequest{Name: "n", Driver: "wires", IPAM: &mnetwork.IPAM{Driver: "wires"}, Options: map[string]string{"colour": "red"}})
	if len(in.IPAM.Config) != 1 || in.IPAM.Config[0].Subnet.String() != "10.88.0.0/24" || in.IPAM.Config[0].Gateway.String() != "10.88.0.2" || in.Driver != "wires" {
		t.Fatalf("got %+v", in)
	}
	a, b := newNS(t), newNS(t)
	aa := attach(t, m, a, "a", "n", nil)
	bb := attach(t, m, b, "b", "n", func(r *AttachRequest) {
		r.Settings = &mnetwork.EndpointSettings{IPAMConfig: &mnetwork.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("10.88.0.50")}}
		r.Ports = ports(t, "8080:80/tcp")
	})
	if aa.Settings.IPAddress.String() != "10.88.0.3" || bb.Settings.IPAddress.String() != "10.88.0.50" || aa.Settings.Gateway.String() != "10.88.0.2" {
		t.Fatalf("got %+v and %+v", aa.Settings, bb.Settings)
	}
	echo(t, a, ":80")
	// The kernel takes its time to see the carrier of links made by others.
	within(t, "b reaches a", func() bool { _, err := ask(b, "tcp", aa.Settings.IPAddress.String()+":80"); return err == nil })
	if got, err := lookup(b, "a", "ip4"); err != nil || len(got) != 1 {
		t.Errorf("a leads to %v, %v", got, err)
	}
	if s := linksIn(t, a); !strings.Contains(s, "net0") {
		t.Errorf("links: %s", s)
	}
	if s := routesIn(t, a); !strings.Contains(s, "default via 10.88.0.2") || !strings.Contains(s, "203.0.113.0/24 dev net0") {
		t.Errorf("routes: %s", s)
	}
	if !slices.Contains(p.seen(), "NetworkDriver.ProgramExternalConnectivity") {
		t.Errorf("the driver was not told of ports: %v", p.seen())
	}
	// A running container is disconnected and connected again.
	if err := m.Detach(ctx, "a", "n"); err != nil {
		t.Fatal(err)
	}
	if s := linksIn(t, a); strings.Contains(s, "net0") {
		t.Errorf("links after disconnecting: %s", s)
	}
	attach(t, m, a, "a", "n", nil)
	// The driver is away when a container ends: it is told later, by another engine too.
	_ = p.srv.Close()
	if err := m.Release(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(filepath.Join(dir, "wires.sock"))
	p.listen(dir)
	m = newManager(t, edit)
	if err := m.Restore(ctx, []Live{{"a", a}}); err != nil {
		t.Fatal(err)
	}
	runManager(t, m)
	within(t, "the driver is told", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.eps) == 1 })
	if err := m.Release(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	within(t, "nothing is left", func() bool {
		l, _ := os.ReadDir(filepath.Join(dirs[1], "farewells"))
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(l) == 0 && len(p.eps) == 0
	})
	if err := m.Remove(ctx, "n"); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.given, "10.88.0.50") // it was released while the plugin was away
	if len(p.given) > 0 || !slices.Contains(p.calls, "IpamDriver.ReleasePool") || !slices.Contains(p.calls, "NetworkDriver.DeleteNetwork") {
		t.Errorf("addresses left: %v; calls %v", p.given, p.calls)
	}
}

func TestDriverPluginWithItsOwnAddresses(t *testing.T) {
	dir := t.TempDir()
	p := &driverPlugin{t: t}
	p.start(dir)
	m := newManager(t, func(c *Config) { c.Plugins = plugin.New(plugin.Config{Dirs: []string{dir}, Patience: time.Second}) })
	ctx := context.Background()
	create(t, m, mnetwork.CreateRequest{Name: "n", Driver: "wires", IPAM: &mnetwork.IPAM{Config: []mnetwork.IPAMConfig{{Subnet: netip.MustParsePrefix("10.99.0.0/24")}}}})
	for _, method := range []string{"CreateEndpoint", "Join"} {
		p.mu.Lock()
		p.fail = "NetworkDriver." + method
		p.mu.Unlock()
		ns := newNS(t)
		if _, err := m.Attach(ctx, AttachRequest{ContainerID: "a", ContainerName: "a", Network: "n", NetNS: ns, Ephemeral: true}); err == nil || !strings.Contains(err.Error(), "not today") {
			t.Errorf("%s: got %v", method, err)
		}
	}
	p.mu.Lock()
	p.fail = ""
	p.mu.Unlock()
	m.later.Wait()
	if l, _ := os.ReadDir(m.farewells()); len(l) != 0 {
		t.Errorf("%d farewells are owed", len(l))
	}
	ns := newNS(t)
	attach(t, m, ns, "a", "n", nil)
	if err := m.Release(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	m.later.Wait()
	if err := m.Remove(ctx, "n"); err != nil {
		t.Fatal(err)
	}
}
