//go:build unix && !linux

package qemu

import (
	"context"
	"os"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

type unprivileged struct{}

func privateUser(string) *unprivileged { return nil }

func processAttributes(*unprivileged) *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

func readableBy(path string) (*os.File, error) { return os.Open(path) }

// birth tells apart only whether there is a process.
func birth(pid int) uint64 {
	if pid > 0 && syscall.Kill(pid, 0) == nil {
		return 1
	}
	return 0
}

func findProcess(string) int { return 0 }

func serveFolder(context.Context, string, vm.Spec, vm.Share, int) (*os.File, error) {
	return nil, fault.New(fault.Unsupported, "QEMU shares host folders on Linux alone")
}
