package osimage

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// numbered is a disk of a machine with several: at is its place among PCI devices, which is the order in which the
// kernel finds them, and boot the firmware's.
func numbered(name, file, at, boot string) []string {
	return []string{"-drive", "file=" + file + ",format=raw,if=none,id=" + name, "-device", "virtio-blk-pci,drive=" + name + ",serial=" + name + ",addr=" + at + ",bootindex=" + boot}
}

// sumOf is a digest of a whole file.
func sumOf(t *testing.T, p string) string {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// besides starts a machine from the second of two disks.
func besides(t *testing.T, other, disk string, more ...string) *machine {
	t.Helper()
	args := append(numbered("other", other, "0x10", "1"), numbered("own", disk, "0x11", "0")...)
	m := start(t, 20*time.Minute, append(append([]string{"-action", "reboot=reset"}, args...), more...)...)
	m.connect()
	return m
}

// TestTwoDisks starts a machine from the second of two disks with systems: its data are those of the disk that it was
// started from, and an upgrade is written there. The other disk stays as it was, byte for byte.
func TestTwoDisks(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	key := signer(t)
	disk, other := slotDisk(t, "1.0.0", key), slotDisk(t, "0.9.0", signer(t))
	next := releaseOf(t, "1.1.0", func(o *osimage.Options) { o.Sign = []ed25519.PrivateKey{key} })
	m := fromDisk(t, disk)
	m.must("version")
	m.keep()
	m.off()
	before := sumOf(t, other)

	m = besides(t, other, disk)
	m.keptOn("/dev/vdb5")
	m.at("1.0.0", "a")
	if out, err := m.cloudos("upgrade", "--wait", "0", next); err != nil {
		t.Fatal(out)
	}
	m.again()
	s := m.os("upgraded", func(s system.Status) bool { return s.Last != nil && s.Last.Outcome == system.Succeeded })
	if s.Version != "1.1.0" || s.Next != "b" || !s.Slots[1].Running || s.Slots[0].Version != "1.0.0" {
		t.Fatalf("the machine is %+v", s)
	}
	m.keptOn("/dev/vdb5")
	m.off()
	if sumOf(t, other) != before {
		t.Fatal("the other disk was written to")
	}

	// With UEFI as well.
	m = besides(t, other, disk, uefi(t)...)
	m.keptOn("/dev/vdb5")
	m.at("1.1.0", "b")
	m.off()
	if sumOf(t, other) != before {
		t.Fatal("the other disk was written to")
	}
}

// TestCopiedDisk starts a machine with a disk and a copy of it that was never started: which of both it was started from
// cannot be told, so nothing is kept and nothing written until one is taken out.
func TestCopiedDisk(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	key := signer(t)
	disk := slotDisk(t, "1.0.0", key)
	next := releaseOf(t, "1.1.0", func(o *osimage.Options) { o.Sign = []ed25519.PrivateKey{key} })
	other := filepath.Join(t.TempDir(), "copy.raw")
	copyFile(t, other, disk)
	before := sumOf(t, other)
	m := besides(t, other, disk)
	s := m.settled()
	if s.State != vmwire.StateSafe || s.Data.Kind != "memory" || len(s.Problems) == 0 || !strings.Contains(s.Problems[0], "/dev/vda and /dev/vdb are copies of each other") {
		t.Fatalf("the machine is %+v", s)
	}
	if out, err := m.cloudos("upgrade", "--wait", "0", next); err == nil {
		t.Fatal(out)
	}
	m.off()
	if sumOf(t, other) != before || sumOf(t, disk) != before {
		t.Fatal("a disk was written to")
	}
	// Started alone it gets an identity of its own, and is then known among copies.
	m = fromDisk(t, disk)
	m.must("version")
	m.at("1.0.0", "a")
	m.keep()
	m.off()
	m = besides(t, other, disk)
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		t.Fatalf("what was kept is %q", out)
	}
	if s := m.settled(); s.State != vmwire.StateReady || s.Data.Device != "/dev/vdb5" || len(s.Problems) > 0 {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
	if sumOf(t, other) != before {
		t.Fatal("the other disk was written to")
	}
}

// TestTwoDisksOwner does the same with disks that their owner signed: the firmware says which one it started. Both
// have the same system, so that the root alone would not tell.
func TestTwoDisksOwner(t *testing.T) {
	long(t)
	needs(t, emptyVars)
	key := signer(t)
	owner, vars := ownersKeys(t)
	of := func(b *osimage.Options) { b.Owner, b.Sign = owner, []ed25519.PrivateKey{key} }
	disk := filepath.Join(build(t, "disk", func(b *osimage.Options) { of(b); b.DiskFormat, b.Version = "raw", "1.0.0" }), "disk.raw")
	next := releaseOf(t, "1.1.0", of)
	other := filepath.Join(t.TempDir(), "copy.raw")
	copyFile(t, other, disk)
	before := sumOf(t, other)
	firmware := secure(t, vars)
	m := start(t, 10*time.Minute, append(append([]string{"-action", "reboot=reset"}, numbered("own", disk, "0x11", "0")...), firmware...)...)
	m.connect()
	m.at("1.0.0", "a")
	m.keep()
	m.off()
	m = besides(t, other, disk, firmware...)
	m.keptOn("/dev/vdb5")
	m.at("1.0.0", "a")
	if out, err := m.cloudos("upgrade", "--wait", "0", "--no-reboot", next); err != nil {
		t.Fatal(out)
	}
	m.at("1.0.0", "b")
	m.off()
	if sumOf(t, other) != before {
		t.Fatal("the other disk was written to")
	}
}

// keptOn finds what keep kept, on that device, with nothing wrong.
func (m *machine) keptOn(device string) {
	m.t.Helper()
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		m.t.Fatalf("what was kept is %q", out)
	}
	if s := m.settled(); s.Data.Device != device || len(s.Problems) > 0 {
		m.t.Fatalf("the machine is %+v", s)
	}
}
