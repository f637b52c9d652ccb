package native

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// audit holds the processes that were brought back, which have not run yet, against
// the spec. Images are files that anybody may have written: they say who a process
// is, what it may do and where it lives, and CRIU believes them.
func (s *start) audit() error {
	pids, err := descendants(s.sb.mon.PID())
	if err != nil {
		return fault.New(fault.Internal, "cannot look at the processes that were brought back: %w", err)
	}
	n := 0
	for _, pid := range pids {
		if pid == s.stage {
			continue // it has become CRIU
		}
		if dead(pid) {
			continue // it waits to be reaped, as it did then
		}
		n++
		if err := s.auditOne(pid); err != nil {
			return fault.New(fault.Forbidden, "cannot restore: process %d of the checkpoint is not as the container is to be: %w", pid, err)
		}
	}
	if n == 0 {
		return fault.New(fault.Invalid, "cannot restore: the checkpoint holds no process")
	}
	return nil
}

// dead tells whether a process has ended and has no parts any more.
func dead(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	_, rest, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

func nsOf(pid, name string) string {
	l, _ := os.Readlink("/proc/" + pid + "/ns/" + name)
	return l
}

// auditOne looks at one process and its threads.
func (s *start) auditOne(pid int) error {
	p := strconv.Itoa(pid)
	want := map[specs.LinuxNamespaceType]string{specs.PIDNamespace: "pid", specs.MountNamespace: "mnt", specs.IPCNamespace: "ipc",
		specs.UTSNamespace: "uts", specs.CgroupNamespace: "cgroup"}
	for _, ns := range s.spec.Linux.Namespaces {
		if name := want[ns.Type]; name != "" && nsOf(p, name) == nsOf("self", name) {
			return fmt.Errorf("it is in the host's %s namespace", ns.Type)
		}
	}
	if nsOf(p, "user") != nsOf("self", "user") {
		return fmt.Errorf("it is in a user namespace")
	}
	net := nsOf("self", "net")
	if s.sb.netns != nil {
		net, _ = os.Readlink(fdDir(s.sb.netns))
	}
	if nsOf(p, "net") != net {
		return fmt.Errorf("it is in another network namespace (%s, not %s)", nsOf(p, "net"), net)
	}
	if err := s.auditCgroup(p); err != nil {
		return err
	}
	threads, err := os.ReadDir("/proc/" + p + "/task")
	if err != nil {
		return err
	}
	for _, t := range threads {
		b, err := os.ReadFile("/proc/" + p + "/task/" + t.Name() + "/status")
		if err != nil {
			return err
		}
		if err := s.auditStatus(string(b)); err != nil {
			return err
		}
	}
	return nil
}

// auditStatus compares privileges: none may exceed those of the spec's process.
func (s *start) auditStatus(status string) error {
	c := s.spec.Process.Capabilities
	if c == nil {
		c = &specs.LinuxCapabilities{}
	}
	bounding, err := plan.CapabilityMask(c.Bounding)
	if err != nil {
		return err
	}
	filtered := s.spec.Linux.Seccomp != nil
	seen := 0
	for line := range strings.Lines(status) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		v = strings.TrimSpace(v)
		switch k {
		case "CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb":
			seen++
			have, err := strconv.ParseUint(v, 16, 64)
			if err != nil {
				return err
			}
			if more := have &^ bounding; more != 0 {
				return fmt.Errorf("its capabilities exceed the container's (%s has %#x more)", k, more)
			}
		case "NoNewPrivs":
			if s.spec.Process.NoNewPrivileges && v != "1" {
				return fmt.Errorf("it may gain privileges, which the container must not")
			}
		case "Seccomp":
			seen++
			if filtered && v != "2" {
				return fmt.Errorf("it has no system call filter")
			}
		}
	}
	if seen != 6 {
		return fmt.Errorf("its privileges cannot be read")
	}
	return nil
}

// auditCgroup makes sure that the limits hold for it.
func (s *start) auditCgroup(p string) error {
	b, err := os.ReadFile("/proc/" + p + "/cgroup")
	if err != nil {
		return err
	}
	text := "\n" + string(b)
	for name, dir := range s.sb.group.Paths() {
		rel, ok := cgroupOf(text, name)
		if !ok {
			continue
		}
		if rel != s.sb.group.Path() && !strings.HasPrefix(rel, s.sb.group.Path()+"/") && !strings.HasSuffix(filepath.Clean(dir), filepath.Clean(rel)) {
			return fmt.Errorf("it is outside of the container's cgroup, in %s", rel)
		}
	}
	return nil
}

// cgroupOf finds a hierarchy's line.
func cgroupOf(text, name string) (string, bool) {
	i := strings.Index(text, ":"+name+":")
	if i < 0 {
		return "", false
	}
	rest := text[i+len(name)+2:]
	rel, _, _ := strings.Cut(rest, "\n")
	return rel, true
}

// descendants are all processes below one: whatever their cgroup, they cannot leave
// a monitor, which is their subreaper.
func descendants(root int) ([]int, error) {
	list, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	parent := map[int]int{}
	for _, e := range list {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) > 1 {
			parent[pid], _ = strconv.Atoi(f[1])
		}
	}
	var out []int
	for pid := range parent {
		for at, depth := pid, 0; depth < 1<<16; depth++ {
			up, ok := parent[at]
			if !ok {
				break
			}
			if up == root {
				out = append(out, pid)
				break
			}
			at = up
		}
	}
	return out, nil
}
