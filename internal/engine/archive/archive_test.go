package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func root(t *testing.T) (Root, string) {
	t.Helper()
	dir := t.TempDir()
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return In(f), dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func archive(t *testing.T, entries ...*tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		body := ""
		if h.Typeflag == tar.TypeReg {
			body = "new " + h.Name
			h.Size = int64(len(body))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		must(t, w.WriteHeader(h))
		_, err := io.WriteString(w, body)
		must(t, err)
	}
	must(t, w.Close())
	return &b
}

// TestNothingOutsideTheRoot extracts hostile archives into a root beside which a
// secret lies.
func TestNothingOutsideTheRoot(t *testing.T) {
	for name, entries := range map[string][]*tar.Header{
		"dotdot":            {{Name: "../../secret", Typeflag: tar.TypeReg}},
		"absolute":          {{Name: "/../secret", Typeflag: tar.TypeReg}},
		"relative link":     {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "l/secret", Typeflag: tar.TypeReg}},
		"absolute link":     {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUT"}, {Name: "l/secret", Typeflag: tar.TypeReg}},
		"link to file":      {{Name: "secret", Typeflag: tar.TypeSymlink, Linkname: "../secret"}, {Name: "secret", Typeflag: tar.TypeReg}},
		"hard link out":     {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../../secret"}, {Name: "h", Typeflag: tar.TypeReg}},
		"hard link by link": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUT"}, {Name: "h", Typeflag: tar.TypeLink, Linkname: "l/secret"}},
		"magic link":        {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/proc/self/cwd"}, {Name: "l/x", Typeflag: tar.TypeReg}},
	} {
		outer := t.TempDir()
		secret := filepath.Join(outer, "secret")
		must(t, os.WriteFile(secret, []byte("keep"), 0o600))
		in := filepath.Join(outer, "root")
		must(t, os.MkdirAll(filepath.Join(in, "dst"), 0o755))
		f, err := os.OpenFile(in, unix.O_PATH|unix.O_DIRECTORY, 0)
		must(t, err)
		for _, h := range entries {
			h.Linkname = strings.ReplaceAll(h.Linkname, "OUT", outer)
		}
		_ = In(f).Extract(context.Background(), "/dst", archive(t, entries...), ExtractOptions{})
		f.Close()
		if b, err := os.ReadFile(secret); err != nil || string(b) != "keep" {
			t.Errorf("%s: the secret is %q, %v", name, b, err)
		}
		list, _ := os.ReadDir(outer)
		if len(list) != 2 {
			t.Errorf("%s: something appeared beside the root: %v", name, list)
		}
		var st unix.Stat_t
		must(t, unix.Stat(secret, &st))
		if st.Nlink != 1 {
			t.Errorf("%s: the secret has another name", name)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	src, dir := root(t)
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o750))
	must(t, os.WriteFile(filepath.Join(dir, "a/f"), []byte("data"), 0o4755))
	must(t, os.Chmod(filepath.Join(dir, "a/f"), 0o755|os.ModeSetuid))
	must(t, os.Chown(filepath.Join(dir, "a/f"), 12, 34))
	must(t, os.Chmod(filepath.Join(dir, "a/f"), 0o755|os.ModeSetuid))
	must(t, os.Link(filepath.Join(dir, "a/f"), filepath.Join(dir, "a/g")))
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, "a/l")))
	must(t, unix.Mkfifo(filepath.Join(dir, "a/p"), 0o600))
	must(t, unix.Setxattr(filepath.Join(dir, "a/f"), "user.x", []byte("y"), 0))
	var b bytes.Buffer
	must(t, src.Write(context.Background(), "/a", &b, WriteOptions{As: "a"}))
	dst, to := root(t)
	must(t, dst.Extract(context.Background(), "/", &b, ExtractOptions{}))
	var f, g unix.Stat_t
	must(t, unix.Lstat(filepath.Join(to, "a/f"), &f))
	must(t, unix.Lstat(filepath.Join(to, "a/g"), &g))
	if f.Ino != g.Ino || f.Uid != 12 || f.Gid != 34 || f.Mode&0o7777 != 0o4755 {
		t.Errorf("file: %o %d:%d, inodes %d %d", f.Mode, f.Uid, f.Gid, f.Ino, g.Ino)
	}
	v := make([]byte, 9)
	if n, err := unix.Getxattr(filepath.Join(to, "a/f"), "user.x", v); err != nil || string(v[:n]) != "y" {
		t.Errorf("xattr: %q, %v", v[:max(n, 0)], err)
	}
	if l, err := os.Readlink(filepath.Join(to, "a/l")); err != nil || l != "/etc/passwd" {
		t.Errorf("link: %q, %v", l, err)
	}
	if fi, err := os.Lstat(filepath.Join(to, "a/p")); err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		t.Errorf("fifo: %v, %v", fi, err)
	}
	if fi, err := os.Stat(filepath.Join(to, "a/b")); err != nil || fi.Mode().Perm() != 0o750 {
		t.Errorf("directory: %v, %v", fi, err)
	}
}

func TestOverwriting(t *testing.T) {
	for _, keep := range []bool{false, true} {
		r, dir := root(t)
		must(t, os.MkdirAll(filepath.Join(dir, "d/x"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
		err := r.Extract(context.Background(), "/", archive(t, &tar.Header{Name: "d", Typeflag: tar.TypeReg}), ExtractOptions{NoOverwriteDirNonDir: keep})
		if fault.Is(err, fault.Invalid) != keep {
			t.Errorf("file over directory, keep %v: %v", keep, err)
		}
		err = r.Extract(context.Background(), "/", archive(t, &tar.Header{Name: "f", Typeflag: tar.TypeDir, Mode: 0o755}), ExtractOptions{NoOverwriteDirNonDir: keep})
		if fault.Is(err, fault.Invalid) != keep {
			t.Errorf("directory over file, keep %v: %v", keep, err)
		}
	}
}

func TestLookup(t *testing.T) {
	r, dir := root(t)
	must(t, os.MkdirAll(filepath.Join(dir, "real"), 0o755))
	must(t, os.Symlink("real", filepath.Join(dir, "link")))
	for name, want := range map[string]string{"/link": "/real", "link": "/real"} {
		s, err := r.Lookup(name)
		if err != nil || s.LinkTarget != want || s.Mode&os.ModeSymlink == 0 {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	if s, err := r.Lookup("/link/."); err != nil || !s.Mode.IsDir() {
		t.Errorf("/link/.: %+v, %v", s, err)
	}
	if _, err := r.Lookup("/none"); !fault.Is(err, fault.NotFound) {
		t.Errorf("missing: %v", err)
	}
	if s, err := r.Lookup("/"); err != nil || s.Name != "/" {
		t.Errorf("root: %+v, %v", s, err)
	}
}

func TestCutOffArchive(t *testing.T) {
	r, _ := root(t)
	b := archive(t, &tar.Header{Name: "f", Typeflag: tar.TypeReg}).Bytes()
	err := r.Extract(context.Background(), "/", bytes.NewReader(b[:515]), ExtractOptions{})
	if !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.Extract(ctx, "/", bytes.NewReader(b), ExtractOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func FuzzExtract(f *testing.F) {
	f.Add([]byte("x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, dir := root(t)
		must(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		_ = r.Extract(context.Background(), "/d", bytes.NewReader(b), ExtractOptions{})
	})
}
