package upgrade

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestCopyFile compares what a cut may leave with what is whole: the end is written last.
func TestCopyFile(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "EFI", "to")
	for _, size := range []int{0, 1, tail, tail + 1, 300 << 10} {
		content := bytes.Repeat([]byte("signed "), size/7+1)[:size]
		if err := os.WriteFile(from, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if same, err := equal(from, to, tail); err != nil || same && size > 0 {
			t.Fatalf("%d bytes: what is not there is the same: %v", size, err)
		}
		for range 2 { // over one that is there
			if err := copyFile(from, to); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, content) {
				t.Fatalf("%d bytes became %d, %v", size, len(got), err)
			}
		}
		for _, last := range []int64{tail, 1 << 62} {
			if same, err := equal(from, to, last); err != nil || !same {
				t.Fatalf("%d bytes: the copy is another: %v", size, err)
			}
		}
		if size <= tail {
			os.Remove(to)
			continue
		}
		if err := os.Truncate(to, int64(size-tail)); err != nil { // cut off before the end
			t.Fatal(err)
		}
		if same, err := equal(from, to, tail); err != nil || same {
			t.Fatalf("%d bytes: a part is the whole: %v", size, err)
		}
		os.Remove(to)
	}
	if _, err := equal(filepath.Join(dir, "missing"), from, tail); !os.IsNotExist(err) {
		t.Fatalf("a slot without an image: %v", err)
	}
}
