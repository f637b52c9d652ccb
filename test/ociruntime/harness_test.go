// Package ociruntime drives the shipped servin-runtime as its callers do: by its
// command line, under Docker, containerd and Podman, and with the validation
// programs and the bats suite of the Open Container Initiative.
package ociruntime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/test/harness"
)

// TestMain moves the whole suite into network and mount namespaces of its own:
// engines change the host's rules and leave mounts behind when they are killed.
func TestMain(m *testing.M) { harness.Main(m) }

// needLong keeps what takes minutes out of make test.
func needLong(t *testing.T) {
	t.Helper()
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: it takes minutes, and is part of make test-long")
	}
}

func program(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: the suite needs root")
	}
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	p := filepath.Join(bin, "servin-runtime")
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("no programs in %s: run make build first", bin)
	}
	return p
}

// shortDir is a directory whose name leaves room for those of sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "oci")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// rootfs makes a root file system of busybox.
func rootfs(t *testing.T, dir string) {
	t.Helper()
	for _, d := range []string{"bin", "dev", "etc", "proc", "sys", "tmp", "root", "run", "var"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const busybox = "/usr/bin/busybox"
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Skipf("SKIP: %v (busybox-static)", err)
	}
	for name, data := range map[string][]byte{"bin/busybox": b,
		"etc/passwd": []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"), "etc/group": []byte("root:x:0:\nuser:x:1000:\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range strings.Fields(string(out)) {
		if a != "busybox" {
			_ = os.Symlink("busybox", filepath.Join(dir, "bin", a))
		}
	}
}

// bundle is a bundle and the runtime that runs it.
type bundle struct {
	t       *testing.T
	runtime string
	dir     string // of the bundle
	root    string // of the records
	global  []string
	as      *uint32 // the ordinary user who runs it, nil for root
}

func newBundle(t *testing.T, change ...func(*specs.Spec)) *bundle {
	t.Helper()
	dir := shortDir(t)
	b := &bundle{t: t, runtime: program(t), dir: filepath.Join(dir, "b"), root: filepath.Join(dir, "r")}
	rootfs(t, filepath.Join(b.dir, "rootfs"))
	if out, err := b.command("spec").CombinedOutput(); err != nil {
		t.Fatalf("spec: %v: %s", err, out)
	}
	b.edit(func(s *specs.Spec) {
		s.Process.Terminal = false
		s.Process.Args = []string{"true"}
		s.Root.Readonly = false
	})
	b.edit(change...)
	t.Cleanup(func() {
		out, _ := b.command("list", "-q").Output()
		for _, id := range strings.Fields(string(out)) {
			if out, err := b.command("delete", "-f", id).CombinedOutput(); err != nil {
				t.Errorf("delete -f %s: %v: %s", id, err, out)
			}
		}
	})
	return b
}

func (b *bundle) edit(change ...func(*specs.Spec)) {
	b.t.Helper()
	path := filepath.Join(b.dir, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		b.t.Fatal(err)
	}
	for _, f := range change {
		f(&s)
	}
	if data, err = json.Marshal(&s); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// args sets the process's arguments.
func args(a ...string) func(*specs.Spec) { return func(s *specs.Spec) { s.Process.Args = a } }

func (b *bundle) command(a ...string) *exec.Cmd {
	all := append(append([]string{"--root", b.root}, b.global...), a...)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	b.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, b.runtime, all...)
	if b.as != nil {
		cmd = exec.CommandContext(ctx, "setpriv", append([]string{"--reuid", fmt.Sprint(*b.as), "--regid", fmt.Sprint(*b.as), "--clear-groups", "--", b.runtime}, all...)...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	}
	cmd.Dir = b.dir
	return cmd
}

// ok runs a command that must succeed and returns what it wrote.
func (b *bundle) ok(a ...string) string {
	b.t.Helper()
	out, code := b.try(a...)
	if code != 0 {
		b.t.Fatalf("%s: exit %d: %s", strings.Join(a, " "), code, out)
	}
	return out
}

// detached runs a command whose container keeps the standard streams.
func (b *bundle) detached(a ...string) {
	b.t.Helper()
	log := filepath.Join(b.dir, "detached.log")
	f, err := os.Create(log)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	cmd := b.command(a...)
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Run(); err != nil {
		out, _ := os.ReadFile(log)
		b.t.Fatalf("%s: %v: %s", strings.Join(a, " "), err, out)
	}
}

func (b *bundle) try(a ...string) (string, int) {
	b.t.Helper()
	return output(b.t, b.command(a...))
}

func output(t *testing.T, cmd *exec.Cmd) (string, int) {
	t.Helper()
	var buf bytes.Buffer
	cmd.Stdout, cmd.Stderr = &buf, &buf
	err := cmd.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatalf("%s: %v", cmd, err)
	}
	return buf.String(), cmd.ProcessState.ExitCode()
}

type state struct {
	ID, Status, Bundle string
	Pid                int
	Annotations        map[string]string
}

func (b *bundle) state(id string) state {
	b.t.Helper()
	var s state
	if err := json.Unmarshal([]byte(b.ok("state", id)), &s); err != nil {
		b.t.Fatal(err)
	}
	return s
}

// await waits until a container is in the state.
func (b *bundle) await(id, status string) {
	b.t.Helper()
	eventually(b.t, id+" is "+status, func() bool { return b.state(id).Status == status })
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if done() {
			return
		}
	}
	t.Fatalf("in vain waited until %s", what)
}
