package osimage

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// TestSlots has the boot loader try a slot with nothing in it: after three starts
// the good one runs and says so. Then the running slot is the one that is tried: it confirms itself.
func TestSlots(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	p := filepath.Join(build(t, "disk", func(o *osimage.Options) { o.DiskFormat = "raw" }), "disk.raw")
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	esp := make([]byte, 162<<20)
	if _, err := f.ReadAt(esp, 0); err != nil {
		t.Fatal(err)
	}
	at := int64(bytes.Index(esp, []byte("# GRUB Environment Block\ngood=a")))
	if at < 0 {
		t.Fatal("the image has no block of variables")
	}
	set := func(s slots.State) {
		t.Helper()
		b, err := s.Block()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	block := func() slots.State {
		t.Helper()
		b := make([]byte, slots.Size)
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		s, err := slots.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	args := []string{"-action", "reboot=reset", "-drive", "file=" + p + ",format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d,bootindex=0"}

	set(slots.State{Good: "a"}.Start("b"))
	m := start(t, 8*time.Minute, args...)
	m.connect()
	m.must("version")
	for range 50 {
		if s := m.settled(); len(s.Problems) > 0 {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if s := m.settled(); len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "slot b did not come up") {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
	if s := block(); !s.Fallen() || s.Good != "a" {
		t.Fatalf("the block says %+v", s)
	}

	set(slots.State{Good: "b"}.Start("a"))
	m = start(t, 5*time.Minute, args...)
	m.connect()
	m.must("version")
	m.await("slot a came up well", time.Minute)
	m.off()
	if s := block(); s != (slots.State{Good: "a"}) {
		t.Fatalf("the block says %+v", s)
	}
}
