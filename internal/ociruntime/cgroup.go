package ociruntime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	systemdDbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fs"
	"github.com/opencontainers/cgroups/fs2"
	"github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// openCgroup gives the manager that the host and the configuration call for.
func openCgroup(c *cgroups.Cgroup, paths map[string]string) (cgroups.Manager, error) {
	if c.Systemd && !systemd.IsRunningSystemd() {
		return nil, errors.New("systemd not running on this host, cannot use systemd cgroups manager")
	}
	if cgroups.IsCgroup2UnifiedMode() {
		if c.Systemd {
			return systemd.NewUnifiedManager(c, paths[""])
		}
		return fs2.NewManager(c, paths[""])
	}
	if c.Systemd {
		return systemd.NewLegacyManager(c, paths)
	}
	if paths == nil {
		var err error
		if paths, err = legacyPaths(c); err != nil {
			return nil, err
		}
	}
	return fs.NewManager(c, paths)
}

// legacyControllers are those that the library's manager of v1 knows.
const legacyControllers = " cpuset devices memory cpu cpuacct pids blkio hugetlb net_cls net_prio perf_event freezer rdma name=systemd misc "

// legacyPaths finds the container's directory for each v1 controller. The library
// would find the same ones, reading the same two files for each anew.
func legacyPaths(c *cgroups.Cgroup) (map[string]string, error) {
	inner := c.Path
	if inner == "" {
		inner = c.Name
	}
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	mounts, err := cgroups.GetCgroupMounts(false)
	if err != nil {
		return nil, err
	}
	paths := map[string]string{}
	add := func(ctrl, mount, root string) {
		if paths[ctrl] != "" {
			return
		}
		if filepath.IsAbs(inner) {
			paths[ctrl] = filepath.Join(mount, inner)
			return
		}
		if rel, err := filepath.Rel(root, own[ctrl]); err == nil && !strings.HasPrefix(rel, "..") {
			paths[ctrl] = filepath.Join(mount, rel, inner)
		}
	}
	for _, m := range mounts {
		for _, s := range m.Subsystems {
			if _, named := own["name="+s]; named {
				s = "name=" + s // as it is called everywhere else
			}
			if strings.Contains(legacyControllers, " "+s+" ") {
				add(s, m.Mountpoint, m.Root)
			}
		}
	}
	if cgroups.IsCgroup2HybridMode() {
		add("", "/sys/fs/cgroup/unified", "/")
	}
	if paths["devices"] == "" {
		return nil, errors.New("the devices cgroup controller is not mounted, without which a container cannot be kept from the host's devices")
	}
	return paths, nil
}

// cgroupConfig turns the spec's wishes into the library's configuration.
func (a *app) cgroupConfig(id string, spec *specs.Spec) (*cgroups.Cgroup, error) {
	rootless, err := a.rootlessCgroups()
	if err != nil {
		return nil, fmt.Errorf("invalid value of --rootless: %w", err)
	}
	c := &cgroups.Cgroup{Systemd: a.systemd, Rootless: rootless}
	path := spec.Linux.CgroupsPath
	switch {
	case a.systemd && path == "":
		c.ScopePrefix, c.Name = "servin", id
	case a.systemd:
		parts := strings.Split(path, ":")
		if len(parts) != 3 {
			return nil, fmt.Errorf("expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got %q instead", path)
		}
		c.Parent, c.ScopePrefix, c.Name = parts[0], parts[1], parts[2]
	case path == "":
		c.Name = id
	default:
		if c.Path, err = cgroup.Clean(path); err != nil {
			return nil, err
		}
		if !filepath.IsAbs(path) {
			// Relative to where the runtime chooses, which is the same place always.
			c.Path = strings.TrimPrefix(c.Path, "/")
		}
	}
	if a.systemd {
		if c.SystemdProps, err = systemdProps(spec.Annotations); err != nil {
			return nil, err
		}
	}
	if c.Rootless && os.Geteuid() == 0 && cgroups.IsCgroup2UnifiedMode() && a.systemd {
		if uid, err := systemd.DetectUID(); err == nil && uid == 0 {
			c.Rootless = false
		}
	}
	if p, ok := findNamespace(spec, specs.CgroupNamespace); ok && p == "" && len(spec.Linux.UIDMappings) > 0 && cgroupWritable(spec) {
		// The container's root may govern its own subtree (cgroup delegation).
		uid := rootID(spec.Linux.UIDMappings)
		if uid >= 0 {
			c.OwnerUID = &uid
		}
	}
	r := spec.Linux.Resources
	if r == nil {
		r = &specs.LinuxResources{}
	}
	for i, d := range r.Devices {
		if d.Access == "" {
			return nil, fmt.Errorf("device access at %d field cannot be empty", i)
		}
	}
	c.Resources = cgroup.Resources(r)
	c.Resources.Devices = append(c.Resources.Devices, cgroup.DefaultDevices()...)
	c.Resources.SkipDevices = false
	if m := r.Memory; m != nil {
		if m.CheckBeforeUpdate != nil {
			c.Resources.MemoryCheckBeforeUpdate = *m.CheckBeforeUpdate
		}
		if m.Kernel != nil || m.KernelTCP != nil { //nolint:staticcheck // obsolete, not gone
			a.log.Warnf("kernel memory limits are obsolete and ignored")
		}
	}
	if !cgroups.IsCgroup2UnifiedMode() && c.Resources.Unified != nil {
		return nil, cgroups.ErrV1NoUnified
	}
	return c, nil
}

func rootID(m []specs.LinuxIDMapping) int {
	for _, l := range m {
		if l.ContainerID == 0 && l.Size > 0 {
			return int(l.HostID)
		}
	}
	return -1
}

func cgroupWritable(spec *specs.Spec) bool {
	for _, m := range spec.Mounts {
		if (m.Type == "cgroup" || m.Type == "cgroup2") && !slices.Contains(m.Options, "ro") {
			return true
		}
	}
	return false
}

// systemdProps reads "org.systemd.property.NAME" annotations, whose values are in
// D-Bus' own notation (gvariant).
func systemdProps(annotations map[string]string) ([]systemdDbus.Property, error) {
	var props []systemdDbus.Property
	for k, v := range annotations {
		name, ok := strings.CutPrefix(k, "org.systemd.property.")
		if !ok {
			continue
		}
		for _, c := range []byte(name) {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
				return nil, fmt.Errorf("annotation %s: systemd property name must contain only letters", k)
			}
		}
		value, err := dbus.ParseVariant(v, dbus.Signature{})
		if err != nil {
			return nil, fmt.Errorf("annotation %s=%s value parse error: %w", k, v, err)
		}
		// Seconds; a name in USec has its value in microseconds already.
		if n, ok := strings.CutSuffix(name, "Sec"); ok && n != "" && n[len(n)-1] >= 'a' {
			if value, err = inMicroseconds(value); err != nil {
				return nil, fmt.Errorf("annotation %s=%s value parse error: %w", k, v, err)
			}
			name = n + "USec"
		}
		props = append(props, systemdDbus.Property{Name: name, Value: value})
	}
	return props, nil
}

// inMicroseconds is what systemd takes over D-Bus for a value in seconds.
func inMicroseconds(v dbus.Variant) (dbus.Variant, error) {
	var sec float64
	switch n := v.Value().(type) {
	case int32:
		sec = float64(n)
	case int64:
		sec = float64(n)
	case uint32:
		sec = float64(n)
	case uint64:
		sec = float64(n)
	case float64:
		sec = n
	default:
		return v, errors.New("not a number")
	}
	if sec < 0 {
		return v, errors.New("negative")
	}
	return dbus.MakeVariant(uint64(sec * 1e6)), nil
}

// checkCgroup refuses to share a cgroup that somebody lives in.
func checkCgroup(m cgroups.Manager) error {
	if m.Exists() {
		pids, err := m.GetAllPids()
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("unable to get cgroup PIDs: %w", err)
		}
		if len(pids) != 0 {
			return fmt.Errorf("container's cgroup is not empty: %d process(es) found", len(pids))
		}
	}
	st, err := m.GetFreezerState()
	if err != nil {
		return fmt.Errorf("unable to get cgroup freezer state: %w", err)
	}
	if st == cgroups.Frozen {
		return errors.New("container's cgroup unexpectedly frozen")
	}
	return nil
}

// membership is how a child gets into a cgroup by itself.
type membership struct {
	tasks map[string]int // v1: the tasks file of each hierarchy
	dir   int            // v2: for CLONE_INTO_CGROUP, -1 none
}

func (m *membership) close() {
	for _, fd := range m.tasks {
		unix.Close(fd)
	}
	if m.dir >= 0 {
		unix.Close(m.dir)
	}
	m.tasks, m.dir = nil, -1
}

// openMembership opens the container's directory, on v1 one in each hierarchy.
func openMembership(dirs map[string]string) (*membership, error) {
	m := &membership{dir: -1}
	m.tasks = map[string]int{}
	for h, p := range dirs {
		if h == "" {
			fd, err := unix.Open(p, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				m.close()
				return nil, &os.PathError{Op: "open", Path: p, Err: err}
			}
			m.dir = fd
			continue
		}
		fd, err := unix.Open(p+"/tasks", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			m.close()
			return nil, &os.PathError{Op: "open", Path: p + "/tasks", Err: err}
		}
		m.tasks[h] = fd
	}
	return m, nil
}

// byHierarchy turns the library's paths by controller into paths by hierarchy,
// named as /proc/self/cgroup does; "" is the unified one, where it is the only one.
func byHierarchy(paths map[string]string) (map[string]string, []string, error) {
	if cgroups.IsCgroup2UnifiedMode() {
		return map[string]string{"": paths[""]}, nil, nil
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, nil, err
	}
	dirs := map[string]string{}
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 {
			continue
		}
		if f[1] == "" {
			if p := paths[""]; p != "" {
				dirs[""] = p // hybrid: no controllers, but membership counts
			}
			continue
		}
		for _, c := range strings.Split(f[1], ",") {
			if p := paths[c]; p != "" {
				dirs[f[1]], names = p, append(names, f[1])
				break
			}
		}
	}
	return dirs, names, nil
}

// killAll sends a signal to every process of the cgroup.
func killAll(m cgroups.Manager, sig unix.Signal) error {
	if !m.Exists() {
		return errNoCgroup
	}
	if p := m.Path(""); p != "" && sig == unix.SIGKILL && cgroups.IsCgroup2UnifiedMode() {
		if err := os.WriteFile(p+"/cgroup.kill", []byte("1"), 0); err == nil {
			return nil
		}
	}
	// Standing still they can neither fork away nor give their numbers to others.
	frozen := m.Freeze(cgroups.Frozen) == nil
	pids, err := m.GetAllPids()
	for _, pid := range pids {
		if e := unix.Kill(pid, sig); e != nil && e != unix.ESRCH && err == nil {
			err = os.NewSyscallError("kill", e)
		}
	}
	if frozen {
		if e := m.Freeze(cgroups.Thawed); err == nil {
			err = e
		}
	}
	return err
}

var errNoCgroup = errors.New("cgroup not exist")

// awaitEmpty waits until the cgroup has no process left, as long as ctx allows.
func awaitEmpty(ctx context.Context, m cgroups.Manager) {
	for {
		pids, err := m.GetAllPids()
		if err != nil || len(pids) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(2 * time.Millisecond):
		}
	}
}
