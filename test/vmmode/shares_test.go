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

// stillReadOnly has a guest that was taken over write to what is shared with :ro: root with all rights in it makes its own
// mount writable, and it is the host's side that refuses.
func stillReadOnly(t *testing.T, m *machine) {
	t.Helper()
	dir := filepath.Join(m.root, "ro")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("kept"), 0o666); err != nil {
		t.Fatal(err)
	}
	m.must("vm", "config", "--share", dir+":ro")
	busybox(t, m)
	out := m.must("run", "--rm", "--privileged", "-v", dir+":/r", "busybox:1", "sh", "-c",
		"mount -o remount,rw /r; grep ' /r ' /proc/self/mountinfo; touch /r/f; echo x >>/r/f; echo x >/r/g; rm -f /r/f; mkdir /r/d; echo tried")
	if !strings.Contains(out, "tried") || !strings.Contains(out, "virtiofs share1 rw") {
		t.Fatalf("it was not tried on a mount that the guest may write to: %s", out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "f"))
	list, lerr := os.ReadDir(dir)
	if err != nil || string(b) != "kept" || lerr != nil || len(list) != 1 {
		t.Errorf("a guest changed a folder that is shared with :ro: %q, %v, %v", b, list, err)
	}
}

// TestSharesComeFirst: a container that the machine starts again by itself finds the shared folder that it was
// given, not an empty one in its place that the machine made: also where the computer is slow.
func TestSharesComeFirst(t *testing.T) {
	m := newMachine(t)
	m.must("mode", "set", "vm", "--no-carry")
	shared := filepath.Join(m.home, "data")
	if err := os.Mkdir(shared, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(shared, "f"), []byte("found\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// It needs no network, which would be waited for.
	m.must("run", "-d", "--name", "early", "--restart", "always", "--network", "none", "-v", shared+":/data", "servin/hello", "cat", "/data/f")
	m.want("found", "logs", "early")
	stillReadOnly(t, m)
	was := m.status().PID
	restarted := make(chan error, 1)
	go func() { _, err := m.try("vm", "restart"); restarted <- err }()
	for st := m.status(); st.PID == 0 || st.PID == was; st = m.status() {
	}
	// The machine goes on without its host.
	host := m.vmd()
	if err := syscall.Kill(host, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Second)
	if err := syscall.Kill(host, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
	logs := func() string {
		cmd := exec.Command(filepath.Join(programs(), "servin"), "logs", "early")
		cmd.Env = m.env()
		b, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		return string(b)
	}
	out := logs()
	for before := strings.Count(out, "\n"); strings.Count(out, "\n") <= before; { // until it was started again
		out = logs()
	}
	if rest := strings.ReplaceAll(out, "found\n", ""); rest != "" {
		t.Errorf("it missed its shared folder: %q", rest)
	}
}
