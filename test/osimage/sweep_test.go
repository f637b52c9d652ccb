package osimage

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cloudos-io/cloudos/internal/osimage/fat"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/osinit/upgrade"
)

// volumeInMemory is a disk.
type volumeInMemory []byte

func (d volumeInMemory) ReadAt(b []byte, at int64) (int, error) {
	return bytes.NewReader(d).ReadAt(b, at)
}
func (d volumeInMemory) WriteAt(b []byte, at int64) (int, error) { return copy(d[at:], b), nil }
func (volumeInMemory) Sync() error                               { return nil }

func bootTree(files map[string][]byte) *tree.Tree {
	tr := tree.New()
	tr.Dir("cloudos/a", 0o755)
	tr.Dir("cloudos/b", 0o755)
	for name, b := range files {
		tr.Bytes(name, 0o644, "", b)
	}
	return tr
}

// TestSweep empties a slot's folder on a boot partition that a power cut left in disorder: what
// else there is stays, and all other space is free.
func TestSweep(t *testing.T) {
	const size = 80 << 20
	kernel := bytes.Repeat([]byte("kernel of a "), 100000)
	other := bytes.Repeat([]byte("kernel of b "), 100000)
	keep := map[string][]byte{"cloudos/a/kernel": kernel, "EFI/BOOT/BOOTX64.EFI": []byte("loader")}
	both := map[string][]byte{"cloudos/b/kernel": other}
	for name, b := range keep {
		both[name] = b
	}
	image := func(files map[string][]byte) volumeInMemory {
		b, err := fat.Image(bootTree(files), size, "CLOUDOS", 7)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	fatAt := int64(32 * 512)
	for name, spoil := range map[string]func(d volumeInMemory){
		"whole": func(volumeInMemory) {},
		// The folder points at what the table says is free.
		"no table": func(d volumeInMemory) {
			at := fatAt + int64(clusterOf(d, other))*4
			clear(d[at : at+4*1000])
		},
		// Space that nobody points at, in one of both tables.
		"lost": func(d volumeInMemory) { binary.LittleEndian.PutUint32(d[fatAt+4*70000:], 0x0fffffff) },
	} {
		t.Run(name, func(t *testing.T) {
			d := image(both)
			spoil(d)
			if err := upgrade.Sweep(d, "cloudos/b"); err != nil {
				t.Fatal(err)
			}
			if err := upgrade.Sweep(d, "cloudos/b"); err != nil {
				t.Fatal("again:", err)
			}
			if !bytes.Contains(d, kernel) {
				t.Fatal("the other slot's kernel is gone")
			}
			fsck, err := exec.LookPath("/usr/sbin/fsck.fat")
			if err != nil {
				t.Skip("SKIP: fsck.fat is not installed")
			}
			p := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(p, d, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(fsck, "-n", "-v", p).CombinedOutput()
			if err != nil && !bytes.Contains(out, []byte("Free cluster summary uninitialized")) {
				t.Errorf("fsck.fat: %v\n%s", err, out)
			}
			for _, wrong := range []string{"Reclaimed", "shared", "Orphaned", "Contains a free cluster"} {
				if bytes.Contains(out, []byte(wrong)) {
					t.Errorf("fsck.fat:\n%s", out)
				}
			}
		})
	}
	damaged := image(both)
	binary.LittleEndian.PutUint32(damaged[fatAt+int64(clusterOf(damaged, kernel))*4:], 1)
	before := bytes.Clone(damaged[:fatAt+1<<20])
	if err := upgrade.Sweep(damaged, "cloudos/b"); err == nil || !bytes.Equal(before, damaged[:len(before)]) {
		t.Errorf("a damaged table was written: %v", err)
	}
}

// clusterOf finds a file's first cluster by its content.
func clusterOf(d volumeInMemory, content []byte) uint32 {
	le := binary.LittleEndian
	data := int64(le.Uint16(d[14:]))*512 + 2*int64(le.Uint32(d[36:]))*512
	at := int64(bytes.Index(d, content[:4096]))
	return uint32((at-data)/(int64(d[13])*512)) + 2
}

func FuzzSweep(f *testing.F) {
	b, err := fat.Image(bootTree(map[string][]byte{"cloudos/b/kernel": []byte("x"), "cloudos/a/kernel": []byte("y")}), 80<<20, "CLOUDOS", 7)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(32*512), []byte{1, 2, 3})
	f.Add(uint32(44), []byte{9, 0, 0, 0})
	d := make(volumeInMemory, len(b))
	f.Fuzz(func(t *testing.T, at uint32, change []byte) {
		copy(d, b)
		copy(d[int(at)%len(d):], change)
		_ = upgrade.Sweep(d, "cloudos/b")
	})
}
