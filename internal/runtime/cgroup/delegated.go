package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// noDelegation is said where an ordinary user's engine governs no cgroup.
const noDelegation = "no cgroup v2 subtree is delegated to this engine (start servind as a systemd user service with Delegate=yes, or with systemd-run --user --scope -p Delegate=yes servind)"

// Delegated is the host of an engine that lives in a user namespace: below base,
// a path in the v2 tree that was handed to its user, it may do as it likes, and
// nowhere else. An empty base is no cgroup at all.
func Delegated(base string) (*Host, error) {
	mount := ""
	if base != "" {
		mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
		if err != nil {
			return nil, fault.New(fault.Internal, "cannot read the mount table: %w", err)
		}
		for _, m := range mounts {
			if m.Root == "/" {
				mount = m.Mountpoint
				break
			}
		}
	}
	return delegatedAt(mount, base), nil
}

func delegatedAt(mount, base string) *Host {
	h := &Host{parents: map[string]bool{}, rules: map[string]string{}, delegated: true}
	if mount == "" || base == "" {
		return h
	}
	dir := filepath.Join(mount, filepath.Join("/", base))
	for _, f := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		if unix.Access(filepath.Join(dir, f), unix.W_OK) != nil {
			return h
		}
	}
	h.Mode, h.unified, h.mounts = V2, dir, []string{dir}
	return h
}

// Lacking tells for each cgroup controller that containers cannot have why
// that is so. It is empty for an engine that governs the whole host: what its
// kernel lacks is found at the start, and warned of.
func (h *Host) Lacking() map[string]string {
	if !h.delegated {
		return nil
	}
	lacking := map[string]string{}
	have := []string{}
	if h.Mode == V2 {
		s, _ := read(h.unified, "cgroup.controllers")
		have = strings.Fields(s)
	}
	for _, c := range []string{"memory", "cpu", "cpuset", "pids", "io"} {
		switch {
		case h.Mode != V2:
			lacking[c] = noDelegation
		case !slices.Contains(have, c):
			lacking[c] = "the " + c + " controller is not delegated to this engine (systemd: Delegate=cpu cpuset io memory pids in user@.service)"
		}
	}
	return lacking
}

// pidsIn lists the processes of the pid namespace that init lives in: all of a
// container's where there is no cgroup to ask.
func pidsIn(proc string, init int) ([]int, error) {
	ns, err := os.Readlink(filepath.Join(proc, strconv.Itoa(init), "ns/pid"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.Conflict, "cannot list processes: the container is not running")
		}
		return nil, fault.New(fault.Internal, "cannot list processes: %w", err)
	}
	d, err := os.Open(proc)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot list processes: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot list processes: %w", err)
	}
	var pids []int
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		if p, err := os.Readlink(filepath.Join(proc, n, "ns/pid")); err == nil && p == ns {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// PidsIn lists the processes of init's pid namespace, for a container without a
// cgroup that has a namespace of its own.
func PidsIn(init int) ([]int, error) { return pidsIn("/proc", init) }
