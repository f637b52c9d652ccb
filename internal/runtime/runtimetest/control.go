package runtimetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func testSignal(t *testing.T, dr Driver) {
	e := dr.env(t)
	log := filepath.Join(e.dir, "log")
	task := e.start(sh("trap 'echo usr; exit 9' USR1; echo ready; while :; do sleep 0.05; done"), logged(log))
	e.until("ready", func() bool { b, _ := os.ReadFile(log); return len(b) > 0 })
	if err := task.Signal(e.ctx(), int(unix.SIGUSR1), false); err != nil {
		t.Fatal(err)
	}
	if x := e.wait(task); x.Code != 9 {
		t.Errorf("%+v", x)
	}
	task = e.start(sh("sleep 100 & sleep 100 & wait"))
	e.until("children", func() bool { p, _ := task.Pids(e.ctx()); return len(p) == 3 })
	if err := task.Signal(e.ctx(), 9, true); err != nil {
		t.Fatal(err)
	}
	if x := e.wait(task); x.Code != 137 {
		t.Errorf("%+v", x)
	}
	if err := task.Signal(e.ctx(), 99, false); err == nil {
		t.Error("signal 99 exists")
	}
}

func (e *env) exec(task contract.Task, stdin bool, p *specs.Process) contract.Exec {
	e.Helper()
	x, err := task.Exec(e.ctx(), contract.ExecRequest{ID: "x", Process: p, Stdin: stdin})
	if err != nil {
		e.Fatalf("exec: %v", err)
	}
	return x
}

// Process is an ordinary exec's.
func Process(args ...string) *specs.Process {
	p := *Spec(args...).Process
	return &p
}

func testExec(t *testing.T, dr Driver) {
	e := dr.env(t)
	task := e.start(Spec("/bin/sleep", "100"))
	x := e.exec(task, false, Process("/bin/sh", "-c", "echo out; echo err >&2; hostname; exit 6"))
	out, errs := e.drain(x.Streams())
	if c := e.wait(x); c.Code != 6 || out != "out\nconformance\n" || errs != "err\n" || x.Pid() <= 0 {
		t.Errorf("%q %q %+v", out, errs, c)
	}
	x.Streams().Close()
	x = e.exec(task, true, Process("/bin/cat"))
	data := bytes.Repeat([]byte("abcdefgh"), 50000)
	go func() {
		_, _ = x.Streams().Stdin.Write(data)
		x.Streams().Stdin.Close()
	}()
	if out, _ := e.drain(x.Streams()); out != string(data) {
		t.Errorf("%d bytes", len(out))
	}
	e.wait(x)
	x.Streams().Close()
	// Same namespaces and cgroup.
	p := Process("/bin/sh", "-c", "for n in mnt net ipc uts pid cgroup user; do readlink /proc/1/ns/$n; readlink /proc/self/ns/$n; done; ps")
	x = e.exec(task, false, p)
	out, _ = e.drain(x.Streams())
	e.wait(x)
	lines := strings.Split(out, "\n")
	for i := 0; i < 14 && len(lines) > 14; i += 2 {
		if lines[i] != lines[i+1] {
			t.Errorf("%s is not %s", lines[i+1], lines[i])
		}
	}
	if !strings.Contains(out, "sleep 100") {
		t.Errorf("ps shows\n%s", out)
	}
	// Another user, another directory.
	p = Process("/bin/sh", "-c", "id -u; id -g; readlink /proc/self/cwd; echo $FOO; echo x >/dev/stdout")
	p.User, p.Cwd, p.Env = specs.User{UID: 1000, GID: 1000}, "/tmp", append(p.Env, "FOO=bar")
	x = e.exec(task, false, p)
	if out, _ := e.drain(x.Streams()); out != "1000\n1000\n/tmp\nbar\nx\n" {
		t.Errorf("%q", out)
	}
	e.wait(x)
	// Signals.
	x = e.exec(task, false, Process("/bin/sleep", "100"))
	if pids, _ := task.Pids(e.ctx()); len(pids) != 2 {
		t.Errorf("pids %v", pids)
	}
	if err := x.Signal(e.ctx(), int(unix.SIGTERM)); err != nil {
		t.Fatal(err)
	}
	if c := e.wait(x); c.Code != 143 || c.Signal != 15 {
		t.Errorf("%+v", c)
	}
	if err := x.Signal(e.ctx(), 15); err == nil {
		t.Error("an ended exec took a signal")
	}
	// Detached.
	d, err := task.Exec(e.ctx(), contract.ExecRequest{ID: "d", Process: Process("/bin/touch", "/data/detached"), Detach: true})
	if err != nil {
		t.Fatal(err)
	}
	if c := e.wait(d); c.Code != 0 {
		t.Errorf("%+v", c)
	}
	if _, err := os.Stat(filepath.Join(e.root.Dir, "data/detached")); err != nil {
		t.Error(err)
	}
	// Failures.
	if _, err := task.Exec(e.ctx(), contract.ExecRequest{ID: "n", Process: Process("/bin/none")}); !errors.Is(err, os.ErrNotExist) && !dr.Lacks["errno"] || err == nil {
		t.Errorf("%v", err)
	}
	// Many at once.
	errc := make(chan error, 30)
	for i := range cap(errc) {
		go func() {
			x, err := task.Exec(context.Background(), contract.ExecRequest{ID: fmt.Sprint(i), Process: Process("/bin/sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i))})
			if err == nil {
				out, _ := e.drain(x.Streams())
				<-x.Exited()
				x.Streams().Close()
				if x.Exit().Code != i || out != fmt.Sprintf("%d\n", i) {
					err = fmt.Errorf("exec %d: %q %+v", i, out, x.Exit())
				}
			}
			errc <- err
		}()
	}
	for range cap(errc) {
		if err := <-errc; err != nil {
			t.Error(err)
		}
	}
	// The container's end is the exec's.
	x = e.exec(task, false, Process("/bin/sleep", "100"))
	_ = task.Signal(e.ctx(), 9, false)
	if c := e.wait(x); c.Code != 137 {
		t.Errorf("%+v", c)
	}
	e.wait(task)
	if _, err := task.Exec(e.ctx(), contract.ExecRequest{ID: "late", Process: Process("/bin/true")}); err == nil {
		t.Error("exec in an ended container")
	}
}

func testExecTerminal(t *testing.T, dr Driver) {
	e := dr.env(t)
	task := e.start(Spec("/bin/sleep", "100"))
	// A runtime with a terminal of its own behind ours hears of a new size by a signal.
	p := Process("/bin/sh", "-c", "tty; stty size; read x; until [ \"$(stty size)\" = '33 120' ] || [ $((n=n+1)) -gt 100 ]; do sleep 0.05; done; stty size; exit 3")
	p.Terminal, p.ConsoleSize = true, &specs.Box{Width: 90, Height: 30}
	x := e.exec(task, true, p)
	s := x.Streams()
	defer s.Close()
	buf := make([]byte, 4096)
	var got string
	for !strings.Contains(got, "30 90") {
		n, err := s.Stdout.Read(buf)
		got += string(buf[:n])
		if err != nil {
			t.Fatalf("%q %v", got, err)
		}
	}
	if !strings.Contains(got, "/dev/pts/") {
		t.Errorf("%q", got)
	}
	if err := x.Resize(e.ctx(), 120, 33); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(s.Stdin, "\r")
	rest, err := io.ReadAll(s.Stdout)
	if err != nil || !strings.Contains(string(rest), "33 120") {
		t.Errorf("%q %v", rest, err)
	}
	if c := e.wait(x); c.Code != 3 {
		t.Errorf("%+v", c)
	}
}

func testPause(t *testing.T, dr Driver) {
	e := dr.env(t)
	log := filepath.Join(e.dir, "log")
	task := e.start(sh("while :; do echo x; sleep 0.01; done"), logged(log))
	size := func() int64 {
		st, err := os.Stat(log)
		if err != nil {
			return 0
		}
		return st.Size()
	}
	e.until("output", func() bool { return size() > 0 })
	if err := task.Pause(e.ctx()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(30 * time.Millisecond) // what was in the pipe
	a := size()
	time.Sleep(100 * time.Millisecond)
	if b := size(); a != b {
		t.Errorf("it went on: %d, then %d bytes", a, b)
	}
	if err := task.Resume(e.ctx()); err != nil {
		t.Fatal(err)
	}
	e.until("more output", func() bool { return size() > a })
	// A paused container can be killed and deleted.
	if err := task.Pause(e.ctx()); err != nil {
		t.Fatal(err)
	}
	if err := task.Signal(e.ctx(), 9, false); err != nil {
		t.Fatal(err)
	}
	if err := task.Resume(e.ctx()); err != nil {
		select {
		case <-task.Exited(): // v2 freezers let killed processes go; runc thaws to kill
		case <-time.After(10 * time.Second):
			t.Fatal(err)
		}
	}
	e.wait(task)
}

func testLimits(t *testing.T, dr Driver) {
	if dr.Lacks["limits"] {
		t.Skip("SKIP: no cgroup controllers for limits")
	}
	e := dr.env(t)
	spec := sh("sleep 100 & sleep 100")
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}
	spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(50))}
	spec.Linux.Resources.CPU = &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000))}
	task := e.start(spec)
	e.until("child", func() bool { p, _ := task.Pids(e.ctx()); return len(p) == 2 })
	s, err := task.Stats(e.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if s.Memory == 0 || s.MemoryLimit != 64<<20 || s.Pids != 2 || s.PidsLimit != 50 || s.CPUTotal == 0 || s.SystemCPU == 0 || s.OnlineCPUs == 0 {
		t.Errorf("%+v", s)
	}
	up := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(96 << 20)), Swap: ptr(int64(96 << 20))}, Pids: &specs.LinuxPids{Limit: ptr(int64(20))}}
	if err := task.Update(e.ctx(), up); err != nil {
		t.Fatal(err)
	}
	if s, err = task.Stats(e.ctx()); err != nil || s.MemoryLimit != 96<<20 || s.PidsLimit != 20 {
		t.Errorf("%+v %v", s, err)
	}
	// More forks than permitted fail.
	x := e.exec(task, false, Process("/bin/sh", "-c", "i=0; while [ $i -lt 40 ]; do sleep 1 & i=$((i+1)); done"))
	if _, errs := e.drain(x.Streams()); !strings.Contains(errs, "fork") {
		t.Errorf("%q", errs)
	}
	e.wait(x)
	x.Streams().Close()
	if err := task.Update(e.ctx(), &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "4000"}}); err == nil {
		t.Error("processor 4000 exists")
	}
}

func testOOM(t *testing.T, dr Driver) {
	if dr.Lacks["limits"] {
		t.Skip("SKIP: no cgroup controllers for limits")
	}
	e := dr.env(t)
	spec := Spec("/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(32 << 20)), Swap: ptr(int64(32 << 20))}
	if x := e.wait(e.start(spec)); !x.OOMKilled || x.Code != 137 {
		t.Errorf("%+v", x)
	}
	if x := e.wait(e.start(Spec("/bin/true"))); x.OOMKilled {
		t.Errorf("%+v", x)
	}
}

// testIsolation looks at what matters most from inside.
func testIsolation(t *testing.T, dr Driver) {
	e := dr.env(t)
	out, _, _ := e.output(sh("ls /proc/self/fd | wc -l; id -u; hostname; grep -c . /proc/mounts; grep Seccomp: /proc/self/status; grep CapBnd /proc/self/status; cat /proc/1/oom_score_adj; echo x > /proc/sysrq-trigger"))
	f := strings.Split(out, "\n")
	if len(f) < 7 || strings.TrimSpace(f[0]) != "4" || f[1] != "0" || f[2] != "conformance" || f[4] != "Seccomp:\t2" || f[5] != "CapBnd:\t00000000a80425fb" {
		t.Errorf("%q", out)
	}
	_, errs, _ := e.output(sh("dd if=/dev/mem of=/dev/null count=1; mount -t tmpfs x /tmp; cat < /proc/kcore | head -c1 | wc -c; echo 1 > /proc/sys/kernel/panic"))
	if strings.Count(errs, "\n") < 3 {
		t.Errorf("%q", errs)
	}
	// Device numbers outside the rules cannot be opened even with a node.
	spec := sh("busybox mknod /tmp/kmsg c 1 11 && head -c1 /tmp/kmsg; echo $?")
	if out, _, _ := e.output(spec); strings.TrimSpace(out) != "1" {
		t.Errorf("%q", out)
	}
}

func testHeld(t *testing.T, dr Driver) {
	if dr.Lacks["release"] {
		t.Skip("SKIP: the driver cannot hold a process")
	}
	e := dr.env(t)
	for _, restart := range []bool{false, true} {
		log := filepath.Join(e.dir, fmt.Sprint("log", restart))
		task, err := e.d.Start(e.ctx(), e.request(sh("echo ran"), logged(log), func(r *contract.StartRequest) { r.StopAfterCreate = true }))
		if err != nil {
			t.Fatal(err)
		}
		if task.Pid() <= 0 {
			t.Error("no pid")
		}
		time.Sleep(50 * time.Millisecond)
		if b, _ := os.ReadFile(log); len(b) > 0 {
			t.Fatalf("it ran: %s", b)
		}
		if restart {
			e.restart()
			if task, err = e.d.Restore(e.ctx(), task.ID()); err != nil {
				t.Fatal(err)
			}
		}
		ns, err := task.NetNS()
		if err != nil {
			t.Fatal(err)
		}
		ns.Close()
		if err := task.Release(e.ctx()); err != nil {
			t.Fatal(err)
		}
		if x := e.wait(task); x.Code != 0 {
			t.Errorf("%+v", x)
		}
		if r := e.records(log); len(r) != 1 {
			t.Errorf("%v", r)
		}
		if err := task.Release(e.ctx()); err == nil {
			t.Error("released twice")
		}
		e.remove(task)
	}
	// One that is never released can be removed.
	e.start(Spec("/bin/true"), func(r *contract.StartRequest) { r.StopAfterCreate = true })
}
