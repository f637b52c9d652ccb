package network

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/network/bridge"
	mnetwork "github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// actions are what Doctor offers to do.
func actions(m *Manager) (out []string) {
	for _, f := range m.Doctor(context.Background()) {
		if f.Action != "" {
			out = append(out, f.Action)
		}
	}
	return out
}

// ownFiles gives the calling goroutine's thread a mount namespace in which
// copies stand in the place of the host's directories, and empty ones for those
// that end in a slash. The thread ends with the goroutine. What the test starts
// from here, and the tools that a Manager runs, use them.
func ownFiles(t *testing.T, paths ...string) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for i, p := range paths {
		c := filepath.Join(dir, fmt.Sprint(i))
		if strings.HasSuffix(p, "/") {
			if err := os.MkdirAll(c, 0o755); err != nil {
				t.Fatal(err)
			}
		} else if out, err := exec.Command("cp", "-a", p, c).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := unix.Mount(c, strings.TrimSuffix(p, "/"), "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, p := range paths {
			_ = unix.Unmount(strings.TrimSuffix(p, "/"), unix.MNT_DETACH)
		}
	})
}

// need skips a test whose program is not there.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("SKIP: %s is not installed (scripts/deps test)", p)
		}
	}
}

// service runs a daemon until the test ends.
func service(t *testing.T, name string, args ...string) {
	t.Helper()
	c := exec.Command("sh", append([]string{"-c", `mount -t proc proc /proc && exec "$@"`, "sh", name}, args...)...)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	// In a process namespace of its own: what it starts ends with it.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	c.WaitDelay = time.Second
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Signal(unix.SIGTERM)
		time.AfterFunc(10*time.Second, func() { _ = c.Process.Kill() })
		_ = c.Wait()
		if t.Failed() {
			t.Logf("%s: %s", name, out.String())
		}
	})
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 150 {
		if ok() {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("%s: it did not happen", what)
}

// flushed clears away the rules of a firewall that the test loaded.
func flushed(t *testing.T) {
	t.Cleanup(func() { run(t, "nft", "flush", "ruleset") })
}

// fenced are the checks that every firewall has to pass: a port is reachable
// exactly while it is open, and containers reach the outside from the moment
// of the consent until their network goes.
func fenced(t *testing.T, open, shut func(port string), place string, m *Manager, after func(wire *os.File)) {
	t.Helper()
	wire := outside(t)
	echo(t, wire, ":80")
	ctx := context.Background()
	c := newNS(t)
	attach(t, m, c, "c", "bridge", func(r *AttachRequest) { r.Ports = ports(t, "8080:80/tcp", "8080:80/udp") })
	echo(t, c, ":80")
	reach := func(ns *os.File, proto, addr, want string) {
		t.Helper()
		patience := 4 * time.Second
		if want == "" {
			patience = 300 * time.Millisecond
		}
		got, err := askFor(ns, proto, addr, patience)
		if want == "" && err == nil {
			t.Errorf("%s %s: reached although it should not be", proto, addr)
		} else if want != "" && (err != nil || got != want) {
			t.Errorf("%s %s: got %q, %v; want %q", proto, addr, got, err, want)
		}
	}
	// FORWARD drops: nothing goes either way, and doctor knows.
	open("8080")
	reach(c, "tcp", client4+":80", "")
	if place != "firewalld" { // which lets pass whatever was translated
		reach(wire, "tcp", host4+":8080", "")
	}
	var found []Finding
	for _, f := range m.Doctor(ctx) {
		if f.Action != "" {
			found = append(found, f)
		}
	}
	link := m.vethPrefix() + "br0"
	if len(found) != 1 || found[0].Severity != sevError || !strings.Contains(found[0].Detail, place) || !strings.Contains(found[0].Fix, link) {
		t.Fatalf("doctor found %+v", found)
	}
	r, err := m.Create(ctx, mnetwork.CreateRequest{Name: "n"})
	if err != nil || !strings.Contains(r.Warning, place) || !strings.Contains(r.Warning, "servin system doctor --fix") {
		t.Fatalf("got %+v, %v", r, err)
	}
	if done, err := m.AllowForward(ctx, nil); len(done) != 0 || err != nil {
		t.Fatalf("without consent: %v, %v", done, err)
	}
	if done, err := m.AllowForward(ctx, []string{found[0].Action}); len(done) != 0 || err == nil {
		t.Fatalf("with consent to something else: %v, %v", done, err)
	}
	if done, err := m.AllowForward(ctx, actions(m)); len(done) != 1 || err != nil {
		t.Fatalf("got %v, %v", done, err)
	}
	if l := actions(m); len(l) != 0 {
		t.Fatalf("after the fix doctor offers %v\n%s", l, ruleset())
	}
	reach(c, "tcp", client4+":80", host4)
	n := newNS(t)
	attach(t, m, n, "n", "n", nil)
	reach(n, "tcp", client4+":80", host4)
	for range 2 {
		reach(wire, "tcp", host4+":8080", client4)
		reach(wire, "udp", host4+":8080", client4)
		shut("8080")
		reach(wire, "tcp", host4+":8080", "")
		reach(wire, "udp", host4+":8080", "")
		open("8080")
	}
	if after != nil {
		after(wire)
	}
	// A network takes its accept along, and no other's.
	in, err := m.Inspect(ctx, "n")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Release(ctx, "n"); err != nil {
		t.Fatal(err)
	}
	gone := m.bridgePrefix() + in.ID[:8]
	if err := m.Remove(ctx, "n"); err != nil {
		t.Fatal(err)
	}
	if s := strings.ReplaceAll(ruleset(), "servin_", ""); strings.Contains(s, gone) {
		t.Errorf("rules for %s are left:\n%s", gone, s)
	}
	reach(c, "tcp", client4+":80", host4)
	// A shutdown takes all away, and the next engine puts back what was agreed.
	cfg := m.cfg
	if err := m.Destroy(ctx); err != nil {
		t.Fatal(err)
	}
	if s := ruleset(); strings.Contains(s, m.tag) && place != "firewalld" {
		t.Errorf("a shutdown left rules:\n%s", s)
	}
	m2, err := New(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m2.Destroy(ctx)
	if l := actions(m2); len(l) != 1 {
		t.Fatalf("after a shutdown doctor offers %v", l)
	}
	if err := m2.reallow(ctx, false); err != nil {
		t.Fatal(err)
	}
	if l := actions(m2); len(l) != 0 {
		t.Fatalf("after a new start doctor offers %v", l)
	}
}

func TestRawNftables(t *testing.T) {
	need(t, "nft")
	rule := func(verb string) func(string) {
		return func(port string) {
			run(t, "nft", verb, "element", "inet", "admin", "open", "{ "+port+" }")
		}
	}
	policy(t, `table inet admin {
		set open { type inet_service; }
		chain in { type filter hook input priority 0; policy drop; iifname "lo" accept; ct state established,related accept; th dport @open accept; }
		chain f { type filter hook forward priority 0; policy drop; ct state vmap { established : accept, related : accept, invalid : drop }; }
	}`)
	fenced(t, rule("add"), rule("delete"), "inet admin f", newManager(t, nil), nil)
}

func TestUFW(t *testing.T) {
	need(t, "ufw")
	ownFiles(t, "/etc/ufw", "/etc/default/ufw", "/run/")
	flushed(t)
	run(t, "ufw", "--force", "enable")
	open := func(port string) { run(t, "ufw", "allow", port) }
	shut := func(port string) { run(t, "ufw", "delete", "allow", port) }
	fenced(t, open, shut, "ufw", newManager(t, nil), func(*os.File) {
		out, err := exec.Command("ufw", "status").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "ALLOW FWD") {
			t.Errorf("the rules are not in ufw's own list: %v: %s", err, out)
		}
	})
	out, err := exec.Command("ufw", "show", "added").CombinedOutput()
	if err != nil || strings.Contains(string(out), "route") {
		t.Errorf("rules are left: %v: %s", err, out)
	}
}

func TestFirewalld(t *testing.T) {
	need(t, "firewalld", "firewall-cmd", "dbus-daemon")
	ownFiles(t, "/etc/firewalld", "/run/", "/var/log/")
	flushed(t)
	dir := t.TempDir()
	bus := filepath.Join(dir, "bus")
	conf := filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(conf, []byte(`<busconfig><type>system</type><listen>unix:path=`+bus+`</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow receive_sender="*"/></policy></busconfig>`), 0o600); err != nil {
		t.Fatal(err)
	}
	service(t, "dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile")
	until(t, "the message bus", func() bool { _, err := os.Stat(bus); return err == nil })
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+bus)
	service(t, "firewalld", "--nofork", "--nopid")
	until(t, "firewalld", func() bool { return exec.Command("firewall-cmd", "--state").Run() == nil })
	turn := func(verb string) func(string) {
		return func(port string) {
			// Permanent too: the fix reloads, and says so.
			for _, proto := range []string{"tcp", "udp"} {
				run(t, "firewall-cmd", "--"+verb+"-port="+port+"/"+proto)
				run(t, "firewall-cmd", "--permanent", "--"+verb+"-port="+port+"/"+proto)
			}
		}
	}
	m := newManager(t, nil)
	fenced(t, turn("add"), turn("remove"), "firewalld", m, func(*os.File) {
		out, err := exec.Command("firewall-cmd", "--get-zone-of-interface="+m.vethPrefix()+"br0").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != m.zone().name {
			t.Errorf("the bridge is in zone %s, %v", out, err)
		}
	})
	for _, q := range []string{"--get-zones", "--get-policies"} {
		out, err := exec.Command("firewall-cmd", "--permanent", q).CombinedOutput()
		if err != nil || strings.Contains(string(out), m.zone().name) {
			t.Errorf("%s: left: %v: %s", q, err, out)
		}
	}
}

// TestDockerBeside has a dockerd on the same host: its rules drop what is
// forwarded, and its containers must not notice us.
func TestDockerBeside(t *testing.T) {
	if p := os.Getenv("SERVIN_BENCH_PEERS"); p != "" { // a newer one than the distribution's
		t.Setenv("PATH", p+":"+os.Getenv("PATH"))
	}
	need(t, "dockerd", "docker", "containerd", "busybox")
	ownFiles(t, "/run/")
	flushed(t)
	dir, err := os.MkdirTemp("", "dk") // sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sock := "unix://" + dir + "/d.sock"
	docker := func(args ...string) (string, error) {
		out, err := exec.Command("docker", append([]string{"-H", sock}, args...)...).CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	// It drops what is forwarded only where it turned forwarding on itself.
	if old, err := bridge.Sysctl("net/ipv4/ip_forward"); err != nil || bridge.SetSysctl("net/ipv4/ip_forward", "0") != nil {
		t.Fatal(err)
	} else {
		t.Cleanup(func() { bridge.SetSysctl("net/ipv4/ip_forward", old) })
	}
	if err := os.WriteFile(dir+"/config", []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	service(t, "dockerd", "-H", sock, "--data-root", dir+"/data", "--exec-root", dir+"/exec", "--pidfile", dir+"/pid", "--config-file", dir+"/config",
		"--storage-driver", "vfs", "--bip", "172.31.250.1/24", "--userland-proxy=false")
	up := false
	for range 200 {
		if _, err := docker("info"); err == nil {
			up = true
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if !up {
		t.Skip("SKIP: dockerd does not run here")
	}
	t.Cleanup(func() {
		if l, err := docker("ps", "-q"); err == nil && l != "" {
			docker(append([]string{"rm", "-f"}, strings.Fields(l)...)...)
		}
		run(t, "ip", "link", "delete", "docker0")
	})
	rootfs := dir + "/rootfs"
	if out, err := exec.Command("sh", "-c", `mkdir -p "$1/bin" && cp "$(command -v busybox)" "$1/bin/" && tar -C "$1" -c . | docker -H "$2" import - bb`, "sh", rootfs, sock).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := docker("run", "-d", "--name", "theirs", "-p", "9090:80", "bb", "/bin/busybox", "nc", "-ll", "-p", "80", "-e", "/bin/busybox", "echo", "docker"); err != nil {
		t.Skipf("SKIP: Docker cannot run a container here: %s", out)
	}
	policy(t, `table inet admin {
		set open { type inet_service; }
		chain in { type filter hook input priority 0; policy drop; iifname "lo" accept; ct state established,related accept; th dport @open accept; }
	}`)
	turn := func(verb string) func(string) {
		return func(port string) { run(t, "nft", verb, "element", "inet", "admin", "open", "{ "+port+" }") }
	}
	theirs := func(wire *os.File) {
		t.Helper()
		if got, err := askFor(wire, "tcp", host4+":9090", 4*time.Second); err != nil || strings.TrimSpace(got) != "docker" {
			t.Errorf("Docker's container: got %q, %v", got, err)
		}
		if out, err := docker("exec", "theirs", "/bin/busybox", "nc", "-w", "4", client4, "80"); err != nil || !strings.Contains(out, host4) {
			t.Errorf("from Docker's container: %v: %s", err, out)
		}
	}
	var wire *os.File
	m := newManager(t, nil)
	fenced(t, turn("add"), turn("delete"), "Docker's chain", m, func(w *os.File) { wire = w; theirs(w) })
	theirs(wire)
	if out, err := exec.Command("iptables", "-S", "DOCKER-USER").CombinedOutput(); err != nil || strings.Contains(string(out), "ACCEPT") {
		t.Errorf("DOCKER-USER after a shutdown: %v: %s", err, out)
	}
}
