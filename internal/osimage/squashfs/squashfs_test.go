package squashfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cloudos-io/cloudos/internal/osimage/squashfs"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/osimage/xz"
)

// TestRead has another program read what was written, in each of the ways.
func TestRead(t *testing.T) {
	pack, err := xz.New("amd64", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 300_000) // nothing is gained
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	long := bytes.Repeat([]byte("a line that comes again\n"), 200_000)
	content := map[string][]byte{"bin/program": append(bytes.Clone(long), noise...), "etc/empty": nil, "etc/noise": noise, "etc/exact": long[:1<<20]}
	build := func() *tree.Tree {
		tr := tree.New()
		for name, b := range content {
			perm := fs.FileMode(0o644)
			if name == "bin/program" {
				perm = 0o755
			}
			tr.Bytes(name, perm, "", b)
		}
		for i := range 700 { // a listing of several runs and metadata blocks
			tr.Bytes(fmt.Sprintf("many/file-with-a-long-name-%04d", i), 0o600, "", fmt.Appendf(nil, "content %d", i))
		}
		tr.Symlink("etc/link", "../bin/program")
		return tr
	}
	for name, write := range map[string]func(io.WriteSeeker) (squashfs.Usage, error){
		"zstd":   func(w io.WriteSeeker) (squashfs.Usage, error) { return squashfs.Write(w, build(), 1704067200) },
		"stored": func(w io.WriteSeeker) (squashfs.Usage, error) { return squashfs.WriteStored(w, build(), 1704067200) },
		"xz": func(w io.WriteSeeker) (squashfs.Usage, error) {
			return squashfs.WriteSmall(w, build(), 1704067200, func(b []byte, code bool, window int) ([]byte, error) {
				return pack.Pack(context.Background(), b, code, window)
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var images [2][]byte
			for i := range images {
				f, err := os.Create(filepath.Join(dir, "image"))
				if err != nil {
					t.Fatal(err)
				}
				usage, err := write(f)
				f.Close()
				if err != nil {
					t.Fatal(err)
				}
				if name != "stored" && (usage["bin/program"] > 400_000 || usage["etc/noise"] != int64(len(noise))) {
					t.Errorf("the program takes %d bytes, noise %d", usage["bin/program"], usage["etc/noise"])
				}
				if images[i], err = os.ReadFile(f.Name()); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(images[0], images[1]) || len(images[0])%4096 != 0 {
				t.Errorf("the same tree became something else, or %d bytes are no whole pages", len(images[0]))
			}
			root := filepath.Join(dir, "root")
			if out, err := exec.Command("unsquashfs", "-no-progress", "-strict-errors", "-d", root, filepath.Join(dir, "image")).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for name, want := range content {
				if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s has %d bytes of %d, or others: %v", name, len(got), len(want), err)
				}
			}
			if info, err := os.Stat(filepath.Join(root, "bin/program")); err != nil || info.Mode() != 0o755 || info.ModTime().Unix() != 1704067200 {
				t.Errorf("%v, %v", info, err)
			}
			if got, err := os.Readlink(filepath.Join(root, "etc/link")); err != nil || got != "../bin/program" {
				t.Errorf("the link leads to %q, %v", got, err)
			}
			entries, err := os.ReadDir(filepath.Join(root, "many"))
			if err != nil || len(entries) != 700 {
				t.Errorf("%d files of 700: %v", len(entries), err)
			}
			for i, e := range entries {
				if got, err := os.ReadFile(filepath.Join(root, "many", e.Name())); err != nil || string(got) != fmt.Sprintf("content %d", i) {
					t.Fatalf("%s: %q, %v", e.Name(), got, err)
				}
			}
		})
	}
}

// TestNotPacked tells of a block that could not be packed, of a file and of a table.
func TestNotPacked(t *testing.T) {
	broken := errors.New("no more memory")
	for _, fail := range []func(b []byte) bool{
		func(b []byte) bool { return bytes.HasPrefix(b, []byte("content")) },
		func(b []byte) bool { return !bytes.HasPrefix(b, []byte("content")) },
	} {
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		tr := tree.New()
		for i := range 20 {
			tr.Bytes(fmt.Sprintf("file%d", i), 0o644, "", fmt.Appendf(nil, "content %d", i))
		}
		_, err = squashfs.WriteSmall(f, tr, 0, func(b []byte, _ bool, _ int) ([]byte, error) {
			if fail(b) {
				return nil, broken
			}
			return b, nil
		})
		if !errors.Is(err, broken) {
			t.Errorf("%v", err)
		}
	}
}
