package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

func newStore(t *testing.T) *Store {
	t.Helper()
	s, err := New(Config{Root: filepath.Join(t.TempDir(), "volumes")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func reopen(t *testing.T, s *Store) *Store {
	t.Helper()
	n, err := New(Config{Root: s.root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func names(t *testing.T, s *Store, f Filters) []string {
	t.Helper()
	l, _, err := s.List(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, v := range l {
		out = append(out, v.Name)
	}
	return out
}

func create(t *testing.T, s *Store, req volume.CreateRequest, o CreateOptions) *volume.Volume {
	t.Helper()
	v, err := s.Create(t.Context(), req, o)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestLifeAcrossRestart(t *testing.T) {
	s := newStore(t)
	v := create(t, s, volume.CreateRequest{Name: "data", Labels: map[string]string{"a": "b"}}, CreateOptions{})
	a := create(t, s, volume.CreateRequest{}, CreateOptions{Ephemeral: true, For: "c1"})
	if len(a.Name) != 64 {
		t.Fatalf("anonymous name %q", a.Name)
	}
	if st, err := os.Stat(v.Mountpoint); err != nil || st.Mode().Perm() != 0o755 {
		t.Fatalf("data directory: %v %v", st, err)
	}
	s = reopen(t, s)
	got, err := s.Inspect(t.Context(), "data")
	if err != nil || got.Labels["a"] != "b" || got.CreatedAt != v.CreatedAt || got.Mountpoint != v.Mountpoint {
		t.Fatalf("after restart: %+v %v", got, err)
	}
	if _, ok := must(s.Inspect(t.Context(), a.Name)).Labels[AnonymousLabel]; !ok {
		t.Fatal("anonymous label lost")
	}
	if err := s.Remove(t.Context(), "data", false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Inspect(t.Context(), "data"); !fault.Is(err, fault.NotFound) {
		t.Fatalf("removed volume: %v", err)
	}
	if err := s.Remove(t.Context(), "data", false); !fault.Is(err, fault.NotFound) {
		t.Fatalf("second removal: %v", err)
	}
	if err := s.Remove(t.Context(), "data", true); err != nil {
		t.Fatal(err)
	}
	if got := names(t, reopen(t, s), nil); len(got) != 1 || got[0] != a.Name {
		t.Fatalf("left: %v", got)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestReferencesKeepAVolume(t *testing.T) {
	s := newStore(t)
	create(t, s, volume.CreateRequest{Name: "data"}, CreateOptions{For: "c1"})
	if err := s.Reference("data", "c2"); err != nil {
		t.Fatal(err)
	}
	err := s.Remove(t.Context(), "data", true)
	if !fault.Is(err, fault.Conflict) || err.Error() != "remove data: volume is in use - [c1 c2]" {
		t.Fatalf("got %v", err)
	}
	s.Unreference("data", "c1")
	s.Unreference("data", "c2")
	if err := s.Remove(t.Context(), "data", false); err != nil {
		t.Fatal(err)
	}
	if err := s.Reference("data", "c1"); !fault.Is(err, fault.NotFound) {
		t.Fatalf("got %v", err)
	}
}

func TestBadRequestsChangeNothing(t *testing.T) {
	s := newStore(t)
	for _, req := range []volume.CreateRequest{
		{Name: "a"}, {Name: "../x"}, {Name: ".trash"}, {Name: "a/b"}, {Name: strings.Repeat("a", 256)}, {Name: "a\x00b"},
		{Name: "ok", DriverOpts: map[string]string{"nonsense": "1"}},
		{Name: "ok", DriverOpts: map[string]string{"type": "tmpfs"}},
		{Name: "ok", DriverOpts: map[string]string{"o": "bind"}},
		{Name: "ok", DriverOpts: map[string]string{"type": "none", "o": "bind", "device": "relative"}},
		{Name: "ok", Labels: map[string]string{"big": strings.Repeat("x", maxRecord)}},
	} {
		if _, err := s.Create(t.Context(), req, CreateOptions{}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%.80v: got %v", req, err)
		}
	}
	if _, err := s.Create(t.Context(), volume.CreateRequest{Name: "ok", Driver: "other"}, CreateOptions{}); !fault.Is(err, fault.NotFound) {
		t.Errorf("unknown driver: %v", err)
	}
	if got := names(t, s, nil); len(got) != 0 {
		t.Fatalf("volumes %v appeared", got)
	}
	for _, e := range must(os.ReadDir(s.root)) {
		if e.Name() != trashDir {
			t.Errorf("%s was left behind", e.Name())
		}
	}
}

func TestOneNameOneVolume(t *testing.T) {
	s := newStore(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if _, err := s.Create(context.Background(), volume.CreateRequest{Name: "data"}, CreateOptions{For: fmt.Sprint(i), Ephemeral: true}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(s.References("data")); n != 16 {
		t.Fatalf("%d references", n)
	}
	if _, err := s.Create(t.Context(), volume.CreateRequest{Name: "data", DriverOpts: map[string]string{"type": "tmpfs", "device": "tmpfs"}}, CreateOptions{}); !fault.Is(err, fault.Conflict) {
		t.Fatalf("other options: %v", err)
	}
}

// Create and remove of one name race; afterwards index and disk agree.
func TestCreateRemoveRace(t *testing.T) {
	s := newStore(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				if _, err := s.Create(context.Background(), volume.CreateRequest{Name: "data"}, CreateOptions{Ephemeral: true}); err != nil {
					t.Error(err)
				}
				if err := s.Remove(context.Background(), "data", true); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	onDisk := false
	if _, err := os.Stat(filepath.Join(s.root, "data")); err == nil {
		onDisk = true
	}
	if len(names(t, s, nil)) == 1 != onDisk {
		t.Fatal("index and disk differ")
	}
}

func TestUnfinishedWorkIsCleared(t *testing.T) {
	s := newStore(t)
	create(t, s, volume.CreateRequest{Name: "torn"}, CreateOptions{})
	write(t, s.root+"/torn/_data/file", "kept")
	write(t, s.root+"/torn/volume.json", `{"Vers`)
	for _, d := range []string{newPrefix + "1/_data", trashDir + "/x/y"} {
		if err := os.MkdirAll(filepath.Join(s.root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s)
	if got := names(t, s, nil); !slices.Equal(got, []string{"torn"}) {
		t.Fatalf("volumes %v", got)
	}
	if b, err := os.ReadFile(s.root + "/torn/_data/file"); err != nil || string(b) != "kept" {
		t.Fatalf("data of a volume with a torn record: %q %v", b, err)
	}
	if err := s.EmptyTrash(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := must(os.ReadDir(filepath.Join(s.root, trashDir))); len(left) != 0 {
		t.Fatalf("trash holds %v", left)
	}
	if _, err := os.Stat(filepath.Join(s.root, newPrefix+"1")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("unfinished volume: %v", err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Directories nested deeper than descriptors or paths allow are deleted too, and
// what a link points to stays.
func TestTrashOfHostileTrees(t *testing.T) {
	s := newStore(t)
	create(t, s, volume.CreateRequest{Name: "deep"}, CreateOptions{})
	outside := filepath.Join(t.TempDir(), "outside")
	write(t, outside, "mine")
	fd := must(unix.Open(s.root+"/deep/_data", unix.O_PATH, 0))
	for range 3000 {
		if err := unix.Mkdirat(fd, "d", 0o700); err != nil {
			t.Fatal(err)
		}
		next := must(unix.Openat(fd, "d", unix.O_PATH, 0))
		unix.Close(fd)
		fd = next
	}
	if err := unix.Symlinkat(outside, fd, "link"); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if _, err := s.Usage(t.Context(), "deep"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "deep", false); err != nil {
		t.Fatal(err)
	}
	if err := s.EmptyTrash(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := must(os.ReadDir(filepath.Join(s.root, trashDir))); len(left) != 0 {
		t.Fatalf("trash holds %v", left)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Fatal(err)
	}
}

func TestPruneAndFilters(t *testing.T) {
	s := newStore(t)
	create(t, s, volume.CreateRequest{Name: "named", Labels: map[string]string{"keep": "1"}}, CreateOptions{})
	create(t, s, volume.CreateRequest{Name: "used"}, CreateOptions{For: "c"})
	a := create(t, s, volume.CreateRequest{}, CreateOptions{})
	write(t, a.Mountpoint+"/f", "12345")
	if got := names(t, s, Filters{"dangling": {"false": true}}); !slices.Equal(got, []string{"used"}) {
		t.Fatalf("not dangling: %v", got)
	}
	if got := names(t, s, Filters{"label": {"keep=1": true}}); !slices.Equal(got, []string{"named"}) {
		t.Fatalf("by label: %v", got)
	}
	if got := names(t, s, Filters{"name": {"us": true}}); !slices.Equal(got, []string{"used"}) {
		t.Fatalf("by name: %v", got)
	}
	if _, _, err := s.List(t.Context(), Filters{"bogus": {"1": true}}); !fault.Is(err, fault.Invalid) {
		t.Fatalf("bogus filter: %v", err)
	}
	r, err := s.Prune(t.Context(), nil)
	if err != nil || !slices.Equal(r.VolumesDeleted, []string{a.Name}) || r.SpaceReclaimed != 5 {
		t.Fatalf("prune: %+v %v", r, err)
	}
	r, err = s.Prune(t.Context(), Filters{"all": {"true": true}})
	if err != nil || !slices.Equal(r.VolumesDeleted, []string{"named"}) {
		t.Fatalf("prune all: %+v %v", r, err)
	}
}

func TestDriverOptionsMountOnUse(t *testing.T) {
	s := newStore(t)
	src := t.TempDir()
	write(t, src+"/hello", "there")
	cases := map[string]map[string]string{
		"tmpfs": {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,uid=7,nosuid"},
		"bound": {"type": "none", "device": src, "o": "bind,ro"},
	}
	for name, o := range cases {
		create(t, s, volume.CreateRequest{Name: name, DriverOpts: o}, CreateOptions{})
		p, err := s.Use(t.Context(), name, "c1")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(p, unix.MNT_DETACH) })
		if _, err := s.Use(t.Context(), name, "c2"); err != nil {
			t.Fatal(err)
		}
		if err := s.Release(t.Context(), name, "c1"); err != nil {
			t.Fatal(err)
		}
		if !s.isMounted(name) {
			t.Fatalf("%s was unmounted under a container", name)
		}
		switch name {
		case "tmpfs":
			var st unix.Stat_t
			if err := unix.Stat(p, &st); err != nil || st.Uid != 7 {
				t.Fatalf("uid %d, %v", st.Uid, err)
			}
		case "bound":
			if b, err := os.ReadFile(p + "/hello"); err != nil || string(b) != "there" {
				t.Fatalf("%q %v", b, err)
			}
			if err := os.WriteFile(p+"/x", nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Fatalf("writing a read-only bind: %v", err)
			}
		}
		// A new engine finds it mounted, and unmounts what nobody claims.
		n := reopen(t, s)
		if !n.m[name].mounted {
			t.Fatalf("%s: restart does not see the mount", name)
		}
		if err := n.ReleaseUnused(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n.isMounted(name) {
			t.Fatalf("%s is still mounted", name)
		}
	}
	if err := s.Remove(t.Context(), "bound", false); err != nil {
		t.Fatal(err)
	}
	if err := s.EmptyTrash(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(src + "/hello"); err != nil {
		t.Fatalf("removing a volume reached what it was bound to: %v", err)
	}
}

func TestCopyUp(t *testing.T) {
	s := newStore(t)
	img := t.TempDir()
	if err := os.MkdirAll(img+"/srv/www/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, img+"/srv/www/a", "content")
	for _, err := range []error{
		os.Link(img+"/srv/www/a", img+"/srv/www/sub/b"),
		os.Symlink("../../../etc/passwd", img+"/srv/www/ln"),
		os.Symlink("/srv/www", img+"/www"),
		unix.Mkfifo(img+"/srv/www/fifo", 0o640),
		unix.Setxattr(img+"/srv/www/a", "trusted.note", []byte("x"), 0),
		os.Chown(img+"/srv/www/a", 1005, 1006),
		os.Chmod(img+"/srv/www/a", 0o4755|fs.ModeSetuid),
		os.Chown(img+"/srv/www", 1000, 1000),
		os.Chmod(img+"/srv/www", 0o750),
		os.Truncate(img+"/srv/www/sub/b", 8<<20),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	v := create(t, s, volume.CreateRequest{Name: "data"}, CreateOptions{})
	root := must(os.Open(img))
	defer root.Close()
	m := snapshot.IDMap{UIDs: []snapshot.IDRange{{Host: 1000, Size: 65536}}, GIDs: []snapshot.IDRange{{Host: 1000, Size: 65536}}}
	// Only what is mapped can be copied: root's files are not.
	if err := s.CopyUp(t.Context(), root, "/www", "data", "", m); !errors.Is(err, unix.EOVERFLOW) {
		t.Fatalf("unmapped owner: %v", err)
	}
	if left := must(os.ReadDir(v.Mountpoint)); len(left) != 0 {
		t.Fatalf("failed copy left %v", left)
	}
	if err := s.CopyUp(t.Context(), root, "/www", "data", "", snapshot.IDMap{}); err != nil {
		t.Fatal(err)
	}
	var top, a, b unix.Stat_t
	for p, st := range map[string]*unix.Stat_t{"": &top, "/a": &a, "/sub/b": &b} {
		if err := unix.Lstat(v.Mountpoint+p, st); err != nil {
			t.Fatal(err)
		}
	}
	if top.Uid != 1000 || top.Mode&0o7777 != 0o750 {
		t.Errorf("directory: uid %d mode %o", top.Uid, top.Mode)
	}
	if a.Ino != b.Ino || a.Uid != 1005 || a.Gid != 1006 || a.Size != 8<<20 || a.Blocks > 64 {
		t.Errorf("hard link, owner, size or holes lost: %+v", a)
	}
	var src unix.Stat_t
	if err := unix.Lstat(img+"/srv/www/a", &src); err != nil || src.Mode != a.Mode || src.Mtim != a.Mtim {
		t.Errorf("mode %o want %o, mtime %v want %v", a.Mode, src.Mode, a.Mtim, src.Mtim)
	}
	buf := make([]byte, 8)
	if n, err := unix.Getxattr(v.Mountpoint+"/a", "trusted.note", buf); err != nil || string(buf[:n]) != "x" {
		t.Errorf("xattr: %q %v", buf[:max(n, 0)], err)
	}
	if l, err := os.Readlink(v.Mountpoint + "/ln"); err != nil || l != "../../../etc/passwd" {
		t.Errorf("link: %q %v", l, err)
	}
	if st, err := os.Lstat(v.Mountpoint + "/fifo"); err != nil || st.Mode()&fs.ModeNamedPipe == 0 {
		t.Errorf("fifo: %v %v", st, err)
	}
	// What a volume holds is never touched.
	write(t, v.Mountpoint+"/a", "mine")
	if err := s.CopyUp(t.Context(), root, "/www", "data", "", snapshot.IDMap{}); err != nil {
		t.Fatal(err)
	}
	if b := must(os.ReadFile(v.Mountpoint + "/a")); string(b) != "mine" {
		t.Errorf("content was overwritten: %q", b)
	}
}

func TestCopyUpStaysInRoot(t *testing.T) {
	s := newStore(t)
	outside := t.TempDir()
	write(t, outside+"/secret", "x")
	img := t.TempDir()
	for link, target := range map[string]string{"abs": outside, "up": "../../../../../.." + outside, "magic": "/proc/self/root" + outside} {
		if err := os.Symlink(target, filepath.Join(img, link)); err != nil {
			t.Fatal(err)
		}
	}
	root := must(os.Open(img))
	defer root.Close()
	v := create(t, s, volume.CreateRequest{Name: "data"}, CreateOptions{})
	for _, p := range []string{"/abs", "/up", "/magic", "../.." + outside, "/missing"} {
		if err := s.CopyUp(t.Context(), root, p, "data", "", snapshot.IDMap{}); err != nil {
			t.Errorf("%s: %v", p, err)
		}
		if got := must(os.ReadDir(v.Mountpoint)); len(got) != 0 {
			t.Fatalf("%s led out of the image: %v", p, got)
		}
	}
}

// A directory that a running container has mounted must stay the same one.
func TestCopyUpKeepsAMountedDirectory(t *testing.T) {
	s := newStore(t)
	img := t.TempDir()
	write(t, img+"/a", "x")
	root := must(os.Open(img))
	defer root.Close()
	v := create(t, s, volume.CreateRequest{Name: "data"}, CreateOptions{})
	must(s.Use(t.Context(), "data", "other"))
	var before, after unix.Stat_t
	if err := unix.Stat(v.Mountpoint, &before); err != nil {
		t.Fatal(err)
	}
	if err := s.CopyUp(t.Context(), root, "/", "data", "", snapshot.IDMap{}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(v.Mountpoint, &after); err != nil || before.Ino != after.Ino {
		t.Fatalf("directory was replaced: %v", err)
	}
	if _, err := os.Stat(v.Mountpoint + "/a"); err != nil {
		t.Fatal(err)
	}
}
