package daemon

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// unmapProgram lets go of the pages of the program itself, most of which only its
// start needed: they stay in the page cache, and those that are used again are
// mapped again, a few at each fault.
func unmapProgram() {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		var from, to uintptr
		var mode string
		if n, err := fmt.Sscanf(sc.Text(), "%x-%x %s", &from, &to, &mode); n < 3 || err != nil {
			continue
		}
		// What can be written to is ours alone, and would be lost.
		if !strings.HasSuffix(sc.Text(), " "+exe) || strings.Contains(mode, "w") || !strings.HasSuffix(mode, "p") {
			continue
		}
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED)
	}
}
