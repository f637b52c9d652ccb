package overlay

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	"golang.org/x/sys/unix"
)

func newStore(t testing.TB, root string) *Store {
	t.Helper()
	s, err := New(Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: mounting needs root")
	}
}

// chain makes layers' directories from path lists, lowest first.
func chain(t testing.TB, root string, layers ...map[string]string) snapshot.Chain {
	t.Helper()
	c := snapshot.Chain{ID: "sha256:test"}
	for i, l := range layers {
		dir := filepath.Join(root, "image", fmt.Sprint(i), "fs")
		for p, body := range l {
			full := filepath.Join(dir, p)
			if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(full, []byte(body), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		c.Dirs = slices.Insert(c.Dirs, 0, dir)
	}
	return c
}

// path names what a mount descriptor holds.
func at(f *os.File, p string) string {
	return filepath.Join(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), p)
}

func modes(t *testing.T, f func(t *testing.T, s *Store, root string)) {
	needRoot(t)
	for _, mode := range []string{"append", "private", "mount2"} {
		t.Run(mode, func(t *testing.T) {
			root := t.TempDir()
			s := newStore(t, filepath.Join(root, "layers"))
			switch mode {
			case "append":
				if !s.cap.append {
					t.Skip("SKIP: this kernel's overlayfs has no lowerdir+")
				}
			case "private":
				s.cap.private = true
			case "mount2":
				s.cap.append = false
			}
			f(t, s, root)
		})
	}
}

func TestMountReadsChainAndKeepsWrites(t *testing.T) {
	modes(t, func(t *testing.T, s *Store, root string) {
		ctx := context.Background()
		c := chain(t, root, map[string]string{"a": "1", "d/x": "x"}, map[string]string{"a": "2", "b": "b"})
		for _, ephemeral := range []bool{false, true} {
			id := fmt.Sprintf("c-%v", ephemeral)
			if err := s.Create(ctx, id, c, ephemeral, 0); err != nil {
				t.Fatal(err)
			}
			for round := range 2 {
				f, err := s.Mount(ctx, id, false, snapshot.IDMap{})
				if err != nil {
					t.Fatal(err)
				}
				if b, _ := os.ReadFile(at(f, "a")); string(b) != "2" {
					t.Errorf("a = %q, want the top layer's", b)
				}
				if b, _ := os.ReadFile(at(f, "d/x")); string(b) != "x" {
					t.Errorf("d/x = %q", b)
				}
				if round == 1 {
					if b, _ := os.ReadFile(at(f, "new")); string(b) != "n" {
						t.Errorf("new = %q after a second mount", b)
					}
				}
				if err := os.WriteFile(at(f, "new"), []byte("n"), 0o644); err != nil {
					t.Error(err)
				}
				f.Close()
			}
			ro, err := s.Mount(ctx, id, true, snapshot.IDMap{})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(at(ro, "no"), nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("write to a read-only mount: %v, want EROFS", err)
			}
			ro.Close()
			if err := s.Remove(ctx, id); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Mount(ctx, id, false, snapshot.IDMap{}); !fault.Is(err, fault.NotFound) {
				t.Errorf("mount of a removed layer: %v, want not found", err)
			}
		}
	})
}

func TestMountChainIsReadOnly(t *testing.T) {
	modes(t, func(t *testing.T, s *Store, root string) {
		two := chain(t, root, map[string]string{"a": "1"}, map[string]string{"b": "2"})
		for n, c := range []snapshot.Chain{{}, {ID: two.ID, Dirs: two.Dirs[1:]}, two} {
			f, err := s.MountChain(context.Background(), c, snapshot.IDMap{})
			if err != nil {
				t.Fatalf("%d layers: %v", n, err)
			}
			ents, err := os.ReadDir(at(f, "."))
			if err != nil || len(ents) != n {
				t.Errorf("%d layers: %d entries, %v", n, len(ents), err)
			}
			if err := os.WriteFile(at(f, "no"), nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("%d layers: write: %v, want EROFS", n, err)
			}
			f.Close()
		}
	})
}

func TestIDMappedLayers(t *testing.T) {
	modes(t, func(t *testing.T, s *Store, root string) {
		ctx := context.Background()
		c := chain(t, root, map[string]string{"a": "1"}, map[string]string{"b": "2"})
		m := snapshot.IDMap{
			UIDs: []snapshot.IDRange{{Container: 0, Host: 300000, Size: 65536}},
			GIDs: []snapshot.IDRange{{Container: 0, Host: 400000, Size: 65536}},
		}
		owner := func(p string) (uint32, uint32) {
			var st unix.Stat_t
			if err := unix.Lstat(p, &st); err != nil {
				t.Fatal(err)
			}
			return st.Uid, st.Gid
		}
		if err := s.Create(ctx, "c", c, false, 0); err != nil {
			t.Fatal(err)
		}
		f, err := s.Mount(ctx, "c", false, m)
		if fault.Is(err, fault.Unsupported) {
			t.Skipf("SKIP: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{".", "a", "b"} {
			if u, g := owner(at(f, p) + "/."[:2*btoi(p == ".")]); u != 300000 || g != 400000 {
				t.Errorf("%s is owned by %d:%d, want 300000:400000", p, u, g)
			}
		}
		// What the mapped root writes is root's on disk.
		mappedWrite(t, 300000, 400000, at(f, "a"))
		_, upper, _, _, _ := s.Dirs("c")
		if u, g := owner(filepath.Join(upper, "a")); u != 0 || g != 0 {
			t.Errorf("a in upper is owned by %d:%d, want 0:0", u, g)
		}
		f.Close()
		r, err := s.MountChain(ctx, snapshot.Chain{Dirs: c.Dirs[:1]}, m)
		if err != nil {
			t.Fatal(err)
		}
		if u, _ := owner(at(r, "b")); u != 300000 {
			t.Errorf("b of one layer is owned by %d, want 300000", u)
		}
		r.Close()
	})
}

// mappedWrite opens p for writing as uid and gid, on a thread of its own.
func mappedWrite(t *testing.T, uid, gid int, p string) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := errors.Join(unix.Setfsgid(gid), unix.Setfsuid(uid))
		if err == nil {
			err = os.WriteFile(strings.Replace(p, "/self/", "/thread-self/", 1), []byte("x"), 0o644)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestManyLayers(t *testing.T) {
	modes(t, func(t *testing.T, s *Store, root string) {
		var ls []map[string]string
		for i := range 120 {
			ls = append(ls, map[string]string{fmt.Sprint("f", i): "x"})
		}
		c := chain(t, root, ls...)
		if err := s.Create(context.Background(), "c", c, false, 0); err != nil {
			t.Fatal(err)
		}
		f, err := s.Mount(context.Background(), "c", false, snapshot.IDMap{})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if ents, err := os.ReadDir(at(f, ".")); err != nil || len(ents) != 120 {
			t.Errorf("%d entries, %v", len(ents), err)
		}
	})
}

func TestChangesAndDiff(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s := newStore(t, filepath.Join(root, "layers"))
	ctx := context.Background()
	c := chain(t, root,
		map[string]string{"keep/a": "", "keep/b": "", "gone/x": "", "again/old": "", "again/both": "", "deep/er/f": "", "file": "", "swap/x": ""},
		map[string]string{"top": "", "again/top": "", "linkdir": "", "untouched/y": ""})
	if err := os.Symlink("keep", filepath.Join(c.Dirs[0], "sym")); err != nil {
		t.Fatal(err)
	}
	if err := s.Create(ctx, "c", c, false, 0); err != nil {
		t.Fatal(err)
	}
	f, err := s.Mount(ctx, "c", false, snapshot.IDMap{})
	if err != nil {
		t.Fatal(err)
	}
	do := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	do(os.Remove(at(f, "keep/a")),
		os.RemoveAll(at(f, "gone")),
		os.RemoveAll(at(f, "again")), os.Mkdir(at(f, "again"), 0o755), os.WriteFile(at(f, "again/both"), []byte("new"), 0o600), os.WriteFile(at(f, "again/fresh"), nil, 0o600),
		os.WriteFile(at(f, "deep/er/f"), []byte("changed"), 0o644),
		os.Mkdir(at(f, "made"), 0o755), os.WriteFile(at(f, "made/z"), []byte("zzzzz"), 0o644), os.Link(at(f, "made/z"), at(f, "made/z2")),
		os.Remove(at(f, "sym")), os.Mkdir(at(f, "sym"), 0o755), os.WriteFile(at(f, "sym/b"), nil, 0o644),
		os.RemoveAll(at(f, "swap")), os.WriteFile(at(f, "swap"), nil, 0o644),
		os.Chmod(at(f, "file"), 0o600),
		unix.Setxattr(at(f, "file"), "user.k", []byte("v"), 0),
	)
	f.Close()
	got, err := s.Changes(ctx, "c")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, ch := range got {
		lines = append(lines, ch.Kind.String()+" "+ch.Path)
	}
	want := []string{
		"C /again", "C /again/both", "A /again/fresh", "D /again/old", "D /again/top",
		"C /deep", "C /deep/er", "C /deep/er/f", "C /file", "D /gone", "C /keep", "D /keep/a",
		"A /made", "A /made/z", "A /made/z2", "C /swap", "C /sym", "A /sym/b",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("changes:\n got %q\nwant %q", lines, want)
	}
	if n, err := s.Usage(ctx, "c"); err != nil || n != 5+7+3 {
		t.Errorf("usage = %d, %v; want 15", n, err)
	}

	var buf bytes.Buffer
	if err := s.Diff(ctx, "c", &buf); err != nil {
		t.Fatal(err)
	}
	seen := map[string]*tar.Header{}
	for tr := tar.NewReader(&buf); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		seen[h.Name] = h
	}
	for _, n := range []string{"keep/.wh.a", ".wh.gone", "again/.wh..wh..opq", "made/", "made/z", "swap", "sym/b"} {
		if seen[n] == nil {
			t.Errorf("diff lacks %s", n)
		}
	}
	if h := seen["made/z2"]; h == nil || h.Typeflag != tar.TypeLink || h.Linkname != "made/z" {
		t.Errorf("made/z2 is %+v, want a hard link", h)
	}
	if h := seen["file"]; h == nil || h.PAXRecords["SCHILY.xattr.user.k"] != "v" || h.Mode != 0o600 {
		t.Errorf("file is %+v", h)
	}
	if seen["untouched/"] != nil {
		t.Error("diff has what did not change")
	}
}

func TestReopen(t *testing.T) {
	root := t.TempDir()
	s := newStore(t, root)
	ctx := context.Background()
	for _, id := range []string{"a", "b", "half"} {
		if err := s.Create(ctx, id, snapshot.Chain{ID: "sha256:" + id}, id == "b", 0); err != nil {
			t.Fatal(err)
		}
	}
	// A Create that was killed before its record, and an earlier boot's layers.
	if err := unix.Removexattr(filepath.Join(root, "rw", "half"), s.cap.recordAttr()); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, "ephemeral", "earlier", "x", "upper"), 0o700); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, root)
	got, _ := s.List(ctx)
	slices.Sort(got)
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("layers after reopening: %q", got)
	}
	if ids := s.ChainIDs(); len(ids) != 2 {
		t.Errorf("chains: %v", ids)
	}
	if err := s.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if ents, _ := os.ReadDir(filepath.Join(root, "trash")); len(ents) != 0 {
		t.Errorf("trash holds %d entries", len(ents))
	}
	if ents, _ := os.ReadDir(filepath.Join(root, "ephemeral")); len(ents) != 1 {
		t.Errorf("ephemeral holds %d boots", len(ents))
	}
}

func TestLongRecordGetsAFile(t *testing.T) {
	root := t.TempDir()
	s := newStore(t, root)
	c := snapshot.Chain{ID: "sha256:long"}
	for i := range 100 {
		c.Dirs = append(c.Dirs, filepath.Join(root, fmt.Sprintf("some-rather-long-directory-name-for-a-layer-%d", i), "fs"))
	}
	if err := os.MkdirAll(c.Dirs[0], 0o751); err != nil {
		t.Fatal(err)
	}
	if err := s.Create(context.Background(), "a", c, false, 0); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, root)
	lower, upper, _, _, err := s.Dirs("a")
	if err != nil || !slices.Equal(lower, c.Dirs) {
		t.Errorf("%d lower directories, %v", len(lower), err)
	}
	if fi, err := os.Stat(upper); err != nil || fi.Mode().Perm() != 0o751 {
		t.Errorf("the root's mode is %v, %v; want that of the image", fi, err)
	}
}

func TestRunPreparesAndDeletes(t *testing.T) {
	root := t.TempDir()
	s := newStore(t, root)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	for i := range 40 {
		id := fmt.Sprint("c", i)
		if err := s.Create(ctx, id, snapshot.Chain{}, i%2 == 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	for range 200 {
		trash, _ := os.ReadDir(s.trash)
		if len(trash) == 0 && len(s.spares) == cap(s.spares) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if trash, _ := os.ReadDir(s.trash); len(trash) != 0 || len(s.spares) != cap(s.spares) {
		t.Errorf("%d discarded layers left, %d prepared", len(trash), len(s.spares))
	}
}

func TestCreateRefuses(t *testing.T) {
	s := newStore(t, t.TempDir())
	ctx := context.Background()
	for _, id := range []string{"", ".", "..", "a/b", "../x", "a\x00b", string(make([]byte, 200))} {
		if err := s.Create(ctx, id, snapshot.Chain{}, false, 0); !fault.Is(err, fault.Invalid) {
			t.Errorf("Create(%q) = %v, want invalid", id, err)
		}
	}
	if err := s.Create(ctx, "a", snapshot.Chain{}, false, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Create(ctx, "a", snapshot.Chain{}, false, 0); !fault.Is(err, fault.Conflict) {
		t.Errorf("second Create = %v, want conflict", err)
	}
	if err := s.Create(ctx, "b", snapshot.Chain{Dirs: []string{"/nonexistent/dir"}}, false, 0); !fault.Is(err, fault.NotFound) {
		t.Errorf("Create on a missing chain = %v, want not found", err)
	}
	if err := s.Remove(ctx, "nobody"); err != nil {
		t.Errorf("Remove of none = %v", err)
	}
	if got, _ := s.List(ctx); !slices.Equal(got, []string{"a"}) {
		t.Errorf("layers: %q", got)
	}
}

func BenchmarkCreateMount(b *testing.B) {
	needRoot(b)
	for _, ephemeral := range []bool{false, true} {
		b.Run(fmt.Sprintf("ephemeral=%v", ephemeral), func(b *testing.B) {
			root := b.TempDir()
			s := newStore(b, filepath.Join(root, "l"))
			c := chain(b, root, map[string]string{"a": ""}, map[string]string{"b": ""}, map[string]string{"c": ""})
			ctx := context.Background()
			s.refill()
			for i := range b.N {
				id := fmt.Sprint("c", i)
				if err := s.Create(ctx, id, c, ephemeral, 0); err != nil {
					b.Fatal(err)
				}
				f, err := s.Mount(ctx, id, false, snapshot.IDMap{})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				f.Close()
				_ = s.Remove(ctx, id)
				s.refill()
				b.StartTimer()
			}
		})
	}
}
