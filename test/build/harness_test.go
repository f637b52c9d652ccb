// Package build drives builds as users do: docker's command line, with and
// without BuildKit, and servin's, against a daemon on folders of its own.
package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// long reports whether the long campaigns were asked for (make test-long).
var long = os.Getenv("SERVIN_LONG") != ""

// TestMain moves the suite into a network namespace of its own, so that neither
// the host's network nor another suite can meet it.
func TestMain(m *testing.M) {
	const marker = "SERVIN_TEST_NETNS"
	if os.Getenv(marker) != "" || os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := exec.Command("unshare", append([]string{"-n", "--", "sh", "-c", `ip link set lo up; exec "$0" "$@"`}, os.Args...)...)
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		os.Exit(ee.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// engine is one daemon on folders of its own.
type engine struct {
	t        *testing.T
	dir, bin string
	sock     string
	conf     string // configuration beside the version
	cmd      *exec.Cmd
	exited   chan struct{}
}

// start begins a daemon and gives it the image "bb", a busybox.
func start(t *testing.T, conf string) *engine {
	t.Helper()
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if _, err := os.Stat(filepath.Join(bin, "servin-buildd")); err != nil {
		t.Fatalf("no programs in %s: run make build first", bin)
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: the build suite needs root")
	}
	dir, err := os.MkdirTemp("", "sb") // short: the names of sockets are bounded
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{t: t, dir: dir, sock: dir + "/s.sock", bin: bin, conf: conf}
	t.Cleanup(e.close)
	e.boot()
	e.importBusybox()
	return e
}

func (e *engine) boot() {
	e.t.Helper()
	logFile, err := os.OpenFile(e.dir+"/servind.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		e.t.Fatal(err)
	}
	defer logFile.Close()
	conf := e.dir + "/config.yaml"
	if err := os.WriteFile(conf, []byte("version: 1\nshutdownTimeout: 1s\n"+e.conf), 0o644); err != nil {
		e.t.Fatal(err)
	}
	e.cmd = exec.Command(filepath.Join(e.bin, "servind"), "--config", conf, "--root", e.dir+"/root", "--run-root", e.dir+"/run", "--listen", "unix://"+e.sock)
	e.cmd.Stdout, e.cmd.Stderr = logFile, logFile
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.exited = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(e.cmd, e.exited)
	eventually(e.t, "the daemon answers", 20*time.Second, func() bool {
		resp, err := e.http().Get("http://engine/_ping")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// kill ends the daemon as a crash would.
func (e *engine) kill() {
	_ = e.cmd.Process.Kill()
	<-e.exited
	// A program that it was just starting may hold its socket a moment longer.
	_ = os.Remove(e.sock)
}

// close ends everything and looks for traces.
func (e *engine) close() {
	select {
	case <-e.exited:
		e.boot()
	default:
	}
	if r := e.servin("system", "shutdown", "--force"); r.code != 0 {
		e.t.Errorf("shutdown: %s", r)
	}
	select {
	case <-e.exited:
	case <-time.After(30 * time.Second):
		e.t.Error("the daemon did not end after shutdown")
		e.kill()
	}
	if e.t.Failed() {
		b, _ := os.ReadFile(e.dir + "/servind.log")
		e.t.Logf("daemon's log:\n%s", b[max(0, len(b)-6000):])
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(e.dir)) {
		e.t.Errorf("mounts are left below %s", e.dir)
	}
	if g := e.groups(); len(g) > 0 {
		e.t.Errorf("cgroups are left: %v", g)
	}
	if p := e.processes(); len(p) > 0 {
		e.t.Errorf("processes are left: %v", p)
	}
	if err := os.RemoveAll(e.dir); err != nil {
		e.t.Errorf("cannot remove the engine's folders: %v", err)
	}
}

// instance is how names of this engine's things begin.
func (e *engine) instance() string {
	b, _ := exec.Command("sh", "-c", fmt.Sprintf(`printf '%s/root\0%s/run' | sha256sum | cut -c1-8`, e.dir, e.dir)).Output()
	return strings.TrimSpace(string(b))
}

// groups lists the cgroups of build steps.
func (e *engine) groups() []string {
	name := "servin-build-" + e.instance()
	a, _ := filepath.Glob("/sys/fs/cgroup/" + name)
	b, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	return append(a, b...)
}

// processes lists programs that were started with this engine's folders.
func (e *engine) processes() []string {
	var out []string
	for pid, args := range commands() {
		if strings.Contains(args, e.dir) && pid != os.Getpid() {
			out = append(out, strconv.Itoa(pid)+" "+args)
		}
	}
	return out
}

// commands are the command lines of all processes.
func commands() map[int]string {
	out := map[int]string{}
	ents, _ := os.ReadDir("/proc")
	for _, x := range ents {
		if pid, err := strconv.Atoi(x.Name()); err == nil {
			if b, _ := os.ReadFile("/proc/" + x.Name() + "/cmdline"); len(b) > 0 {
				out[pid] = strings.ReplaceAll(string(b), "\x00", " ")
			}
		}
	}
	return out
}

// builder is the process id of the running servin-buildd, 0 if there is none.
func (e *engine) builder() int {
	for pid, args := range commands() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if strings.HasPrefix(args, "servin-buildd serve") && len(f) > 1 && f[1] == strconv.Itoa(e.cmd.Process.Pid) {
			return pid
		}
	}
	return 0
}

// step is the process id of a build step whose command line begins so.
func step(prefix string) int {
	for pid, args := range commands() {
		if strings.HasPrefix(args, prefix) {
			return pid
		}
	}
	return 0
}

type result struct {
	out, err string
	code     int
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.code, r.out, r.err)
}

func (r result) all() string { return r.out + r.err }

// exec runs a program against the engine.
func (e *engine) exec(stdin io.Reader, env []string, argv ...string) result {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errb
	cmd.Env = append(append(os.Environ(), "DOCKER_HOST=unix://"+e.sock, "SERVIN_HOST=unix://"+e.sock, "SERVIN_CONFIG="+e.dir+"/cli"), env...)
	err := cmd.Run()
	r := result{out: out.String(), err: errb.String()}
	var ee *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &ee):
		r.code = ee.ExitCode()
	default:
		e.t.Fatalf("%s: %v", strings.Join(argv, " "), err)
	}
	return r
}

func (e *engine) servin(args ...string) result {
	e.t.Helper()
	return e.exec(nil, nil, append([]string{filepath.Join(e.bin, "servin")}, args...)...)
}

// must runs servin and returns what it printed.
func (e *engine) must(args ...string) string {
	e.t.Helper()
	r := e.servin(args...)
	if r.code != 0 {
		e.t.Fatalf("servin %s: %s", strings.Join(args, " "), r)
	}
	return strings.TrimSpace(r.out)
}

// classic runs docker build without BuildKit.
func (e *engine) classic(args ...string) result {
	e.t.Helper()
	return e.exec(nil, []string{"DOCKER_BUILDKIT=0", "DOCKER_CONFIG=" + e.dir + "/docker"}, append([]string{"docker", "build"}, args...)...)
}

// context makes a directory of files, by path; a path that ends in a slash is a
// directory.
func (e *engine) context(files map[string]string) string {
	e.t.Helper()
	dir, err := os.MkdirTemp(e.dir, "ctx")
	if err != nil {
		e.t.Fatal(err)
	}
	for name, body := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			e.t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(body), 0o644); err != nil {
			e.t.Fatal(err)
		}
	}
	return dir
}

// importBusybox makes the image "bb" of the host's static busybox.
func (e *engine) importBusybox() {
	e.t.Helper()
	bin, err := os.ReadFile("/usr/bin/busybox")
	if err != nil {
		e.t.Fatal(err)
	}
	list, err := exec.Command("/usr/bin/busybox", "--list").Output()
	if err != nil {
		e.t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, body []byte) {
		h.Size = int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			e.t.Fatal(err)
		}
		_, _ = w.Write(body)
	}
	for _, d := range []string{"bin/", "etc/", "proc/", "sys/", "dev/", "root/"} {
		add(tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	add(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	add(tar.Header{Name: "bin/busybox", Mode: 0o755}, bin)
	for _, a := range strings.Fields(string(list)) {
		if a != "busybox" {
			add(tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
		}
	}
	add(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n"))
	if err := w.Close(); err != nil {
		e.t.Fatal(err)
	}
	if r := e.exec(&b, nil, filepath.Join(e.bin, "servin"), "import", "-", "bb"); r.code != 0 {
		e.t.Fatal(r)
	}
}

// startRegistry serves a registry on loopback.
func startRegistry(t *testing.T) string {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// http asks the engine.
func (e *engine) http() *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", e.sock)
		}}}
}

// eventually polls until ok holds.
func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, limit)
		}
	}
}

// contains checks that a text has all of some parts.
func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q is missing in:\n%s", p, text)
		}
	}
}
