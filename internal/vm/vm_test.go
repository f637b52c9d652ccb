package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

var big = Computer{CPUs: 8, MemoryMiB: 16384, Home: "/home/ada"}

func ptr[T any](v T) *T { return &v }

func TestDefaults(t *testing.T) {
	for _, c := range []Computer{big, {CPUs: 1, MemoryMiB: 512}, {CPUs: 64, MemoryMiB: 1 << 20, Home: "/root"}, {}} {
		d := Defaults(c)
		if err := Validate(d, Computer{}); err != nil {
			t.Errorf("%+v: the defaults %+v are refused: %v", c, d, err)
		}
	}
	if d := Defaults(big); d.CPUs != 8 || d.MemoryMiB != 8192 || len(d.Shares) != 1 || d.Shares[0].Path != "/home/ada" {
		t.Errorf("defaults: %+v", d)
	}
	if d := Defaults(Computer{Home: "/var/lib/me"}); len(d.Shares) != 0 {
		t.Errorf("a home below /var is shared: %+v", d.Shares)
	}
}

func TestChange(t *testing.T) {
	dir := t.TempDir()
	base := Defaults(big)
	base.Shares = nil
	for name, x := range map[string]struct {
		ch   api.VMChange
		want func(*api.VMConfig)
		err  string
	}{
		"cpus":            {api.VMChange{CPUs: ptr(2)}, func(c *api.VMConfig) { c.CPUs = 2 }, ""},
		"no cpu":          {api.VMChange{CPUs: ptr(0)}, nil, "not between 1"},
		"too many cpus":   {api.VMChange{CPUs: ptr(9)}, nil, "more than this computer's 8"},
		"memory":          {api.VMChange{MemoryMiB: ptr(512)}, func(c *api.VMConfig) { c.MemoryMiB = 512 }, ""},
		"little memory":   {api.VMChange{MemoryMiB: ptr(256)}, nil, "less than the 512"},
		"much memory":     {api.VMChange{MemoryMiB: ptr(1 << 20)}, nil, "more than this computer's"},
		"disk grows":      {api.VMChange{DiskGiB: ptr(100)}, func(c *api.VMConfig) { c.DiskGiB = 100 }, ""},
		"disk shrinks":    {api.VMChange{DiskGiB: ptr(10)}, nil, "cannot shrink"},
		"share":           {api.VMChange{Shares: []api.VMShare{{Path: dir}}}, func(c *api.VMConfig) { c.Shares = []api.VMShare{{Path: dir}} }, ""},
		"share a file":    {api.VMChange{Shares: []api.VMShare{{Path: dir + "/none"}}}, nil, "it is no folder"},
		"share the root":  {api.VMChange{Shares: []api.VMShare{{Path: "/"}}}, nil, "of its own"},
		"share /usr/lib":  {api.VMChange{Shares: []api.VMShare{{Path: "/usr/lib"}}}, nil, "a /usr of its own"},
		"unshare nothing": {api.VMChange{Unshare: []string{"/x"}}, nil, "is not shared"},
		"never sleeps":    {api.VMChange{IdleSeconds: ptr(0)}, func(c *api.VMConfig) { c.IdleSeconds = 0 }, ""},
		"sleeps at once":  {api.VMChange{IdleSeconds: ptr(1)}, nil, "shorter than 5"},
		"driver":          {api.VMChange{Driver: ptr("xen")}, nil, "no driver"},
		"relative image":  {api.VMChange{Image: ptr("img")}, nil, "no absolute path"},
	} {
		got, err := Change(base, x.ch, big)
		if x.err != "" {
			if err == nil || !strings.Contains(err.Error(), x.err) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		want := base
		x.want(&want)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %+v %v, want %+v", name, got, err, want)
		}
	}
}

func TestShares(t *testing.T) {
	c := Defaults(big)
	c.Shares = []api.VMShare{{Path: "/home/ada"}, {Path: "/home/ada/src"}}
	if err := Validate(c, big); err == nil || !strings.Contains(err.Error(), "inside each other") {
		t.Errorf("nested shares: %v", err)
	}
	for path, want := range map[string]bool{"/home/ada": true, "/home/ada/x": true, "/home/adam": false, "/home": false} {
		if _, got := Shared([]api.VMShare{{Path: "/home/ada"}}, path); got != want {
			t.Errorf("%s in /home/ada: %v", path, got)
		}
	}
	for _, path := range []string{"", "x", "/a/../b", "/a,b", "/a\x00", "/proc", "/proc/1", "/" + strings.Repeat("x", 500)} {
		if Shareable(path) == nil {
			t.Errorf("%q may be shared", path)
		}
	}
}

func TestConfigFile(t *testing.T) {
	dir := t.TempDir()
	c, err := LoadConfig(dir, big)
	if err != nil || !reflect.DeepEqual(c, Defaults(big)) {
		t.Fatalf("%+v %v", c, err)
	}
	c.CPUs = 3
	if err := SaveConfig(dir, c); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadConfig(dir, big); err != nil || !reflect.DeepEqual(got, c) {
		t.Fatalf("%+v %v", got, err)
	}
	// A computer with fewer processors than when it was written.
	if got, err := LoadConfig(dir, Computer{CPUs: 2}); err != nil || got.CPUs != 2 {
		t.Fatalf("%+v %v", got, err)
	}
	for _, raw := range []string{`{`, `{"version":2}`, `{"version":1,"cpus":1,"memoryMiB":1024,"diskGiB":1,"surprise":1}`, `{} {}`} {
		os.WriteFile(filepath.Join(dir, "config.json"), []byte(raw), 0o600)
		if _, err := LoadConfig(dir, big); err == nil {
			t.Errorf("%s is taken", raw)
		}
	}
}

// imageIn makes an image whose files hold their names.
func imageIn(t *testing.T) (string, vmwire.Image) {
	t.Helper()
	dir := t.TempDir()
	m := vmwire.Image{FormatVersion: 1, Format: "vm", Version: "1", Arch: runtime.GOARCH, Kernel: "6.1", CommandLine: "quiet", Files: map[string]vmwire.File{}}
	for _, role := range []string{"kernel", "initrd", "root"} {
		sum := sha256.Sum256([]byte(role))
		m.Files[role] = vmwire.File{Name: role, Size: int64(len(role)), SHA256: hex.EncodeToString(sum[:])}
		if err := os.WriteFile(filepath.Join(dir, role), []byte(role), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	save(t, dir, m)
	return dir, m
}

func save(t *testing.T, dir string, m vmwire.Image) {
	t.Helper()
	if err := WriteJSON(filepath.Join(dir, vmwire.Manifest), m); err != nil {
		t.Fatal(err)
	}
}

func TestImage(t *testing.T) {
	dir, m := imageIn(t)
	seen := map[string]string{}
	img, err := OpenImage(dir, nil, seen)
	if err != nil || img.Kernel != filepath.Join(dir, "kernel") || len(seen) != 3 {
		t.Fatalf("%+v %v %v", img, err, seen)
	}
	if _, err := OpenImage(t.TempDir(), nil, nil); err == nil || !strings.Contains(err.Error(), "cloudos image build") {
		t.Errorf("no image: %v", err)
	}
	for name, spoil := range map[string]func(m *vmwire.Image){
		"a version of the future": func(m *vmwire.Image) { m.FormatVersion = 2 },
		"another format":          func(m *vmwire.Image) { m.Format = "iso" },
		"another architecture":    func(m *vmwire.Image) { m.Arch = "s390x" },
		"no root":                 func(m *vmwire.Image) { delete(m.Files, "root") },
		"a path": func(m *vmwire.Image) {
			m.Files["root"] = vmwire.File{Name: "../root", Size: 4, SHA256: m.Files["root"].SHA256}
		},
		"an option": func(m *vmwire.Image) {
			m.Files["root"] = vmwire.File{Name: "a,b", Size: 4, SHA256: m.Files["root"].SHA256}
		},
		"a packed initrd": func(m *vmwire.Image) {
			f := m.Files["initrd"]
			f.Format = vmwire.Packed
			m.Files["initrd"] = f
		},
		"a path of a file that it does not need": func(m *vmwire.Image) {
			m.Files["disk"] = vmwire.File{Name: "../" + filepath.Base(dir) + "/root", Size: 4, SHA256: m.Files["root"].SHA256}
		},
		"two lines": func(m *vmwire.Image) { m.CommandLine = "a\nb" },
		"no digest": func(m *vmwire.Image) { m.Files["kernel"] = vmwire.File{Name: "kernel", Size: 6} },
	} {
		var bad vmwire.Image
		raw, _ := json.Marshal(m)
		json.Unmarshal(raw, &bad)
		spoil(&bad)
		save(t, dir, bad)
		if _, err := OpenImage(dir, nil, nil); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	save(t, dir, m)
	os.WriteFile(filepath.Join(dir, "initrd"), []byte("INITRD"), 0o644)
	if _, err := OpenImage(dir, nil, seen); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged file: %v", err)
	}
}

// TestUnpack has a packed root unpacked once for each image, and never by halves.
func TestUnpack(t *testing.T) {
	dir, m := imageIn(t)
	state := filepath.Join(t.TempDir(), "me[a") // a user's folder may be called so
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	pack := func(content string) Image {
		t.Helper()
		e, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		b := e.EncodeAll([]byte(content), nil)
		sum := sha256.Sum256(b)
		m.Files["root"] = vmwire.File{Name: "root", Size: int64(len(b)), SHA256: hex.EncodeToString(sum[:]), Format: vmwire.Packed}
		if err := os.WriteFile(filepath.Join(dir, "root"), b, 0o644); err != nil {
			t.Fatal(err)
		}
		save(t, dir, m)
		img, err := OpenImage(dir, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	files := func() string {
		t.Helper()
		l, err := os.ReadDir(state)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range l {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	}
	if err := os.WriteFile(filepath.Join(state, "data.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	first := pack("first")
	if err := first.Unpack(state); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(first.Root); err != nil || string(b) != "first" || filepath.Dir(first.Root) != state {
		t.Fatalf("%s holds %q, %v", first.Root, b, err)
	}
	// It is there for the next start, which needs the packed one no more.
	again := pack("first")
	os.Remove(again.Root)
	if err := again.Unpack(state); err != nil || again.Root != first.Root {
		t.Errorf("the next start: %s, %v", again.Root, err)
	}
	// A start that was killed while it unpacked left something.
	os.WriteFile(filepath.Join(state, ".root-0123.img.tmp"), []byte("half"), 0o600)
	second := pack("second")
	if err := second.Unpack(state); err != nil {
		t.Fatal(err)
	}
	if want := "data.img " + filepath.Base(second.Root); files() != want {
		t.Errorf("there is %q, want %q", files(), want)
	}
	cut := pack("third")
	b, _ := os.ReadFile(cut.Root)
	os.WriteFile(cut.Root, b[:len(b)-2], 0o644)
	if err := cut.Unpack(state); err == nil || strings.Contains(files(), "root-") {
		t.Errorf("half a root: %v, %s", err, files())
	}
	// What was checked is what is unpacked: a package may replace the file in between.
	checked := pack("checked")
	was := checked.Root
	other := pack("replaced")
	if err := checked.Unpack(state); err == nil || strings.Contains(files(), "root-") {
		t.Errorf("another root than the one that was checked, %s: %v, %s", was, err, files())
	}
	if err := other.Unpack(state); err != nil {
		t.Error(err)
	}
	raw := Image{Root: "/there/root.img"}
	if err := raw.Unpack(state); err != nil || raw.Root != "/there/root.img" {
		t.Errorf("one that is not packed: %s, %v", raw.Root, err)
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"formatVersion":1,"format":"vm","arch":"amd64","files":{"kernel":{"name":"k","size":1,"sha256":""}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := ParseManifest(raw)
		if err != nil {
			return
		}
		for _, file := range m.Files {
			if m.Files["kernel"].Name == file.Name && filepath.Base(file.Name) != file.Name {
				t.Errorf("the name %q leaves the folder", file.Name)
			}
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"version":1,"cpus":1,"memoryMiB":1024,"diskGiB":1,"shares":[{"path":"/a"}],"idleSeconds":5,"offSeconds":0}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := ParseConfig(raw)
		if err != nil || Validate(c, Computer{}) != nil {
			return
		}
		for _, s := range c.Shares {
			if !filepath.IsAbs(s.Path) || strings.ContainsAny(s.Path, ",\x00") {
				t.Errorf("%q may be shared", s.Path)
			}
		}
	})
}
