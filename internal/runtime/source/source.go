// Package source opens on the host what a plan's slots stand for: detached
// copies of mounts and device nodes, with their attributes and id mappings, and
// namespaces. Names are resolved here, once; the start-up stage gets descriptors.
//
// The runtime drivers and package ociruntime import it.
package source

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Mount makes a detached copy of a slot's mount or device node, in the caller's
// mount namespace. exe is a program to make user namespaces with (see idmap).
func Mount(sl *plan.Slot, exe string) (int, error) {
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
	if err := prepare(fd, sl, exe); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func prepare(fd int, sl *plan.Slot, exe string) error {
	if err := SetAttr(fd, sl); err != nil {
		return &contract.StartError{Step: "prepare mount source " + sl.Source, Err: err}
	}
	if sl.UIDMap != nil || sl.GIDMap != nil {
		return idmap(fd, sl, exe)
	}
	return nil
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

// SetAttr gives a detached mount the attributes and the propagation that its slot
// asks for.
func SetAttr(fd int, sl *plan.Slot) error {
	if sl.AttrSet|sl.AttrClear|sl.AttrReset|sl.Propagation == 0 {
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
	if sl.AttrSet|sl.AttrClear|sl.AttrReset == 0 {
		return nil
	}
	reset := sl.AttrReset
	if sl.Locked {
		have, err := restrictions(fd)
		if err != nil {
			return err
		}
		if sl.AttrClear&have&^timeAttrs != 0 || sl.AttrClear&unix.MOUNT_ATTR__ATIME != 0 && sl.AttrSet&timeAttrs != have&timeAttrs {
			return unix.EPERM
		}
		reset &^= have
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if sl.RecursiveAttr {
		flags |= unix.AT_RECURSIVE
	}
	err := unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: sl.AttrSet, Attr_clr: sl.AttrClear | reset})
	if err == unix.EPERM && reset != 0 {
		// In a user namespace some are locked: what nobody asked to clear stays.
		err = unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: sl.AttrSet, Attr_clr: sl.AttrClear})
	}
	return err
}

const timeAttrs = unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME

// restrictions are the attributes of a mount that take something from its users,
// and what it says on access times.
func restrictions(fd int) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return 0, err
	}
	var have uint64
	for _, f := range [][2]uint64{{unix.ST_RDONLY, unix.MOUNT_ATTR_RDONLY}, {unix.ST_NOSUID, unix.MOUNT_ATTR_NOSUID},
		{unix.ST_NODEV, unix.MOUNT_ATTR_NODEV}, {unix.ST_NOEXEC, unix.MOUNT_ATTR_NOEXEC}} {
		if uint64(st.Flags)&f[0] != 0 {
			have |= f[1]
		}
	}
	switch flags := uint64(st.Flags); {
	case flags&unix.ST_NOATIME != 0:
		have |= unix.MOUNT_ATTR_NOATIME
	case flags&unix.ST_RELATIME == 0:
		have |= unix.MOUNT_ATTR_STRICTATIME
	}
	if uint64(st.Flags)&unix.ST_NODIRATIME != 0 {
		have |= unix.MOUNT_ATTR_NODIRATIME
	}
	return have, nil
}

func idmap(fd int, sl *plan.Slot, exe string) error {
	ns, err := userNamespace(exe, sl.UIDMap, sl.GIDMap)
	if err != nil {
		return err
	}
	defer ns.Close()
	flags := uint(unix.AT_EMPTY_PATH)
	if sl.RecursiveID {
		flags |= unix.AT_RECURSIVE
	}
	err = unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
	if err != nil {
		return &contract.StartError{Step: "map ids of mount " + sl.Source, Err: err}
	}
	return nil
}

// Namespace opens a namespace file and makes sure that it is one.
func Namespace(path string) (int, error) {
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

// WriteIDMaps maps the ids of a process that waits in a new user namespace.
func WriteIDMaps(pid int, uids, gids []specs.LinuxIDMapping) error {
	dir := "/proc/" + strconv.Itoa(pid) + "/"
	for _, f := range []struct{ name, data string }{{"gid_map", mapLines(gids)}, {"uid_map", mapLines(uids)}} {
		if err := os.WriteFile(dir+f.name, []byte(f.data), 0); err != nil {
			return &contract.StartError{Step: "write " + f.name, Err: err}
		}
	}
	return nil
}

// HostID maps an id of the container to the host's.
func HostID(id uint32, m []specs.LinuxIDMapping) int {
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
