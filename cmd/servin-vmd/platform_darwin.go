package main

import (
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/qemu"
	"github.com/cloudos-io/cloudos/internal/vm/vfkit"
)

func drivers(string) []vm.Driver {
	return []vm.Driver{vfkit.New(vfkit.Config{}), qemu.New(qemu.Config{})}
}

func memory() uint64 {
	n, err := unix.SysctlUint64("hw.memsize")
	if err != nil {
		return 0
	}
	return n
}
