package osinit

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/modules"
)

// In VM mode shim/first.c is the initial file system's program: it has mounted the root and started
// the engine before it became this one (ADR 57). It says so with a variable, the
// engine's process id, and leaves descriptors.
const (
	firstEnv                                = "CLOUDOS_FIRST"
	firstTell, firstOut, firstIn, firstRoot = 3, 4, 5, 6
)

// adopt takes over what the first stage left, and says whether there was one.
func (m *machine) adopt() (bool, error) {
	word := os.Getenv(firstEnv)
	if word == "" {
		return false, nil
	}
	pid, err := strconv.Atoi(word)
	if err != nil {
		return false, fmt.Errorf("cannot read %s: %w", firstEnv, err)
	}
	if err := os.Unsetenv(firstEnv); err != nil {
		return false, err
	}
	for fd := firstTell; fd <= firstRoot; fd++ {
		unix.CloseOnExec(fd)
	}
	e := &waitingEngine{
		tell: os.NewFile(firstTell, "order"), out: os.NewFile(firstOut, "output"), in: os.NewFile(firstIn, "output"),
	}
	if pid > 0 {
		e.process = m.table.Adopt(pid, engineOOMScore)
		m.prepared = e
	} else { // it could not be started: it is when it is its turn
		e.close()
	}
	// What the kernel unpacked stays open: modules are loaded from there beside all else.
	at := fmt.Sprintf("/proc/self/fd/%d", firstRoot)
	defer unix.Close(firstRoot)
	if m.unpacked, err = os.OpenRoot(at); err != nil {
		return false, err
	}
	m.initial, err = modules.Open(at)
	return true, err
}
