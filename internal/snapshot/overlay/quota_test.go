package overlay

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	"golang.org/x/sys/unix"
)

// quotaDisk mounts a small ext4 with project quotas.
func quotaDisk(t *testing.T) string {
	t.Helper()
	needRoot(t)
	img, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 64<<20); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{
		{"mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", img},
		{"mount", "-o", "loop,prjquota", img, dir},
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

func TestSizeLimit(t *testing.T) {
	root := quotaDisk(t)
	s := newStore(t, root)
	ctx := context.Background()
	const limit = 2 << 20
	for _, id := range []string{"a", "b"} {
		if err := s.Create(ctx, id, snapshot.Chain{}, false, limit); err != nil {
			t.Fatal(err)
		}
		f, err := s.Mount(ctx, id, false, snapshot.IDMap{})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at(f, "fits"), make([]byte, 1<<20), 0o600); err != nil {
			t.Errorf("a file below the limit: %v", err)
		}
		err = os.WriteFile(at(f, "big"), make([]byte, 4<<20), 0o600)
		if !errors.Is(err, unix.EDQUOT) && !errors.Is(err, unix.ENOSPC) {
			t.Errorf("a file over the limit: %v", err)
		}
		f.Close()
	}
	// The limits are still known, and distinct, after a restart.
	s = newStore(t, root)
	if s.layers["a"].Project == s.layers["b"].Project || s.layers["a"].Project == 0 {
		t.Errorf("projects %d and %d", s.layers["a"].Project, s.layers["b"].Project)
	}
	if err := s.Create(ctx, "c", snapshot.Chain{}, false, limit); err != nil {
		t.Fatal(err)
	}
	if p := s.layers["c"].Project; p == s.layers["a"].Project || p == s.layers["b"].Project {
		t.Errorf("project %d is used twice", p)
	}
	for _, id := range []string{"a", "b", "c"} {
		if err := s.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Drain(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestSizeLimitUnsupported(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Skipf("SKIP: cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s := newStore(t, dir)
	if err := s.Create(context.Background(), "a", snapshot.Chain{}, false, 1<<20); !fault.Is(err, fault.Unsupported) {
		t.Errorf("err = %v, want unsupported", err)
	}
	if l, _ := s.List(context.Background()); len(l) != 0 {
		t.Errorf("layers left: %q", l)
	}
}
