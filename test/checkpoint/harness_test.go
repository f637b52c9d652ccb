// Package checkpoint drives checkpoints, restores and moves between two engines:
// without processes on this host's kernel, and with CRIU on one that it knows, in a
// virtual machine.
package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain moves the suite into a network namespace of its own.
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
	config   string
	env      []string
	cmd      *exec.Cmd
	exited   chan struct{}
}

// start begins a daemon with a busybox image "bb".
func start(t *testing.T, config string, env ...string) *engine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root")
	}
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if _, err := os.Stat(filepath.Join(bin, "servind")); err != nil {
		t.Fatalf("no programs in %s: run make build first", bin)
	}
	dir, err := os.MkdirTemp("", "cp") // a short path: names of sockets are limited
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{t: t, dir: dir, bin: bin, config: config, env: env}
	t.Cleanup(e.close)
	e.boot()
	return e
}

func (e *engine) sock() string { return "unix://" + e.dir + "/s" }

func (e *engine) boot() {
	e.t.Helper()
	conf := e.dir + "/config.yaml"
	if err := os.WriteFile(conf, []byte("version: 1\nshutdownTimeout: 1s\n"+e.config), 0o644); err != nil {
		e.t.Fatal(err)
	}
	log, err := os.OpenFile(e.dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		e.t.Fatal(err)
	}
	defer log.Close()
	e.cmd = exec.Command(e.bin+"/servind", "--config", conf, "--root", e.dir+"/root", "--run-root", e.dir+"/run", "--listen", e.sock())
	e.cmd.Env = append(os.Environ(), e.env...)
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.exited = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(e.cmd, e.exited)
	e.eventually("the engine answers", func() bool { _, code := e.try("version"); return code == 0 })
}

// kill ends the daemon as a crash would.
func (e *engine) kill() {
	_ = e.cmd.Process.Kill()
	<-e.exited
}

func (e *engine) log() string {
	b, _ := os.ReadFile(e.dir + "/log")
	return string(b[max(0, len(b)-8000):])
}

func (e *engine) close() {
	select {
	case <-e.exited:
		e.boot()
	default:
	}
	if out, code := e.try("system", "shutdown", "--force"); code != 0 {
		e.t.Errorf("shutdown: %s", out)
	}
	select {
	case <-e.exited:
	case <-time.After(30 * time.Second):
		e.t.Error("the daemon did not end after shutdown")
		e.kill()
	}
	if e.t.Failed() {
		e.t.Logf("the engine's log:\n%s", e.log())
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	if strings.Contains(string(mounts), e.dir) {
		e.t.Errorf("mounts are left: %s", mounts)
	}
	if err := os.RemoveAll(e.dir); err != nil {
		e.t.Error(err)
	}
}

// try runs the command line; both outputs come together.
func (e *engine) try(args ...string) (string, int) { return e.pipe(nil, args...) }

func (e *engine) pipe(in io.Reader, args ...string) (string, int) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, e.bin+"/servin", append([]string{"--host", e.sock()}, args...)...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &out
	err := cmd.Run()
	var ee *exec.ExitError
	switch {
	case err == nil:
		return strings.TrimSpace(out.String()), 0
	case errors.As(err, &ee):
		return strings.TrimSpace(out.String()), ee.ExitCode()
	}
	return err.Error(), -1
}

func (e *engine) ok(args ...string) string {
	e.t.Helper()
	out, code := e.try(args...)
	if code != 0 {
		e.t.Fatalf("servin %s: exit %d: %s", strings.Join(args, " "), code, out)
	}
	return out
}

// fails runs what must fail with a text.
func (e *engine) fails(want string, args ...string) {
	e.t.Helper()
	out, code := e.try(args...)
	if code == 0 || !strings.Contains(out, want) {
		e.t.Errorf("servin %s: exit %d: %q, want %q", strings.Join(args, " "), code, out, want)
	}
}

func (e *engine) eventually(what string, ok func() bool) {
	e.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			e.t.Fatalf("%s: not within a minute\n%s", what, e.log())
		}
	}
}

// status is a container's, "" where there is none.
func (e *engine) status(name string) string {
	out, code := e.try("inspect", "--format", "{{.State.Status}}", name)
	if code != 0 {
		return ""
	}
	return out
}

// count reads the number that a counting container keeps in a file.
func (e *engine) count(name string) int {
	out, code := e.try("exec", name, "cat", "/n")
	if code != 0 {
		return -1
	}
	n, _ := strconv.Atoi(strings.TrimSpace(out))
	return n
}

// image makes the image "bb" of the host's static busybox.
func (e *engine) image() {
	e.t.Helper()
	const script = `set -e
d=$(mktemp -d); cd "$d"
mkdir -p r/bin r/etc r/tmp r/proc r/sys r/dev r/root; chmod 1777 r/tmp
cp -L /usr/bin/busybox r/bin/busybox
for a in $(r/bin/busybox --list); do [ "$a" = busybox ] || ln -s busybox r/bin/$a; done
echo 'root:x:0:0:root:/root:/bin/sh' > r/etc/passwd
tar -C r -cf - .
cd /; rm -rf "$d"`
	cmd := exec.Command("sh", "-c", script)
	r, err := cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	out, code := e.pipe(r, "import", "-", "bb")
	if err := cmd.Wait(); err != nil || code != 0 {
		e.t.Fatalf("cannot import busybox: %v: %s", err, out)
	}
}

// counter counts in a file and in memory.
const counter = `i=0; while :; do i=$((i+1)); echo $i > /n.new; mv /n.new /n; sleep 0.05; done`
