// Package harness is what the end-to-end suites share: a network namespace of their
// own, the programs under test, and a daemon on folders of its own that leaves no
// trace. The suites import it; it knows none of them.
package harness

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
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Limits of what is waited for.
const (
	bootLimit = 20 * time.Second
	stopLimit = 30 * time.Second
	logShown  = 8000 // bytes of the daemon's log, from its end
)

// Slow is by how much a wait may be longer than elsewhere: emulated machines say so
// with SERVIN_TEST_SLOW.
func Slow() time.Duration {
	if f, err := strconv.Atoi(os.Getenv("SERVIN_TEST_SLOW")); err == nil && f > 1 {
		return time.Duration(f)
	}
	return 1
}

// Long reports whether the long campaigns were asked for (make test-long).
func Long() bool { return os.Getenv("SERVIN_LONG") != "" }

// Main runs a suite in network and mount namespaces of its own: neither the host's
// network nor another suite can meet it, and no process of another suite holds a copy
// of its mounts.
func Main(m *testing.M) {
	const marker = "SERVIN_TEST_NETNS"
	if os.Getenv(marker) != "" || os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	args := []string{"-n", "-m", "--propagation", "private", "--", "sh", "-c", `ip link set lo up; exec "$0" "$@"`}
	cmd := exec.Command("unshare", append(args, os.Args...)...)
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

// Programs is the folder of the programs under test: SERVIN_BIN, or what make build
// made. A suite that is not run by root is skipped.
func Programs(t *testing.T, names ...string) string {
	t.Helper()
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	for _, n := range append(names, "servind") {
		if _, err := os.Stat(filepath.Join(bin, n)); err != nil {
			t.Fatalf("no %s in %s: run make build first", n, bin)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root")
	}
	return bin
}

// Eventually polls until ok holds.
func Eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Slow() * limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, limit)
		}
	}
}

// Busybox is the tar of a root file system of the host's static busybox, with the
// lines of its user and group files. Its names are links to one file: symbolic ones,
// or hard ones for tests that cover a single name.
func Busybox(t *testing.T, passwd, group string, hard bool) io.Reader {
	t.Helper()
	const script = `set -e
cd "$(mktemp -d)"; trap 'rm -rf "$PWD"' EXIT
mkdir -p r/bin r/etc r/tmp r/proc r/sys r/dev r/root; chmod 1777 r/tmp
cp -L /usr/bin/busybox r/bin/busybox
for a in $(r/bin/busybox --list); do [ "$a" = busybox ] || (cd r/bin && ln $3 busybox $a); done
printf '%s\n' "$1" > r/etc/passwd
printf '%s\n' "$2" > r/etc/group
tar -C r -cf - .`
	kind := "-s"
	if hard {
		kind = "-f"
	}
	out, err := exec.Command("bash", "-c", script, "bash", passwd, group, kind).Output()
	if err != nil {
		t.Fatalf("cannot make a root file system of busybox: %v", err)
	}
	return bytes.NewReader(out)
}

// Daemon is a servind on folders of its own. What is set before Boot holds from
// then on.
type Daemon struct {
	T   *testing.T
	Dir string
	Bin string
	// Wrap is a command that executes the daemon, Args are more arguments, Env more
	// of its environment, Config more lines of its configuration.
	Wrap, Args, Env []string
	Config          string
	// Ready tells whether it serves; nil asks for /_ping.
	Ready func() error

	Cmd    *exec.Cmd
	Exited chan struct{} // closed when the process has ended
}

// New makes the folders of a daemon whose name begins with prefix: a short one, for
// the names of sockets are limited. Their removal is Close's.
func New(t *testing.T, prefix string, programs ...string) *Daemon {
	t.Helper()
	bin := Programs(t, programs...)
	dir, err := os.MkdirTemp("", prefix)
	if err != nil {
		t.Fatal(err)
	}
	return &Daemon{T: t, Dir: dir, Bin: bin}
}

// Sock is the path of its socket.
func (d *Daemon) Sock() string { return d.Dir + "/s.sock" }

// Host is its socket as clients name it.
func (d *Daemon) Host() string { return "unix://" + d.Sock() }

// Boot starts the process and waits until it serves.
func (d *Daemon) Boot() {
	d.T.Helper()
	log, err := os.OpenFile(d.Dir+"/servind.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		d.T.Fatal(err)
	}
	defer log.Close()
	// Containers that ignore SIGTERM are not waited for at the end of a test.
	conf := d.Dir + "/config.yaml"
	if err := os.WriteFile(conf, []byte("version: 1\nshutdownTimeout: 1s\n"+d.Config), 0o644); err != nil {
		d.T.Fatal(err)
	}
	argv := append(slices.Clone(d.Wrap), filepath.Join(d.Bin, "servind"), "--config", conf, "--root", d.Dir+"/root", "--run-root", d.Dir+"/run", "--listen", d.Host())
	argv = append(argv, d.Args...)
	d.Cmd = exec.Command(argv[0], argv[1:]...)
	d.Cmd.Env = append(os.Environ(), d.Env...)
	d.Cmd.Stdout, d.Cmd.Stderr = log, log
	d.Cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.Cmd.Start(); err != nil {
		d.T.Fatal(err)
	}
	d.Exited = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(d.Cmd, d.Exited)
	ready := d.Ready
	if ready == nil {
		ready = d.Ping
	}
	for deadline := time.Now().Add(Slow() * bootLimit); ; {
		err := ready()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			d.T.Fatalf("the daemon does not answer: %v\n%s", err, d.Log())
		}
		select {
		case <-d.Exited:
			d.T.Fatalf("the daemon ended:\n%s", d.Log())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// HTTP is a client of its API, which any host name reaches.
func (d *Daemon) HTTP() *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", d.Sock())
		}}}
}

// Ping asks whether it serves.
func (d *Daemon) Ping() error {
	resp, err := d.HTTP().Get("http://engine/_ping")
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

// Log is the end of what it has said.
func (d *Daemon) Log() string {
	b, _ := os.ReadFile(d.Dir + "/servind.log")
	return string(b[max(0, len(b)-logShown):])
}

// Kill ends the process as a crash would.
func (d *Daemon) Kill() {
	_ = d.Cmd.Process.Kill()
	<-d.Exited
	// A program that it was just starting may hold its socket a moment longer.
	_ = os.Remove(d.Sock())
}

// Close ends every container and the daemon, looks for mounts that are left, and
// removes the folders.
func (d *Daemon) Close() {
	select {
	case <-d.Exited:
		d.Boot()
	default:
	}
	if out, err := exec.Command(filepath.Join(d.Bin, "servin"), "--host", d.Host(), "system", "shutdown", "--force").CombinedOutput(); err != nil {
		d.T.Errorf("shutdown: %v: %s", err, out)
	}
	select {
	case <-d.Exited:
	case <-time.After(Slow() * stopLimit):
		d.T.Errorf("the daemon did not end after shutdown")
		d.Kill()
	}
	if d.T.Failed() {
		d.T.Logf("the daemon's log:\n%s", d.Log())
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range bytes.Lines(mounts) {
		if bytes.Contains(line, []byte(" "+d.Dir+"/")) {
			d.T.Errorf("a mount is left: %s", line)
		}
	}
	if err := os.RemoveAll(d.Dir); err != nil {
		d.T.Errorf("cannot remove the engine's folders: %v", err)
	}
}
