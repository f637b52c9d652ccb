//go:build windows

package qemu

import (
	"context"
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// Start implements vm.Driver. There are no descriptors to inherit here: QEMU binds
// its sockets itself, in a folder that is its user's alone.
func (d *Driver) Start(ctx context.Context, s vm.Spec, h vm.Host, report func(string)) (vm.Machine, error) {
	if s.Image.Kernel == "" {
		return nil, fault.New(fault.Invalid, "this driver boots images in the vm format: cloudos image build --format vm")
	}
	path, err := d.find(program(runtime.GOARCH))
	if err != nil {
		return nil, err
	}
	if err := vm.MakeDisk(s.Data, s.Disk); err != nil {
		return nil, err
	}
	removeRemains(s)
	det := detail{UUID: machineUUID(s), Host: h, Problems: map[string]string{}}
	for _, sh := range s.Shares {
		det.Problems[sh.Path] = "QEMU shares host folders on Linux alone"
	}
	p := plan{goos: runtime.GOOS, goarch: runtime.GOARCH, accelerator: h.Accelerator, spec: s, uuid: det.UUID,
		kernel: s.Image.Kernel, initrd: s.Image.Initrd, root: s.Image.Root, data: s.Data,
		monitor: "path=" + quote(socket(s, "monitor")), console: "path=" + quote(socket(s, "console")), port: "path=" + quote(socket(s, "port"))}
	p.spec.Shares = nil
	cmd := exec.Command(path, p.args()...)
	said := &tail{max: 16 << 10}
	cmd.Stderr, cmd.Stdout = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP | 0x8}
	report("starting the machine")
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run %s: %w", path, err)
	}
	det.PID, det.Birth = cmd.Process.Pid, birth(cmd.Process.Pid)
	m := &Machine{spec: s, detail: det, ended: make(chan struct{}), quit: make(chan struct{}), said: said}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	died := make(chan struct{})
	go func() { cmd.Wait(); close(died); cancel() }()
	m.mon, err = dialMonitor(ctx, socket(s, "monitor"))
	if err == nil {
		err = m.mon.do(ctx, "cont", nil, nil)
	}
	if err != nil {
		cmd.Process.Kill()
		<-died
		removeRemains(s)
		return nil, fault.New(fault.Unavailable, "cannot start the machine: %s (%w)", said.last(), err)
	}
	go func() { <-died; removeRemains(s); close(m.ended) }()
	return m, nil
}

func birth(pid int) uint64 {
	if pid > 0 {
		return uint64(pid)
	}
	return 0
}

func findProcess(string) int { return 0 }
