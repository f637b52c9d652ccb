package wire_test

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/daemon"
	"github.com/cloudos-io/cloudos/internal/image/unpack"
	"github.com/cloudos-io/cloudos/internal/rootless"
	"github.com/cloudos-io/cloudos/internal/shim"
	"github.com/cloudos-io/cloudos/internal/wire"
)

// serveAs, set to a directory, makes the test binary an engine of that root.
const serveAs = "SERVIN_TEST_ENGINE"

func TestMain(m *testing.M) {
	if os.Args[0] == unpack.Argv0 {
		os.Exit(unpack.Main(os.Args))
	}
	if dir := os.Getenv(serveAs); dir != "" {
		if err := serve(dir); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func serve(dir string) error {
	ctx := context.Background()
	pool := 1
	c := &config.Config{Root: filepath.Join(dir, "root"), RunRoot: filepath.Join(dir, "run"), Listen: []string{"unix://" + filepath.Join(dir, "sock")}, Pool: &pool}
	c.Defaults(false)
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	s, err := wire.New(ctx, c, rootless.State{}, nil, log)
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	var once sync.Once
	s.Engine.OnShutdown(func(bool) { once.Do(func() { close(stop) }) })
	return s.Run(ctx, func(ctx context.Context) error {
		return daemon.Serve(ctx, daemon.Config{Listen: c.Listen, Handler: s.Handler, Stop: stop, Logger: log})
	})
}

// host is an engine in a process of its own.
type host struct {
	*client.Client
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: needs root for namespaces and mounts")
	}
	if x, err := shim.NewExecutable(); err != nil {
		t.Skip("SKIP: this build carries no servin-shim (make shim): ", err)
	} else {
		_ = x.Close()
	}
	busybox := busyboxTar(t)
	dir, err := os.MkdirTemp("", "servin-wire-") // short: the path of the socket is bounded
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, dir: dir}
	c, err := client.New(client.Config{Host: "unix://" + filepath.Join(dir, "sock")})
	if err != nil {
		t.Fatal(err)
	}
	h.Client = c
	t.Cleanup(h.remove)
	h.start()
	if err := h.ImageImport(h.ctx(), busybox, client.ImportOptions{Repo: "busybox", Tag: "latest"}, nil); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	h.t.Cleanup(cancel)
	return ctx
}

func (h *host) start() {
	h.t.Helper()
	h.cmd = exec.Command("/proc/self/exe")
	h.cmd.Env = append(os.Environ(), serveAs+"="+h.dir)
	h.cmd.Stderr = os.Stderr
	if err := h.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	for range 200 {
		if h.Ping(h.ctx()) == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	h.t.Fatal("the engine does not answer")
}

// kill ends the engine as a crash would.
func (h *host) kill() {
	h.t.Helper()
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

func (h *host) remove() {
	if h.Ping(h.ctx()) != nil {
		h.start()
	}
	if err := h.Shutdown(h.ctx(), true); err != nil {
		h.t.Errorf("shutdown: %v", err)
	}
	_ = h.cmd.Wait()
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	if strings.Contains(string(mounts), h.dir) {
		h.t.Errorf("mounts are left below %s", h.dir)
	}
	if list, _ := os.ReadDir(filepath.Join(h.dir, "run", "shim")); len(list) > 0 {
		files, _ := os.ReadDir(filepath.Join(h.dir, "run", "shim", list[0].Name()))
		h.t.Errorf("%d sandboxes are left: %v %v", len(list), list, files)
	}
	if err := os.RemoveAll(h.dir); err != nil {
		h.t.Errorf("cannot remove the root: %v", err)
	}
}

// busyboxTar is a root file system of a static busybox.
func busyboxTar(t testing.TB) io.Reader {
	t.Helper()
	const path = "/usr/bin/busybox"
	f, err := elf.Open(path)
	if err != nil {
		t.Skip("SKIP: needs ", path, ": ", err)
	}
	defer f.Close()
	if libs, _ := f.ImportedLibraries(); len(libs) > 0 {
		t.Skip("SKIP: ", path, " is not static")
	}
	bin, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h *tar.Header, body []byte) {
		h.Size = int64(len(body))
		if err := errors.Join(w.WriteHeader(h), func() error { _, err := w.Write(body); return err }()); err != nil {
			t.Fatal(err)
		}
	}
	add(&tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(&tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, bin)
	for _, a := range []string{"sh", "cat", "echo", "sleep", "true", "false", "id", "ls", "hostname", "kill", "touch", "test", "seq", "rm"} {
		add(&tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
	}
	add(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(&tar.Header{Name: "etc/passwd", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000:me:/home/me:/bin/sh\n"))
	add(&tar.Header{Name: "etc/group", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:\nus:x:1000:\n"))
	add(&tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func sh(script string) *container.Config {
	return &container.Config{Image: "busybox", Cmd: []string{"sh", "-c", script}}
}

func none() *container.HostConfig { return &container.HostConfig{NetworkMode: "none"} }

// begin creates and starts a container.
func (h *host) begin(name, script string, change func(*container.Config, *container.HostConfig)) string {
	h.t.Helper()
	cfg, hc := sh(script), none()
	if change != nil {
		change(cfg, hc)
	}
	res, err := h.ContainerCreate(h.ctx(), client.ContainerCreateOptions{Name: name, Config: cfg, HostConfig: hc})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := h.ContainerStart(h.ctx(), res.ID, ""); err != nil {
		h.t.Fatal(err)
	}
	return res.ID
}

func (h *host) state(name string) *container.State {
	h.t.Helper()
	in, _, err := h.ContainerInspect(h.ctx(), name, false)
	if err != nil {
		h.t.Fatal(err)
	}
	return in.State
}

func (h *host) logs(name string) string {
	h.t.Helper()
	var out, errs bytes.Buffer
	if err := h.ContainerLogs(h.ctx(), name, client.LogOptions{Stdout: true, Stderr: true, Tail: "all"}, &out, &errs); err != nil {
		h.t.Fatal(err)
	}
	return out.String() + errs.String()
}

// eventually waits for what happens behind the back of requests.
func (h *host) eventually(what string, ok func() bool) {
	h.t.Helper()
	for range 400 {
		if ok() {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	h.t.Fatalf("in vain waited for: %s", what)
}

func TestLifeCycle(t *testing.T) {
	h := newHost(t)
	id := h.begin("one", "echo out; echo err >&2; exit 7", nil)
	res, err := h.ContainerWait(h.ctx(), id, container.WaitConditionNotRunning)
	if err != nil || res.StatusCode != 7 {
		t.Fatalf("wait: %+v, %v", res, err)
	}
	if got := h.logs(id); got != "out\nerr\n" {
		t.Errorf("logs: %q", got)
	}
	if st := h.state("one"); st.Status != container.StateExited || st.ExitCode != 7 || st.Pid != 0 {
		t.Errorf("state: %+v", st)
	}
	if err := h.ContainerStart(h.ctx(), "one", ""); err != nil { // a second run
		t.Fatal(err)
	}
	h.eventually("the second run's end", func() bool { return h.state("one").Status == container.StateExited })
	if got := h.logs(id); got != "out\nout\nerr\nerr\n" {
		t.Errorf("logs of both: %q", got)
	}
	if _, err := h.ContainerCreate(h.ctx(), client.ContainerCreateOptions{Name: "one", Config: sh("true")}); err == nil {
		t.Error("a name was given twice")
	}
	if err := h.ContainerRename(h.ctx(), "one", "two"); err != nil {
		t.Fatal(err)
	}
	if err := h.ContainerRemove(h.ctx(), "two", client.RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.ContainerInspect(h.ctx(), id, false); err == nil {
		t.Error("it is still there")
	}
	for _, d := range []string{"root/containers", "root/layers/rw", "root/logs"} {
		if list, _ := os.ReadDir(filepath.Join(h.dir, d)); len(list) > 0 {
			t.Errorf("%s holds %v", d, list)
		}
	}
}

func TestRunExecAttachStop(t *testing.T) {
	h := newHost(t)
	run, err := h.Run(h.ctx(), &api.RunRequest{Config: sh("cat; exit 3"), HostConfig: &container.HostConfig{NetworkMode: "none", AutoRemove: true}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if run.Started.Error != "" {
		t.Fatal(run.Started.Error)
	}
	_ = run.Close()

	id := h.begin("srv", "trap 'echo bye; exit 5' TERM; while true; do sleep 0.05; done", nil)
	x, err := h.ExecCreate(h.ctx(), id, container.ExecCreateRequest{Cmd: []string{"sh", "-c", "id -un; exit 9"}, User: "me", AttachStdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.ExecStartDetached(h.ctx(), x, container.ExecStartRequest{Detach: true}); err != nil {
		t.Fatal(err)
	}
	h.eventually("the exec's exit code", func() bool {
		in, err := h.ExecInspect(h.ctx(), x)
		return err == nil && in.ExitCode != nil && *in.ExitCode == 9
	})
	if err := h.ContainerPause(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if st := h.state(id); st.Status != container.StatePaused {
		t.Errorf("paused: %+v", st)
	}
	if err := h.ContainerUnpause(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	ten := 10
	if err := h.ContainerStop(h.ctx(), id, client.StopOptions{Timeout: &ten}); err != nil {
		t.Fatal(err)
	}
	if st := h.state(id); st.ExitCode != 5 {
		t.Errorf("stopped: %+v", st)
	}
	if got := h.logs(id); got != "bye\n" {
		t.Errorf("logs: %q", got)
	}
}

func TestExitCodesOfFailedStarts(t *testing.T) {
	h := newHost(t)
	for cmd, code := range map[string]int{"nosuch": 127, "/nosuch": 127, "/etc": 126, "/etc/passwd": 126} {
		run, err := h.Run(h.ctx(), &api.RunRequest{Config: &container.Config{Image: "busybox", Cmd: []string{cmd}}, HostConfig: none()})
		var ce *client.Error
		if !errors.As(err, &ce) || ce.ExitCode != code {
			t.Errorf("%s: %v, want exit code %d", cmd, err, code)
		}
		if err == nil {
			_ = run.Close()
		}
	}
	l, err := h.ContainerList(h.ctx(), client.ContainerListOptions{All: true})
	if err != nil || len(l) != 0 {
		t.Errorf("left: %v, %v", l, err)
	}
}

func TestRestartPolicies(t *testing.T) {
	h := newHost(t)
	policy := func(name container.RestartPolicyMode, n int) func(*container.Config, *container.HostConfig) {
		return func(_ *container.Config, hc *container.HostConfig) {
			hc.RestartPolicy = container.RestartPolicy{Name: name, MaximumRetryCount: n}
		}
	}
	h.begin("fails", "exit 4", policy(container.RestartPolicyOnFailure, 2))
	h.eventually("the last attempt", func() bool {
		in, _, err := h.ContainerInspect(h.ctx(), "fails", false)
		return err == nil && in.RestartCount == 2 && in.State.Status == container.StateExited
	})
	h.begin("again", "sleep 0.1", policy(container.RestartPolicyAlways, 0))
	h.eventually("a restart", func() bool {
		in, _, err := h.ContainerInspect(h.ctx(), "again", false)
		return err == nil && in.RestartCount >= 2
	})
	zero := 0
	if err := h.ContainerStop(h.ctx(), "again", client.StopOptions{Timeout: &zero}); err != nil && !strings.Contains(err.Error(), "already stopped") {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	if st := h.state("again"); st.Running {
		t.Errorf("it was stopped, yet %+v", st)
	}
}

// TestCrash kills the engine while containers run, start, end and write, and
// has another one take everything back.
func TestCrash(t *testing.T) {
	h := newHost(t)
	runs := h.begin("runs", "i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done", nil)
	ends := h.begin("ends", "sleep 0.3; echo last; exit 42", nil)
	h.begin("gone", "sleep 0.3", func(_ *container.Config, hc *container.HostConfig) { hc.AutoRemove = true })
	h.begin("again", "sleep 0.2; exit 1", func(_ *container.Config, hc *container.HostConfig) {
		hc.RestartPolicy = container.RestartPolicy{Name: container.RestartPolicyAlways}
	})
	created, err := h.ContainerCreate(h.ctx(), client.ContainerCreateOptions{Name: "created", Config: sh("true"), HostConfig: none()})
	if err != nil {
		t.Fatal(err)
	}
	pid := h.state(runs).Pid
	h.kill()
	time.Sleep(600 * time.Millisecond)
	down := time.Now()
	h.start()
	if st := h.state(runs); st.Status != container.StateRunning || st.Pid != pid {
		t.Errorf("runs: %+v, was process %d", st, pid)
	}
	st := h.state(ends)
	at, _ := time.Parse(time.RFC3339Nano, st.FinishedAt)
	if st.Status != container.StateExited || st.ExitCode != 42 || !at.Before(down) {
		t.Errorf("ends: %+v", st)
	}
	if got := h.logs(ends); got != "last\n" {
		t.Errorf("its log: %q", got)
	}
	if st := h.state(created.ID); st.Status != container.StateCreated {
		t.Errorf("created: %+v", st)
	}
	h.eventually("the ephemeral one's removal", func() bool { _, _, err := h.ContainerInspect(h.ctx(), "gone", false); return err != nil })
	h.eventually("the restart", func() bool { return h.state("again").Running })
	// its output is complete: no number is missing
	lines := strings.Fields(h.logs(runs))
	for i, l := range lines {
		if want := itoa(i); l != want {
			t.Fatalf("line %d is %q", i, l)
		}
	}
	if len(lines) < 30 {
		t.Errorf("only %d lines", len(lines))
	}
	x, err := h.ExecCreate(h.ctx(), runs, container.ExecCreateRequest{Cmd: []string{"true"}})
	if err == nil {
		err = h.ExecStartDetached(h.ctx(), x, container.ExecStartRequest{Detach: true})
	}
	if err != nil {
		t.Errorf("exec after the crash: %v", err)
	}
	if err := h.ContainerRemove(h.ctx(), runs, client.RemoveOptions{Force: true}); err != nil {
		t.Error(err)
	}
	if unix.Kill(pid, 0) == nil {
		t.Error("its process lives")
	}
}

// TestCrashAnywhere kills engines that are busy creating, starting and removing
// and looks for what would be left.
func TestCrashAnywhere(t *testing.T) {
	h := newHost(t)
	for round := range 4 {
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for i := range 3 {
			wg.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					hc := none()
					hc.AutoRemove = (n+i)%2 == 0
					ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
					res, err := h.ContainerCreate(ctx, client.ContainerCreateOptions{Config: sh("echo x"), HostConfig: hc})
					if err == nil {
						err = h.ContainerStart(ctx, res.ID, "")
					}
					if err == nil && !hc.AutoRemove {
						_ = h.ContainerRemove(ctx, res.ID, client.RemoveOptions{Force: true})
					}
					cancel()
				}
			})
		}
		time.Sleep(time.Duration(150+70*round) * time.Millisecond)
		h.kill()
		close(stop)
		wg.Wait()
		h.start()
	}
	l, err := h.ContainerList(h.ctx(), client.ContainerListOptions{All: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range l {
		if err := h.ContainerRemove(h.ctx(), c.ID, client.RemoveOptions{Force: true}); err != nil && !strings.Contains(err.Error(), "No such container") {
			t.Error(err)
		}
	}
	if err := h.Drained(h.ctx(), false); err != nil {
		t.Error(err)
	}
	for _, d := range []string{"root/containers", "run/containers", "root/layers/rw", "root/logs"} {
		if list, _ := os.ReadDir(filepath.Join(h.dir, d)); len(list) > 0 {
			t.Errorf("%s holds %d things", d, len(list))
		}
	}
}

func TestTwoEnginesOnOneRoot(t *testing.T) {
	h := newHost(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), serveAs+"="+h.dir)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another daemon uses this root") {
		t.Errorf("%v: %s", err, out)
	}
	if err := h.Ping(h.ctx()); err != nil {
		t.Errorf("the first one suffered: %v", err)
	}
}

func itoa(i int) string {
	if i < 10 {
		return string(rune('0' + i))
	}
	return itoa(i/10) + string(rune('0'+i%10))
}
