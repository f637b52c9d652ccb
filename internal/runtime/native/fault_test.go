package native

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/runtimetest"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// host is a driver that runs, for tests of this package.
type host struct {
	testing.TB
	*Driver
	dir, instance string
	root          *runtimetest.Root
	stop          func()
}

func newHost(t testing.TB, pool int) *host {
	h := &host{TB: t, dir: t.TempDir(), instance: fmt.Sprintf("t%d-%d", os.Getpid(), instances.Add(1)), root: runtimetest.NewRoot(t)}
	h.open(pool)
	t.Cleanup(func() { h.close() })
	return h
}

func (h *host) open(pool int) {
	d, err := New(Config{Root: h.dir, RunRoot: h.dir, Instance: h.instance, PoolSize: pool})
	if err != nil {
		h.Fatal(err)
	}
	h.Driver = d
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = d.Run(ctx) }()
	h.stop = func() { cancel(); <-done }
}

func (h *host) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := h.Drained(ctx, false); err != nil {
		h.Error(err)
	}
	h.stop()
	_ = h.Driver.Close()
}

func (h *host) start(spec *specs.Spec, opts ...func(*contract.StartRequest)) *task {
	h.Helper()
	key := contract.SandboxKey{Network: "none"}
	r := contract.StartRequest{ID: h.Reserve(key), Key: key, Spec: spec, RootFS: h.root.Mount(h)}
	for _, o := range opts {
		o(&r)
	}
	t, err := h.Start(context.Background(), r)
	if err != nil {
		h.Fatal(err)
	}
	return t.(*task)
}

func (h *host) ends(t contract.Task, code int) contract.Exit {
	h.Helper()
	select {
	case <-t.Exited():
	case <-time.After(10 * time.Second):
		h.Fatal("the container does not end")
	}
	if t.Exit().Code != code {
		h.Errorf("exit %+v, want %d", t.Exit(), code)
	}
	return t.Exit()
}

// alive reports whether a process still has a program; one that only waits to
// be reaped (an init also for those who were born into its namespace) has none.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && len(b) > 0
}

func TestMonitorKilled(t *testing.T) {
	h := newHost(t, 0)
	for _, uid := range []uint32{0, 1000} { // changed ids clear the death signal
		spec := runtimetest.Spec("/bin/sh", "-c", "sleep 100 & sleep 100")
		spec.Process.User.UID = uid
		c := h.start(spec)
		x, err := c.Exec(context.Background(), contract.ExecRequest{ID: "x", Process: runtimetest.Process("/bin/sleep", "100")})
		if err != nil {
			t.Fatal(err)
		}
		pids, _ := c.Pids(context.Background())
		if err := unix.Kill(c.mon.PID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if e := h.ends(c, 137); e.Error == "" || e.Signal != 9 {
			t.Errorf("%+v", e)
		}
		<-x.Exited()
		x.Streams().Close()
		for _, p := range pids {
			for i := 0; alive(p) && i < 500; i++ {
				time.Sleep(2 * time.Millisecond)
			}
			if alive(p) {
				t.Errorf("process %d of the container lives on", p)
			}
		}
		if err := c.Delete(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMonitorKilledWhileAway(t *testing.T) {
	h := newHost(t, 0)
	spec := runtimetest.Spec("/bin/sleep", "100")
	spec.Process.User.UID = 1000
	c := h.start(spec)
	pid, mon := c.Pid(), c.mon.PID()
	h.stop()
	_ = h.Driver.Close()
	if err := unix.Kill(mon, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for alive(mon) {
		time.Sleep(time.Millisecond)
	}
	h.open(0)
	r, err := h.Restore(context.Background(), c.id)
	if err != nil {
		t.Fatal(err)
	}
	if e := h.ends(r, 137); e.Error == "" {
		t.Errorf("%+v", e)
	}
	for i := 0; alive(pid) && i < 500; i++ {
		time.Sleep(2 * time.Millisecond)
	}
	if alive(pid) {
		t.Error("the container lives on")
	}
	if err := r.Delete(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestMonitorMemory(t *testing.T) {
	h := newHost(t, 0)
	log := filepath.Join(h.dir, "log")
	c := h.start(runtimetest.Spec("/bin/sh", "-c", "echo hello; sleep 100"), func(r *contract.StartRequest) {
		r.Log = contract.Log{Format: "json-file", Path: log}
	})
	for {
		if b, _ := os.ReadFile(log); len(b) > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", c.mon.PID()))
	if err != nil {
		t.Fatal(err)
	}
	var pss int
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "Pss: %d", &pss); err == nil {
			break
		}
	}
	t.Logf("a monitor takes %d kB", pss)
	if pss == 0 || pss > 300 {
		t.Errorf("a monitor takes %d kB", pss)
	}
	_ = c.Signal(context.Background(), 9, false)
	h.ends(c, 137)
	if err := c.Delete(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestDaemon is not a test but the daemon that TestDaemonKilled kills.
func TestDaemon(t *testing.T) {
	dir := os.Getenv("NATIVE_TEST_DIR")
	if dir == "" {
		t.Skip("SKIP: runs as a child of TestDaemonKilled alone")
	}
	d, err := New(Config{Root: dir, RunRoot: dir, Instance: os.Getenv("NATIVE_TEST_INSTANCE"), PoolSize: 2})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = d.Run(context.Background()) }()
	root := &runtimetest.Root{Dir: os.Getenv("NATIVE_TEST_ROOT")}
	for i := range 1000 {
		key := contract.SandboxKey{Network: "none"}
		id := d.Reserve(key)
		task, err := d.Start(context.Background(), contract.StartRequest{
			ID: id, Key: key, Spec: runtimetest.Spec("/bin/sh", "-c", fmt.Sprintf("sleep 0.%d; echo end; exit %d", i%10, 10+i%10)), RootFS: root.Mount(t),
			Ephemeral: i%2 == 0, Log: contract.Log{Format: "json-file", Path: filepath.Join(dir, id+".log")},
		})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(3)
		}
		fmt.Println("started", id, 10+i%10)
		if i%3 == 0 {
			go func() { <-task.Exited(); _ = task.Delete(context.Background()); fmt.Println("deleted", id) }()
		}
	}
}

// TestDaemonKilled kills a daemon at any instant: whatever it acknowledged is
// found by the next one, and what it did not is cleared away.
func TestDaemonKilled(t *testing.T) {
	root := runtimetest.NewRoot(t)
	instance := fmt.Sprintf("t%d-%d", os.Getpid(), instances.Add(1))
	dir := t.TempDir()
	for round := range 8 {
		cmd := osexec.Command(os.Args[0], "-test.run", "^TestDaemon$")
		cmd.Env = append(os.Environ(), "NATIVE_TEST_DIR="+dir, "NATIVE_TEST_INSTANCE="+instance, "NATIVE_TEST_ROOT="+root.Dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(60+rand.IntN(300))*time.Millisecond, func() { _ = cmd.Process.Kill() })
		want := map[string]int{}
		for s := bufio.NewScanner(out); s.Scan(); {
			var id string
			var code int
			if n, _ := fmt.Sscanf(s.Text(), "started %s %d", &id, &code); n == 2 {
				want[id] = code
			} else if n, _ := fmt.Sscanf(s.Text(), "deleted %s", &id); n == 1 {
				delete(want, id)
			} else if strings.HasPrefix(s.Text(), "error") {
				t.Error(s.Text())
			}
		}
		_ = cmd.Wait()
		d, err := New(Config{Root: dir, RunRoot: dir, Instance: instance})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		ids, err := d.Orphans()
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]bool{}
		for _, id := range ids {
			found[id] = true
			task, err := d.Restore(ctx, id)
			if err != nil {
				t.Errorf("restore: %v", err)
				continue
			}
			select {
			case <-task.Exited():
			case <-time.After(5 * time.Second):
				t.Error("a restored container does not end")
			}
			if code, ok := want[id]; ok {
				if task.Exit().Code != code {
					t.Errorf("round %d: exit %+v, want %d", round, task.Exit(), code)
				}
				if b, _ := os.ReadFile(filepath.Join(dir, id+".log")); strings.Count(string(b), "\n") != 1 {
					t.Errorf("log %q", b)
				}
			}
			if err := task.Delete(ctx); err != nil {
				t.Error(err)
			}
		}
		lost := 0
		for id := range want {
			if !found[id] {
				lost++ // deleted in the instant before the kill
			}
		}
		if lost > 3 {
			t.Errorf("round %d: %d of %d containers are lost", round, lost, len(want))
		}
		rctx, stop := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() { defer close(done); _ = d.Run(rctx) }()
		if err := d.Drained(ctx, false); err != nil {
			t.Error(err)
		}
		stop()
		<-done
		if left := d.cg.Children(d.parent); len(left) != 0 {
			t.Errorf("round %d: cgroups are left: %v", round, left)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if e, _ := os.ReadDir(filepath.Join(dir, "shim")); len(e) != 0 {
			t.Errorf("round %d: %d run directories are left", round, len(e))
		}
		t.Logf("round %d: %d started, %d found", round, len(want), len(found))
		cancel()
	}
}

// TestStartWhileReservationEnds starts under an id at the moment when the sandbox
// that was reserved for it is given up.
func TestStartWhileReservationEnds(t *testing.T) {
	h := newHost(t, 2)
	for i := range 12 {
		if err := h.Drained(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		key := contract.SandboxKey{Network: "none"}
		id := h.Reserve(key)
		if i%2 == 0 {
			h.pool.mu.Lock()
			sb := h.pool.reserved[id]
			h.pool.mu.Unlock()
			if sb == nil {
				t.Fatal("no sandbox was reserved")
			}
			if err := unix.Kill(sb.mon.PID(), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			<-sb.relay.lost
		} else {
			go h.pool.release(id)
		}
		task, err := h.Start(t.Context(), contract.StartRequest{ID: id, Key: key, Spec: runtimetest.Spec("/bin/true"), RootFS: h.root.Mount(h)})
		if err != nil {
			t.Fatal(err)
		}
		<-task.Exited()
		if err := task.Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
