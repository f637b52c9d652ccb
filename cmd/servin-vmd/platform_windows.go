package main

import (
	"unsafe"

	"golang.org/x/sys/windows"

	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/hyperv"
	"github.com/cloudos-io/cloudos/internal/vm/qemu"
	"github.com/cloudos-io/cloudos/internal/vm/wsl"
)

// drivers are Hyper-V where Windows has it, WSL2 where not (no edition is without it), and QEMU for the rest.
func drivers(state string) []vm.Driver {
	return []vm.Driver{hyperv.New(hyperv.ThisHost()), wsl.New(wsl.ThisHost(state)), qemu.New(qemu.Config{})}
}

// memoryStatus is MEMORYSTATUSEX.
type memoryStatus struct {
	length, load                                                                                  uint32
	total, available, totalPage, availablePage, totalVirtual, availableVirtual, availableExtended uint64
}

func memory() uint64 {
	st := memoryStatus{length: uint32(unsafe.Sizeof(memoryStatus{}))}
	if r, _, _ := windows.NewLazySystemDLL("kernel32.dll").NewProc("GlobalMemoryStatusEx").Call(uintptr(unsafe.Pointer(&st))); r == 0 {
		return 0
	}
	return st.total
}
