package vmmode

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// busybox makes an image with busybox in the machine.
func busybox(t *testing.T, m *machine) {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"bin", "tmp", "dev"} {
		os.MkdirAll(filepath.Join(dir, d), 0o755)
	}
	b, err := os.ReadFile("/usr/bin/busybox")
	if err != nil {
		t.Skip("SKIP: busybox-static is not installed")
	}
	os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755)
	for _, a := range []string{"sh", "dd", "sleep", "cat", "ls", "rm", "sync", "inotifyd", "echo", "nc", "touch", "mkdir", "find", "wc", "true"} {
		os.Symlink("busybox", filepath.Join(dir, "bin", a))
	}
	tar := filepath.Join(t.TempDir(), "busybox.tar")
	if out, err := exec.Command("tar", "-C", dir, "-cf", tar, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	m.must("import", tar, "busybox:1")
}

// TestMemoryComesBack: what a container used is the host's again soon after it ends.
func TestMemoryComesBack(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t, "--memory", "2g")
	m.must("mode", "set", "vm", "--no-carry")
	busybox(t, m)
	m.must("run", "--rm", "busybox:1", "sh", "-c", "true")
	time.Sleep(3 * time.Second)
	before := m.status().Memory.Host
	m.must("run", "-d", "--name", "big", "--shm-size", "1100m", "busybox:1", "sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=1024 2>/dev/null; echo full; sleep 1000")
	m.want("full", "logs", "big")
	used := m.status().Memory.Host
	if used < before+900<<20 {
		t.Fatalf("the container took %d MiB of the host", (int64(used)-int64(before))>>20)
	}
	m.must("rm", "-f", "big")
	begin := time.Now()
	for {
		now := m.status().Memory.Host
		if now < before+150<<20 {
			t.Logf("%d MiB before, %d with it, %d after %v", before>>20, used>>20, now>>20, time.Since(begin).Round(100*time.Millisecond))
			return
		}
		if time.Since(begin) > time.Minute {
			t.Fatalf("%d MiB before, %d with it, %d a minute after", before>>20, used>>20, now>>20)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// TestDiskComesBack: what is removed inside takes no space outside.
func TestDiskComesBack(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t)
	m.must("mode", "set", "vm", "--no-carry")
	busybox(t, m)
	m.must("volumes", "create", "vol")
	before := m.status().Disk.Host
	m.must("run", "--rm", "-v", "vol:/v", "busybox:1", "sh", "-c", "dd if=/dev/urandom of=/v/x bs=1M count=200 2>/dev/null; sync")
	if used := m.status().Disk.Host; used < before+190<<20 {
		t.Fatalf("the volume took %d MiB of the host", (int64(used)-int64(before))>>20)
	}
	m.must("volumes", "rm", "vol")
	m.must("vm", "stop") // trims at the latest
	if now := m.status().Disk.Host; now > before+50<<20 {
		t.Errorf("%d MiB before the volume, %d after it", before>>20, now>>20)
	}
}

// TestFileEvents: watchers in containers see what an editor on the host does.
func TestFileEvents(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t)
	m.must("mode", "set", "vm", "--no-carry")
	busybox(t, m)
	src := filepath.Join(m.home, "src")
	os.MkdirAll(filepath.Join(src, "deep"), 0o755)
	os.WriteFile(filepath.Join(src, "deep", "f"), []byte("1"), 0o644)
	build := exec.Command("go", "build", "-o", filepath.Join(m.home, "watch"), "./testdata/watch")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	m.must("run", "-d", "--name", "watch", "-v", m.home+":"+m.home, "busybox:1", m.home+"/watch", src+"/deep", src+"/deep/f")
	m.want("watching", "logs", "watch")
	for range 20 { // the folders are watched once the container is noticed
		os.WriteFile(filepath.Join(src, "deep", "f"), []byte(time.Now().String()), 0o644)
		time.Sleep(500 * time.Millisecond)
		if out := m.must("logs", "watch"); strings.Contains(out, "CHMOD "+src+"/deep/f") {
			return
		}
	}
	t.Errorf("a watcher saw nothing: %q", m.must("logs", "watch"))
}
