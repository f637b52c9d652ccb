package wsl

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/vmtest"
	"github.com/cloudos-io/cloudos/test/wsl/wsltest"
)

func TestMain(m *testing.M) {
	wsltest.Main()
	os.Exit(m.Run())
}

// image writes an image whose one program says what it is.
func image(t *testing.T, version string) vm.Image {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	out := tar.NewWriter(z)
	for _, h := range []tar.Header{
		{Name: "run/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "slots/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "slots/a/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "slots/a/distribution/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "slots/a/distribution/etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "slots/a/distribution/etc/wsl.conf", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(version))},
		{Name: "system", Typeflag: tar.TypeSymlink, Linkname: "slots/a"},
	} {
		if err := out.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := out.Write([]byte(version)); err != nil {
				t.Fatal(err)
			}
		}
	}
	out.Close()
	z.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "root.tar.gz")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	return vm.Image{Dir: dir, Version: version, Tar: file, TarDigest: hex.EncodeToString(sum[:])}
}

// driver is one whose wsl.exe is this program.
func driver(t *testing.T, h wsltest.Host) *Driver {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if h.Dir == "" {
		if h.Dir, err = os.MkdirTemp("", "wsl"); err != nil { // sockets want a short path
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(h.Dir) })
	}
	return New(Config{Program: self, Env: h.Env(), Place: Place, Origin: Origin})
}

func spec(t *testing.T, img vm.Image) vm.Spec {
	dir := t.TempDir()
	return vm.Spec{Name: "t", CPUs: 2, Memory: 1 << 30, Disk: 1 << 30, Data: filepath.Join(dir, "data.img"), Run: dir, State: dir, Image: img}
}

func TestDriver(t *testing.T) {
	img := image(t, "1")
	d := driver(t, wsltest.Host{})
	h, err := d.Probe(t.Context(), img, "")
	if err != nil || h.Version != "WSL 2.4.13.0" || h.Accelerator != "hyper-v" {
		t.Fatalf("%+v %v", h, err)
	}
	vmtest.Suite{Driver: d, Host: h, Spec: func(t *testing.T) vm.Spec { return spec(t, img) }}.Run(t)
	if _, err := d.Probe(t.Context(), vm.Image{Dir: "/x", Disk: "/x/disk.raw"}, ""); err == nil || !strings.Contains(err.Error(), "--format wsl") {
		t.Errorf("an image of another format: %v", err)
	}
}

// TestKept replaces the image of a machine that keeps something.
func TestKept(t *testing.T) {
	dir, err := os.MkdirTemp("", "wsl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := driver(t, wsltest.Host{Dir: dir, Trouble: "old"}) // one that knows no UTF-8
	s := spec(t, image(t, "one"))
	d.cfg.Home = s.State
	begin := func() []string {
		t.Helper()
		var steps []string
		m, err := d.Start(t.Context(), s, vm.Host{}, func(step string) { steps = append(steps, step) })
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		m.Close()
		return steps
	}
	root := filepath.Join(dir, "servin", "rootfs")
	has := func(name, want string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q %v, want %q", name, b, err, want)
		}
	}
	if steps := begin(); !strings.HasPrefix(steps[0], "making") {
		t.Errorf("the first start: %q", steps)
	}
	if err := os.WriteFile(filepath.Join(root, "data/kept"), []byte("yes"), 0o600); err != nil {
		t.Fatal(err)
	}
	if steps := begin(); len(steps) != 1 {
		t.Errorf("a start of the same image: %q", steps)
	}
	for _, v := range []string{"two", "three"} {
		s.Image = image(t, v)
		if steps := begin(); len(steps) != 2 || !strings.HasPrefix(steps[1], "bringing") {
			t.Errorf("the start of another image: %q", steps)
		}
		has("system/distribution/etc/wsl.conf", v)
		has("etc/wsl.conf", v)
		has("data/kept", "yes")
	}
	if slots, _ := os.ReadDir(filepath.Join(root, "slots")); len(slots) != 1 {
		t.Errorf("slots after the start: %v", slots)
	}
	// One that is damaged on its way is not taken.
	s.Image = image(t, "four")
	s.Image.TarDigest = strings.Repeat("0", 64)
	if _, err := d.Start(t.Context(), s, vm.Host{}, func(string) {}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged image: %v", err)
	}
	has("system/distribution/etc/wsl.conf", "three")
	// A distribution that is destroyed is gone with its disk, and can be made again.
	if err := d.Destroy(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := d.Destroy(t.Context(), s); err != nil {
		t.Errorf("twice: %v", err)
	}
	s.Image = image(t, "five")
	begin()
	if _, err := os.Stat(filepath.Join(root, "data/kept")); err == nil {
		t.Error("what was destroyed is there")
	}
	// A disk that WSL does not know is nobody's to remove.
	if err := os.RemoveAll(filepath.Join(dir, "servin")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Start(t.Context(), s, vm.Host{}, func(string) {}); err == nil || !strings.Contains(err.Error(), "--import-in-place") {
		t.Errorf("a disk of nobody: %v", err)
	}
}

// TestTrouble has hosts that cannot.
func TestTrouble(t *testing.T) {
	none := New(Config{Program: filepath.Join(t.TempDir(), "wsl.exe")})
	for name, c := range map[string]struct {
		d    *Driver
		want string
	}{
		"no wsl.exe":    {none, "wsl --install"},
		"not installed": {driver(t, wsltest.Host{Trouble: "missing"}), "nicht installiert"},
	} {
		if _, err := c.d.Probe(t.Context(), vm.Image{}, ""); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "wsl --install") {
			t.Errorf("%s: %v", name, err)
		}
	}
	d := driver(t, wsltest.Host{Trouble: "noimport"})
	s := spec(t, image(t, "1"))
	if _, err := d.Start(t.Context(), s, vm.Host{}, func(string) {}); err == nil || !strings.Contains(err.Error(), "HCS_E_HYPERV_NOT_INSTALLED") || !strings.Contains(err.Error(), "Virtual Machine Platform") {
		t.Errorf("no virtualization: %v", err)
	}
	if m, err := d.Attach(t.Context(), vm.Record{Spec: s}); m != nil || err != nil {
		t.Errorf("attached: %v %v", m, err)
	}
	s.Shares = []vm.Share{{Tag: "a"}, {Tag: "b"}}
	s.Shares[0].Path, s.Shares[1].Path = `C:\Users\ada`, `\\server\share`
	if p := newMachine(d, "x", s, "", false).ShareProblems(); len(p) != 1 || p[`\\server\share`] == "" {
		t.Errorf("shares: %v", p)
	}
}

// TestEnd has machines that end by themselves, seen by who started and by who found them.
func TestEnd(t *testing.T) {
	d := driver(t, wsltest.Host{})
	s := spec(t, image(t, "1"))
	m, err := d.Start(t.Context(), s, vm.Host{}, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	again, err := d.Attach(t.Context(), vm.Record{Spec: s})
	if err != nil || again == nil {
		t.Fatalf("%v %v", again, err)
	}
	c, err := again.(vm.Console).Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for who, m := range map[string]vm.Machine{"who started it": m, "who found it": again} {
		if err := m.Wait(ctx); err == nil || ctx.Err() != nil {
			t.Errorf("%s is told that it ended in order: %v", who, err)
		}
	}
	again.Close()
	m.Close()
	if _, err := m.Port(t.Context()); err == nil {
		t.Error("the port of a machine that has ended")
	}
}
