package osimage

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// TestVirtualMachine boots the VM format, runs containers through the port, and
// finds what was kept after the machine was stopped, its disk grown, and started again.
func TestVirtualMachine(t *testing.T) {
	image := vmImage(t)
	data := disk(t, 2<<30)
	m := vm(t, image, data, "")
	if out := m.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Everything works") {
		t.Fatalf("a container said %q", out)
	}
	s := m.settled()
	if s.State != vmwire.StateReady || len(s.Problems) > 0 || s.Data.Kind != "disk" || !s.Engine.Ready || s.ConfigSource != "default" {
		t.Fatalf("the machine is %+v", s)
	}
	m.keep()
	m.must("run", "-d", "--name", "web", "-p", "8080:8080", "servin/hello", "serve")
	web := &http.Client{Transport: &http.Transport{DialContext: dial(m, vmwire.Purpose{Kind: vmwire.TCP, Address: "127.0.0.1:8080"})}}
	if body := fetch(t, web); !strings.Contains(body, "Hello") {
		t.Fatalf("the published port says %q", body)
	}
	if _, err := m.session.Open(t.Context(), vmwire.Purpose{Kind: vmwire.TCP, Address: "127.0.0.1:1"}); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Fatalf("a port where nobody listens: %v", err)
	}
	var busy vmwire.Busy
	if err := m.ctl("GET", "/v1/busy", nil, &busy); err != nil || busy.Containers != 1 {
		t.Fatalf("busy: %+v, %v", busy, err)
	}
	if err := m.ctl("POST", "/v1/mounts", vmwire.Mount{Tag: "x", Target: "/etc/x"}, nil); err == nil {
		t.Fatal("a share was mounted into the system")
	}
	if err := m.ctl("PUT", "/v1/config", "version: 1\nwrong: 1\n", nil); err == nil {
		t.Fatal("a wrong configuration was kept")
	}
	if err := m.ctl("PUT", "/v1/config", "version: 1\nhostname: kept-name\n", nil); err != nil {
		t.Fatal(err)
	}
	when := time.Date(2031, 5, 5, 5, 5, 5, 0, time.UTC)
	if err := m.ctl("PUT", "/v1/clock", vmwire.Clock{Time: when}, nil); err != nil {
		t.Fatal(err)
	}
	if s := m.settled(); s.Time.Before(when) || s.Time.After(when.Add(10*time.Minute)) || !s.TimeSynchronized {
		t.Fatalf("the clock says %v", s.Time)
	}
	m.off()

	if err := os.Truncate(data, 3<<30); err != nil {
		t.Fatal(err)
	}
	m = vm(t, image, data, "")
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		t.Fatalf("what was kept is %q", out)
	}
	s = m.settled()
	if s.Hostname != "kept-name" || s.ConfigSource != "disk" {
		t.Fatalf("the kept configuration is not in use: %+v", s)
	}
	var d vmwire.Disk
	if err := m.ctl("POST", "/v1/data/grow", nil, &d); err != nil || d.Total < 2800<<20 {
		t.Fatalf("the data did not grow: %+v, %v", d, err)
	}
	m.off()
}

// TestWrongConfiguration boots into safe mode, which says what is wrong.
func TestWrongConfiguration(t *testing.T) {
	long(t)
	m := vm(t, vmImage(t), disk(t, 2<<30), "cloudos.config=base64:"+base64.StdEncoding.EncodeToString([]byte("version: 1\nhostname: box\nbogus: 1\n")))
	s := m.settled()
	if s.State != vmwire.StateSafe || s.Engine.Running || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "bogus") {
		t.Fatalf("the machine is %+v", s)
	}
	if out, err := m.servin("version"); err == nil {
		t.Fatalf("an engine answers: %s", out)
	}
	m.await("This is safe mode", 10*time.Second)
	m.await("field bogus not found", time.Second)
	m.off()
}

// TestForeignDisk leaves a disk alone that somebody else's data are on.
func TestForeignDisk(t *testing.T) {
	long(t)
	data := disk(t, 2<<30)
	f, err := os.OpenFile(data, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("precious"), 4096)
	f.Close()
	m := vm(t, vmImage(t), data, "")
	s := m.settled()
	if s.State != vmwire.StateSafe || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "not ours") {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
	b := make([]byte, 1<<20)
	f, err = os.Open(data)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.ReadFull(f, b); err != nil || string(b[4096:4104]) != "precious" || len(bytes.Trim(b, "\x00")) != 8 {
		t.Fatalf("the disk was written to: %v", err)
	}
}

// TestPowerCut kills machines while they prepare their disk and while containers
// write, and finds acknowledged data each time.
func TestPowerCut(t *testing.T) {
	long(t)
	image, data := vmImage(t), disk(t, 2<<30)
	for _, after := range []string{"", "eth0 has"} {
		m := vm(t, image, data, "")
		if after != "" {
			m.await(after, time.Minute)
		}
		m.cmd.Process.Kill()
		<-m.done
		m.done <- nil
	}
	for i := range 3 {
		m := vm(t, image, data, "")
		if i > 0 {
			if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
				t.Fatalf("after cut %d: %q", i, out)
			}
			if out := m.must("ps", "-a", "--format", "{{.Names}}"); !strings.Contains(out, "steady") {
				t.Fatalf("after cut %d the containers are %q", i, out)
			}
		} else {
			m.keep()
			m.must("run", "-d", "--restart", "always", "--name", "steady", "servin/hello", "serve")
			m.must("volumes", "ls")
			var out string
			if err := m.ctl("POST", "/v1/sleep", vmwire.Sleep{}, &out); err != nil { // writes what is unwritten
				t.Fatal(err)
			}
		}
		if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 {
			t.Fatalf("the machine is %+v", s)
		}
		m.cmd.Process.Kill()
		<-m.done
		m.done <- nil
	}
}

// TestDisk boots the disk format with both kinds of firmware, on a disk larger
// than the image.
func TestDisk(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "qemu-img")
	image := build(t, "disk", func(o *osimage.Options) { o.DiskFormat = "qcow2" })
	p := filepath.Join(image, "disk.qcow2")
	if out, err := exec.Command("qemu-img", "check", p).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
	if out, err := exec.Command("qemu-img", "resize", p, "4G").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img resize: %v\n%s", err, out)
	}
	args := []string{"-drive", "file=" + p + ",format=qcow2,if=none,id=d,discard=unmap", "-device", "virtio-blk-pci,drive=d,bootindex=0"}
	m := start(t, 5*time.Minute, args...)
	m.connect()
	m.keep()
	var d vmwire.Disk
	if err := m.ctl("POST", "/v1/data/grow", nil, &d); err != nil || d.Device == "" || d.Total < 2<<30 {
		t.Fatalf("the data did not grow with the disk: %+v, %v", d, err)
	}
	m.off()
	m = start(t, 8*time.Minute, append(args, uefi(t)...)...)
	m.connect()
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		t.Fatalf("what was kept is %q", out)
	}
	m.off()
}

// uefi are QEMU's flags for UEFI.
func uefi(t *testing.T) []string {
	t.Helper()
	return append([]string{"-machine", "q35"}, firmware(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")...)
}

// firmware are QEMU's flags for firmware in flash, with variables of its own.
func firmware(t *testing.T, code, vars string) []string {
	t.Helper()
	needs(t, code)
	b, err := os.ReadFile(vars)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), "vars")
	if err := os.WriteFile(own, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-drive", "if=pflash,format=raw,readonly=on,file=" + code, "-drive", "if=pflash,format=raw,file=" + own}
}

// TestISO boots the ISO image as a disc with both kinds of firmware, and as a stick.
func TestISO(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", "xorriso")
	iso := filepath.Join(build(t, "iso", nil), "cloudos.iso")
	for name, args := range map[string][]string{
		"bios disc":  {"-cdrom", iso, "-boot", "d"},
		"uefi disc":  append([]string{"-cdrom", iso, "-boot", "d"}, uefi(t)...),
		"bios stick": {"-drive", "file=" + iso + ",format=raw,if=none,id=d,readonly=on", "-device", "qemu-xhci", "-device", "usb-storage,drive=d,bootindex=0"},
	} {
		t.Run(name, func(t *testing.T) {
			m := start(t, 8*time.Minute, args...)
			m.connect()
			if s := m.settled(); s.State != vmwire.StateReady || s.Data.Kind != "memory" {
				t.Fatalf("the machine is %+v", s)
			}
			if out := m.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Everything works") {
				t.Fatalf("a container said %q", out)
			}
			m.off()
		})
	}
}

// TestNetboot starts the pair of kernel and initial file system alone.
func TestNetboot(t *testing.T) {
	long(t)
	image := build(t, "netboot", nil)
	in, err := osimage.Inspect(image)
	if err != nil {
		t.Fatal(err)
	}
	m := start(t, 5*time.Minute, "-kernel", filepath.Join(image, "kernel"), "-initrd", filepath.Join(image, "initrd"), "-append", in.Image.CommandLine)
	m.connect()
	if out := strings.Join(strings.Fields(m.must("run", "--rm", "servin/hello", "cat", "/proc/self/limits")), " "); !strings.Contains(out, "Max open files 1048576 1048576") {
		t.Errorf("a container has other limits than elsewhere: %s", out)
	}
	if out := m.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Everything works") {
		t.Fatalf("a container said %q", out)
	}
	m.off()
}

// TestNoCloud reads the configuration of a volume with the label cidata.
func TestNoCloud(t *testing.T) {
	long(t)
	needs(t, "xorriso")
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "f"), 0o755)
	for name, text := range map[string]string{"user-data": "#cloudos\nversion: 1\nsysctl: {vm.swappiness: \"7\"}\nnetwork:\n  links:\n  - {name: eth0, addresses: [10.0.2.77/24], gateway: 10.0.2.2}\n", "meta-data": "local-hostname: from-volume\n"} {
		if err := os.WriteFile(filepath.Join(dir, "f", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	iso := filepath.Join(dir, "cidata.iso")
	if out, err := exec.Command("xorriso", "-as", "mkisofs", "-quiet", "-V", "cidata", "-R", "-o", iso, filepath.Join(dir, "f")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m := vm(t, vmImage(t), "", "", "-drive", "file="+iso+",format=raw,if=none,id=c,readonly=on", "-device", "virtio-blk-pci,drive=c")
	s := m.settled()
	if s.ConfigSource != "nocloud" || s.Hostname != "from-volume" || len(s.Interfaces) != 1 || len(s.Interfaces[0].Addresses) == 0 || s.Interfaces[0].Addresses[0] != "10.0.2.77/24" {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
}

// TestReproducible builds twice, in folders of different names, and compares all bytes: signatures, too.
func TestReproducible(t *testing.T) {
	kinds := map[string]func(*osimage.Options){"vm": nil}
	if os.Getenv("SERVIN_LONG") != "" {
		needs(t, "grub-mkimage", "xorriso")
		key := signer(t)
		owner, _ := ownersKeys(t)
		kinds["disk"], kinds["iso"], kinds["netboot"] = nil, nil, nil
		kinds["release"] = func(o *osimage.Options) { o.Sign = []ed25519.PrivateKey{key} }
		kinds["disk of an owner"] = func(o *osimage.Options) { o.DiskFormat, o.Owner, o.Sign = "qcow2", owner, []ed25519.PrivateKey{key} }
	}
	for name, change := range kinds {
		t.Run(name, func(t *testing.T) {
			format, _, _ := strings.Cut(name, " ")
			first := ""
			if format == "vm" {
				first = vmImage(t)
			} else {
				first = build(t, format, change)
			}
			one, two := sums(t, first), sums(t, build(t, format, change))
			if len(one) < 3 {
				t.Fatalf("there are %d files", len(one))
			}
			if size := folderSize(t, first); name != "disk" && size >= 60e6 { // a raw disk is sparse
				t.Errorf("the image has %d bytes, not less than 60 MB", size)
			}
			for name, sum := range one {
				if two[name] != sum {
					t.Errorf("%s differs", name)
				}
			}
		})
	}
}

func folderSize(t *testing.T, dir string) (size int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	return size
}

func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(filepath.Join(dir, p))
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		_, err = io.Copy(h, f)
		out[p] = hex.EncodeToString(h.Sum(nil))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestInspect finds a file that was changed after it was built.
func TestInspect(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(vmImage(t))); err != nil {
		t.Fatal(err)
	}
	in, err := osimage.Inspect(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	in.Print(&b, 5)
	if !strings.Contains(b.String(), "root/bin/servind") || !strings.Contains(b.String(), "modules") {
		t.Fatalf("it says\n%s", b.String())
	}
	var size int64
	for _, f := range in.Image.Files {
		size += f.Size
	}
	t.Logf("the image has %.1f MB", float64(size)/1e6)
	f, err := os.OpenFile(filepath.Join(dir, in.Image.Files["root"].Name), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte{0xff}, 12345)
	f.Close()
	if _, err := osimage.Inspect(dir); err == nil {
		t.Fatal("a changed root passed")
	}
}
