package qemu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// probePatience bounds the guest that finds out whether KVM runs guests. A
// kernel says its first words within a second there.
const probePatience = 8 * time.Second

// verdict is what a probe found, for this boot of the computer and these programs.
type verdict struct {
	Key  string  `json:"key"`
	Host vm.Host `json:"host"`
}

// Probe implements vm.Driver.
func (d *Driver) Probe(ctx context.Context, img vm.Image, state string) (vm.Host, error) {
	if img.Dir != "" && img.Kernel == "" {
		return vm.Host{}, fault.New(fault.Invalid, "QEMU starts kernels: build the image with 'cloudos image build --format vm' and name its folder with 'servin vm config --image DIR'")
	}
	path, err := d.find(program(runtime.GOARCH))
	if err != nil {
		return vm.Host{}, fault.New(fault.Unsupported, "cannot find %s: install it (Debian: qemu-system-x86 or qemu-system-arm, macOS: brew install qemu)", program(runtime.GOARCH))
	}
	key := d.probeKey(path, img)
	file := filepath.Join(state, "probe.json")
	var v verdict
	if ok, err := vm.ReadJSON(file, &v); ok && err == nil && v.Key == key {
		return v.Host, nil
	}
	vctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	out, err := exec.CommandContext(vctx, path, "--version").Output()
	cancel()
	if err != nil {
		return vm.Host{}, fmt.Errorf("cannot run %s: %w", path, err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	v = verdict{Key: key, Host: vm.Host{Accelerator: "tcg", Version: strings.TrimPrefix(first, "QEMU emulator version ")}}
	switch runtime.GOOS {
	case "linux":
		if why := d.tryKVM(ctx, path, img); why == "" {
			v.Host.Accelerator = "kvm"
		} else {
			v.Host.Slow = why
		}
	case "darwin":
		v.Host.Accelerator = "hvf"
	case "windows":
		v.Host.Accelerator = "whpx"
	}
	if ctx.Err() != nil {
		return vm.Host{}, ctx.Err()
	}
	return v.Host, vm.WriteJSON(file, v)
}

// probeKey changes with whatever could change the verdict.
func (d *Driver) probeKey(path string, img vm.Image) string {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	key := strings.TrimSpace(string(boot)) + " " + img.Digest + " " + path
	for _, f := range []string{path, "/dev/kvm"} {
		if fi, err := os.Stat(f); err == nil {
			key += fmt.Sprintf(" %d %s", fi.ModTime().UnixNano(), fi.Mode())
		}
	}
	return key
}

// tryKVM boots the image's kernel without a root under KVM: it panics at once
// where KVM works. A /dev/kvm that opens tells nothing: nested ones hang or fail at the first instruction.
func (d *Driver) tryKVM(ctx context.Context, path string, img vm.Image) string {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		if os.IsPermission(err) {
			return "/dev/kvm may not be opened: join the group that owns it (usermod -aG kvm USER)"
		}
		return "there is no /dev/kvm: switch virtualization on in the firmware, or nested virtualization in the outer machine"
	}
	f.Close()
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-machine", kvmMachine(),
		"-accel", "kvm", "-cpu", "host", "-m", "512M", "-serial", "stdio", "-kernel", img.Kernel, "-append", "console=ttyS0 console=ttyAMA0 panic=-1 root=none")
	out := &tail{max: 64 << 10}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	text := out.bytes()
	if bytes.Contains(text, []byte("Linux version")) && bytes.Contains(text, []byte("Kernel panic")) {
		return ""
	}
	if ctx.Err() != nil {
		return fmt.Sprintf("KVM is there, but did not boot a kernel within %v", probePatience)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return fmt.Sprintf("KVM is there, but does not run a guest: %s (%v)", clean(lines[0]), err)
}

func kvmMachine() string {
	if runtime.GOARCH == "arm64" {
		return "virt,gic-version=max"
	}
	return "q35"
}

// clean makes a line of somebody else's printable.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, s)
	return s[:min(len(s), 300)]
}
