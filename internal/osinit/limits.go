package osinit

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// raiseLimits gives the engine and its containers what packaging/servind.service gives them elsewhere. The kernel's own
// are 4096 open files, which an engine of some hundred containers needs itself, and a share of the memory
// in processes for all containers together. In VM mode shim/first.c did it for the first engine.
func (m *machine) raiseLimits() {
	for what, most := range map[int]uint64{unix.RLIMIT_NOFILE: 1 << 20, unix.RLIMIT_NPROC: unix.RLIM_INFINITY} {
		if err := unix.Setrlimit(what, &unix.Rlimit{Cur: most, Max: most}); err != nil {
			m.problem(fmt.Errorf("cannot raise the limits of the engine: %w", err))
		}
	}
}
