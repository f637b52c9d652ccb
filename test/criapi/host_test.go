package criapi

import (
	"bytes"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// processesIn finds the processes of a container: its monitor, which works in its
// run directory, and those in its cgroup.
func processesIn(t *testing.T, id string) (out []*os.Process) {
	t.Helper()
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		cwd, _ := os.Readlink(d + "/cwd")
		group, _ := os.ReadFile(d + "/cgroup")
		if strings.Contains(cwd, id) || bytes.Contains(group, []byte(id)) {
			if st, _ := os.ReadFile(d + "/stat"); bytes.Contains(st, []byte(") Z ")) {
				continue
			}
			if p, err := os.FindProcess(pid); err == nil {
				out = append(out, p)
			}
		}
	}
	return out
}

func unmountBelow(t *testing.T, dir string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var at []string
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			at = append(at, f[4])
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(at)))
	for _, p := range at {
		_ = unix.Unmount(p, unix.MNT_DETACH)
	}
}

// pss is what processes take of memory, bytes.
func pss(pids ...int) (sum int) {
	for _, pid := range pids {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
		for l := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(l, "Pss:"); ok {
				kb, _ := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")))
				sum += kb << 10
			}
		}
	}
	return sum
}
