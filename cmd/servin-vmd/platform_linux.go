package main

import (
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/qemu"
)

func drivers(string) []vm.Driver { return []vm.Driver{qemu.New(qemu.Config{})} }

func memory() uint64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 0
	}
	return uint64(si.Totalram) * uint64(si.Unit)
}
