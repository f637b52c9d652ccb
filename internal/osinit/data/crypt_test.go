package data

import (
	"crypto/rand"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestFormatScrambled makes a file system where nothing reads as zeros, as on an
// encrypted device that was just made, and has e2fsck look at it.
func TestFormatScrambled(t *testing.T) {
	e2fsck, err := exec.LookPath("e2fsck")
	if err != nil {
		t.Skip("SKIP: e2fsck is not installed")
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = templateSize
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, u := range used {
		f.Seek(u[0]*blockSize, io.SeekStart)
		if _, err := io.CopyN(f, rand.Reader, u[1]*blockSize+blockSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := format(f, size, true); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(e2fsck, "-fn", f.Name()).CombinedOutput()
	if err != nil || strings.Contains(string(out), "Fix") {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}
