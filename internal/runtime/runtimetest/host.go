package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func testHooks(t *testing.T, dr Driver) {
	if dr.Lacks["hooks"] {
		t.Skip("SKIP: the driver leaves hooks to its runtime")
	}
	e := dr.env(t)
	out := filepath.Join(e.dir, "hooks")
	hook := func(name string) specs.Hook {
		return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "read s; echo " + name + " $s >> " + out}, Env: []string{"PATH=/bin:/usr/bin"}}
	}
	inside := func(name string) specs.Hook {
		return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "echo " + name + " >> /data/hooks"}, Env: []string{"PATH=/bin"}}
	}
	spec := sh("echo process >> /data/hooks")
	spec.Hooks = &specs.Hooks{
		CreateRuntime: []specs.Hook{hook("createRuntime")}, StartContainer: []specs.Hook{inside("startContainer")},
		Poststart: []specs.Hook{hook("poststart")}, Poststop: []specs.Hook{hook("poststop")},
		CreateContainer: []specs.Hook{hook("createContainer")},
	}
	task := e.start(spec)
	e.wait(task)
	if err := task.Delete(e.ctx()); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(out)
	var names []string
	for line := range strings.Lines(string(b)) {
		name, state, _ := strings.Cut(line, " ")
		names = append(names, name)
		if !strings.Contains(state, task.ID()) {
			t.Errorf("state %q", state)
		}
	}
	if got := strings.Join(names, " "); got != "createRuntime createContainer poststart poststop" {
		t.Errorf("host hooks: %s", got)
	}
	b, _ = os.ReadFile(filepath.Join(e.root.Dir, "data/hooks"))
	if string(b) != "startContainer\nprocess\n" {
		t.Errorf("hooks inside: %q", b)
	}
	spec = Spec("/bin/true")
	spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false"}}}
	if _, err := e.d.Start(e.ctx(), e.request(spec)); err == nil {
		t.Error("a failing hook did not stop the start")
	}
}

func testRestore(t *testing.T, dr Driver) {
	e := dr.env(t)
	log, log2 := filepath.Join(e.dir, "log"), filepath.Join(e.dir, "log2")
	r1, r2 := e.request(sh("while :; do echo x; sleep 0.01; done"), logged(log)), e.request(sh("sleep 0.2; echo end; exit 8"), logged(log2))
	run, err := e.d.Start(e.ctx(), r1)
	if err != nil {
		t.Fatal(err)
	}
	ends, err := e.d.Start(e.ctx(), r2)
	if err != nil {
		t.Fatal(err)
	}
	started, pid := run.StartedAt(), run.Pid()
	e.stop()
	if err := e.d.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(400 * time.Millisecond)
	before := len(e.records(log))
	e.open()
	ids, err := e.d.Orphans()
	if err != nil || len(ids) != 2 {
		t.Fatalf("%v %v", ids, err)
	}
	if run, err = e.d.Restore(e.ctx(), run.ID()); err != nil {
		t.Fatal(err)
	}
	if ends, err = e.d.Restore(e.ctx(), ends.ID()); err != nil {
		t.Fatal(err)
	}
	if x := e.wait(ends); x.Code != 8 || time.Since(x.At) > time.Minute {
		t.Errorf("%+v", x)
	}
	if r := e.records(log2); len(r) != 1 || r[0].Log != "end\n" {
		t.Errorf("%v", r)
	}
	if run.Pid() != pid || run.StartedAt().Sub(started).Abs() > time.Millisecond {
		t.Errorf("pid %d, started %v; was %d, %v", run.Pid(), run.StartedAt(), pid, started)
	}
	e.until("more output", func() bool { return len(e.records(log)) > before })
	x := e.exec(run, false, Process("/bin/sh", "-c", "echo hi; grep Seccomp: /proc/self/status"))
	if out, _ := e.drain(x.Streams()); out != "hi\nSeccomp:\t2\n" {
		t.Errorf("%q", out)
	}
	e.wait(x)
	s, err := run.Attach(e.ctx(), contract.AttachOptions{Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := s.Stdout.Read(make([]byte, 2)); n == 0 || err != nil {
		t.Error(err)
	}
	s.Close()
	e.remove(run)
	e.remove(ends)
	if _, err := e.d.Restore(e.ctx(), "nonesuch"); err == nil {
		t.Error("something unknown was restored")
	}
}

func testNetwork(t *testing.T, dr Driver) {
	e := dr.env(t)
	var called contract.Sandbox
	net := func(err error) option {
		return func(r *contract.StartRequest) {
			r.Network = func(_ context.Context, sb contract.Sandbox) error {
				called = sb
				if sb.NetNS != nil {
					var st unix.Stat_t
					if e := unix.Fstat(int(sb.NetNS.Fd()), &st); e != nil {
						return e
					}
				}
				time.Sleep(20 * time.Millisecond)
				return err
			}
		}
	}
	begin := time.Now()
	out, _, _ := e.output(sh("readlink /proc/self/ns/net; cat /proc/net/dev"), net(nil))
	if called.NetNS == nil || time.Since(begin) < 20*time.Millisecond || !strings.Contains(out, "lo:") {
		t.Errorf("%+v %q", called, out)
	}
	broken := errors.New("no address")
	r := e.request(sh("touch /data/ran"), net(broken))
	if _, err := e.d.Start(e.ctx(), r); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(e.root.Dir, "data/ran")); err == nil {
		t.Error("the process ran without its network")
	}
}

func testMounts(t *testing.T, dr Driver) {
	e := dr.env(t)
	src := filepath.Join(e.dir, "src")
	if err := os.MkdirAll(filepath.Join(src, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "file"), []byte("content\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	spec := sh("cat /data/file; echo w > /data/written; echo x > /ro/file || echo readonly; cat /etc/one; grep -c ' /tmp tmpfs' /proc/mounts")
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/data", Source: src, Type: "bind", Options: []string{"rbind", "rprivate"}},
		specs.Mount{Destination: "/ro", Source: src, Type: "bind", Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/etc/one", Source: filepath.Join(src, "file"), Type: "bind", Options: []string{"bind", "ro"}},
		specs.Mount{Destination: "/tmp", Source: "tmpfs", Type: "tmpfs", Options: []string{"nosuid", "size=1m"}},
	)
	out, _, x := e.output(spec)
	if out != "content\nreadonly\ncontent\n1\n" || x.Code != 0 {
		t.Errorf("%q %+v", out, x)
	}
	if b, _ := os.ReadFile(filepath.Join(src, "written")); string(b) != "w\n" {
		t.Errorf("%q", b)
	}
	spec = sh("echo x > /etc/new || echo readonly")
	spec.Root.Readonly = true
	if out, _, _ := e.output(spec); out != "readonly\n" {
		t.Errorf("%q", out)
	}
}

func setNS(spec *specs.Spec, typ specs.LinuxNamespaceType, path string, keep bool) {
	var l []specs.LinuxNamespace
	for _, n := range spec.Linux.Namespaces {
		if n.Type != typ {
			l = append(l, n)
		}
	}
	if keep {
		l = append(l, specs.LinuxNamespace{Type: typ, Path: path})
	}
	spec.Linux.Namespaces = l
}

// plain makes a request not fit a parked sandbox.
func plain(r *contract.StartRequest) { r.Key = contract.SandboxKey{}; r.ID = id() }

func testNamespaces(t *testing.T, dr Driver) {
	e := dr.env(t)
	a := e.start(Spec("/bin/sleep", "100"))
	for _, typ := range []specs.LinuxNamespaceType{specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.PIDNamespace} {
		file := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.PIDNamespace: "pid"}[typ]
		path := fmt.Sprintf("/proc/%d/ns/%s", a.Pid(), file)
		want, err := os.Readlink(path)
		if err != nil {
			t.Fatal(err)
		}
		spec := sh("readlink /proc/self/ns/" + file + "; sleep 0.1 & exit 3")
		spec.Hostname = ""
		setNS(spec, typ, path, true)
		out, _, x := e.output(spec, plain)
		if strings.TrimSpace(out) != want || x.Code != 3 {
			t.Errorf("%s: %q %+v, want %s", typ, out, x, want)
		}
		// The host's.
		want, _ = os.Readlink("/proc/self/ns/" + file)
		setNS(spec, typ, "", false)
		if out, _, x := e.output(spec, plain); strings.TrimSpace(out) != want || x.Code != 3 {
			t.Errorf("host's %s: %q %+v, want %s", typ, out, x, want)
		}
	}
	if x := e.exec(a, false, Process("/bin/true")); e.wait(x).Code != 0 {
		t.Error("exec")
	}
}

func testUserNamespace(t *testing.T, dr Driver) {
	e := dr.env(t)
	spec := sh("id -u; cat /proc/self/uid_map; echo x > /dev/stdout; sleep 100")
	setNS(spec, specs.UserNamespace, "", true)
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	spec.Linux.GIDMappings = spec.Linux.UIDMappings
	log := filepath.Join(e.dir, "log")
	task := e.start(spec, plain, logged(log), func(r *contract.StartRequest) { r.Key.UserNS = "test" })
	e.until("output", func() bool { b, _ := os.ReadFile(log); return strings.Count(string(b), "\n") >= 3 })
	r := e.records(log)
	if r[0].Log != "0\n" || strings.Join(strings.Fields(r[1].Log), " ") != "0 200000 65536" || r[2].Log != "x\n" {
		t.Errorf("%v", r)
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", task.Pid()), &st); err != nil || st.Uid != 200000 {
		t.Errorf("uid %d, %v", st.Uid, err)
	}
	x := e.exec(task, false, Process("/bin/sh", "-c", "id -u; readlink /proc/self/ns/user; readlink /proc/1/ns/user"))
	out, _ := e.drain(x.Streams())
	f := strings.Fields(out)
	if c := e.wait(x); c.Code != 0 || len(f) != 3 || f[0] != "0" || f[1] != f[2] {
		t.Errorf("%q %+v", out, c)
	}
	if dr.Lacks["userns-join"] {
		return
	}
	// Join it.
	joined := sh("readlink /proc/self/ns/user; readlink /proc/self/ns/net")
	setNS(joined, specs.UserNamespace, fmt.Sprintf("/proc/%d/ns/user", task.Pid()), true)
	setNS(joined, specs.NetworkNamespace, fmt.Sprintf("/proc/%d/ns/net", task.Pid()), true)
	want, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", task.Pid()))
	if out, _, x := e.output(joined, plain, func(r *contract.StartRequest) { r.Key.UserNS = "joined" }); !strings.HasPrefix(out, want) || x.Code != 0 {
		t.Errorf("%q %+v", out, x)
	}
}

// testLarge: more mounts and a longer environment than fit one message.
func testLarge(t *testing.T, dr Driver) {
	e := dr.env(t)
	src := filepath.Join(e.dir, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, network := range []bool{false, true} {
		spec := sh("ls /data | wc -l; echo ${#BIG}; grep -c /data/ /proc/mounts")
		for i := range 300 {
			spec.Mounts = append(spec.Mounts, specs.Mount{Destination: fmt.Sprintf("/data/%d", i), Source: src, Type: "bind", Options: []string{"rbind", "ro"}})
		}
		spec.Process.Env = append(spec.Process.Env, "BIG="+strings.Repeat("x", 100000), "MORE="+strings.Repeat("y", 20000))
		out, _, x := e.output(spec, func(r *contract.StartRequest) {
			if network {
				r.Network = func(context.Context, contract.Sandbox) error { time.Sleep(10 * time.Millisecond); return nil }
			}
		})
		if out != "300\n100000\n300\n" || x.Code != 0 {
			t.Errorf("%q %+v", out, x)
		}
	}
}

func testCancel(t *testing.T, dr Driver) {
	e := dr.env(t)
	for _, after := range []time.Duration{0, 200 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2 * time.Millisecond, 3 * time.Millisecond} {
		for i := range 6 {
			ctx, cancel := context.WithTimeout(context.Background(), after)
			r := e.request(Spec("/bin/true"), func(r *contract.StartRequest) {
				if i%2 == 1 {
					plain(r)
				}
			})
			task, err := e.d.Start(ctx, r)
			cancel()
			if err == nil {
				e.wait(task)
				e.remove(task)
			} else if _, err := e.d.Restore(e.ctx(), r.ID); err == nil {
				t.Errorf("something is left after %v", after)
			}
		}
	}
}

// Leftovers counts what containers could leave behind in this process and, as
// mounts, in the directories of the test; others mount elsewhere meanwhile.
func Leftovers(t testing.TB, dirs ...string) map[string]int {
	t.Helper()
	count := map[string]int{}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		for _, d := range dirs {
			if strings.Contains(line, d) {
				count["mounts"]++
			}
		}
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	count["descriptors"] = len(fds)
	count["goroutines"] = runtime.NumGoroutine()
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", os.Getpid(), os.Getpid()))
	count["children"] = len(strings.Fields(string(children)))
	return count
}

func testCycles(t *testing.T, dr Driver) {
	e := dr.env(t)
	n := 200
	if dr.Lacks["speed"] {
		n = 20
	}
	cycle := func(i int) error {
		r := e.request(Spec("/bin/true"), func(r *contract.StartRequest) {
			if i%4 == 3 {
				plain(r)
			}
		})
		task, err := e.d.Start(e.ctx(), r)
		if err != nil {
			return err
		}
		<-task.Exited()
		if c := task.Exit().Code; c != 0 {
			return fmt.Errorf("exit %d", c)
		}
		return task.Delete(e.ctx())
	}
	for i := range 10 {
		if err := cycle(i); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.d.Drained(e.ctx(), true); err != nil {
		t.Fatal(err)
	}
	before := Leftovers(t, e.dir, e.root.Dir)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range n / 4 {
				if err := cycle(w + i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := e.d.Drained(e.ctx(), true); err != nil {
		t.Fatal(err)
	}
	var after map[string]int
	for range 100 {
		after = Leftovers(t, e.dir, e.root.Dir)
		if after["descriptors"] <= before["descriptors"] && after["goroutines"] <= before["goroutines"]+2 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for k, v := range after {
		if v > before[k] && !(k == "goroutines" && v <= before[k]+2) {
			t.Errorf("%s: %d, then %d", k, before[k], v)
		}
	}
	entries, _ := os.ReadDir(filepath.Join(e.dir, "run/shim"))
	if ids, err := e.d.Orphans(); err != nil || len(ids) != 0 {
		t.Errorf("orphans %v %v (%d entries)", ids, err, len(entries))
	}
}
