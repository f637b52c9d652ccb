// Package native drives the shipped programs on this host: the daemon on
// folders of its own, the command line against its socket, real containers.
package native

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// long reports whether the long campaigns were asked for (make test-long).
var long = os.Getenv("SERVIN_LONG") != ""

// pick chooses a size: small for make test, large for make test-long.
func pick(small, large int) int {
	if long {
		return large
	}
	return small
}

// engine is one daemon on folders of its own.
type engine struct {
	t      *testing.T
	dir    string
	sock   string
	cmd    *exec.Cmd
	args   []string
	wrap   []string // command that executes the daemon, if any
	bin    string
	id     string // instance, see traces
	config string // further lines of the configuration
	exited chan struct{}
}

// TestMain moves the whole suite into a network namespace of its own, so that
// neither the host's network nor another suite can meet it.
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

func programs(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if _, err := os.Stat(filepath.Join(bin, "servind")); err != nil {
		t.Fatalf("no programs in %s: run make build first", bin)
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: the native suite needs root")
	}
	return bin
}

// start begins a daemon in a fresh folder and gives it a busybox image "bb".
func start(t *testing.T, args ...string) *engine {
	t.Helper()
	// A short path: unix socket names are limited to 107 bytes.
	dir, err := os.MkdirTemp("", "sv")
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{t: t, dir: dir, sock: dir + "/s.sock", args: args, bin: programs(t)}
	t.Cleanup(e.close)
	e.boot()
	e.importBusybox()
	return e
}

// boot starts the daemon's process and waits until it answers.
func (e *engine) boot() {
	e.t.Helper()
	log, err := os.OpenFile(e.dir+"/servind.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		e.t.Fatal(err)
	}
	defer log.Close()
	// Containers that ignore SIGTERM are not waited for at the end of a test.
	conf := e.dir + "/config.yaml"
	if err := os.WriteFile(conf, []byte("version: 1\nshutdownTimeout: 1s\n"+e.config), 0o644); err != nil {
		e.t.Fatal(err)
	}
	args := append([]string{"--config", conf, "--root", e.dir + "/root", "--run-root", e.dir + "/run", "--listen", "unix://" + e.sock}, e.args...)
	argv := append(append(slices.Clone(e.wrap), filepath.Join(e.bin, "servind")), args...)
	e.cmd = exec.Command(argv[0], argv[1:]...)
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.exited = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(e.cmd, e.exited)
	deadline := time.Now().Add(20 * time.Second)
	for {
		if err := e.ping(); err == nil {
			return
		} else if time.Now().After(deadline) {
			e.t.Fatalf("the daemon does not answer: %v\n%s", err, e.log())
		}
		select {
		case <-e.exited:
			e.t.Fatalf("the daemon ended:\n%s", e.log())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (e *engine) http() *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", e.sock)
		}}}
}

func (e *engine) ping() error {
	resp, err := e.http().Get("http://engine/_ping")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

func (e *engine) log() string {
	data, _ := os.ReadFile(e.dir + "/servind.log")
	if len(data) > 6000 {
		data = data[len(data)-6000:]
	}
	return string(data)
}

// kill ends the daemon as a crash would.
func (e *engine) kill() {
	_ = e.cmd.Process.Kill()
	<-e.exited
}

// close ends every container and the daemon, and removes the folders.
func (e *engine) close() {
	select {
	case <-e.exited:
		e.boot()
	default:
	}
	if res := e.run("system", "shutdown", "--force"); res.code != 0 {
		e.t.Errorf("shutdown: %s", res)
	}
	select {
	case <-e.exited:
	case <-time.After(30 * time.Second):
		e.t.Errorf("the daemon did not end after shutdown:\n%s", e.log())
		e.kill()
	}
	if e.t.Failed() {
		e.t.Logf("daemon's log:\n%s", e.log())
	}
	if err := os.RemoveAll(e.dir); err != nil {
		e.t.Errorf("cannot remove the engine's folders: %v", err)
	}
}

type result struct {
	out, err string
	code     int
	took     time.Duration
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.code, r.out, r.err)
}

// run runs the command line.
func (e *engine) run(args ...string) result { return e.pipe(nil, args...) }

func (e *engine) pipe(stdin io.Reader, args ...string) result {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(e.bin, "servin"), append([]string{"--host", "unix://" + e.sock}, args...)...)
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errb
	begin := time.Now()
	err := cmd.Run()
	r := result{out: out.String(), err: errb.String(), took: time.Since(begin)}
	var ee *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &ee):
		r.code = ee.ExitCode()
	default:
		e.t.Fatalf("servin %s: %v", strings.Join(args, " "), err)
	}
	return r
}

// must runs the command line and fails the test unless it succeeds; it returns
// the trimmed output.
func (e *engine) must(args ...string) string {
	e.t.Helper()
	r := e.run(args...)
	if r.code != 0 {
		e.t.Fatalf("servin %s: %s", strings.Join(args, " "), r)
	}
	return strings.TrimSpace(r.out)
}

// importBusybox makes the image "bb" of the host's static busybox.
func (e *engine) importBusybox() {
	e.t.Helper()
	const script = `set -e
cd "$(mktemp -d)"; trap 'rm -rf "$PWD"' EXIT
mkdir -p r/bin r/etc r/tmp r/proc r/sys r/dev r/root; chmod 1777 r/tmp
cp /usr/bin/busybox r/bin/busybox
for a in $(r/bin/busybox --list); do [ "$a" = busybox ] || ln -s busybox r/bin/$a; done
printf 'root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n' > r/etc/passwd
printf 'root:x:0:\nweb:x:1000:\nextra:x:2000:web\n' > r/etc/group
tar -C r -cf - .`
	cmd := exec.Command("bash", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	r := e.pipe(out, "import", "-", "bb")
	if err := cmd.Wait(); err != nil || r.code != 0 {
		e.t.Fatalf("cannot import busybox: %v: %s", err, r)
	}
}

// eventually polls until ok holds.
func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, limit)
		}
	}
}

// refuse starts a daemon that is expected to end by itself and returns what it
// said.
func (e *engine) refuse(more ...string) string {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	args := append([]string{"--root", e.dir + "/root", "--run-root", e.dir + "/run", "--listen", "unix://" + e.sock}, append(more, e.args...)...)
	out, err := exec.CommandContext(ctx, filepath.Join(e.bin, "servind"), args...).CombinedOutput()
	if err == nil || ctx.Err() != nil {
		e.t.Errorf("the daemon did not refuse: %v", err)
	}
	return string(out)
}
