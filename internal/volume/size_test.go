package volume

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/quota"
)

// disk mounts a small ext4; with its project quotas enforced or not.
func disk(t *testing.T, options string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root")
	}
	if dir := os.Getenv("SERVIN_TEST_QUOTA"); dir != "" && options == "loop,prjquota" {
		dir, err := os.MkdirTemp(dir, "quota") // a disk that has them: see test/vm
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
	img, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 64<<20)); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{
		{"mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", img},
		{"mount", "-o", options, img, dir},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Skipf("SKIP: no disk with project quotas: %v: %s", err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// full writes as a container would: ext4 exempts who has CAP_SYS_RESOURCE.
func full(t *testing.T, path string, n int) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var had [2]unix.CapUserData
	if err := unix.Capget(&h, &had[0]); err != nil {
		t.Fatal(err)
	}
	without := had
	without[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
	if err := unix.Capset(&h, &without[0]); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Capset(&h, &had[0]); err != nil {
			t.Fatal(err)
		}
	}()
	if err := os.WriteFile(path, make([]byte, n), 0o600); !errors.Is(err, unix.EDQUOT) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a file over the limit: %v", err)
	}
	_ = os.Remove(path)
}

func TestSizeLimit(t *testing.T) {
	root := disk(t, "loop,prjquota")
	s, err := New(Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	limited := map[string]string{"size": "2m"}
	for _, n := range []string{"aa", "bb"} {
		v := create(t, s, volume.CreateRequest{Name: n, DriverOpts: limited}, CreateOptions{})
		if err := os.WriteFile(v.Mountpoint+"/fits", make([]byte, 1<<20), 0o600); err != nil {
			t.Errorf("below the limit: %v", err)
		}
		full(t, v.Mountpoint+"/big", 4<<20)
	}
	for _, bad := range []map[string]string{{"size": "many"}, {"size": "-1"}, {"size": "1m", "type": "tmpfs", "device": "tmpfs"}} {
		if _, err := s.Create(t.Context(), volume.CreateRequest{Name: "cc", DriverOpts: bad}, CreateOptions{}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	// New content has the limit too, and old content does not count against it.
	g, err := s.Stage(t.Context(), volume.CreateRequest{Name: "aa"}, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, g.tmp, "new"), make([]byte, 512<<10), 0o600); err != nil {
		t.Errorf("staged: %v", err)
	}
	full(t, filepath.Join(root, g.tmp, "big"), 4<<20)
	if _, err := g.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.EmptyTrash(t.Context()); err != nil {
		t.Fatal(err)
	}
	full(t, filepath.Join(root, "aa", dataDir, "big"), 4<<20)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// After a restart the ids are known, and a removed volume's limit is gone.
	s, err = New(Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	full(t, filepath.Join(root, "bb", dataDir, "big"), 4<<20)
	create(t, s, volume.CreateRequest{Name: "cc", DriverOpts: limited}, CreateOptions{})
	if p := s.m["cc"].rec.Project; p == 0 || p == s.m["aa"].rec.Project || p == s.m["bb"].rec.Project {
		t.Errorf("project %d is used twice", p)
	}
	project := s.m["cc"].rec.Project
	if err := s.Remove(t.Context(), "cc", false); err != nil {
		t.Fatal(err)
	}
	if used, err := quota.Used(s.dir, project); err != nil || used > 1<<20 {
		t.Errorf("project %d: %d bytes, %v", project, used, err)
	}
}

// TestSizeRefused: a file system that only counts, or does not even that, is told.
func TestSizeRefused(t *testing.T) {
	t.Run("none", func(t *testing.T) {
		if os.Getenv("SERVIN_TEST_QUOTA") != "" {
			t.Skip("SKIP: the disk here has quotas")
		}
		refused(t, t.TempDir())
	})
	t.Run("counting", func(t *testing.T) { refused(t, disk(t, "loop,noquota")) })
}

func refused(t *testing.T, root string) {
	t.Helper()
	s, err := New(Config{Root: root + "/v"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, err = s.Create(t.Context(), volume.CreateRequest{Name: "aa", DriverOpts: map[string]string{"size": "2m"}}, CreateOptions{})
	if !fault.Is(err, fault.Unsupported) {
		t.Errorf("%v", err)
	}
	if len(s.m) != 0 {
		t.Error("a volume without its limit is left")
	}
}
