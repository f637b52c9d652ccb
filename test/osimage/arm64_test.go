package osimage

import (
	"debug/elf"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// armBoard is the machine that arm64 images are booted on: a real processor's
// instructions, no more.
var armBoard = []string{"qemu-system-aarch64", "-machine", "virt,gic-version=max", "-cpu", "cortex-a72"}

// armPrograms is the folder with the programs that make arm64 made.
func armPrograms(t *testing.T) string {
	t.Helper()
	long(t)
	dir := filepath.Join(programs(t), "arm64")
	f, err := elf.Open(filepath.Join(dir, "servind"))
	if err != nil {
		t.Skipf("SKIP: no programs for arm64 (make arm64): %v", err)
	}
	defer f.Close()
	if f.Machine != elf.EM_AARCH64 {
		t.Fatalf("the programs in %s are for %s", dir, f.Machine)
	}
	return dir
}

func armImage(t *testing.T, format string, change func(*osimage.Options)) string {
	t.Helper()
	dir := armPrograms(t)
	return build(t, format, func(o *osimage.Options) {
		o.Arch, o.Programs = "arm64", dir
		if change != nil {
			change(o)
		}
	})
}

// armUEFI are QEMU's flags for UEFI on arm64.
func armUEFI(t *testing.T) []string {
	t.Helper()
	return firmware(t, "/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd")
}

// hello runs the embedded image in a container, with what takes the shim, the
// system call filter and the network to be right.
func (m *machine) hello() {
	m.t.Helper()
	if out := m.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Everything works") {
		m.t.Fatalf("a container said %q", out)
	}
}

// TestArm64 boots the VM format and has containers do what depends on the
// architecture: system call filters, limits, terminals, published ports, exec.
func TestArm64(t *testing.T) {
	image, data := armImage(t, "vm", nil), disk(t, 2<<30)
	m := vm(t, image, data, "")
	m.hello()
	s := m.settled()
	if s.State != vmwire.StateReady || len(s.Problems) > 0 || s.Arch != "arm64" || s.Data.Kind != "disk" || !s.Engine.Ready {
		t.Fatalf("the machine is %+v", s)
	}
	if out := m.must("image", "inspect", "--format", "{{.Architecture}}", "servin/hello"); strings.TrimSpace(out) != "arm64" {
		t.Fatalf("the image is for %q", out)
	}
	m.keep()
	// A whole system of programs: the toolbox's shell calls what programs call.
	m.must("run", "-d", "--name", "web", "-p", "8080:8080", "servin/hello", "serve")
	web := &http.Client{Transport: &http.Transport{DialContext: dial(m, vmwire.Purpose{Kind: vmwire.TCP, Address: "127.0.0.1:8080"})}}
	if body := fetch(t, web); !strings.Contains(body, "Hello") {
		t.Fatalf("the published port says %q", body)
	}
	tools := func(args ...string) (string, error) {
		return m.servin(append([]string{"debug", "-T", "web"}, args...)...)
	}
	if out, err := tools("sh", "-c", "uname -m; grep Seccomp: /proc/self/status; id -u; ls /target; for i in 1 2 3; do (true) & done; wait; echo done"); err != nil ||
		!strings.Contains(out, "aarch64") || !strings.Contains(out, "Seccomp:\t2") || !strings.Contains(out, "servin-hello") || !strings.Contains(out, "done") {
		t.Fatalf("the tools say %q (%v)", out, err)
	}
	// What the default filter refuses, by number: a table for another architecture would let it through or kill.
	if out, err := tools("sh", "-c", "unshare -U true; swapoff /nowhere; mount -t tmpfs x /tmp; echo answered"); err != nil ||
		strings.Count(out, "Operation not permitted")+strings.Count(out, "permission denied") < 3 || !strings.Contains(out, "answered") {
		t.Fatalf("the filter answers %q (%v)", out, err)
	}
	if out := m.must("exec", "web", "/servin-hello"); !strings.Contains(out, "Everything works") {
		t.Fatalf("exec said %q", out)
	}
	m.must("run", "--rm", "-t", "--memory", "64m", "--pids-limit", "64", "--cpus", "0.5", "--read-only", "--userns", "auto", "servin/hello")
	m.must("stop", "-t", "2", "web")
	m.off()

	m = vm(t, image, data, "")
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		t.Fatalf("what was kept is %q", out)
	}
	m.off()
}

// TestArm64Firmware boots disk, ISO and netboot images: the first two through UEFI.
func TestArm64Firmware(t *testing.T) {
	armPrograms(t)
	boot := func(t *testing.T, kind string, args ...string) {
		t.Helper()
		m := emulate(t, 8*time.Minute, "stdio", append(append(append([]string{}, armBoard...), args...), "-device", "ramfb")...)
		m.connect()
		m.hello()
		if s := m.settled(); s.State != vmwire.StateReady || s.Arch != "arm64" || s.Data.Kind != kind {
			t.Fatalf("the machine is %+v", s)
		}
		m.off()
	}
	t.Run("disk", func(t *testing.T) {
		p := filepath.Join(armImage(t, "disk", func(o *osimage.Options) { o.DiskFormat = "qcow2" }), "disk.qcow2")
		if out, err := exec.Command("qemu-img", "resize", p, "4G").CombinedOutput(); err != nil {
			t.Fatalf("qemu-img resize: %v\n%s", err, out)
		}
		boot(t, "disk", append(armUEFI(t), "-drive", "file="+p+",format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d,bootindex=0")...)
	})
	t.Run("iso", func(t *testing.T) {
		needs(t, "xorriso")
		p := filepath.Join(armImage(t, "iso", nil), "cloudos.iso")
		boot(t, "memory", append(armUEFI(t), "-drive", "file="+p+",format=raw,if=none,id=d,readonly=on", "-device", "qemu-xhci", "-device", "usb-storage,drive=d,bootindex=0")...)
	})
	t.Run("netboot", func(t *testing.T) {
		dir := armImage(t, "netboot", nil)
		in, err := osimage.Inspect(dir)
		if err != nil {
			t.Fatal(err)
		}
		boot(t, "memory", "-kernel", filepath.Join(dir, "kernel"), "-initrd", filepath.Join(dir, "initrd"), "-append", in.Image.CommandLine)
	})
}
