package upload

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

func pack(t testing.TB, hs ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		body := h.Uname // carries the content
		h.Uname = ""
		h.Size = int64(len(body))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func walkAll(t testing.TB, f fsutil.FS, target string) []string {
	t.Helper()
	var out []string
	err := f.Walk(context.Background(), target, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		i, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := i.Sys().(*types.Stat); !ok || st.Path != p {
			t.Errorf("%s has no stat of its own: %+v", p, i.Sys())
		}
		out = append(out, p)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestTree(t *testing.T) {
	b := pack(t,
		tar.Header{Name: "./z", Uname: "last"},
		tar.Header{Name: "a/b/c", Uname: "deep"}, // its directories are implied
		tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o700},
		tar.Header{Name: "a-b", Uname: "beside"},
		tar.Header{Name: "/abs", Uname: "1"},
		tar.Header{Name: "abs", Uname: "two"},
		tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "a/b/c"},
		tar.Header{Name: "setuid", Mode: 0o4755},
	)
	var z, s bytes.Buffer
	zw := gzip.NewWriter(&z)
	_, _ = zw.Write(b)
	_ = zw.Close()
	sw, _ := zstd.NewWriter(&s)
	_, _ = sw.Write(b)
	_ = sw.Close()
	for name, raw := range map[string][]byte{"plain": b, "gzip": z.Bytes(), "zstd": s.Bytes()} {
		tree, err := Read(t.Context(), bytes.NewReader(raw), t.TempDir())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer tree.Close()
		if !IsArchive(raw) {
			t.Errorf("%s is not taken for an archive", name)
		}
		if got, want := walkAll(t, tree, ""), []string{"a", "a/b", "a/b/c", "a-b", "abs", "hard", "link", "setuid", "z"}; !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
		if got := walkAll(t, tree, "/a"); !slices.Equal(got, []string{"a", "a/b", "a/b/c"}) {
			t.Errorf("%s: below a: %v", name, got)
		}
		for file, want := range map[string]string{"abs": "two", "hard": "deep", "/a/b/c": "deep", "setuid": ""} {
			r, err := tree.Open(file)
			if err != nil {
				t.Errorf("%s: %s: %v", name, file, err)
				continue
			}
			if got, _ := io.ReadAll(r); string(got) != want {
				t.Errorf("%s: %s is %q", name, file, got)
			}
		}
		for _, file := range []string{"link", "a", "nosuch", "../z", "abs/x"} {
			if r, err := tree.Open(file); err == nil {
				t.Errorf("%s: %s was opened: %v", name, file, r)
			}
		}
		if n := tree.find("a"); n.mode.Perm() != 0o700 {
			t.Errorf("%s: a has mode %v", name, n.mode)
		}
		if n := tree.find("setuid"); n.mode&fs.ModeSetuid == 0 {
			t.Errorf("%s: the setuid bit is lost", name)
		}
	}
}

// The walk must be in the order and have the manners that fsutil's own has.
func TestWalkSkips(t *testing.T) {
	tree, err := Read(t.Context(), bytes.NewReader(pack(t, tar.Header{Name: "a/1"}, tar.Header{Name: "a/2"}, tar.Header{Name: "b"})), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	for skip, want := range map[string]string{"a": "a b", "a/1": "a a/1 b", "b": "a a/1 a/2 b"} {
		var got []string
		err := tree.Walk(t.Context(), "", func(p string, _ fs.DirEntry, _ error) error {
			got = append(got, p)
			if p == skip {
				return fs.SkipDir
			}
			return nil
		})
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("skipping at %s: %v, %v; want %s", skip, got, err, want)
		}
	}
	err = tree.Walk(t.Context(), "nosuch", func(_ string, _ fs.DirEntry, err error) error { return err })
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a target that there is not: %v", err)
	}
	f, err := fsutil.NewFilterFS(tree, &fsutil.FilterOpt{ExcludePatterns: []string{"a", "!a/2"}, FollowPaths: []string{"nosuch", "b", "a/2"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := walkAll(t, f, ""); !slices.Equal(got, []string{"a", "a/2", "b"}) {
		t.Errorf("filtered: %v", got)
	}
}

func TestRefused(t *testing.T) {
	long := strings.Repeat("x", maxPath+1)
	for name, hs := range map[string][]tar.Header{
		"up":             {{Name: "../x"}},
		"up inside":      {{Name: "a/../../x"}},
		"deep":           {{Name: strings.Repeat("d/", maxDepth+1) + "f"}},
		"long":           {{Name: long}},
		"long link":      {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: long}},
		"device":         {{Name: "d", Typeflag: tar.TypeChar}},
		"below a file":   {{Name: "f"}, {Name: "f/x"}},
		"below a link":   {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/"}, {Name: "l/x"}},
		"link to none":   {{Name: "h", Typeflag: tar.TypeLink, Linkname: "x"}},
		"link to out":    {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../x"}},
		"link to itself": {{Name: "h", Typeflag: tar.TypeLink, Linkname: "h"}},
	} {
		if tree, err := Read(t.Context(), bytes.NewReader(pack(t, hs...)), t.TempDir()); err == nil {
			t.Errorf("%s: %v", name, walkAll(t, tree, ""))
			tree.Close()
		}
	}
}

// A sparse file of a terabyte is a few bytes of tar.
func TestSparse(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(dir + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"gnu", "posix"} {
		b, err := exec.Command("tar", "--format="+format, "-C", dir, "-S", "-c", "f").Output()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Read(t.Context(), bytes.NewReader(b), dir); err == nil || !strings.Contains(err.Error(), "sparse") {
			t.Errorf("%s: %d bytes: %v", format, len(b), err)
		}
	}
}

func TestHugeClaim(t *testing.T) {
	var b bytes.Buffer
	_ = tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "huge", Mode: 0o644, Size: 1 << 60})
	_, err := Read(t.Context(), &b, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "disk") {
		t.Errorf("%v", err)
	}
}

func TestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Read(ctx, bytes.NewReader(pack(t, tar.Header{Name: "f"})), t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(pack(f, tar.Header{Name: "a/b", Uname: "x"}, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "a"}))
	f.Add(pack(f, tar.Header{Name: "a", Uname: "x"}, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "a"}))
	f.Add([]byte{0x1f, 0x8b})
	f.Fuzz(func(t *testing.T, b []byte) {
		tree, err := Read(t.Context(), bytes.NewReader(b), t.TempDir())
		if err != nil {
			return
		}
		defer tree.Close()
		last := ""
		err = tree.Walk(t.Context(), "", func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if strings.HasPrefix(p, "/") || slices.Contains(strings.Split(p, "/"), "..") {
				return fmt.Errorf("%q leads out", p)
			}
			if !before(last, p) {
				return fmt.Errorf("%q comes after %q", p, last)
			}
			last = p
			if d.Type().IsRegular() {
				r, err := tree.Open(p)
				if err != nil {
					return err
				}
				n, err := io.Copy(io.Discard, r)
				if i, _ := d.Info(); err != nil || n != i.Size() {
					return fmt.Errorf("%q has %d bytes, not %d: %v", p, n, i.Size(), err)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// before is fsutil's order: by path elements.
func before(a, b string) bool {
	return a == "" || slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) < 0
}

// TestLongNames refuses an archive of few packed bytes whose names would fill the memory.
func TestLongNames(t *testing.T) {
	r, w := io.Pipe()
	defer r.Close()
	go func() {
		z := gzip.NewWriter(w)
		tw := tar.NewWriter(z)
		deep := strings.Repeat("/"+strings.Repeat("d", 250), 15)
		for i := range 1 << 17 {
			if tw.WriteHeader(&tar.Header{Name: strconv.Itoa(i) + deep + "/f", Typeflag: tar.TypeSymlink, Linkname: "x"}) != nil {
				return // refused
			}
		}
		w.CloseWithError(errors.Join(tw.Close(), z.Close()))
	}()
	if _, err := Read(t.Context(), r, t.TempDir()); err == nil || !strings.Contains(err.Error(), "names and links") {
		t.Errorf("%v", err)
	}
}
