package rootless

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// leaf is where the engine itself sits, below the subtree delegated to it: a
// cgroup whose children are to be limited may hold no process of its own.
const leaf = "servin-engine"

// scoped marks an engine that systemd has put into a scope of its own, so that
// this is tried once.
const scoped = "SERVIN_SCOPED"

// groups is the v2 tree as an ordinary user sees it.
type groups struct {
	mount string // mount point of the v2 tree, "" none
	own   string // this process's path below it
}

func findGroups() groups {
	var g groups
	info, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return g
	}
	defer info.Close()
	for s := bufio.NewScanner(info); s.Scan(); {
		before, after, ok := strings.Cut(s.Text(), " - ")
		f := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(f) > 4 && f[3] == "/" {
			g.mount = f[4]
			break
		}
	}
	data, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(data)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			g.own = p
		}
	}
	return g
}

// delegated looks for the subtree that this process may govern, and moves it to
// the leaf of that. Only a cgroup that holds nobody else is taken: others'
// processes are not moved about.
func (g groups) delegated(pids ...int) string {
	if g.mount == "" || g.own == "" || g.own == "/" {
		return ""
	}
	base := g.own
	if filepath.Base(base) == leaf {
		base = filepath.Dir(base)
	}
	dir := filepath.Join(g.mount, base)
	for _, f := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		if syscall.Access(filepath.Join(dir, f), 2) != nil {
			return ""
		}
	}
	for _, p := range procs(dir) {
		if !slices.Contains(pids, p) {
			return ""
		}
	}
	if g.enter(base, pids...) != nil {
		return ""
	}
	have, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	for _, c := range strings.Fields(string(have)) {
		// One that cannot be enabled is lacking, which is said when it is asked for.
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
	return base
}

// enter moves processes to the leaf of a subtree.
func (g groups) enter(base string, pids ...int) error {
	dir := filepath.Join(g.mount, base, leaf)
	if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
		return err
	}
	for _, p := range pids {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p)), 0); err != nil {
			return err
		}
	}
	return nil
}

func procs(dir string) []int {
	data, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	var out []int
	for _, f := range strings.Fields(string(data)) {
		if n, err := strconv.Atoi(f); err == nil {
			out = append(out, n)
		}
	}
	return out
}

// scope has systemd start this program again in a scope of its own, where the
// user's systemd runs; it returns where that cannot be.
func (g groups) scope(args []string) {
	run := os.Getenv("XDG_RUNTIME_DIR")
	if g.mount != "/sys/fs/cgroup" || run == "" || os.Getenv(scoped) != "" {
		return
	}
	if _, err := os.Stat(filepath.Join(run, "systemd", "private")); err != nil {
		return
	}
	path, err := exec.LookPath("systemd-run")
	if err != nil || exec.Command(path, "--user", "--scope", "--quiet", "-p", "Delegate=yes", "--", "true").Run() != nil {
		return
	}
	unit := fmt.Sprintf("--unit=servind-%d.scope", os.Getpid())
	argv := append([]string{path, "--user", "--scope", "--quiet", "-p", "Delegate=yes", unit, "--"}, args...)
	_ = syscall.Exec(path, argv, append(os.Environ(), scoped+"=1"))
}
