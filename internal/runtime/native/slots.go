package native

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// slotSources are the descriptors that slots may stand for, -1 where absent.
type slotSources struct {
	root  int
	stdio [3]int
	pidfd int
	tasks []int // cgroup v1, in the order of controllers
}

// planOptions are the parts of plan.Options that depend on the host alone.
func (d *Driver) planOptions(id string) plan.Options {
	o := plan.Options{ID: id, CgroupV2: d.cg.Mode != cgroup.V1, V1Controllers: d.controllers, AppArmor: d.limits.appArmor, SELinux: d.limits.seLinux, BindDevices: d.limits.userNS,
		KeepGroups: d.limits.keepGroups}
	return o
}

// openSlots supplies the descriptors that a plan asks for, in order; done
// closes those that were opened for it.
func (s *sandbox) openSlots(p *plan.Plan, src slotSources) (fds []int, done func(), err error) {
	if src.tasks == nil {
		src.tasks = s.tasks
	}
	return s.d.openSlots(p, src)
}

func (d *Driver) openSlots(p *plan.Plan, src slotSources) (fds []int, done func(), err error) {
	var opened []int
	done = func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}
	fds = make([]int, 0, len(p.Slots))
	for i := range p.Slots {
		sl := &p.Slots[i]
		fd := -1
		switch sl.Kind {
		case plan.SlotRoot:
			fd = src.root
			if err = setAttr(fd, sl); err != nil {
				return nil, done, &contract.StartError{Step: "prepare the root file system", Err: err}
			}
		case plan.SlotStdio:
			fd = src.stdio[map[string]int{"stdin": 0, "stdout": 1, "stderr": 2}[sl.Source]]
		case plan.SlotPidfd:
			fd = src.pidfd
		case plan.SlotCgroup:
			for k, c := range d.controllers {
				if c == sl.Source && k < len(src.tasks) {
					fd = src.tasks[k]
				}
			}
		case plan.SlotNamespace:
			if fd, err = openNamespace(sl.Source); err != nil {
				return nil, done, err
			}
			opened = append(opened, fd)
		case plan.SlotMount, plan.SlotDevice:
			if fd, err = d.cloneMount(sl); err != nil {
				return nil, done, err
			}
			opened = append(opened, fd)
		}
		if fd < 0 {
			return nil, done, fault.New(fault.Internal, "cannot supply descriptor %d (%s) of the plan", i, sl.Source)
		}
		fds = append(fds, fd)
	}
	return fds, done, nil
}

// cloneMount makes a detached copy of a mount, in the host's mount namespace.
func (d *Driver) cloneMount(sl *plan.Slot) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if sl.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	source := sl.Source
	if sl.Kind == plan.SlotDevice {
		source = devicePath(sl)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, flags)
	if err != nil {
		if sl.Optional && errors.Is(err, unix.ENOENT) {
			return unix.Open("/dev/null", unix.O_PATH|unix.O_CLOEXEC, 0)
		}
		return -1, &contract.StartError{Step: "open mount source " + sl.Source, Err: err}
	}
	if err := setAttr(fd, sl); err != nil {
		unix.Close(fd)
		return -1, &contract.StartError{Step: "prepare mount source " + sl.Source, Err: err}
	}
	if sl.UIDMap != nil || sl.GIDMap != nil {
		if err := d.idmap(fd, sl); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// devicePath finds a device node on the host: at the place that it has in the
// container, else where the kernel says that it is.
func devicePath(sl *plan.Slot) string {
	is := func(path string) bool {
		var st unix.Stat_t
		return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == sl.Device.Type &&
			uint64(st.Rdev) == unix.Mkdev(sl.Device.Major, sl.Device.Minor)
	}
	if is(sl.Source) {
		return sl.Source
	}
	kind := "char"
	if sl.Device.Type == unix.S_IFBLK {
		kind = "block"
	}
	data, _ := os.ReadFile("/sys/dev/" + kind + "/" + strconv.Itoa(int(sl.Device.Major)) + ":" + strconv.Itoa(int(sl.Device.Minor)) + "/uevent")
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok && is("/dev/"+name) {
			return "/dev/" + name
		}
	}
	return sl.Source // whose absence or otherness is then reported
}

func setAttr(fd int, sl *plan.Slot) error {
	if sl.AttrSet|sl.AttrClear|sl.Propagation == 0 {
		return nil
	}
	prop := sl.Propagation
	recProp := prop&unix.MS_REC != 0
	prop &^= unix.MS_REC
	if prop != 0 {
		flags := uint(unix.AT_EMPTY_PATH)
		if recProp || sl.Recursive {
			flags |= unix.AT_RECURSIVE
		}
		if err := unix.MountSetattr(fd, "", flags, &unix.MountAttr{Propagation: prop}); err != nil {
			return err
		}
	}
	if sl.AttrSet|sl.AttrClear == 0 {
		return nil
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if sl.RecursiveAttr {
		flags |= unix.AT_RECURSIVE
	}
	return unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: sl.AttrSet, Attr_clr: sl.AttrClear})
}

func (d *Driver) idmap(fd int, sl *plan.Slot) error {
	ns, err := d.userNamespace(sl.UIDMap, sl.GIDMap)
	if err != nil {
		return err
	}
	defer ns.Close()
	flags := uint(unix.AT_EMPTY_PATH)
	if sl.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	err = unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
	if err != nil {
		return &contract.StartError{Step: "map ids of mount " + sl.Source, Err: err}
	}
	return nil
}

// openNamespace opens a namespace file and makes sure that it is one.
func openNamespace(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &contract.StartError{Step: "open namespace " + path, Err: err}
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || uint32(st.Type) != unix.NSFS_MAGIC {
		unix.Close(fd)
		return -1, fault.New(fault.Invalid, "cannot join namespace %s: it is not a namespace file", path)
	}
	return fd, nil
}

func mapLines(m []specs.LinuxIDMapping) string {
	var b strings.Builder
	for _, l := range m {
		b.WriteString(strconv.FormatUint(uint64(l.ContainerID), 10) + " " + strconv.FormatUint(uint64(l.HostID), 10) + " " + strconv.FormatUint(uint64(l.Size), 10) + "\n")
	}
	return b.String()
}

// writeIDMaps maps the ids of a process that waits in a new user namespace.
func writeIDMaps(pid int, uids, gids []specs.LinuxIDMapping) error {
	dir := "/proc/" + strconv.Itoa(pid) + "/"
	for _, f := range []struct{ name, data string }{{"gid_map", mapLines(gids)}, {"uid_map", mapLines(uids)}} {
		if err := os.WriteFile(dir+f.name, []byte(f.data), 0); err != nil {
			return &contract.StartError{Step: "write " + f.name, Err: err}
		}
	}
	return nil
}

// hostID maps an id of the container to the host's.
func hostID(id uint32, m []specs.LinuxIDMapping) int {
	if len(m) == 0 {
		return int(id)
	}
	for _, l := range m {
		if id >= l.ContainerID && id-l.ContainerID < l.Size {
			return int(l.HostID + (id - l.ContainerID))
		}
	}
	return -1
}
