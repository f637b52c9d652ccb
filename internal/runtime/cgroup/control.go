package cgroup

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// Freeze stops every process of the group and waits until they stand still.
func (g *Group) Freeze(ctx context.Context) error { return g.freeze(ctx, true) }

// Thaw lets them run again.
func (g *Group) Thaw(ctx context.Context) error { return g.freeze(ctx, false) }

func (g *Group) freeze(ctx context.Context, on bool) error {
	if g.h.Mode == V2 {
		dir, v := g.dir(""), "0"
		if on {
			v = "1"
		}
		if err := write(dir, "cgroup.freeze", v); err != nil {
			return fault.New(fault.Internal, "cannot freeze: %w", err)
		}
		return poll(ctx, func() (bool, error) {
			s, err := read(dir, "cgroup.events")
			return strings.Contains(s, "frozen "+v), err
		})
	}
	dir := g.dir("freezer")
	if dir == "" && g.h.delegated {
		return fault.New(fault.Unsupported, "cannot pause: %s", noDelegation)
	}
	if dir == "" {
		return fault.New(fault.Unsupported, "cannot pause: the kernel has no freezer cgroup controller")
	}
	state := "THAWED"
	if on {
		state = "FROZEN"
	}
	n := 0
	err := poll(ctx, func() (bool, error) {
		// Freezing a group that forks meanwhile may need to be asked for again,
		// now and then with a thaw between.
		if on && n > 0 && n%50 == 0 {
			_ = write(dir, "freezer.state", "THAWED")
		}
		n++
		if err := write(dir, "freezer.state", state); err != nil {
			return false, err
		}
		s, err := read(dir, "freezer.state")
		return s == state, err
	})
	if err != nil && on {
		_ = write(dir, "freezer.state", "THAWED")
	}
	return err
}

// Frozen reports whether the group is frozen.
func (g *Group) Frozen() (bool, error) {
	if g.h.Mode == None {
		return false, nil
	}
	if g.h.Mode == V2 {
		s, err := read(g.dir(""), "cgroup.freeze")
		return s == "1", err
	}
	s, err := read(g.dir("freezer"), "freezer.state")
	return s == "FROZEN" || s == "FREEZING", err
}

func poll(ctx context.Context, done func() (bool, error)) error {
	for wait := 200 * time.Microsecond; ; wait = min(wait*2, 10*time.Millisecond) {
		ok, err := done()
		if err != nil {
			return fault.New(fault.Internal, "cannot change the freezer: %w", err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.DeadlineExceeded, "cannot change the freezer: %w", context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// Pids lists the processes of the group and of groups below.
func (g *Group) Pids() ([]int, error) {
	dir := g.dir("pids")
	if dir == "" {
		for _, d := range g.dirs() {
			dir = d
			break
		}
	}
	var pids []int
	if dir == "" {
		return nil, fault.New(fault.Unsupported, "cannot list processes: there are no cgroups, and the container has no pid namespace of its own")
	}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			if errors.Is(err, fs.ErrNotExist) && p != dir {
				return nil
			}
			return err
		}
		b, err := os.ReadFile(p + "/cgroup.procs")
		for _, f := range strings.Fields(string(b)) {
			if n, e := strconv.Atoi(f); e == nil && n > 0 {
				pids = append(pids, n)
			}
		}
		if errors.Is(err, unix.ENODEV) {
			err = nil
		}
		return err
	})
	slices.Sort(pids)
	return slices.Compact(pids), err
}

// Signal sends sig to every process of the group.
func (g *Group) Signal(ctx context.Context, sig int) error {
	if g.h.Mode == V2 && unix.Signal(sig) == unix.SIGKILL && write(g.dir(""), "cgroup.kill", "1") == nil {
		return nil
	}
	// Standing still they can neither fork away nor end and have their numbers taken.
	frozen, _ := g.Frozen()
	if !frozen {
		fctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		ferr := g.Freeze(fctx)
		cancel()
		if ferr == nil {
			defer g.Thaw(context.WithoutCancel(ctx))
		}
	}
	pids, err := g.Pids()
	if err != nil {
		return err
	}
	for _, p := range pids {
		if e := unix.Kill(p, unix.Signal(sig)); e != nil && e != unix.ESRCH {
			err = os.NewSyscallError("kill", e)
		}
	}
	if unix.Signal(sig) == unix.SIGKILL && frozen {
		return errors.Join(err, g.Thaw(ctx))
	}
	return err
}

// OOMKills counts processes that the kernel killed for want of memory.
func (g *Group) OOMKills() uint64 {
	file := "memory.oom_control"
	if g.h.Mode == V2 {
		file = "memory.events"
	}
	s, _ := read(g.dir("memory"), file)
	return keyed(s)["oom_kill"]
}

// Remove deletes the group and groups below. The kernel may need a moment after
// the last process has ended; processes still there are fault.Conflict.
func (g *Group) Remove(ctx context.Context) error {
	if g.h.Mode == None {
		return nil
	}
	if g.mgr != nil {
		if err := g.mgr.Destroy(); err != nil {
			return fault.New(fault.Conflict, "cannot remove the scope of %s: %w", g.path, err)
		}
		return nil
	}
	deadline := time.Now().Add(2 * time.Second)
	for wait := time.Millisecond; ; wait = min(wait*2, 50*time.Millisecond) {
		var last error
		for _, d := range g.dirs() {
			if err := removeTree(d); err != nil {
				last = err
			}
		}
		if last == nil {
			return nil
		}
		if !errors.Is(last, unix.EBUSY) || time.Now().After(deadline) {
			return fault.New(fault.Conflict, "cannot remove cgroup %s: %w", g.path, last)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

func removeTree(dir string) error {
	err := unix.Rmdir(dir)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EBUSY && err != unix.ENOTEMPTY {
		return &os.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	entries, rerr := os.ReadDir(dir)
	if fault.Short(rerr) {
		return rerr // else it would look as if there were none below
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(dir + "/" + e.Name()); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// RemoveParent removes a parent that Create made if nothing is left in it.
func (h *Host) RemoveParent(parent string) {
	parent, err := Clean(parent)
	if err != nil || parent == "/" || h.Mode == None {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.parents, parent)
	for _, m := range h.mounts { // another OCI runtime uses them all
		_ = unix.Rmdir(m + parent)
	}
}

// Children lists the groups directly below a parent.
func (h *Host) Children(parent string) []string {
	parent, err := Clean(parent)
	if err != nil || h.Mode == None {
		return nil
	}
	var names []string
	for _, d := range (&Group{h: h, path: parent}).dirs() {
		entries, _ := os.ReadDir(d)
		for _, e := range entries {
			if e.IsDir() {
				names = append(names, e.Name())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
