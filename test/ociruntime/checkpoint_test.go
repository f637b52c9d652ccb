package ociruntime

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// criuWorks skips where it does not: it has to know the kernel that it runs on.
func criuWorks(t *testing.T) {
	t.Helper()
	need(t, "criu")
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("SKIP: criu check fails on this kernel: %s", out[max(0, len(out)-400):])
	}
}

func count(t *testing.T, file string) int {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(data)))
	return n
}

// TestCheckpoint: a container goes on where it was, under another name, with its
// memory, its limits, its mounts and its place in the file system.
func TestCheckpoint(t *testing.T) {
	b := newBundle(t)
	criuWorks(t)
	data := filepath.Join(b.dir, "data")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	limit := int64(100)
	b.edit(args("sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/data/new && mv /data/new /data/n; sleep 0.05; done"), func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: data, Options: []string{"bind"}})
		s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &limit}
	})
	run := func(a ...string) {
		t.Helper()
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		// The null device, since criu cannot bring back files of outside.
		b.global = []string{"--log", filepath.Join(b.dir, "log")}
		cmd := b.command(a...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
		b.global = nil
		if err := cmd.Run(); err != nil {
			log, _ := os.ReadFile(filepath.Join(b.dir, "log"))
			t.Fatalf("%v: %v: %s", a, err, log)
		}
	}
	run("run", "-d", "before")
	file := filepath.Join(data, "n")
	eventually(t, "it counts", func() bool { return count(t, file) > 3 })
	image, work := filepath.Join(b.dir, "image"), filepath.Join(b.dir, "work")
	run("checkpoint", "--leave-running", "--image-path", filepath.Join(b.dir, "first"), "before")
	n := count(t, file)
	eventually(t, "it goes on", func() bool { return count(t, file) > n })
	run("checkpoint", "--image-path", image, "--work-path", work, "before")
	if out, code := b.try("state", "before"); code == 0 {
		t.Fatalf("it is still there: %s", out)
	}
	n = count(t, file)
	time.Sleep(300 * time.Millisecond)
	if m := count(t, file); m != n {
		t.Fatalf("it goes on after its checkpoint: %d, %d", n, m)
	}
	for _, id := range []string{"after", "again"} {
		run("restore", "-d", "--image-path", image, "--work-path", work, id)
		b.await(id, "running")
		eventually(t, "it goes on where it was", func() bool { return count(t, file) > n })
		if m := count(t, file); m > n+200 {
			t.Fatalf("it goes on at %d, and was at %d", m, n)
		}
		if out := b.ok("exec", id, "cat", "/data/n"); strings.TrimSpace(out) == "" {
			t.Error("exec in the restored container")
		}
		if out := b.ok("events", "--stats", id); !strings.Contains(out, `"limit":100`) {
			t.Errorf("the limit is lost: %s", out)
		}
		b.ok("kill", id, "KILL")
		b.await(id, "stopped")
		b.ok("delete", id)
	}
}

// TestNoCRIU: what to do is said where criu is not, or refuses the kernel.
func TestNoCRIU(t *testing.T) {
	b := newBundle(t, args("sleep", "100"))
	b.detached("run", "-d", "c")
	cmd := b.command("checkpoint", "--image-path", filepath.Join(b.dir, "i"), "c")
	cmd.Env = []string{"PATH=/nothing"}
	if out, code := output(t, cmd); code == 0 || !strings.Contains(out, "criu is not installed (Debian: apt-get install criu)") {
		t.Errorf("%d %s", code, out)
	}
	if s := b.state("c").Status; s != "running" {
		t.Errorf("it is %s", s)
	}
	b.detached("create", "d")
	if out, code := b.try("checkpoint", "d"); code == 0 || !strings.Contains(out, "Container cannot be checkpointed in created state") {
		t.Errorf("%d %s", code, out)
	}
}

// TestSecondKernel runs this suite on Debian's kernel under QEMU: with cgroup v2
// alone, and with a criu that knows the kernel.
func TestSecondKernel(t *testing.T) {
	needLong(t)
	bin := filepath.Dir(program(t))
	dir := t.TempDir()
	build := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, "suite.test"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Mkdir(filepath.Join(dir, "testdata"), 0o755); err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = dir
	}
	cmd := exec.Command("../vm/smoke.sh", bin, filepath.Join(cache, "servin-test", "kernel"), filepath.Join(dir, "suite.test"))
	cmd.Env = append(os.Environ(), "SMOKE_TIMEOUT=1500", "SMOKE_EXTRA="+bin+"/servin-runtime criu iptables-restore ip6tables-restore iptables-save ip6tables-save nft setpriv unshare tar gzip",
		"SMOKE_MODULES=xt_mark|xt_conntrack|nft_compat|x_tables|inet_diag|tcp_diag|udp_diag|raw_diag|unix_diag|af_packet_diag|netlink_diag")
	// What iptables loads by itself, for criu to lock the network with.
	libs, _ := filepath.Glob("/usr/lib/*/xtables/lib*t_*.so")
	cmd.Env = append(cmd.Env, "SMOKE_FILES="+strings.Join(libs, " "))
	out, code := output(t, cmd)
	if code == 77 {
		t.Skip(out)
	}
	t.Log(out)
	if !strings.Contains(out, "SUITE passed") || !strings.Contains(out, "--- PASS: TestCheckpoint") || !strings.Contains(out, "--- PASS: TestLife") {
		t.Error("the suite failed there")
	}
}
