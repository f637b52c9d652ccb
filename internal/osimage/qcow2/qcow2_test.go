package qcow2

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestWrite(t *testing.T) {
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("SKIP: qemu-img is not installed")
	}
	raw := make([]byte, 9<<20+512)
	noise := rand.NewChaCha8([32]byte{1})
	noise.Read(raw[1<<20 : 2<<20])
	copy(raw[5<<20:], bytes.Repeat([]byte("pattern "), 40000))
	copy(raw[3<<20:4<<20], raw[1<<20:]) // the same again, of both kinds
	copy(raw[7<<20:8<<20], raw[5<<20:6<<20])
	copy(raw[len(raw)-5:], "end")
	dir := t.TempDir()
	p, back := filepath.Join(dir, "q"), filepath.Join(dir, "r")
	f, err := os.Create(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Write(f, bytes.NewReader(raw), int64(len(raw))); err != nil {
		t.Fatal(err)
	}
	if info, err := f.Stat(); err != nil || info.Size() > 2<<20 {
		t.Errorf("it has %d bytes, %v: the same content is in it twice", info.Size(), err)
	}
	for _, args := range [][]string{{"check", p}, {"convert", "-O", "raw", p, back}} {
		if out, err := exec.Command(img, args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
		}
	}
	if b, err := os.ReadFile(back); err != nil || !bytes.Equal(b, raw) {
		t.Fatalf("the disk came back with %d bytes, %v", len(b), err)
	}
}
