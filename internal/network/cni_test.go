package network

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/cni"
	"github.com/cloudos-io/cloudos/internal/network/cni/cnitest"
)

// cniBed is a Manager with plugins, on folders that a second one can take up.
type cniBed struct {
	t        *testing.T
	dir, bin string
	svc      *cni.Service
	m        *Manager
}

func newCNI(t *testing.T) *cniBed {
	b := &cniBed{t: t, dir: t.TempDir(), bin: cnitest.Plugins(t)}
	if err := os.MkdirAll(b.dir+"/net.d", 0o755); err != nil {
		t.Fatal(err)
	}
	b.open()
	return b
}

// open makes service and Manager, as an engine's start does.
func (b *cniBed) open() {
	b.t.Helper()
	log := slog.New(slog.NewTextHandler(testLog{b.t}, nil))
	var err error
	b.svc, err = cni.New(cni.Config{
		ConfDir: b.dir + "/net.d", BinDirs: []string{b.bin, b.dir + "/bin"}, Root: b.dir + "/cni", RunRoot: b.dir + "/run", Logger: log,
		Limits: cni.Limits{Del: 2 * time.Second, Grace: time.Second},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func(s *cni.Service) { done <- s.Run(ctx) }(b.svc)
	b.t.Cleanup(func() { cancel(); <-done })
	b.m = newManager(b.t, func(c *Config) {
		c.Root, c.RunRoot, c.CNI = b.dir+"/net", b.dir+"/netrun", b.svc
	})
}

// list writes a configuration and waits until it is seen.
func (b *cniBed) list(name, plugins string) {
	b.t.Helper()
	gen := b.svc.Generation()
	conf := `{"cniVersion":"1.0.0","name":"` + name + `","plugins":[` + strings.ReplaceAll(plugins, "DIR", b.dir) + `]}`
	if err := os.WriteFile(filepath.Join(b.dir, "net.d", name+".conflist"), []byte(conf), 0o644); err != nil {
		b.t.Fatal(err)
	}
	waitUntil(b.t, "the configuration", func() bool {
		_, err := b.svc.Network(name)
		return b.svc.Generation() > gen && err == nil
	})
}

const (
	cniBridge = `{"type":"bridge","bridge":"cnitest0","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":"DIR/leases","subnet":"10.87.0.0/24","routes":[{"dst":"0.0.0.0/0"}]},"capabilities":{"mac":true,"ips":true}}`
	cniPorts  = `{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}`
)

func waitUntil(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func (b *cniBed) clean() {
	b.t.Helper()
	for _, d := range []string{"cni/attachments", "run/netns", "netrun/endpoints"} {
		// An attachment is forgotten first, its namespace given up right after.
		var es []os.DirEntry
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if es, _ = os.ReadDir(filepath.Join(b.dir, d)); len(es) == 0 {
				break
			}
		}
		if len(es) > 0 {
			b.t.Errorf("%s is not empty: %v", d, es)
		}
	}
	if l, _ := filepath.Glob(b.dir + "/leases/*/10.*"); len(l) > 0 {
		b.t.Errorf("leases stay: %v", l)
	}
	if l, err := bridge.New(); err == nil {
		if i := l.Index("cnitest0"); i != 0 {
			_ = l.Delete(i)
		}
		l.Close()
	}
}

func TestCNINetwork(t *testing.T) {
	b := newCNI(t)
	b.list("lan", cniBridge+","+cniPorts)
	ctx := context.Background()
	in, err := b.m.Inspect(ctx, "cni:lan")
	if err != nil || in.Driver != "cni" || in.Options[optCNIPlugins] != "bridge,portmap" {
		t.Fatalf("%+v %v", in, err)
	}
	one, two := newNS(t), newNS(t)
	bind := network.PortMap{network.MustParsePort("80/tcp"): {{HostPort: "18085"}}, network.MustParsePort("81/tcp"): {{HostIP: netip.MustParseAddr("127.0.0.1")}}}
	a1 := attach(t, b.m, one, "one", "cni:lan", func(r *AttachRequest) { r.Ports = bind })
	if a1.Settings.IPAddress.String() != "10.87.0.2" || a1.Settings.Gateway.String() != "10.87.0.1" || a1.Settings.IPPrefixLen != 24 || a1.Settings.NetworkID != in.ID {
		t.Errorf("settings %+v", a1.Settings)
	}
	if p := a1.Ports[network.MustParsePort("81/tcp")]; len(p) != 1 || p[0].HostPort == "" {
		t.Errorf("ports %+v", a1.Ports)
	}
	echo(t, one, ":80")
	for _, at := range []string{"10.87.0.2:80", "127.0.0.1:18085", "10.87.0.1:18085"} {
		if _, err := ask(nil, "tcp", at); err != nil {
			t.Errorf("%s: %v", at, err)
		}
	}
	// What is asked for is had, or it is an error.
	a2 := attach(t, b.m, two, "two", "cni:lan", func(r *AttachRequest) {
		r.Settings = &network.EndpointSettings{MacAddress: network.HardwareAddr{2, 0, 0, 0, 0, 9}, Aliases: []string{"x"}, IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("10.87.0.77")}}
	})
	if a2.Settings.IPAddress.String() != "10.87.0.77" || a2.Settings.MacAddress.String() != "02:00:00:00:00:09" || len(a2.Warnings) != 1 {
		t.Errorf("%+v", a2)
	}
	for name, c := range map[string]struct {
		edit func(*AttachRequest)
		kind fault.Kind
	}{
		"port taken": {func(r *AttachRequest) {
			r.Ports = network.PortMap{network.MustParsePort("9/tcp"): {{HostPort: "18085"}}}
		}, fault.Conflict},
		"address taken": {func(r *AttachRequest) {
			r.Settings = &network.EndpointSettings{IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("10.87.0.77")}}
		}, fault.Internal},
		"no capability": {func(r *AttachRequest) {
			r.Settings = &network.EndpointSettings{DriverOpts: map[string]string{"cni.capability.bandwidth": "{}"}}
		}, fault.Invalid},
		"unknown": {func(r *AttachRequest) { r.Network = "cni:none" }, fault.NotFound},
	} {
		req := AttachRequest{ContainerID: "three", ContainerName: "three", Network: "cni:lan", NetNS: newNS(t), Ephemeral: true}
		c.edit(&req)
		if _, err := b.m.Attach(ctx, req); !fault.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := b.m.Remove(ctx, "cni:lan"); !fault.Is(err, fault.Forbidden) {
		t.Errorf("removing: %v", err)
	}
	if rep, err := b.m.Prune(ctx, nil); err != nil || len(rep.NetworksDeleted) > 0 {
		t.Errorf("pruning: %+v %v", rep, err)
	}

	// The engine comes back: one lives on, two has died meanwhile.
	if err := b.m.Close(); err != nil {
		t.Fatal(err)
	}
	b.open()
	if err := b.m.Restore(ctx, []Live{{ContainerID: "one", NetNS: one}}); err != nil {
		t.Error(err)
	}
	if _, err := ask(nil, "tcp", "127.0.0.1:18085"); err != nil {
		t.Error(err)
	}
	waitUntil(t, "the dead one's address", func() bool { return !b.svc.Has("two") })
	if _, err := b.m.Attach(ctx, AttachRequest{ContainerID: "four", Network: "cni:lan", NetNS: newNS(t), Ports: network.PortMap{network.MustParsePort("9/tcp"): {{HostPort: "18085"}}}}); !fault.Is(err, fault.Conflict) {
		t.Errorf("the living one's port is free: %v", err)
	}
	// A container without its configuration keeps its network, and can go.
	if err := os.Remove(b.dir + "/net.d/lan.conflist"); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "the configuration's going", func() bool { return !b.svc.Present() })
	if in, err := b.m.Inspect(ctx, "cni:lan"); err != nil || len(in.Containers) != 1 {
		t.Errorf("%+v %v", in.Containers, err)
	}
	if err := b.m.Detach(ctx, "one", "cni:lan"); err != nil {
		t.Error(err)
	}
	insideErrors(t, one, "eth0")
	if err := b.m.Release(ctx, "one"); err != nil {
		t.Error(err)
	}
	if _, err := b.m.Inspect(ctx, "cni:lan"); !fault.Is(err, fault.NotFound) {
		t.Errorf("the network without configuration and containers: %v", err)
	}
	b.clean()
}

// insideErrors fails the test if a namespace has a link of that name.
func insideErrors(t *testing.T, ns *os.File, link string) {
	t.Helper()
	in(t, ns, func() error {
		if _, err := net.InterfaceByName(link); err == nil {
			return fmt.Errorf("link %s is there", link)
		}
		return nil
	})
}

// Publishing needs a plugin for it.
func TestCNIWithoutPorts(t *testing.T) {
	b := newCNI(t)
	b.list("lan", cniBridge)
	_, err := b.m.Attach(context.Background(), AttachRequest{ContainerID: "one", Network: "cni:lan", NetNS: newNS(t), Ports: network.PortMap{network.MustParsePort("9/tcp"): {{}}}})
	if !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "portmap") {
		t.Errorf("%v", err)
	}
	b.clean()
}

// A plugin that hangs does not hold up the release of a container for longer
// than its limit.
func TestCNIHangingRelease(t *testing.T) {
	b := newCNI(t)
	if err := os.MkdirAll(b.dir+"/bin", 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\n[ $CNI_COMMAND = DEL ] && [ ! -e " + b.dir + "/mended ] && sleep 600\n[ $CNI_COMMAND = ADD ] && echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.87.1.5/24\"}]}'\nexit 0\n"
	if err := os.WriteFile(b.dir+"/bin/hangs", []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	b.list("lan", `{"type":"hangs"}`)
	attach(t, b.m, newNS(t), "one", "cni:lan", nil)
	if err := b.m.Release(context.Background(), "one"); err != nil {
		t.Error(err)
	}
	if !b.svc.Has("one") {
		t.Error("what could not be undone is forgotten")
	}
	if err := os.WriteFile(b.dir+"/mended", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "the next attempt", func() bool { return !b.svc.Has("one") })
	b.clean()
}

func TestPodPlugins(t *testing.T) {
	b := newCNI(t)
	ctx := context.Background()
	pods, err := NewPodPlugins(PodPluginsConfig{Service: b.svc, Bridge: NewPodBridge(b.m, ""), Root: b.dir + "/pods"})
	if err != nil {
		t.Fatal(err)
	}
	pod := func(id string) Pod {
		ns := newNS(t)
		// As the engine has it: a path that stays while the pod does.
		return Pod{ID: id, Name: "n", Namespace: "s", UID: "u", NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())}
	}
	// Without configuration the embedded bridge serves.
	if err := pods.Status(ctx); err != nil {
		t.Error(err)
	}
	early := pod("early")
	res, err := pods.Setup(ctx, early)
	if err != nil || len(res.IPs) == 0 || res.IPs[0].String()[:3] == "10." {
		t.Fatalf("%+v %v", res, err)
	}
	strict, err := NewPodPlugins(PodPluginsConfig{Service: b.svc, Root: b.dir + "/pods"})
	if err != nil {
		t.Fatal(err)
	}
	if err := strict.Status(ctx); !fault.Is(err, fault.Unavailable) {
		t.Errorf("without a bridge: %v", err)
	}
	// With configuration the plugins do, with the range of the node.
	if err := pods.Configure(ctx, "10.87.9.0/24, fd00:87::/64"); err != nil {
		t.Fatal(err)
	}
	if err := pods.Configure(ctx, "10.87.9.0/24;"); !fault.Is(err, fault.Invalid) {
		t.Errorf("a range that is none: %v", err)
	}
	b.list("pods", `{"type":"bridge","bridge":"cnitest0","ipam":{"type":"host-local","dataDir":"DIR/leases"},"capabilities":{"ipRanges":true}},`+cniPorts+`,{"type":"bandwidth","capabilities":{"bandwidth":true}}`)
	if pods, err = NewPodPlugins(PodPluginsConfig{Service: b.svc, Bridge: NewPodBridge(b.m, ""), Root: b.dir + "/pods"}); err != nil {
		t.Fatal(err)
	}
	p := pod("late")
	p.Ports = []PodPort{{Protocol: "TCP", HostPort: 18086, ContainerPort: 80}}
	p.Annotations = map[string]string{annotationIngress: "8M"}
	if res, err = pods.Setup(ctx, p); err != nil || len(res.IPs) != 2 || res.IPs[0].String() != "10.87.9.2" || res.IPs[1].String() != "fd00:87::2" {
		t.Fatalf("%+v %v", res, err)
	}
	if err := pods.Check(ctx, p); err != nil {
		t.Error(err)
	}
	if i := pods.Info(); i["backend"] != "cni" || i["plugins"] != "bridge,portmap,bandwidth" {
		t.Errorf("info %v", i)
	}
	bad := pod("bad")
	bad.Annotations = map[string]string{annotationEgress: "lots"}
	if _, err := pods.Setup(ctx, bad); !fault.Is(err, fault.Invalid) {
		t.Errorf("bandwidth: %v", err)
	}
	// Each is undone by what did it.
	for _, p := range []Pod{early, p, bad} {
		for range 2 {
			if err := pods.Teardown(ctx, p); err != nil {
				t.Error(err)
			}
		}
	}
	// Broken configuration is no reason to take the bridge.
	if err := os.WriteFile(b.dir+"/net.d/pods.conflist", []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "the broken configuration", func() bool { _, err := b.svc.Network(""); return err != nil })
	if err := pods.Status(ctx); !fault.Is(err, fault.Unavailable) {
		t.Errorf("broken configuration: %v", err)
	}
	if _, err := pods.Setup(ctx, pod("never")); err == nil {
		t.Error("a pod was connected all the same")
	}
	b.clean()
}

func TestQuantity(t *testing.T) {
	for in, want := range map[string]float64{"10M": 1e7, "1k": 1e3, "1.5Gi": 1.5 * (1 << 30), "2e6": 2e6, "1000": 1000, "1500m": 1.5} {
		if got, err := quantity(in); err != nil || got != want {
			t.Errorf("%s: %v %v", in, got, err)
		}
	}
	for _, in := range []string{"", "M", "0x10", "inf", "NaN", "1_0", "ten"} {
		if got, err := quantity(in); err == nil {
			t.Errorf("%q is %v", in, got)
		}
	}
	if b, err := bandwidth(map[string]string{annotationIngress: "1M"}); err != nil || b.IngressRate != 1e6 || b.IngressBurst == 0 || b.EgressRate != 0 {
		t.Errorf("%+v %v", b, err)
	}
	if _, err := bandwidth(map[string]string{annotationIngress: "1"}); err == nil {
		t.Error("one bit per second")
	}
}
