package native

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// TestMonitorKilled kills a container's monitor: the container must not live on
// unwatched, and the engine must say what happened.
func TestMonitorKilled(t *testing.T) {
	e := start(t)
	id := e.must("run", "-d", "--name", "cc", "bb", "sleep", "1000")
	pid := e.must("inspect", "--format", "{{.State.Pid}}", "cc")
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	var ppid int
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "PPid: %d", &ppid); err == nil {
			break
		}
	}
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", ppid))
	if !strings.Contains(string(comm), "servin-shim") {
		t.Fatalf("the parent of %s is %d, %s", id, ppid, comm)
	}
	if err := syscall.Kill(ppid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "exit noticed", 5*time.Second, func() bool {
		return e.must("inspect", "--format", "{{.State.Running}}", "cc") == "false"
	})
	if got := e.must("inspect", "--format", "{{.State.ExitCode}}", "cc"); got == "0" {
		t.Errorf("exit code %s after the monitor was killed", got)
	}
	harness.Eventually(t, "end of the container's process", 5*time.Second, func() bool {
		_, err := os.Stat("/proc/" + pid)
		return err != nil
	})
	e.must("start", "cc")
	e.must("rm", "-f", "cc")
}

// TestDiskFull fills the file system under the engine: requests fail with the
// reason, nothing that was acknowledged is lost, and work goes on afterwards.
func TestDiskFull(t *testing.T) {
	bin := harness.Programs(t)
	dir, err := os.MkdirTemp("", "sv")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("the engine keeps its file system busy: %v", err)
			_ = syscall.Unmount(dir, syscall.MNT_DETACH)
		}
		_ = os.Remove(dir)
	})
	e := &engine{Daemon: &harness.Daemon{T: t, Dir: dir + "/e", Bin: bin}, t: t}
	if err := os.Mkdir(e.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	e.Boot()
	e.importBusybox()
	ref, _ := startRegistry(t).push(t, "big:1", 2<<20, 3)
	e.must("create", "--name", "before", "bb", "true")
	e.must("run", "-d", "--name", "talker", "bb", "sh", "-c", "while [ ! -e /go ]; do sleep 0.05; done; i=0; while [ $i -lt 20000 ]; do echo line $i padded with some text; i=$((i+1)); done")
	fill := exec.Command("dd", "if=/dev/zero", "of="+dir+"/fill", "bs=64k")
	_ = fill.Run() // ends with no space left
	if r := e.run("pull", ref); r.code == 0 || !strings.Contains(r.err, "free on the disk") {
		t.Errorf("pull to a full disk: %s", r)
	}
	failures := 0
	for i := range 20 {
		r := e.run("create", "--name", fmt.Sprint("full", i), "-v", fmt.Sprint("vol", i, ":/v"), "bb", "true")
		if r.code != 0 {
			failures++
			if !strings.Contains(strings.ToLower(r.err), "no space") {
				t.Errorf("the error does not say that the disk is full: %s", r)
			}
		}
	}
	// A daemon that dies now must come back: what runs is in its care.
	e.Kill()
	e.Boot()
	if got := e.must("inspect", "--format", "{{.State.Running}}", "talker"); got != "true" {
		t.Errorf("after a crash on a full disk: running %s", got)
	}
	// The log cannot grow: the container waits rather than lose lines.
	e.run("exec", "talker", "touch", "/go")
	time.Sleep(time.Second)
	if err := os.Remove(dir + "/fill"); err != nil {
		t.Fatal(err)
	}
	e.must("run", "--rm", "bb", "true")
	e.must("pull", ref)
	if got := e.must("inspect", "--format", "{{.State.Status}}", "before"); got != "created" {
		t.Errorf("acknowledged before the disk was full, now %q", got)
	}
	if r := e.run("exec", "talker", "touch", "/go"); r.code != 0 && e.must("inspect", "--format", "{{.State.Running}}", "talker") == "true" {
		t.Errorf("exec after space came back: %s", r)
	}
	harness.Eventually(t, "talker done", 30*time.Second, func() bool {
		return e.must("inspect", "--format", "{{.State.Status}}", "talker") == "exited"
	})
	if n := strings.Count(e.run("logs", "talker").out, "\n"); n != 20000 {
		t.Errorf("%d lines in the log, want 20000", n)
	}
	t.Logf("%d of 20 creates refused while full", failures)
}

// TestBadInput gives wrong values everywhere: an error of the right kind, and
// nothing changed.
func TestBadInput(t *testing.T) {
	e := start(t)
	for _, args := range [][]string{
		{"run", "--name", "a/b", "bb"}, {"run", "--name", "", "-p", "99999:1", "bb"}, {"run", "-p", "x:y", "bb"}, {"run", "-p", "80:80/quic", "bb"},
		{"run", "-v", "relative/path:/x:zz", "bb"}, {"run", "-v", "a:relative", "bb"}, {"run", "--mount", "type=wormhole,target=/x", "bb"},
		{"run", "-e", "=x", "bb"}, {"run", "-m", "-5", "bb"}, {"run", "--cpus", "1000000", "bb"}, {"run", "--cpuset-cpus", "9999", "bb"},
		{"run", "--network", "no-such-net", "bb"}, {"run", "--ip", "10.0.0.1", "bb"}, {"run", "--user", "nobody-here", "bb"}, {"run", "--user", "-7", "bb"},
		{"run", "--cap-add", "FLY", "bb"}, {"run", "--security-opt", "seccomp=/no/such", "bb"}, {"run", "--restart", "sometimes", "bb"},
		{"run", "--device", "/dev/no-such", "bb"}, {"run", "--ulimit", "nofile=x", "bb"}, {"run", "--sysctl", "kernel.panic=1", "bb"},
		{"run", "--log-driver", "pigeon", "bb"}, {"run", "--runtime", "nope", "bb"}, {"run", "UPPER/case", "true"}, {"run", "bb@sha256:beef"},
		{"run", "--hostname", strings.Repeat("x", 300), "bb"}, {"run", "--health-cmd", "x", "--health-interval", "1ns", "bb"},
		{"run", "-w", "relative", "bb"}, {"run", "--ipc", "container:none", "bb"}, {"run", "--pid", "container:none", "bb"}, {"run", "--network", "container:none", "bb"},
		{"volumes", "create", "../x"}, {"volumes", "rm", "none"}, {"networks", "create", "--subnet", "300.0.0.0/8", "n"}, {"networks", "create", "--subnet", "10.1.0.0/33", "n"},
		{"networks", "create", "host"}, {"networks", "rm", "bridge"}, {"tag", "bb", "Bad:Tag:x"}, {"rmi", "none"}, {"start", "none"}, {"logs", "none"}, {"exec", "none", "true"},
		{"inspect", "nothing"}, {"kill", "none"}, {"cp", "none:/x", "/tmp/x"}, {"pull", "127.0.0.1:1/x"},
	} {
		r := e.run(args...)
		if r.code == 0 {
			t.Errorf("%s was accepted: %s", strings.Join(args, " "), r)
		}
		if args[0] == "run" && r.code != 125 {
			t.Errorf("%s: want exit 125, got %s", strings.Join(args, " "), r)
		}
		if strings.TrimSpace(r.err) == "" {
			t.Errorf("%s fails without a word", strings.Join(args, " "))
		}
		if strings.Contains(r.err, "panic") || strings.Contains(r.err, "goroutine") || strings.Contains(r.err, "500") {
			t.Errorf("%s: %s", strings.Join(args, " "), r)
		}
	}
	if out := e.must("ps", "-aq"); out != "" {
		t.Errorf("refused requests left containers: %q", out)
	}
	if out := e.must("volumes", "ls", "-q"); out != "" {
		t.Errorf("refused requests left volumes: %q", out)
	}
	if out := e.must("networks", "ls", "--format", "{{.Name}}"); len(strings.Fields(out)) != 3 {
		t.Errorf("networks: %q", out)
	}
}

// TestManyContainers holds many containers at once.
func TestManyContainers(t *testing.T) {
	n := pick(60, 1000)
	e := start(t)
	sem := make(chan struct{}, 8)
	errs := make(chan string, n)
	for i := range n {
		sem <- struct{}{}
		go func() {
			defer func() { <-sem }()
			network := "none"
			if i%2 == 0 {
				network = "bridge"
			}
			if r := e.run("run", "-d", "--network", network, "--name", fmt.Sprint("m", i), "bb", "sleep", "10000"); r.code != 0 {
				errs <- r.String()
			}
		}()
	}
	for range cap(sem) {
		sem <- struct{}{}
	}
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	if got := len(strings.Fields(e.must("ps", "-q"))); got != n {
		t.Fatalf("%d running, want %d", got, n)
	}
	e.Kill()
	begin := time.Now()
	e.Boot()
	if got := len(strings.Fields(e.must("ps", "-q"))); got != n {
		t.Fatalf("%d running after a crash, want %d", got, n)
	}
	t.Logf("%d containers taken back after %s", n, time.Since(begin).Round(time.Millisecond))
}
