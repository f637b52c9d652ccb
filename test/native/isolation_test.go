package native

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// probe is run inside containers: it tries what a default container must not do.
const probe = `
try() { n=$1; shift; if "$@" >/dev/null 2>&1; then echo "$n allowed"; else echo "$n denied"; fi; }
try mount mount -t tmpfs none /tmp
try umount umount /proc
try remount mount -o remount,rw /sys
try mknod-disk mknod /tmp/d b 8 0
try unshare unshare -m true
try unshare-user unshare -U true
try chroot chroot / true
try sethostname hostname other
try swapoff swapoff -a
try insmod insmod /tmp/none.ko
try reboot-write sh -c 'echo b > /proc/sysrq-trigger'
try sysctl-write sh -c 'echo 1 > /proc/sys/kernel/panic'
try core-pattern sh -c 'echo x > /proc/sys/kernel/core_pattern'
try sys-write sh -c 'echo 1 > /sys/kernel/profiling'
try kcore sh -c 'head -c 1 /proc/kcore | grep -q .'
try keys sh -c 'grep -q . /proc/keys'
try timer-list sh -c 'grep -q . /proc/timer_list'
try firmware sh -c 'ls /sys/firmware | grep -q .'
try cgroup-write sh -c 'mkdir /sys/fs/cgroup/memory/x || mkdir /sys/fs/cgroup/x'
try dmesg dmesg
try date sh -c 'date -s 2020-01-01 2>&1 | grep -q 2020 && ! date -s 2020-01-01 2>&1 | grep -q permitted'
try nice-down nice -n -5 true
try dev-mem sh -c 'test -e /dev/mem'
try dev-kmsg sh -c 'test -e /dev/kmsg'
try raw-socket ping -c 1 -W 1 127.0.0.1
`

// TestIsolation states what a default container gets, field by field.
func TestIsolation(t *testing.T) {
	e := start(t)
	status := map[string]string{}
	for line := range strings.Lines(e.must("run", "--rm", "bb", "cat", "/proc/self/status")) {
		k, v, _ := strings.Cut(line, ":")
		status[k] = strings.TrimSpace(v)
	}
	for k, want := range map[string]string{
		"CapInh": "0000000000000000", "CapPrm": "00000000a80425fb", "CapEff": "00000000a80425fb",
		"CapBnd": "00000000a80425fb", "CapAmb": "0000000000000000",
		"Seccomp": "2", "NoNewPrivs": "0", "Uid": "0\t0\t0\t0", "Gid": "0\t0\t0\t0", "NSpid": status["Pid"],
	} {
		if status[k] != want {
			t.Errorf("%s is %q, want %q", k, status[k], want)
		}
	}
	verdicts := map[string]bool{}
	for line := range strings.Lines(e.must("run", "--rm", "bb", "sh", "-c", probe)) {
		verdicts[strings.TrimSpace(line)] = true
	}
	for _, want := range []string{"mount denied", "umount denied", "remount denied", "mknod-disk allowed", "unshare denied", "unshare-user denied",
		"chroot allowed", "sethostname denied", "swapoff denied", "insmod denied", "reboot-write denied", "sysctl-write denied", "core-pattern denied",
		"sys-write denied", "kcore denied", "keys denied", "timer-list denied", "firmware denied", "cgroup-write denied", "date denied",
		"nice-down denied", "dev-mem denied", "dev-kmsg denied", "raw-socket allowed"} {
		if !verdicts[want] {
			t.Errorf("want %q of %v", want, verdicts)
		}
	}
	// A node may be made, but the device cgroup forbids its use.
	if r := e.run("run", "--rm", "bb", "sh", "-c", "mknod /tmp/d b 253 0 && head -c 1 /tmp/d"); !strings.Contains(r.err, "not permitted") {
		t.Errorf("a disk could be opened: %s", r)
	}
	// Nothing of the host is open or in sight.
	if out := e.must("run", "--rm", "bb", "sh", "-c", "ls -l /proc/self/fd | grep -c -- '->'"); out != "3" && out != "4" {
		t.Errorf("descriptors in a fresh process: %s, want 0, 1, 2 and the listing's own", out)
	}
	mounts := e.must("run", "--rm", "bb", "cat", "/proc/self/mountinfo")
	for line := range strings.Lines(mounts) {
		f := strings.Fields(line)
		if slices.Contains([]string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}, f[4]) {
			continue
		}
		if strings.Contains(line, e.Dir) && f[4] != "/" {
			t.Errorf("a host path is mounted: %s", line)
		}
		if strings.Contains(f[6], "shared:") {
			t.Errorf("a mount spreads to others: %s", line)
		}
	}
	if out := e.must("run", "--rm", "bb", "sh", "-c", "ls /dev | sort | tr '\\n' ' '"); out != "console core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero" &&
		out != "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero" {
		t.Errorf("/dev holds %q", out)
	}
}

// TestSameAsRunc runs the same probe under runc on the spec that `runc spec`
// makes, widened to what a Docker container has, and compares the verdicts.
func TestSameAsRunc(t *testing.T) {
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("SKIP: runc is not installed")
	}
	e := start(t)
	ours := e.must("run", "--rm", "--network", "none", "bb", "sh", "-c", probe)
	dir := t.TempDir()
	e.must("create", "--name", "fs", "bb", "true")
	tar := exec.Command("bash", "-c", `mkdir -p "$1/rootfs" && tar -C "$1/rootfs" -x`, "sh", dir)
	pipe, err := tar.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var tarErr strings.Builder
	tar.Stderr = &tarErr
	if err := tar.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(pipe, e.run("export", "fs").out); err != nil {
		t.Fatal(err)
	}
	pipe.Close()
	if err := tar.Wait(); err != nil {
		t.Fatalf("%v: %s", err, tarErr.String())
	}
	script := `set -e; cd "$1"; "$2" spec; jq --arg p "$3" '.process.terminal=false | .process.args=["sh","-c",$p] | .process.noNewPrivileges=false | .root.readonly=false | del(.process.rlimits)
 | .process.env=["PATH=/bin"] | (["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"]) as $c
 | .process.capabilities={bounding:$c,effective:$c,permitted:$c}' config.json > c && mv c config.json; "$2" --root "$1/state" run probe`
	// crun and runc alike need a tree without controllers on v2 beside v1.
	cmd := exec.Command("unshare", "-m", "bash", "-c", "umount -l /sys/fs/cgroup/unified 2>/dev/null; "+script, "sh", dir, runc, probe)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("SKIP: runc cannot run here: %v", err)
	}
	theirs := strings.TrimSpace(string(out))
	// The seccomp profile is ours alone there: what it denies may only be stricter.
	o, r := strings.Split(ours, "\n"), strings.Split(theirs, "\n")
	if len(o) != len(r) {
		t.Fatalf("%d verdicts, runc %d:\n%s\n--\n%s", len(o), len(r), ours, theirs)
	}
	for i := range o {
		if strings.HasSuffix(o[i], " allowed") && !strings.HasSuffix(strings.TrimSpace(r[i]), " allowed") {
			t.Errorf("ours: %s, runc: %s", o[i], r[i])
		}
	}
}

// TestEscapes tries known ways out.
func TestEscapes(t *testing.T) {
	e := start(t)
	// The runtime's program cannot be reached or overwritten from inside.
	if out := e.must("run", "--rm", "bb", "sh", "-c", "readlink /proc/1/exe; for p in /proc/[0-9]*; do readlink $p/exe; done | sort -u"); strings.Contains(out, "shim") || strings.Contains(out, "memfd") {
		t.Errorf("the shim is visible inside: %q", out)
	}
	// The same while an exec is being set up, many times.
	e.must("run", "-d", "--name", "xx", "bb", "sh", "-c", `while :; do for p in /proc/[0-9]*; do e=$(readlink $p/exe 2>/dev/null); case "$e" in *shim*|*memfd*) (echo pwned > $p/exe) 2>/dev/null && echo "WRITTEN $p"; ls -l $p/fd 2>/dev/null | grep -v denied | grep -- '->' && echo "FDS $p"; ls $p/root/ 2>/dev/null | grep -q servin && echo "ROOT $p";; esac; done; done`)
	for range 30 {
		e.must("exec", "xx", "true")
	}
	if out := e.must("logs", "xx"); strings.Contains(out, "WRITTEN") || strings.Contains(out, "ROOT") || strings.Contains(out, "FDS") {
		t.Errorf("a process of ours is open to the container while exec is set up: %q", out)
	}
	// A working directory outside the root (CVE-2024-21626).
	for _, d := range []string{"/proc/self/fd/7", "/proc/self/fd/8", "/proc/1/cwd/../../.."} {
		r := e.run("run", "--rm", "-w", d, "bb", "sh", "-c", "ls ../../../../../.. | sort | head -3; pwd")
		if strings.Contains(r.out, "lib64") || strings.Contains(r.out, "boot") {
			t.Errorf("-w %s leads to the host: %s", d, r)
		}
	}
	// Mount targets that are links to the outside or to /proc.
	dir := t.TempDir()
	marker := filepath.Join(dir, "marker")
	if err := os.WriteFile(marker, []byte("host"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.must("run", "--name", "links", "bb", "sh", "-c", "ln -s /proc/self/root/../../.. /l; ln -s /proc /p; rm -rf /sys2; ln -s / /sys2")
	e.must("commit", "links", "links:1")
	for _, target := range []string{"/l/tmp/x", "/p/sys/x", "/../../x"} {
		r := e.run("run", "--rm", "-v", dir+":"+target, "links:1", "cat", "/proc/self/mountinfo")
		for line := range strings.Lines(r.out) {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], "/proc/sys/x") {
				t.Errorf("mounted over proc: %s", line)
			}
		}
	}
	// Masked paths that are links: the mask must hold for procfs itself.
	if out := e.run("run", "--rm", "links:1", "sh", "-c", "test ! -e /proc/kcore || wc -c < /proc/kcore"); strings.Trim(out.out, "0\n") != "" {
		t.Errorf("kcore: %s", out)
	}
	// An image whose /dev/null or /proc is a link must not redirect mounts.
	e.must("run", "--name", "swap", "bb", "sh", "-c", "rm -rf /sys /dev /proc 2>/dev/null; mkdir -p /new; true")
	if r := e.run("run", "--rm", "-v", "/proc:/host-proc:ro", "bb", "sh", "-c", "echo 1 > /host-proc/sys/kernel/panic"); r.code == 0 {
		t.Errorf("a read-only bind of /proc was written: %s", r)
	}
}
