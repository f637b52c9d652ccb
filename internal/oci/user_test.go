package oci

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func userRoot(t *testing.T, passwd, group string) *os.File {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"passwd": passwd, "group": group} {
		if content != "" {
			if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

const (
	passwdFile = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34:www:/srv/www:/bin/false\nodd:x:5:5::relative:\n"
	groupFile  = "root:x:0:root\nwheel:x:10:root,www\naudio:x:29:\nweb:x:34:\n"
)

func TestLookupUser(t *testing.T) {
	root := userRoot(t, passwdFile, groupFile)
	for name, c := range map[string]struct {
		add  []string
		want specs.User
		home string
	}{
		"":         {nil, specs.User{AdditionalGids: []uint32{0, 0, 10}}, "/root"},
		"0":        {nil, specs.User{AdditionalGids: []uint32{0, 0, 10}}, "/root"},
		"www":      {[]string{"audio", "77"}, specs.User{UID: 33, GID: 34, AdditionalGids: []uint32{34, 10, 29, 77}}, "/srv/www"},
		"33":       {nil, specs.User{UID: 33, GID: 34, AdditionalGids: []uint32{34, 10}}, "/srv/www"},
		"www:root": {nil, specs.User{UID: 33, AdditionalGids: []uint32{0}}, "/srv/www"},
		"1234:55":  {nil, specs.User{UID: 1234, GID: 55, AdditionalGids: []uint32{55}}, "/"},
		"odd":      {nil, specs.User{UID: 5, GID: 5, AdditionalGids: []uint32{5}}, "/"},
	} {
		got, home, err := LookupUser(root, name, c.add)
		// How often the primary group stands in the list does not matter to anybody.
		if err != nil || !reflect.DeepEqual(unique(got.AdditionalGids), unique(c.want.AdditionalGids)) || got.UID != c.want.UID || got.GID != c.want.GID || home != c.home {
			t.Errorf("%q: got %+v %q %v", name, got, home, err)
		}
	}
	for _, name := range []string{"nobody", "www:none", "-1", "4294967296", "a:b:c"} {
		if _, _, err := LookupUser(root, name, nil); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: got %v", name, err)
		}
	}
	empty := userRoot(t, "", "")
	if u, home, err := LookupUser(empty, "7:8", nil); err != nil || u.UID != 7 || u.GID != 8 || home != "/" {
		t.Errorf("no files: %+v %q %v", u, home, err)
	}
	if _, _, err := LookupUser(empty, "www", nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("no files: %v", err)
	}
}

func unique(ids []uint32) []uint32 {
	var out []uint32
	seen := map[uint32]bool{}
	for _, id := range ids {
		if !seen[id] {
			seen[id] = true
			out = append(out, id)
		}
	}
	slices.Sort(out) // nor does the order
	return out
}

// A hostile image must not make the engine read the host, wait, or fill memory.
func TestLookupUserHostile(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(outside, []byte("evil:x:4242:4242::/evil:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func(path string) error{
		"absolute link": func(p string) error { return os.Symlink(outside, p) },
		"climbing link": func(p string) error { return os.Symlink(strings.Repeat("../", 20)+outside, p) },
		"fifo":          func(p string) error { return unix.Mkfifo(p, 0o644) },
		"device":        func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) },
		"directory":     func(p string) error { return os.Mkdir(p, 0o755) },
		"huge":          func(p string) error { return truncated(p, maxDatabase+1) },
		"long line":     func(p string) error { return os.WriteFile(p, []byte(strings.Repeat("a", 1<<20)), 0o644) },
		"link loop":     func(p string) error { return os.Symlink("passwd", p) },
	} {
		root := userRoot(t, "", groupFile)
		if err := plant(filepath.Join(root.Name(), "etc/passwd")); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { _, _, err := LookupUser(root, "evil", nil); done <- err }()
		select {
		case err := <-done:
			if !fault.Is(err, fault.Invalid) {
				t.Errorf("%s: got %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the lookup hangs", name)
		}
	}
}

func truncated(p string, size int64) error {
	f, err := os.Create(p)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

func TestDevicesAt(t *testing.T) {
	d, err := DevicesAt("/dev/null")
	if err != nil || len(d) != 1 || d[0].Type != "c" || d[0].Major != 1 || d[0].Minor != 3 || d[0].Path != "/dev/null" {
		t.Fatalf("got %+v %v", d, err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(dir+"/sub/n", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, dir+"-link"); err != nil {
		t.Fatal(err)
	}
	if d, err = DevicesAt(dir + "-link"); err != nil || len(d) != 1 || d[0].Path != dir+"-link/sub/n" {
		t.Fatalf("got %+v %v", d, err)
	}
	for _, bad := range []string{"null", "/dev/missing", "/etc/passwd", t.TempDir()} {
		if _, err := DevicesAt(bad); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: got %v", bad, err)
		}
	}
}

func TestProbeHost(t *testing.T) {
	h := ProbeHost()
	if h.CPUs < 1 || h.CPULimit < h.CPUs || len(h.Capabilities) == 0 {
		t.Fatalf("got %+v", h)
	}
	t.Logf("%+v", h)
}
