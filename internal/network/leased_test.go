package network

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/dhcp"
	mnetwork "github.com/moby/moby/api/types/network"
)

// dnsmasq serves addresses from..to in a namespace until stop is called.
func dnsmasq(t *testing.T, ns *os.File, leases, from, to string, more ...string) (stop func(), said func() string) {
	t.Helper()
	if _, err := exec.LookPath("dnsmasq"); err != nil {
		t.Fatal("dnsmasq is missing: run scripts/deps test")
	}
	logFile := filepath.Join(t.TempDir(), "log")
	cmd := exec.Command("dnsmasq", append([]string{"-k", "-C", "/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces", "--dhcp-authoritative", "--leasefile-ro", "--no-ping",
		"--log-dhcp", "--log-facility=" + logFile, "--pid-file=", "--user=root", "--dhcp-range=" + from + "," + to + ",255.255.255.0,2m", "--dhcp-option=option:router," + host4,
		"--dhcp-option=option:dns-server,192.0.2.53", "--dhcp-option=option:T1,5", "--dhcp-option=option:T2,20"}, more...)...)
	if leases != "" {
		cmd.Args = append(cmd.Args, "--dhcp-leasefile="+leases)
		cmd.Args = strings.Fields(strings.Replace(strings.Join(cmd.Args, " "), " --leasefile-ro", "", 1))
	}
	in(t, ns, cmd.Start)
	ended := false
	stop = func() {
		if !ended {
			ended = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(stop)
	said = func() string { b, _ := os.ReadFile(logFile); return string(b) }
	within(t, "dnsmasq is ready", func() bool {
		return strings.Contains(said(), "DHCP, sockets bound") || strings.Contains(said(), "started")
	})
	return stop, said
}

func addressesIn(t *testing.T, ns *os.File) string {
	var out []byte
	in(t, ns, func() (err error) { out, err = exec.Command("ip", "-o", "-4", "addr").CombinedOutput(); return err })
	return string(out)
}

func TestDHCP(t *testing.T) {
	wire := outside(t)
	echo(t, wire, ":80")
	leases := filepath.Join(t.TempDir(), "leases")
	stop, said := dnsmasq(t, wire, leases, "198.51.100.100", "198.51.100.150")
	dirs := [2]string{t.TempDir(), t.TempDir()}
	edit := func(c *Config) { c.Root, c.RunRoot = dirs[0], dirs[1] }
	m := newManager(t, edit)
	ctx := context.Background()
	in4 := create(t, m, mnetwork.CreateRequest{Name: "lan", Driver: "macvlan", Options: map[string]string{optParent: "wire0"}, IPAM: &mnetwork.IPAM{Driver: "dhcp"}})
	if in4.IPAM.Driver != "dhcp" || len(in4.IPAM.Config) != 0 {
		t.Errorf("inspect shows %+v", in4.IPAM)
	}
	a, b := newHeldNS(t), newHeldNS(t)
	aa := attach(t, m, a.ns, "a", "lan", func(r *AttachRequest) { r.Hostname = "web"; r.DNS = nil })
	ip := aa.Settings.IPAddress
	if !netip.MustParsePrefix("198.51.100.0/24").Contains(ip) || ip.As4()[3] < 100 || ip.As4()[3] > 150 || aa.Settings.Gateway.String() != host4 || aa.Settings.IPPrefixLen != 24 {
		t.Fatalf("got %+v", aa.Settings)
	}
	if got, err := ask(a.ns, "tcp", client4+":80"); err != nil || got != ip.String() {
		t.Errorf("to the outside: %q, %v", got, err)
	}
	if s := said(); !strings.Contains(s, "web") {
		t.Errorf("the server was not told the host name:\n%s", s)
	}
	want := "198.51.100.120"
	if ip.String() == want { // the server picks by the card's address, which is random
		want = "198.51.100.121"
	}
	bb := attach(t, m, b.ns, "b", "lan", func(r *AttachRequest) { r.Settings = &mnetwork.EndpointSettings{IPAMConfig: ipamOf(want)} })
	if bb.Settings.IPAddress.String() != want {
		t.Errorf("got %s instead of %s", bb.Settings.IPAddress, want)
	}
	if got, err := lookup(b.ns, "a", "ip4"); err != nil || len(got) != 1 || got[0] != ip.String() {
		t.Errorf("a leads to %v, %v", got, err)
	}
	// Nobody's engine runs, and the lease is renewed all the same.
	before, err := m.keeper.List(ctx)
	if err != nil || len(before) != 2 {
		t.Fatalf("kept: %+v, %v", before, err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	k := &dhcp.Keeper{Dir: filepath.Join(dirs[1], "dhcp")}
	find := func(l []dhcp.Entry) (e dhcp.Entry) {
		for _, x := range l {
			if x.Lease.Addr.Addr() == ip {
				e = x
			}
		}
		return e
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if now, err := k.List(ctx); err == nil && find(now).Lease.Got.After(find(before).Lease.Got) {
			break
		} else if time.Now().After(end) {
			t.Fatalf("the lease was not renewed: %+v, %v\n%s", now, err, said())
		}
	}
	m = newManager(t, edit)
	if err := m.Restore(ctx, []Live{{"a", a.ns}, {"b", b.ns}}); err != nil {
		t.Fatal(err)
	}
	bs, es := m.leasesOf()
	m.syncLeases(ctx, bs, es)
	if in, err := m.Inspect(ctx, "lan"); err != nil || len(in.Containers) != 2 || in.Containers["a"].IPv4Address.Addr() != ip {
		t.Errorf("after a restart: %+v, %v", in.Containers, err)
	}
	// A keeper that is killed is replaced, and knows what is to be kept.
	killKeeper(t, filepath.Join(dirs[1], "dhcp"))
	within(t, "a new keeper keeps both", func() bool {
		m.syncLeases(ctx, bs, es)
		now, err := k.List(ctx)
		return err == nil && len(now) == 2
	})
	// A server that forgot us and has other addresses.
	if err := m.Detach(ctx, "b", "lan"); err != nil {
		t.Fatal(err)
	}
	within(t, "b's lease is given back", func() bool { l, _ := os.ReadFile(leases); return !strings.Contains(string(l), want) })
	stop()
	stop, said = dnsmasq(t, wire, "", "198.51.100.200", "198.51.100.220")
	for end := time.Now().Add(40 * time.Second); !strings.Contains(addressesIn(t, a.ns), "inet 198.51.100.2"); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the address does not change: %s\n%s", addressesIn(t, a.ns), said())
		}
	}
	bs, es = m.leasesOf()
	within(t, "the books follow", func() bool {
		m.syncLeases(ctx, bs, es)
		in, _ := m.Inspect(ctx, "lan")
		return in.Containers["a"].IPv4Address.Addr() != ip
	})
	if strings.Contains(addressesIn(t, a.ns), ip.String()+"/") {
		t.Errorf("the old address stays: %s", addressesIn(t, a.ns))
	}
	if got, err := ask(a.ns, "tcp", client4+":80"); err != nil {
		t.Errorf("to the outside: %q, %v", got, err)
	}
	if err := m.Release(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	within(t, "nothing is kept", func() bool { l, err := k.List(ctx); return err == nil && len(l) == 0 })
	stop()
	// Without a server, an error in bounded time, and nothing left.
	c := newNS(t)
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = m.Attach(short, AttachRequest{ContainerID: "c", ContainerName: "c", Network: "lan", NetNS: c, Ephemeral: true})
	if !fault.Is(err, fault.DeadlineExceeded) || !strings.Contains(err.Error(), "no server answered") {
		t.Errorf("got %v", err)
	}
	if s := linksIn(t, c); strings.Contains(s, "eth0") {
		t.Errorf("a link is left: %s", s)
	}
	if err := m.Destroy(ctx); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dirs[1], "dhcp")); err == nil {
		t.Error("the keeper's directory is left")
	}
}

func linksIn(t *testing.T, ns *os.File) string {
	var out []byte
	in(t, ns, func() (err error) { out, err = exec.Command("ip", "-o", "link").CombinedOutput(); return err })
	return string(out)
}

// held is a namespace with a process in it, as a container's has.
type held struct{ ns *os.File }

func newHeldNS(t *testing.T) held {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/" + itoa(cmd.Process.Pid) + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return held{f}
}

func itoa(i int) string { return strconv.Itoa(i) }

// killKeeper finds the keeper by its arguments and ends it.
func killKeeper(t *testing.T, dir string) {
	t.Helper()
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && string(b) == dhcp.Argv0+"\x00"+dir+"\x00" {
			var pid int
			for _, c := range strings.Split(p, "/")[2] {
				pid = pid*10 + int(c-'0')
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("there is no keeper")
}

func TestDHCPOptions(t *testing.T) {
	_ = outside(t)
	m := newManager(t, nil)
	yes, no := true, false
	for name, req := range map[string]mnetwork.CreateRequest{
		"subnet": {Driver: "macvlan", IPAM: &mnetwork.IPAM{Driver: "dhcp", Config: []mnetwork.IPAMConfig{{Subnet: netip.MustParsePrefix("10.0.0.0/24")}}}},
		"six":    {Driver: "macvlan", EnableIPv6: &yes, IPAM: &mnetwork.IPAM{Driver: "dhcp"}},
		"none":   {Driver: "macvlan", EnableIPv4: &no, IPAM: &mnetwork.IPAM{Driver: "dhcp"}},
		"other":  {Driver: "macvlan", IPAM: &mnetwork.IPAM{Driver: "nosuch"}},
	} {
		req.Name, req.Options = name, map[string]string{optParent: "wire0"}
		if _, err := m.Create(context.Background(), req); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	// No addresses at all: the container has a link and sees to itself.
	create(t, m, mnetwork.CreateRequest{Name: "bare", IPAM: &mnetwork.IPAM{Driver: "null"}})
	ns := newNS(t)
	a := attach(t, m, ns, "a", "bare", nil)
	if a.Settings.IPAddress.IsValid() || !strings.Contains(linksIn(t, ns), "eth0") {
		t.Errorf("got %+v\n%s", a.Settings, linksIn(t, ns))
	}
}

func routesIn(t *testing.T, ns *os.File) string {
	var out []byte
	in(t, ns, func() (err error) { out, err = exec.Command("ip", "route").CombinedOutput(); return err })
	return string(out)
}
