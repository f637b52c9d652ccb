package runtimetest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Driver is what a test of a driver supplies.
type Driver struct {
	// New makes a driver on the state directory; it is called again on the same
	// directory to play a restarted daemon.
	New func(t testing.TB, runRoot string) contract.Driver
	// Lacks names what the driver cannot do: "errno" (failures carry the errno),
	// "hooks" (as the test looks at them), "release" (hold before exec), "speed"
	// (hundreds of cycles), "userns-join", "limits".
	Lacks map[string]bool
}

// env is one test's driver and directories.
type env struct {
	testing.TB
	dr   Driver
	d    contract.Driver
	dir  string
	root *Root
	stop func()
}

func (dr Driver) env(t testing.TB) *env {
	t.Helper()
	e := &env{TB: t, dr: dr, root: NewRoot(t), dir: t.TempDir()}
	// The root of a user namespace must be able to get to a mounted root.
	for _, d := range []string{e.dir, filepath.Dir(e.dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	e.open()
	t.Cleanup(e.close)
	return e
}

func (e *env) open() {
	e.Helper()
	e.d = e.dr.New(e.TB, filepath.Join(e.dir, "run"))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = e.d.Run(ctx)
	}()
	e.stop = func() { cancel(); <-done }
}

func (e *env) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := e.d.Drained(ctx, false); err != nil {
		e.Errorf("teardown does not end: %v", err)
	}
	e.stop()
	if err := e.d.Close(); err != nil {
		e.Error(err)
	}
}

// restart plays a daemon that went away and came back.
func (e *env) restart() {
	e.stop()
	if err := e.d.Close(); err != nil {
		e.Fatal(err)
	}
	e.open()
}

func (e *env) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	e.Cleanup(cancel)
	return ctx
}

func id() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

type option func(*contract.StartRequest)

func (e *env) request(spec *specs.Spec, opts ...option) contract.StartRequest {
	key := contract.SandboxKey{Network: "none"}
	r := contract.StartRequest{ID: e.d.Reserve(key), Key: key, Spec: spec, Log: contract.Log{Format: "none"}}
	r.RootFS = e.root.Mount(e)
	reserved := r.ID
	for _, o := range opts {
		o(&r)
	}
	if r.ID != reserved {
		e.d.Release(reserved)
	}
	return r
}

// start starts a container and sees to its removal.
func (e *env) start(spec *specs.Spec, opts ...option) contract.Task {
	e.Helper()
	t, err := e.d.Start(e.ctx(), e.request(spec, opts...))
	if err != nil {
		e.Fatalf("start: %v", err)
	}
	e.Cleanup(func() { e.remove(t) })
	return t
}

func (e *env) remove(t contract.Task) {
	_ = t.Signal(context.Background(), 9, false)
	select {
	case <-t.Exited():
	case <-time.After(10 * time.Second):
		e.Errorf("container %s does not end", t.ID())
		return
	}
	if err := t.Delete(e.ctx()); err != nil {
		e.Errorf("delete: %v", err)
	}
}

func (e *env) wait(t interface {
	Exited() <-chan struct{}
	Exit() contract.Exit
}) contract.Exit {
	e.Helper()
	select {
	case <-t.Exited():
		return t.Exit()
	case <-time.After(20 * time.Second):
		e.Fatal("the process does not end")
		return contract.Exit{}
	}
}

// output runs a container to its end with an attached client.
func (e *env) output(spec *specs.Spec, opts ...option) (stdout, stderr string, x contract.Exit) {
	e.Helper()
	t := e.start(spec, append([]option{attached(false)}, opts...)...)
	s, err := t.Attach(e.ctx(), contract.AttachOptions{Stdout: true, Stderr: true})
	if err != nil {
		e.Fatal(err)
	}
	defer s.Close()
	stdout, stderr = e.drain(s)
	return stdout, stderr, e.wait(t)
}

func (e *env) drain(s contract.Streams) (stdout, stderr string) {
	ch := make(chan string, 1)
	go func() {
		var b []byte
		if s.Stderr != nil {
			b, _ = io.ReadAll(s.Stderr)
		}
		ch <- string(b)
	}()
	var b []byte
	if s.Stdout != nil {
		b, _ = io.ReadAll(s.Stdout)
	}
	return string(b), <-ch
}

func attached(stdin bool) option {
	return func(r *contract.StartRequest) {
		r.Stdio.Stdin = stdin
		r.Stdio.Attach = &contract.AttachOptions{Stdin: stdin, Stdout: true, Stderr: true}
	}
}

func logged(path string) option {
	return func(r *contract.StartRequest) { r.Log = contract.Log{Format: "json-file", Path: path} }
}

// record is one line of a json-file log.
type record struct {
	Log    string    `json:"log"`
	Stream string    `json:"stream"`
	Time   time.Time `json:"time"`
}

func (e *env) records(path string) []record {
	e.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		e.Fatal(err)
	}
	var all []record
	for line := range strings.Lines(string(b)) {
		var r record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			e.Fatalf("log line %.80q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

func (e *env) until(what string, ok func() bool) {
	e.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	e.Fatalf("%s: does not happen", what)
}

func sh(script string) *specs.Spec { return Spec("/bin/sh", "-c", script) }

// Run runs the whole suite.
func Run(t *testing.T, dr Driver) {
	for _, c := range []struct {
		name string
		f    func(*testing.T, Driver)
	}{
		{"Exit", testExit}, {"StartErrors", testStartErrors}, {"Attach", testAttach}, {"BigOutput", testBigOutput},
		{"SlowClient", testSlowClient}, {"Log", testLog}, {"LogRotation", testRotation}, {"LogFull", testLogFull},
		{"Signal", testSignal}, {"Exec", testExec}, {"ExecTerminal", testExecTerminal}, {"Terminal", testTerminal},
		{"Pause", testPause}, {"Limits", testLimits}, {"OOM", testOOM}, {"Isolation", testIsolation},
		{"StopAfterCreate", testHeld}, {"Hooks", testHooks}, {"Restore", testRestore}, {"Network", testNetwork},
		{"Mounts", testMounts}, {"Namespaces", testNamespaces}, {"UserNamespace", testUserNamespace}, {"Large", testLarge}, {"Cancel", testCancel}, {"Cycles", testCycles},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, dr) })
	}
}

func testExit(t *testing.T, dr Driver) {
	e := dr.env(t)
	for _, c := range []struct {
		spec         *specs.Spec
		code, signal int
	}{
		{Spec("/bin/true"), 0, 0}, {Spec("/bin/false"), 1, 0}, {Spec("true"), 0, 0}, {sh("exit 42"), 42, 0},
		// The first process of a pid namespace is immune to its own signals, so a child dies.
		{sh("sh -c 'kill -9 $$'; exit $?"), 137, 0}, {sh("kill -15 $$; exit 3"), 3, 0},
	} {
		task := e.start(c.spec)
		if task.Pid() <= 0 || task.StartedAt().IsZero() || time.Since(task.StartedAt()) > time.Minute {
			t.Errorf("pid %d, started at %v", task.Pid(), task.StartedAt())
		}
		x := e.wait(task)
		if x.Code != c.code || x.Signal != c.signal || x.At.Before(task.StartedAt()) {
			t.Errorf("%v: %+v, want %d", c.spec.Process.Args, x, c.code)
		}
	}
	task := e.start(Spec("/bin/sleep", "100"))
	if err := task.Delete(e.ctx()); err == nil {
		t.Error("a running container was deleted")
	}
	if err := task.Signal(e.ctx(), 9, false); err != nil {
		t.Fatal(err)
	}
	if x := e.wait(task); x.Code != 137 || x.Signal != 9 {
		t.Errorf("killed: %+v", x)
	}
	if err := task.Signal(e.ctx(), 15, false); err == nil {
		t.Error("an ended container took a signal")
	}
	for range 2 {
		if err := task.Delete(e.ctx()); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
}

func testStartErrors(t *testing.T, dr Driver) {
	e := dr.env(t)
	bad := Spec("/bin/true")
	bad.Mounts = append(bad.Mounts, specs.Mount{Destination: "/data", Source: "/nonexistent-source", Options: []string{"bind"}})
	for _, c := range []struct {
		name string
		spec *specs.Spec
		is   error
	}{
		{"no program", Spec("/bin/none"), os.ErrNotExist}, {"no program in PATH", Spec("none"), os.ErrNotExist},
		{"not executable", Spec("/etc/passwd"), os.ErrPermission}, {"mount source", bad, os.ErrNotExist}, {"empty spec", &specs.Spec{}, nil},
	} {
		r := e.request(Spec("/bin/true"))
		r.Spec = c.spec
		task, err := e.d.Start(e.ctx(), r)
		if err == nil {
			t.Errorf("%s: started", c.name)
			e.remove(task)
			continue
		}
		if c.is != nil && !dr.Lacks["errno"] {
			var se *contract.StartError
			if !errors.As(err, &se) || !errors.Is(err, c.is) {
				t.Errorf("%s: %v (%T)", c.name, err, err)
			}
		}
		if _, err := e.d.Restore(e.ctx(), r.ID); err == nil {
			t.Errorf("%s: something is left", c.name)
		}
	}
	if ids, err := e.d.Orphans(); err != nil || len(ids) != 0 {
		t.Errorf("orphans %v, %v", ids, err)
	}
	task := e.start(Spec("/bin/sleep", "100"))
	r := e.request(Spec("/bin/true"))
	r.ID = task.ID()
	if _, err := e.d.Start(e.ctx(), r); err == nil {
		t.Error("an id was started twice")
	}
}
