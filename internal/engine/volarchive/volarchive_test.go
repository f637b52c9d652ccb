package volarchive

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func dir(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// archiveOf makes an archive of a small tree.
func archiveOf(t *testing.T) []byte {
	t.Helper()
	src := t.TempDir()
	must(t, os.MkdirAll(src+"/a/b", 0o750))
	must(t, os.WriteFile(src+"/a/f", bytes.Repeat([]byte("data"), 1000), 0o640))
	must(t, os.Link(src+"/a/f", src+"/a/g"))
	must(t, os.Symlink("/etc/passwd", src+"/l"))
	must(t, os.WriteFile(src+"/empty", nil, 0o600))
	must(t, unix.Setxattr(src+"/a/f", "user.x", bytes.Repeat([]byte("y"), 2000), 0))
	must(t, unix.Setxattr(src+"/a/f", "trusted.z", []byte("t"), 0))
	var b bytes.Buffer
	if _, err := Write(context.Background(), &b, dir(t, src), Head{Name: "v"}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func restore(t *testing.T, b []byte) (string, error) {
	t.Helper()
	to := t.TempDir()
	_, err := Read(context.Background(), bytes.NewReader(b), false, func(Head) (*os.File, error) { return os.Open(to) })
	return to, err
}

func TestRoundTrip(t *testing.T) {
	to, err := restore(t, archiveOf(t))
	must(t, err)
	var f, g unix.Stat_t
	must(t, unix.Lstat(to+"/a/f", &f))
	must(t, unix.Lstat(to+"/a/g", &g))
	if f.Ino != g.Ino || f.Size != 4000 || f.Mode&0o777 != 0o640 {
		t.Errorf("%+v", f)
	}
	v := make([]byte, 4096)
	if n, err := unix.Getxattr(to+"/a/f", "user.x", v); n != 2000 {
		t.Errorf("user.x: %d %v", n, err)
	}
	if n, err := unix.Getxattr(to+"/a/f", "trusted.z", v); n != 1 {
		t.Errorf("trusted.z: %d %v", n, err)
	}
	if l, _ := os.Readlink(to + "/l"); l != "/etc/passwd" {
		t.Errorf("link %q", l)
	}
}

// rebuild lets fn change the entries of an archive, as somebody would who packs it
// anew without knowing how to make the sum.
func rebuild(t *testing.T, b []byte, fn func(h *tar.Header, body []byte) ([]byte, bool)) []byte {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(b))
	must(t, err)
	defer z.Close()
	var out bytes.Buffer
	zw, err := zstd.NewWriter(&out)
	must(t, err)
	tw := tar.NewWriter(zw)
	tr := tar.NewReader(z)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		body, err := io.ReadAll(tr)
		must(t, err)
		body, keep := fn(h, body)
		if !keep {
			continue
		}
		h.Size = int64(len(body))
		must(t, tw.WriteHeader(h))
		_, err = tw.Write(body)
		must(t, err)
	}
	must(t, tw.Close())
	must(t, zw.Close())
	return out.Bytes()
}

func TestChanged(t *testing.T) {
	good := archiveOf(t)
	for what, fn := range map[string]func(h *tar.Header, body []byte) ([]byte, bool){
		"content": func(h *tar.Header, b []byte) ([]byte, bool) {
			return bytes.Replace(b, []byte("datad"), []byte("dataD"), 1), true
		},
		"a mode":   func(h *tar.Header, b []byte) ([]byte, bool) { h.Mode |= 0o4000; return b, true },
		"one less": func(h *tar.Header, b []byte) ([]byte, bool) { return b, h.Name != "data/empty" },
		"no end":   func(h *tar.Header, b []byte) ([]byte, bool) { return b, h.Name != endEntry },
		"no head":  func(h *tar.Header, b []byte) ([]byte, bool) { return b, h.Name != headEntry },
		"outside": func(h *tar.Header, b []byte) ([]byte, bool) {
			h.Name = strings.Replace(h.Name, "data/empty", "empty", 1)
			return b, true
		},
		"version": func(h *tar.Header, b []byte) ([]byte, bool) {
			return bytes.Replace(b, []byte(`"Version":1`), []byte(`"Version":2`), 1), true
		},
		"a longer end": func(h *tar.Header, b []byte) ([]byte, bool) {
			if h.Name == endEntry {
				b = append(b, make([]byte, 2<<20)...)
			}
			return b, true
		},
		"the name only": func(h *tar.Header, b []byte) ([]byte, bool) {
			h.Name = strings.Replace(h.Name, "/empty", "/other", 1)
			return b, true
		},
	} {
		if _, err := restore(t, rebuild(t, good, fn)); !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for n := 0; n < len(good); n += 97 {
		if _, err := restore(t, good[:n]); err == nil {
			t.Errorf("cut at %d: restored", n)
		}
		b := bytes.Clone(good)
		b[n] ^= 0x10
		if _, err := restore(t, b); err == nil {
			// A bit of zstd that means nothing may flip: then the content is the same.
			to, _ := restore(t, b)
			if c, _ := os.ReadFile(filepath.Join(to, "a/f")); string(c) != strings.Repeat("data", 1000) {
				t.Errorf("flipped at %d: restored", n)
			}
		}
	}
}

func TestDevices(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root to make device nodes")
	}
	src := t.TempDir()
	must(t, unix.Mknod(src+"/whiteout", unix.S_IFCHR|0o600, 0))
	var b bytes.Buffer
	_, err := Write(context.Background(), &b, dir(t, src), Head{Name: "v"})
	must(t, err)
	if _, err := restore(t, b.Bytes()); err != nil {
		t.Errorf("overlayfs' mark: %v", err)
	}
	must(t, unix.Mknod(src+"/zero", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))))
	b.Reset()
	_, err = Write(context.Background(), &b, dir(t, src), Head{Name: "v"})
	must(t, err)
	if _, err := restore(t, b.Bytes()); !fault.Is(err, fault.Forbidden) {
		t.Errorf("a device: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	var b bytes.Buffer
	d, err := os.Open(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	if _, err := Write(context.Background(), &b, d, Head{Name: "v"}); err != nil {
		f.Fatal(err)
	}
	z, _ := zstd.NewReader(bytes.NewReader(b.Bytes()))
	plain, _ := io.ReadAll(z)
	z.Close()
	f.Add(plain)
	f.Fuzz(func(t *testing.T, plain []byte) {
		// Compressed here, so that the fuzzer reaches what lies inside.
		var c bytes.Buffer
		zw, _ := zstd.NewWriter(&c)
		_, _ = zw.Write(plain)
		_ = zw.Close()
		outer := t.TempDir()
		if err := os.Mkdir(outer+"/in", 0o755); err != nil {
			t.Fatal(err)
		}
		_, _ = Read(context.Background(), &c, false, func(Head) (*os.File, error) { return os.Open(outer + "/in") })
		if l, _ := os.ReadDir(outer); len(l) != 1 {
			t.Errorf("something lies outside: %v", l)
		}
	})
}
