package ociruntime

import (
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/runtime/source"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// readMappings reads the mapping of ids that a process lives with.
func readMappings(pid int, file string) ([]specs.LinuxIDMapping, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/" + file)
	if err != nil {
		return nil, err
	}
	var out []specs.LinuxIDMapping
	for line := range strings.Lines(string(data)) {
		var m specs.LinuxIDMapping
		if _, err := fmt.Sscan(line, &m.ContainerID, &m.HostID, &m.Size); err != nil {
			return nil, fmt.Errorf("cannot parse %s: %w", file, err)
		}
		out = append(out, m)
	}
	return out, nil
}

// pidInside is the process's number in its own pid namespace.
func pidInside(pid int) int {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(v)
			if len(f) > 0 {
				n, _ := strconv.Atoi(f[len(f)-1])
				return n
			}
		}
	}
	return pid
}

// mapIDs maps the ids of a new user namespace, and sets what takes privileges over
// the host that the process will not have in there.
func (b *birth) mapIDs() error {
	if b.p.CloneFlags&unix.CLONE_NEWUSER == 0 {
		return nil
	}
	var err error
	if unprivileged() {
		err = mapUnprivileged(b.proc.pid, b.p.UIDMap, b.p.GIDMap)
	} else {
		err = source.WriteIDMaps(b.proc.pid, b.p.UIDMap, b.p.GIDMap)
	}
	if err != nil {
		return err
	}
	if err := raiseLimits(b.proc.pid, b.spec.Process); err != nil {
		return err
	}
	return b.proc.stage.Mapped()
}

// raiseLimits sets limits and scores of a process in a user namespace from outside.
func raiseLimits(pid int, p *specs.Process) error {
	if p.OOMScoreAdj != nil {
		// Where it is not permitted the stage will say so, or has nothing to lower.
		_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(strconv.Itoa(*p.OOMScoreAdj)), 0)
	}
	for _, l := range p.Rlimits {
		n, ok := rlimits[l.Type]
		if !ok {
			return fmt.Errorf("invalid rlimit type: %s", l.Type)
		}
		var now unix.Rlimit
		if err := unix.Prlimit(pid, n, nil, &now); err != nil || l.Hard <= now.Max {
			continue // lowering takes no privilege, and would bind the stage too early
		}
		if err := unix.Prlimit(pid, n, &unix.Rlimit{Cur: max(l.Soft, now.Cur), Max: l.Hard}, nil); err != nil && !unprivileged() {
			return fmt.Errorf("error setting rlimit type %d: %w", n, err)
		}
	}
	return nil
}

var rlimits = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}

// mapUnprivileged maps ids as an ordinary user may: one's own, or through the
// setuid programs that know which others one has.
func mapUnprivileged(pid int, uids, gids []specs.LinuxIDMapping) error {
	proc := "/proc/" + strconv.Itoa(pid) + "/"
	for _, m := range []struct {
		file, program string
		ids           []specs.LinuxIDMapping
		own           int
	}{{"gid_map", "newgidmap", gids, os.Getegid()}, {"uid_map", "newuidmap", uids, os.Geteuid()}} {
		if len(m.ids) == 1 && m.ids[0].Size == 1 && int(m.ids[0].HostID) == m.own {
			if m.file == "gid_map" {
				if err := os.WriteFile(proc+"setgroups", []byte("deny"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
			}
			line := fmt.Sprintf("%d %d 1\n", m.ids[0].ContainerID, m.ids[0].HostID)
			if err := os.WriteFile(proc+m.file, []byte(line), 0); err != nil {
				return err
			}
			continue
		}
		args := []string{strconv.Itoa(pid)}
		for _, l := range m.ids {
			args = append(args, fmt.Sprint(l.ContainerID), fmt.Sprint(l.HostID), fmt.Sprint(l.Size))
		}
		if out, err := osexec.Command(m.program, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("cannot map ids with %s: %w: %s", m.program, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// unprivileged tells whether mounts and ids are beyond us.
func unprivileged() bool { return os.Geteuid() != 0 }

func inUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && !slices.Equal(strings.Fields(string(b)), []string{"0", "0", "4294967295"})
}

// setgroupsDenied tells whether the container's processes cannot set groups.
func setgroupsDenied(spec *specs.Spec) bool {
	if unprivileged() {
		g := spec.Linux.GIDMappings
		return len(g) == 1 && g[0].Size == 1
	}
	b, _ := os.ReadFile("/proc/self/setgroups")
	return strings.TrimSpace(string(b)) == "deny"
}
