package fat

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cloudos-io/cloudos/internal/osimage/tree"
)

func TestImage(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789"), 200000)
	tr := tree.New()
	tr.Bytes("EFI/BOOT/BOOTX64.EFI", 0o644, "", big)
	tr.Bytes("cloudos/a/empty", 0o644, "", nil)
	twice := append([]byte("where it begins"), bytes.Repeat([]byte("x"), large)...)
	for _, size := range []int64{6 << 20, 160 << 20} {
		if size == 160<<20 {
			tr.Bytes("cloudos/a/linux.efi", 0o644, "", twice)
			tr.Bytes("cloudos/b/linux.efi", 0o644, "", twice)
		}
		b, err := Image(tr, size, "CLOUDOS", 7)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Image(tr, size, "CLOUDOS", 7); err != nil || !bytes.Equal(b, again) {
			t.Fatal("twice is not the same", err)
		}
		if size == 160<<20 {
			first := bytes.Index(b, twice[:15])
			second := bytes.LastIndex(b, twice[:15])
			if first == second || (second-first)%aligned != 0 {
				t.Errorf("the same large file is at %d and %d", first, second)
			}
		}
		fsck, err := exec.LookPath("fsck.fat")
		if err != nil {
			t.Log("fsck.fat is not installed: what is written is checked by booting alone")
			continue
		}
		p := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(fsck, "-n", "-v", p).CombinedOutput(); err != nil {
			t.Errorf("fsck.fat of %d MiB: %v\n%s", size>>20, err, out)
		}
	}
	tr.Bytes("much-too-long-a-name.txt", 0o644, "", nil)
	if _, err := Image(tr, 6<<20, "X", 1); err == nil {
		t.Error("a long name was written")
	}
	if _, err := Image(tree.New(), 1<<20, "X", 1); err == nil {
		t.Error("a file system too small was written")
	}
}
