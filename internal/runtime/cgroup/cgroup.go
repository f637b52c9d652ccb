// Package cgroup makes, limits, reads and removes the control groups of
// containers, on cgroup v1, v2 and hybrid hosts. On the way to a start it writes
// the few files that are asked for itself; a systemd-managed cgroup goes through
// github.com/opencontainers/cgroups.
//
// Vocabulary. A *host* is the set of mounted hierarchies. A *group* is one
// container's cgroup: a directory in each hierarchy. Only runtime drivers
// import this package.
package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// Mode tells which cgroup version governs resources.
type Mode uint8

// The modes. A hybrid host is V1 here: its v2 tree holds no controller we need.
const (
	None Mode = iota
	V1
	V2
)

// hierarchy is one mounted v1 hierarchy.
type hierarchy struct {
	name  string // as in /proc/self/cgroup: "cpu,cpuacct"
	ctrls []string
	mount string
}

// Host is what there is on this machine.
type Host struct {
	Mode    Mode
	v1      []hierarchy
	unified string   // mount point of the v2 tree, "" none; the subtree's directory if delegated
	mounts  []string // every hierarchy, those that hold no controller of ours too
	// delegated: an ordinary user's engine, which governs one subtree or nothing.
	delegated bool

	mu      sync.Mutex
	parents map[string]bool // made and prepared by us
	rules   map[string]string
}

// Detect looks at the mounted hierarchies.
func Detect() (*Host, error) {
	h := &Host{parents: map[string]bool{}, rules: map[string]string{}}
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.FSType != "cgroup" && i.FSType != "cgroup2", false
	})
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read the mount table: %w", err)
	}
	known, err := ownHierarchies()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if unix.Access(m.Mountpoint, unix.W_OK) != nil {
			continue
		}
		h.mounts = append(h.mounts, m.Mountpoint)
		if m.FSType == "cgroup2" {
			if h.unified == "" {
				h.unified = m.Mountpoint
			}
			continue
		}
		opts := strings.Split(m.VFSOptions, ",")
		for _, name := range known {
			ctrls := strings.Split(name, ",")
			// systemd's own hierarchy matters only where systemd runs.
			if strings.HasPrefix(name, "name=") || !slices.Contains(opts, ctrls[0]) {
				continue
			}
			if !slices.ContainsFunc(h.v1, func(x hierarchy) bool { return x.name == name }) {
				h.v1 = append(h.v1, hierarchy{name, ctrls, m.Mountpoint})
			}
		}
	}
	switch {
	case len(h.v1) > 0:
		h.Mode = V1
	case h.unified != "":
		h.Mode = V2
	}
	return h, nil
}

func ownHierarchies() ([]string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot find the cgroup hierarchies: %w", err)
	}
	var names []string
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		if f := strings.SplitN(s.Text(), ":", 3); len(f) == 3 && f[1] != "" {
			names = append(names, f[1])
		}
	}
	return names, nil
}

// Unified makes a hybrid host use its v2 tree alone, with whatever controllers
// that has; it reports whether there is one.
func (h *Host) Unified() bool {
	if h.unified == "" {
		return false
	}
	h.Mode, h.v1 = V2, nil
	return true
}

// Controllers names the v1 hierarchies in the order of Group.Tasks.
func (h *Host) Controllers() []string {
	names := make([]string, len(h.v1))
	for i, x := range h.v1 {
		names[i] = x.name
	}
	return names
}

// Group is one container's cgroup.
type Group struct {
	h    *Host
	path string          // below each hierarchy's mount point
	mgr  cgroups.Manager // where systemd manages it
	mu   sync.Mutex
	rule string // device rules in force, as a key
}

// Clean checks a cgroup path given from outside.
func Clean(p string) (string, error) {
	if strings.IndexByte(p, 0) >= 0 || len(p) > 3000 {
		return "", fault.New(fault.Invalid, "cgroup path %.64q is invalid", p)
	}
	for _, e := range strings.Split(p, "/") {
		if e == ".." {
			return "", fault.New(fault.Invalid, "cgroup path %q must not contain ..", p)
		}
	}
	return filepath.Join("/", p), nil
}

// Create makes the group id under parent. A group of that name that exists is
// fault.Conflict.
func (h *Host) Create(parent, id string) (*Group, error) {
	parent, err := Clean(parent)
	if err != nil {
		return nil, err
	}
	if id == "" || strings.ContainsAny(id, "/\x00") || id == "." || id == ".." {
		return nil, fault.New(fault.Invalid, "cgroup name %.64q is invalid", id)
	}
	g := &Group{h: h, path: filepath.Join(parent, id)}
	if h.Mode == None {
		return g, nil
	}
	if err := h.prepareParent(parent); err != nil {
		return nil, err
	}
	err = g.mkdir()
	if errors.Is(err, fs.ErrNotExist) { // somebody removed the parent
		h.mu.Lock()
		delete(h.parents, parent)
		h.mu.Unlock()
		if err := h.prepareParent(parent); err != nil {
			return nil, err
		}
		err = g.mkdir()
	}
	if errors.Is(err, fs.ErrExist) {
		return nil, fault.New(fault.Conflict, "cannot create cgroup %s: it exists", g.path)
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot create cgroup %s: %w", g.path, err)
	}
	return g, nil
}

func (g *Group) mkdir() error {
	dirs := g.dirs()
	for i, d := range dirs {
		if err := unix.Mkdir(d, 0o755); err != nil {
			for _, m := range dirs[:i] {
				_ = unix.Rmdir(m)
			}
			return &os.PathError{Op: "mkdir", Path: d, Err: err}
		}
	}
	return nil
}

// prepareParent makes the parent so that children need nothing set to be used:
// cpusets are inherited, v2 controllers are enabled.
func (h *Host) prepareParent(parent string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.parents[parent] {
		return nil
	}
	elems := strings.Split(strings.Trim(parent, "/"), "/")
	if h.Mode == V2 {
		dir := h.unified
		enableControllers(dir)
		for _, e := range elems {
			if e == "" {
				continue
			}
			dir = filepath.Join(dir, e)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fault.New(fault.Internal, "cannot create cgroup: %w", err)
			}
			enableControllers(dir)
		}
		h.parents[parent] = true
		return nil
	}
	for _, x := range h.v1 {
		dir := x.mount
		for _, e := range elems {
			if e == "" {
				continue
			}
			up := dir
			dir = filepath.Join(dir, e)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fault.New(fault.Internal, "cannot create cgroup: %w", err)
			}
			if slices.Contains(x.ctrls, "cpuset") {
				for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
					if err := inherit(up, dir, f); err != nil {
						return fault.New(fault.Internal, "cannot set up cpuset: %w", err)
					}
				}
				if err := write(dir, "cgroup.clone_children", "1"); err != nil {
					return err
				}
			}
		}
	}
	h.parents[parent] = true
	return nil
}

func inherit(up, dir, file string) error {
	have, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil || len(bytes.TrimSpace(have)) > 0 {
		return err
	}
	from, err := os.ReadFile(filepath.Join(up, file))
	if err != nil {
		return err
	}
	return write(dir, file, string(bytes.TrimSpace(from)))
}

// enableControllers is best effort: one at a time, since one that cannot be
// enabled (threaded or delegated trees) would refuse all.
func enableControllers(dir string) {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	on, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	enabled := strings.Fields(string(on))
	for _, c := range strings.Fields(string(have)) {
		if !slices.Contains(enabled, c) {
			_ = write(dir, "cgroup.subtree_control", "+"+c)
		}
	}
}

// Open names an existing group by its path.
func (h *Host) Open(path string) (*Group, error) {
	path, err := Clean(path)
	if err != nil {
		return nil, err
	}
	return &Group{h: h, path: path}, nil
}

// Path is the group's path below each hierarchy.
func (g *Group) Path() string { return g.path }

func (g *Group) dirs() []string {
	if g.h.Mode == V2 {
		return []string{g.h.unified + g.path}
	}
	d := make([]string, len(g.h.v1))
	for i, x := range g.h.v1 {
		d[i] = x.mount + g.path
	}
	return d
}

// Paths maps each v1 hierarchy's name ("" on v2) to the group's directory.
func (g *Group) Paths() map[string]string {
	m := map[string]string{}
	if g.h.Mode == V2 {
		m[""] = g.h.unified + g.path
		return m
	}
	for _, x := range g.h.v1 {
		m[x.name] = x.mount + g.path
	}
	return m
}

// dir is the group's directory for a v1 controller, "" where there is none.
func (g *Group) dir(ctrl string) string {
	if g.h.Mode == V2 {
		return g.h.unified + g.path
	}
	for _, x := range g.h.v1 {
		if slices.Contains(x.ctrls, ctrl) {
			return x.mount + g.path
		}
	}
	return ""
}

// Tasks opens the v1 tasks files, in the order of Host.Controllers. A
// single-threaded process that writes "0" to each has joined.
func (g *Group) Tasks() ([]int, error) {
	var fds []int
	if g.h.Mode != V1 || g.mgr != nil {
		return nil, nil
	}
	for _, d := range g.dirs() {
		fd, err := unix.Open(d+"/tasks", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			for _, f := range fds {
				unix.Close(f)
			}
			return nil, &os.PathError{Op: "open", Path: d + "/tasks", Err: err}
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// Dir opens the v2 directory for CLONE_INTO_CGROUP; -1 on v1.
func (g *Group) Dir() (int, error) {
	if g.h.Mode != V2 || g.mgr != nil {
		return -1, nil
	}
	d := g.h.unified + g.path
	fd, err := unix.Open(d, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: d, Err: err}
	}
	return fd, nil
}

func write(dir, file, data string) error {
	fd, err := unix.Open(dir+"/"+file, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir + "/" + file, Err: err}
	}
	defer unix.Close(fd)
	for {
		_, err = unix.Write(fd, []byte(data))
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return &os.PathError{Op: "write " + data + " to", Path: dir + "/" + file, Err: err}
		}
	}
}

func read(dir, file string) (string, error) {
	if dir == "" {
		return "", fs.ErrNotExist
	}
	b, err := os.ReadFile(dir + "/" + file)
	return strings.TrimSpace(string(b)), err
}
