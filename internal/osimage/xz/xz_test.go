package xz_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage/xz"
)

func TestPack(t *testing.T) {
	t.Setenv("XZ_OPT", "--check=sha256") // nothing of the caller's matters
	b := bytes.Repeat([]byte("some words that repeat, "), 4000)
	for i := range 1000 {
		b[rand.IntN(len(b))] = byte(i)
	}
	cache := t.TempDir()
	p, err := xz.New("amd64", cache)
	if err != nil {
		t.Fatal(err)
	}
	pack := func(code bool) []byte {
		out, err := p.Pack(context.Background(), b, code, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("xz", "-dc")
		cmd.Stdin = bytes.NewReader(out)
		if back, err := cmd.Output(); err != nil || !bytes.Equal(back, b) {
			t.Errorf("unpacked, it is something else: %v", err)
		}
		if out[7] != 1 { // the stream's flags: CRC32
			t.Errorf("the check is %d", out[7])
		}
		return out
	}
	first := pack(false)
	if code := pack(true); bytes.Equal(code, first) {
		t.Error("programs are packed as all else is")
	}
	kept, err := filepath.Glob(filepath.Join(cache, "*"))
	if err != nil || len(kept) != 2 {
		t.Fatalf("kept: %v, %v", kept, err)
	}
	old := time.Now().Add(-time.Hour)
	for _, k := range kept {
		if err := os.Chtimes(k, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(pack(false), first) {
		t.Error("what was kept is something else")
	}
	used := 0
	for _, k := range kept {
		if info, err := os.Stat(k); err == nil && info.ModTime().After(old.Add(time.Minute)) {
			used++
		}
	}
	if used != 1 {
		t.Errorf("%d of what was kept were used", used)
	}
	for _, k := range kept { // a file that was cut off, or changed
		f, err := os.OpenFile(k, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt([]byte("x"), 100)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(pack(false), first) {
		t.Error("a changed file was taken")
	}
	if err := os.Chtimes(kept[0], old, old.Add(-30*24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := xz.New("amd64", cache); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(kept[0]); !os.IsNotExist(err) {
		t.Errorf("what nobody used for a month is still there: %v", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	stop()
	if _, err := p.Pack(ctx, []byte("new"), false, 4096); err == nil {
		t.Error("packed though it was called off")
	}
}
