//go:build !linux

package qemu

import (
	"context"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// AddShare implements vm.Sharer.
func (m *Machine) AddShare(context.Context, vm.Share) error {
	return fault.New(fault.Unsupported, "QEMU shares host folders on Linux alone")
}
