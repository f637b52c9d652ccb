package data

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestFormat makes a file system and has e2fsck look at it; then again after the
// work was left half done.
func TestFormat(t *testing.T) {
	e2fsck, err := exec.LookPath("e2fsck")
	if err != nil {
		t.Skip("SKIP: e2fsck is not installed")
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = templateSize + 64<<20
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if c, err := inspect(f); err != nil || c != empty {
		t.Fatal(c, err)
	}
	check := func() {
		t.Helper()
		if err := format(f, size, false); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(e2fsck, "-fn", f.Name()).CombinedOutput()
		if err != nil || strings.Contains(string(out), "Fix") {
			t.Fatalf("e2fsck: %v\n%s", err, out)
		}
		if c, err := inspect(f); err != nil || c != ours {
			t.Fatal(c, err)
		}
	}
	check()
	id := make([]byte, 16)
	f.ReadAt(id, superAt+0x68)
	f.WriteAt([]byte(mark), 0)
	f.WriteAt(make([]byte, 1024), superAt)
	if c, err := inspect(f); err != nil || c != unfinished {
		t.Fatal(c, err)
	}
	check()
	again := make([]byte, 16)
	f.ReadAt(again, superAt+0x68)
	if string(id) == string(again) {
		t.Error("two file systems have one identity")
	}
	f.WriteAt([]byte("other"), 4096)
	f.WriteAt([]byte{0}, superAt+0x38)
	if c, err := inspect(f); err != nil || c != foreign {
		t.Fatal(c, err)
	}
	if err := format(f, 1<<20, false); err == nil {
		t.Error("a disk that is too small was taken")
	}
}
