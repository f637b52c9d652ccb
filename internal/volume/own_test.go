package volume

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestChown gives a tree away: links themselves, not what they name; nothing on
// another file system; nothing of the host's system.
func TestChown(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: giving files away takes root")
	}
	outside := t.TempDir()
	dir := filepath.Join(t.TempDir(), "d")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(outside+"/victim", nil, 0o644))
	must(os.MkdirAll(dir+"/a/b", 0o755))
	must(os.WriteFile(dir+"/a/b/f", nil, 0o644))
	must(os.Symlink(outside+"/victim", dir+"/a/link"))
	must(os.Symlink(outside, dir+"/dirlink"))
	must(os.Mkdir(dir+"/mnt", 0o755))
	must(unix.Mkfifo(dir+"/fifo", 0o644))
	must(unix.Mount("none", dir+"/mnt", "tmpfs", 0, "size=64k"))
	defer unix.Unmount(dir+"/mnt", unix.MNT_DETACH)

	f, err := OpenSource(dir)
	must(err)
	defer f.Close()
	must(Chown(context.Background(), f, 1234, 5678))
	owner := func(p string) [2]uint32 {
		t.Helper()
		var st unix.Stat_t
		must(unix.Lstat(p, &st))
		return [2]uint32{st.Uid, st.Gid}
	}
	for _, p := range []string{"", "/a", "/a/b", "/a/b/f", "/a/link", "/dirlink", "/fifo"} {
		if o := owner(dir + p); o != [2]uint32{1234, 5678} {
			t.Errorf("%s belongs to %v", p, o)
		}
	}
	for _, p := range []string{outside, outside + "/victim", dir + "/mnt"} {
		if o := owner(p); o != [2]uint32{} {
			t.Errorf("%s was given to %v", p, o)
		}
	}

	deep := t.TempDir()
	must(os.MkdirAll(deep+strings.Repeat("/x", ownDepth+2), 0o755))
	d, err := OpenSource(deep)
	must(err)
	defer d.Close()
	if err := Chown(context.Background(), d, 1, 1); err == nil {
		t.Error("a tree of any depth is walked")
	}
	for _, p := range []string{"/", "/etc", "/usr/lib", "/etc/../var", "/no/such"} {
		if f, err := OpenSource(p); err == nil {
			f.Close()
			t.Errorf("%s may be given away", p)
		}
	}
}

// TestSystemByAnotherName: a directory of the system is one wherever it is seen.
func TestSystemByAnotherName(t *testing.T) {
	at := t.TempDir()
	if err := unix.Mount("/etc", at, "", unix.MS_BIND, ""); err != nil {
		t.Skip("SKIP: it needs the right to mount: " + err.Error())
	}
	defer unix.Unmount(at, unix.MNT_DETACH)
	if f, err := OpenSource(at); err == nil {
		f.Close()
		t.Error("/etc may be given away by another name")
	}
}
