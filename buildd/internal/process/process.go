// Package process makes servin-buildd at home in the namespaces that servind
// started it in: mounts of its own that follow the host's, a procfs of its own,
// and the duties of a first process.
package process

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Settle prepares this process. Where it was started without namespaces of its
// own it leaves everything alone.
func Settle(ctx context.Context) error {
	if os.Getpid() != 1 {
		return nil
	}
	// The engine's later mounts (layers read lazily) must appear here, ours not there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cannot make the mounts follow the host's: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("cannot mount procfs: %w", err)
	}
	go reap(ctx)
	return nil
}

// reapAfter is how long a child must have been dead before it is taken for one
// that nobody waits for: those that this program started are waited for at once.
const reapAfter = 2 * time.Minute

// reap collects orphans of build steps, which a first process inherits.
func reap(ctx context.Context) {
	t := time.NewTicker(reapAfter)
	defer t.Stop()
	seen := map[int]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := map[int]bool{}
		for _, pid := range zombies() {
			if seen[pid] {
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
				continue
			}
			now[pid] = true
		}
		seen = now
	}
}

// zombies lists dead children of this process.
func zombies() []int {
	ents, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range ents {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// pid (name) state ppid …; the name may hold anything.
		i := strings.LastIndexByte(string(b), ')')
		if i < 0 {
			continue
		}
		f := strings.Fields(string(b)[i+1:])
		if len(f) > 1 && f[0] == "Z" && f[1] == "1" {
			out = append(out, pid)
		}
	}
	return out
}
