package vmmode

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestSwitch carries a native engine's things into the machine and back.
func TestSwitch(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: the native engine here needs root")
	}
	m := newMachine(t)
	// A network namespace of its own: nothing of the host's is touched.
	sock := filepath.Join(m.root, "n.sock")
	native := exec.Command("unshare", "-n", "--", "sh", "-c", `ip link set lo up; exec "$0" "$@"`, filepath.Join(programs(), "servind"),
		"--root", filepath.Join(m.root, "nroot"), "--run-root", filepath.Join(m.root, "nrun"), "--listen", "unix://"+sock)
	native.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := native.Start(); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SERVIN_NATIVE_HOST", "unix://"+sock)
	t.Cleanup(func() {
		m.try("--host", "unix://"+sock, "system", "shutdown", "--force")
		native.Process.Signal(syscall.SIGTERM)
		native.Wait()
	})
	m.want("Engine", "version")
	busybox(t, m)
	m.must("volumes", "create", "kept")
	m.must("networks", "create", "mine")
	secret := filepath.Join(m.root, "secret")
	os.WriteFile(secret, []byte("s3cret\x00\xff"), 0o600)
	m.must("secrets", "create", "token", secret)
	m.must("run", "-d", "--name", "app", "--network", "mine", "-v", "kept:/kept", "busybox:1", "sh", "-c", "while :; do sleep 1; done")
	m.must("exec", "app", "sh", "-c", "echo in the volume > /kept/f; echo in the layer > /tmp/f; rm /bin/echo; sync")
	m.must("run", "--name", "ended", "busybox:1", "true")

	// A switch that is killed halfway is run again.
	cut := exec.Command(filepath.Join(programs(), "servin"), "mode", "set", "vm")
	cut.Env = m.env()
	if err := cut.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	cut.Process.Kill()
	cut.Wait()
	m.must("mode", "set", "vm")
	check := func(where string) {
		t.Helper()
		if st := m.must("mode", "status"); !strings.Contains(st, where) {
			t.Errorf("mode status: %s", st)
		}
		m.want("app", "ps", "--filter", "status=running")
		if out := m.must("exec", "app", "cat", "/kept/f", "/tmp/f"); out != "in the volume\nin the layer\n" {
			t.Errorf("%s: %q", where, out)
		}
		if _, err := m.try("exec", "app", "/bin/echo"); err == nil {
			t.Errorf("%s: a removed file is there again", where)
		}
		if out := m.must("ps", "-a"); !strings.Contains(out, "ended") {
			t.Errorf("%s: %s", where, out)
		}
		m.want("mine", "networks", "list")
		if out := m.must("run", "--rm", "--secret", "token", "busybox:1", "cat", "/run/secrets/token"); out != "s3cret\x00\xff" {
			t.Errorf("%s: the secret is %q", where, out)
		}
		if out := m.must("images"); strings.Count(out, "servin-carried/") > 1 {
			t.Errorf("%s: %s", where, out)
		}
	}
	check("Mode:    vm")
	// The source keeps everything, stopped.
	if out := m.must("--host", "unix://"+sock, "ps", "-a"); !strings.Contains(out, "app") || strings.Contains(out, "Up ") {
		t.Errorf("the source: %s", out)
	}
	if out := m.must("--host", "unix://"+sock, "volumes", "list"); !strings.Contains(out, "kept") {
		t.Errorf("the source: %s", out)
	}
	// And back, to an engine that has lost all but its images.
	m.must("exec", "app", "sh", "-c", "echo from inside > /kept/g; sync")
	m.must("--host", "unix://"+sock, "rm", "-f", "app", "ended")
	m.must("--host", "unix://"+sock, "volumes", "rm", "kept")
	m.must("--host", "unix://"+sock, "secrets", "rm", "token")
	m.must("mode", "set", "native")
	check("Mode:    native")
	if out := m.must("exec", "app", "cat", "/kept/g"); out != "from inside\n" {
		t.Errorf("what was written in the machine: %q", out)
	}
}
