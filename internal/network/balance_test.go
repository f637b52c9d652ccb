package network

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	mnetwork "github.com/moby/moby/api/types/network"
)

// greet serves the container's own name on :80.
func greet(t testing.TB, ns *os.File, name string) {
	t.Helper()
	serve(t, ns, ":80", name)
}

// spreadOf asks a service many times and tells who answered.
func spreadOf(t testing.TB, from *os.File, proto, addr string, times int) map[string]int {
	t.Helper()
	got := map[string]int{}
	for range times {
		begin := time.Now()
		s, err := ask(from, proto, addr)
		if err != nil {
			t.Logf("%s %s after %v: %v", proto, addr, time.Since(begin), err)
			s = "error"
		}
		got[s]++
	}
	return got
}

// runManager runs the background work until the test ends.
func runManager(t testing.TB, m *Manager) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = m.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

// within waits for a condition, a second at most by what is promised, more on a
// busy machine.
func within(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestServiceAddress(t *testing.T) {
	for _, six := range []bool{false, true} {
		t.Run(fmt.Sprintf("six=%t", six), func(t *testing.T) { testService(t, six) })
	}
}

func testService(t *testing.T, six bool) {
	dirs := [2]string{t.TempDir(), t.TempDir()}
	edit := func(c *Config) { c.Root, c.RunRoot, c.IPv6 = dirs[0], dirs[1], "auto" }
	m := newManager(t, edit)
	runManager(t, m)
	ctx := context.Background()
	four := !six
	create(t, m, mnetwork.CreateRequest{Name: "n", EnableIPv4: &four, EnableIPv6: &six, Options: map[string]string{optVIP: "true"}})
	family, join := "ip4", func(a string) string { return a + ":80" }
	if six {
		family, join = "ip6", func(a string) string { return "[" + a + "]:80" }
	}
	backends := map[string]*os.File{}
	for _, name := range []string{"w1", "w2", "w3"} {
		ns := newNS(t)
		attach(t, m, ns, name, "n", func(r *AttachRequest) { r.Settings = &mnetwork.EndpointSettings{Aliases: []string{"web", name}} })
		greet(t, ns, name)
		backends[name] = ns
	}
	client := newNS(t)
	attach(t, m, client, "client", "n", nil)
	vip, err := lookup(client, "web", family)
	if err != nil || len(vip) != 1 {
		t.Fatalf("web leads to %v, %v", vip, err)
	}
	own, err := lookup(client, "w1", family)
	if err != nil || len(own) != 1 || own[0] == vip[0] {
		t.Fatalf("w1 leads to %v, %v", own, err)
	}
	// Every one answers, and sees the client's own address.
	got := spreadOf(t, client, "tcp", join(vip[0]), 60)
	if !slices.Equal(slices.Sorted(maps.Keys(got)), []string{"w1", "w2", "w3"}) {
		t.Fatalf("got %v\n%s", got, insideRules(client))
	}
	for _, n := range got {
		if n < 4 {
			t.Errorf("spread badly: %v", got)
		}
	}
	if got := spreadOf(t, client, "udp", join(vip[0]), 30); len(got) != 3 || got["error"] > 0 {
		t.Errorf("udp: %v", got)
	}
	// A backend is a client, too, of itself as well.
	if got := spreadOf(t, backends["w1"], "tcp", join(vip[0]), 30); len(got) != 3 || got["error"] > 0 {
		t.Errorf("from a backend: %v", got)
	}
	// An ill one is left out, and comes back.
	m.SetHealthy("w2", false)
	only := func(want ...string) func() bool {
		return func() bool {
			return slices.Equal(slices.Sorted(maps.Keys(spreadOf(t, client, "tcp", join(vip[0]), 25))), want)
		}
	}
	within(t, "w2 is left out", only("w1", "w3"))
	m.SetHealthy("w2", true)
	within(t, "w2 comes back", only("w1", "w2", "w3"))
	if err := m.Release(ctx, "w3"); err != nil {
		t.Fatal(err)
	}
	within(t, "w3 is left out", only("w1", "w2"))
	if in, err := m.Inspect(ctx, "n"); err != nil || len(in.Services) != 1 || in.Services["web"].VIP.String() != vip[0] || len(in.Services["web"].Tasks) != 2 {
		t.Errorf("inspect shows %+v, %v", in.Services, err)
	}
	// Another engine takes over: the address stays, and is nobody else's.
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m2 := newManager(t, edit)
	runManager(t, m2)
	if err := m2.Restore(ctx, []Live{{"w1", backends["w1"]}, {"w2", backends["w2"]}, {"client", client}}); err != nil {
		t.Fatal(err)
	}
	if again, err := lookup(client, "web", family); err != nil || !slices.Equal(again, vip) {
		t.Errorf("web leads to %v, %v", again, err)
	}
	if !only("w1", "w2")() {
		t.Error("after a restart connections are not spread over w1 and w2")
	}
	a, err := m2.Attach(ctx, AttachRequest{ContainerID: "thief", ContainerName: "thief", Network: "n", NetNS: newNS(t), Ephemeral: true,
		Settings: &mnetwork.EndpointSettings{IPAMConfig: ipamOf(vip[0])}})
	if !fault.Is(err, fault.Conflict) {
		t.Errorf("the service's address was given away: %+v, %v", a.Settings, err)
	}
	// Without anybody behind it the name is nobody's, and the address refuses.
	for _, name := range []string{"w1", "w2"} {
		if err := m2.Detach(ctx, name, "n"); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "connections are refused", func() bool {
		_, err := ask(client, "tcp", join(vip[0]))
		return err != nil && strings.Contains(err.Error(), "refused")
	})
	if got, err := lookup(client, "web", family); err == nil {
		t.Errorf("web leads to %v", got)
	}
}

func ipamOf(a string) *mnetwork.EndpointIPAMConfig {
	ip := netip.MustParseAddr(a)
	if ip.Is4() {
		return &mnetwork.EndpointIPAMConfig{IPv4Address: ip}
	}
	return &mnetwork.EndpointIPAMConfig{IPv6Address: ip}
}

func insideRules(ns *os.File) (out string) {
	_ = insideErr(ns, func() error {
		b, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
		out = string(b)
		return err
	})
	return out
}

func TestServiceOfOneEndpointAndSticky(t *testing.T) {
	m := newManager(t, nil)
	runManager(t, m)
	create(t, m, mnetwork.CreateRequest{Name: "n", Options: map[string]string{optVIP: "sticky"}})
	create(t, m, mnetwork.CreateRequest{Name: "plain"})
	for _, n := range []string{"n", "plain"} {
		for _, name := range []string{"a", "b"} {
			ns := newNS(t)
			attach(t, m, ns, n+name, n, func(r *AttachRequest) {
				r.Settings = &mnetwork.EndpointSettings{DriverOpts: map[string]string{optEndpointVIP: "db"}, Aliases: []string{"rr"}}
			})
			greet(t, ns, name)
		}
	}
	for n, answers := range map[string]int{"n": 1, "plain": 2} {
		c := newNS(t)
		attach(t, m, c, "c"+n, n, nil)
		vip, err := lookup(c, "db", "ip4")
		if err != nil || len(vip) != 1 {
			t.Fatalf("%s: db leads to %v, %v", n, vip, err)
		}
		if got := spreadOf(t, c, "tcp", vip[0]+":80", 30); len(got) != answers || got["error"] > 0 {
			t.Errorf("%s: got %v", n, got)
		}
		rr, err := lookup(c, "rr", "ip4")
		if want := 3 - answers; err != nil || len(rr) != want { // by names in turn, or by an address
			t.Logf("%s: rr leads to %v, %v", n, rr, err)
		}
	}
	if _, err := m.Attach(context.Background(), AttachRequest{ContainerID: "x", ContainerName: "x", Network: "bridge", NetNS: newNS(t), Ephemeral: true,
		Settings: &mnetwork.EndpointSettings{DriverOpts: map[string]string{optEndpointVIP: "db"}}}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a service on the default network: %v", err)
	}
}
