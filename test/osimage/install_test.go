package osimage

import (
	"crypto/ed25519"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

var isoOnce struct {
	sync.Mutex
	file string
	key  ed25519.PrivateKey
}

// isoImage is one signed ISO image for all tests that install.
func isoImage(t *testing.T) string {
	t.Helper()
	isoOnce.Lock()
	defer isoOnce.Unlock()
	if isoOnce.file == "" {
		isoOnce.key = signer(t)
		from := filepath.Join(build(t, "iso", func(o *osimage.Options) { o.Version, o.Sign = "1.0.0", []ed25519.PrivateKey{isoOnce.key} }), "cloudos.iso")
		dir, err := os.MkdirTemp("", "osimage")
		if err != nil {
			t.Fatal(err)
		}
		isoOnce.file = filepath.Join(dir, "cloudos.iso")
		if err := os.Rename(from, isoOnce.file); err != nil {
			t.Fatal(err)
		}
	}
	return isoOnce.file
}

// removeISO ends with the tests.
func removeISO() {
	if isoOnce.file != "" {
		os.RemoveAll(filepath.Dir(isoOnce.file))
	}
}

// volume makes a NoCloud volume with a document.
func volume(t *testing.T, document string) []string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "f"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"user-data": "#cloudos\nversion: 1\n" + document, "meta-data": "local-hostname: from-volume\n"} {
		if err := os.WriteFile(filepath.Join(dir, "f", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	iso := filepath.Join(dir, "cidata.iso")
	if out, err := exec.Command("xorriso", "-as", "mkisofs", "-quiet", "-V", "cidata", "-R", "-o", iso, filepath.Join(dir, "f")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return []string{"-drive", "file=" + iso + ",format=raw,if=none,id=c,readonly=on", "-device", "virtio-blk-pci,drive=c"}
}

// drive is a disk of a machine.
func drive(name, file string) []string {
	return []string{"-drive", "file=" + file + ",format=raw,if=none,id=" + name + ",discard=unmap,detect-zeroes=unmap", "-device", "virtio-blk-pci,drive=" + name + ",serial=" + name}
}

// installer starts a machine from the ISO image.
func installer(t *testing.T, more ...[]string) *machine {
	t.Helper()
	args := []string{"-cdrom", isoImage(t), "-boot", "d"}
	for _, a := range more {
		args = append(args, a...)
	}
	return start(t, 10*time.Minute, args...)
}

// ended waits until the machine has stopped.
func (m *machine) ended(limit time.Duration) {
	m.t.Helper()
	select {
	case err := <-m.done:
		m.done <- err
		if err != nil {
			m.t.Fatalf("the machine ended with %v", err)
		}
	case <-time.After(limit):
		m.t.Fatal("the machine does not stop")
	}
}

func holding(t *testing.T, text string) string {
	t.Helper()
	p := disk(t, 3<<30)
	f, err := os.OpenFile(p, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(text), 4096); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestInstall installs by a document on the empty one of two disks, starts from it with both
// kinds of firmware, and finds the document in use. What is installed is not installed again.
func TestInstall(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "xorriso")
	full, target := holding(t, "precious"), disk(t, 3<<30)
	document := volume(t, "hostname: box-7\nrole: master\ninstall: {then: poweroff}\n")
	m := installer(t, document, drive("full", full), drive("target", target))
	m.await("is installed on", 6*time.Minute)
	m.ended(time.Minute)
	for _, want := range []string{"serial target  (empty)", "serial full  (something that is not known)", "network  eth0"} {
		if !strings.Contains(m.said(), want) {
			t.Errorf("the machine did not say %q:\n%s", want, m.said())
		}
	}
	if b := make([]byte, 8); !readsAt(t, full, b, 4096) || string(b) != "precious" {
		t.Fatal("the other disk was written to")
	}
	for _, firmware := range [][]string{nil, uefi(t)} {
		m = start(t, 8*time.Minute, append(append([]string{"-action", "reboot=reset"}, firmware...), drive("target", target)...)...)
		m.connect()
		if out := m.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Everything works") {
			t.Fatalf("a container said %q", out)
		}
		s := m.settled()
		if s.Hostname != "box-7" || s.ConfigSource != "disk" || s.Data.Kind != "disk" || s.Data.Disk < 2<<30 {
			t.Fatalf("the machine is %+v", s)
		}
		o := m.os("up", func(s system.Status) bool { return s.State == "ready" && s.Next != "" })
		if o.Version != "1.0.0" || o.Platform != "metal" || len(o.Slots) != 2 || !o.Slots[0].Running || o.Slots[0].SignedBy == "" || o.Last == nil || o.Last.Kind != "install" {
			t.Fatalf("the machine is %+v", o)
		}
		m.off()
	}
	m = installer(t, document, drive("full", full), drive("target", target))
	m.connect()
	if s := m.settled(); s.State != vmwire.StateSafe || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "by this very document") {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
}

func readsAt(t *testing.T, file string, b []byte, at int64) bool {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = f.ReadAt(b, at)
	return err == nil
}

// TestInstallRefuses leaves a disk with data alone, and overwrites it when it is named and
// that is permitted.
func TestInstallRefuses(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "xorriso")
	full := holding(t, "precious")
	for document, want := range map[string]string{
		"install: {}\n":                        "there is no empty disk",
		"install: {disk: {serial: full}}\n":    "not overwritten without install.disk.wipe",
		"install: {disk: {serial: another}}\n": "no disk is as install.disk says",
	} {
		m := installer(t, volume(t, document), drive("full", full))
		m.connect()
		if s := m.settled(); s.State != vmwire.StateSafe || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], want) || !strings.Contains(s.Problems[0], "serial full") {
			t.Fatalf("%s: the machine is %+v", document, s)
		}
		m.off()
		if b := make([]byte, 8); !readsAt(t, full, b, 4096) || string(b) != "precious" {
			t.Fatal("the disk was written to")
		}
	}
	m := installer(t, volume(t, "install: {disk: {serial: full, wipe: true}, then: poweroff}\n"), drive("full", full))
	m.await("is installed on", 6*time.Minute)
	m.ended(time.Minute)
}

// TestPowerCutInstall cuts the power at several moments of an installation: the next one
// goes through without being told to wipe anything.
func TestPowerCutInstall(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "xorriso")
	target := disk(t, 3<<30)
	document := volume(t, "install: {then: poweroff}\n")
	for _, c := range []struct {
		after string
		wait  time.Duration
	}{{"writing system", 0}, {"writing system", 2 * time.Second}, {"write root.img", 0}, {"verify", 500 * time.Millisecond}} {
		m := installer(t, document, drive("target", target))
		m.await(c.after, 5*time.Minute)
		time.Sleep(c.wait)
		if strings.Contains(m.said(), "is installed on") {
			t.Logf("the cut after %s came too late", c.after)
		}
		m.cut()
	}
	m := installer(t, document, drive("target", target))
	m.await("is installed on", 6*time.Minute)
	if !strings.Contains(m.said(), "an installation that was cut off") {
		t.Error("the machine did not tell of what was cut off")
	}
	m.ended(time.Minute)
	m = start(t, 8*time.Minute, append([]string{"-action", "reboot=reset"}, drive("target", target)...)...)
	m.connect()
	if out := m.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Everything works") {
		t.Fatalf("a container said %q", out)
	}
	m.off()
}

// TestMenu installs by hand: on the serial console, with answers that are wrong at first.
func TestMenu(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "xorriso")
	target := disk(t, 3<<30)
	sock := filepath.Join(t.TempDir(), "s")
	m := startConsole(t, sock, append([]string{"-cdrom", isoImage(t), "-boot", "d"}, drive("target", target)...)...)
	for _, c := range []struct{ await, answer string }{
		{"Choose, within", "4"}, {"Address of a master", "m1.example:6443"}, {"Name of this machine", "node-5"}, {"Disk to install on", "9"}, {"This is not possible", "1"},
	} {
		m.await(c.await, 3*time.Minute)
		if _, err := fmt.Fprintf(m.serial, "%s\n", c.answer); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
	}
	m.await("is installed on", 6*time.Minute)
	m.ended(2 * time.Minute)
	m = start(t, 8*time.Minute, append([]string{"-action", "reboot=reset"}, drive("target", target)...)...)
	m.connect()
	m.must("version")
	var kept string
	if err := m.ctl("GET", "/v1/config", nil, &kept); err != nil || !strings.Contains(kept, "role: node") || !strings.Contains(kept, "m1.example:6443") || strings.Contains(kept, "install") {
		t.Fatalf("the document is %q, %v", kept, err)
	}
	if s := m.settled(); s.Hostname != "node-5" {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
}

// startConsole starts a machine whose serial console can be typed on.
func startConsole(t *testing.T, sock string, args ...string) *machine {
	t.Helper()
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m := startWith(t, 10*time.Minute, "unix:"+sock, args...)
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	m.serial = c
	go io.Copy(m, c)
	t.Cleanup(func() { c.Close() })
	return m
}
