package qemu

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// hotPorts are the places for shares that come while the machine runs.
const hotPorts = 4

// plan is what a command line is made of. Files and sockets are named as QEMU
// can open them: by an inherited descriptor where QEMU runs as somebody who could not.
type plan struct {
	goos, goarch string
	accelerator  string
	spec         vm.Spec
	kernel       string
	initrd       string
	root, data   string
	// uuid is in the command line, so that the process can be found.
	uuid string
	// monitor, console and port are chardev endpoints: "fd=4" or "path=/…"; share[i] is
	// the connected socket of share i's file server.
	monitor, console, port string
	share                  []string
	// sets are descriptors that drives name as /dev/fdset/N.
	sets []fdset
	// sandbox: QEMU's own system call filter is to be had.
	sandbox bool
}

type fdset struct {
	fd, set int
}

// program is the emulator for an architecture.
func program(goarch string) string {
	if goarch == "arm64" {
		return "qemu-system-aarch64"
	}
	return "qemu-system-x86_64"
}

// quote doubles commas, which end a value in QEMU's options.
func quote(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// args is QEMU's command line without the program.
func (p *plan) args() []string {
	mib := strconv.FormatInt(p.spec.Memory>>20, 10)
	backend := "memory-backend-memfd,id=mem,share=on,size=" + mib + "M"
	if p.goos != "linux" {
		backend = "memory-backend-ram,id=mem,size=" + mib + "M"
	}
	machine, cpu := "q35,vmport=off,dump-guest-core=off,memory-backend=mem", "host"
	serial := "isa-serial"
	if p.goarch == "arm64" {
		machine, serial = "virt,gic-version=max,dump-guest-core=off,memory-backend=mem", ""
	}
	// What QEMU's own DHCP server would say: the network is there a conversation earlier.
	accel, words := p.accelerator, p.spec.Image.CommandLine+" cloudos.net=10.0.2.15/24,10.0.2.2,10.0.2.3"
	switch {
	case accel == "tcg":
		// A bigger cache of translated code: booting a kernel and then Go programs overflows the default.
		accel, cpu = "tcg,thread=multi,tb-size=512", "max"
		if p.goarch == "amd64" {
			// Its "fast" string instructions are emulated byte by byte, and a fifth level of
			// page tables makes each walk longer: the kernel takes better ways without them.
			cpu = "max,erms=off,fsrm=off,la57=off"
			// An emulator's processors count the ticks of one clock, but do not promise it: without this
			// word each look at the clock goes to an emulated HPET, which Go programs do all the time.
			words += " tsc=reliable"
		}
	case accel == "whpx":
		accel, cpu = "whpx,kernel-irqchip=off", "max"
	}
	a := []string{
		"-name", "servin-" + quote(p.spec.Name), "-uuid", p.uuid,
		"-no-user-config", "-nodefaults", "-no-reboot", "-S",
		"-machine", machine, "-accel", accel, "-cpu", cpu, "-smp", strconv.Itoa(p.spec.CPUs),
		"-m", mib + "M", "-object", backend, "-rtc", "base=utc", "-display", "none",
	}
	if p.sandbox {
		a = append(a, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	for _, s := range p.sets {
		a = append(a, "-add-fd", fmt.Sprintf("fd=%d,set=%d", s.fd, s.set))
	}
	a = append(a,
		"-chardev", "socket,id=monitor,"+p.monitor+",server=on,wait=off", "-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=console,"+p.console+",server=on,wait=off")
	if serial != "" {
		a = append(a, "-device", serial+",chardev=console")
	} else {
		a = append(a, "-serial", "chardev:console")
	}
	a = append(a,
		"-kernel", p.kernel, "-initrd", p.initrd, "-append", words,
		"-blockdev", "driver=file,node-name=root-file,read-only=on,filename="+quote(p.root),
		"-blockdev", "driver=raw,node-name=root,read-only=on,file=root-file",
		"-device", "virtio-blk-pci,drive=root,serial="+vmwire.SerialRoot,
		"-blockdev", "driver=file,node-name=data-file,discard=unmap,locking=on,filename="+quote(p.data),
		"-blockdev", "driver=raw,node-name=data,discard=unmap,detect-zeroes=unmap,file=data-file",
		"-device", "virtio-blk-pci,drive=data,serial="+vmwire.SerialData+",discard=on,write-zeroes=on",
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-serial-pci,id=serial",
		"-chardev", "socket,id=port,"+p.port+",server=on,wait=off",
		"-device", "virtserialport,bus=serial.0,chardev=port,name="+vmwire.Port,
		"-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on",
		"-device", "virtio-rng-pci")
	for i, s := range p.share {
		a = append(a, "-chardev", fmt.Sprintf("socket,id=share%d,%s", i, s),
			"-device", fmt.Sprintf("vhost-user-fs-pci,id=fs%d,chardev=share%d,queue-size=512,tag=%s", i, i, p.spec.Shares[i].Tag))
	}
	if p.goos == "linux" {
		for i := range hotPorts {
			a = append(a, "-device", fmt.Sprintf("pcie-root-port,id=hot%d,chassis=%d", i, i+1))
		}
	}
	return a
}
