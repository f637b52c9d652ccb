package oci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Host is what specs depend on of the host; it holds no secret.
type Host struct {
	// CPUs counts the ones online; CPULimit is one more than the highest one's number.
	CPUs, CPULimit int
	// Capabilities are those the engine itself has and so can give, in kernel order.
	Capabilities []string
	// ThermalPaths are further masked paths, one for each CPU that has it.
	ThermalPaths []string

	AppArmor, SELinux, Seccomp bool
	// TimeNamespace: a process can enter a time namespace of its own by exec.
	// Before 6.3 it could by fork only, and until then could make no thread.
	TimeNamespace         bool
	RecursiveReadonly     bool // mount_setattr
	PingGroupRange        bool // net.ipv4.ping_group_range exists
	UnprivilegedPortStart bool // net.ipv4.ip_unprivileged_port_start exists
	CPURealtime           bool // the cpu controller has real-time limits
	SwapLimit             bool // memory controller accounts swap
	NoTTYGroup            bool // group 5 does not exist in the engine's user namespace
	// Lacking tells for a cgroup controller (memory, cpu, cpuset, pids, io) why
	// this engine cannot use it; such limits are refused.
	Lacking map[string]string
}

// ProbeHost looks at the host once; the engine keeps the result.
func ProbeHost() Host {
	h := Host{
		CPUs:                  runtime.NumCPU(),
		AppArmor:              apparmorEnabled(),
		SELinux:               selinux.GetEnabled(),
		Seccomp:               unix.Prctl(unix.PR_GET_SECCOMP, 0, 0, 0, 0) == nil,
		TimeNamespace:         exists("/proc/self/ns/time") && kernelAtLeast(6, 3),
		PingGroupRange:        exists("/proc/sys/net/ipv4/ping_group_range"),
		UnprivilegedPortStart: exists("/proc/sys/net/ipv4/ip_unprivileged_port_start"),
		CPURealtime:           exists("/sys/fs/cgroup/cpu/cpu.rt_runtime_us"),
		SwapLimit:             swapLimit(),
	}
	// An empty attribute on a bad descriptor: EBADF where the call exists.
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	h.RecursiveReadonly = !errors.Is(err, unix.ENOSYS)
	h.Capabilities = ownCapabilities()
	if b, err := os.ReadFile("/proc/self/gid_map"); err == nil {
		h.NoTTYGroup = !mapsGroup(string(b), 5)
	}
	h.CPULimit = h.CPUs
	if b, err := os.ReadFile("/sys/devices/system/cpu/online"); err == nil {
		if set, err := CPUSet(strings.TrimSpace(string(b))); err == nil && len(set) > 0 {
			h.CPULimit = slices.Max(set) + 1
		}
	}
	h.ThermalPaths, _ = filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")
	return h
}

// mapsGroup reports whether a gid_map has a group.
func mapsGroup(m string, gid uint64) bool {
	for line := range strings.Lines(m) {
		var inside, outside, size uint64
		if n, _ := fmt.Sscan(line, &inside, &outside, &size); n == 3 && gid >= inside && gid-inside < size {
			return true
		}
	}
	return false
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func apparmorEnabled() bool {
	b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.HasPrefix(string(b), "Y")
}

func swapLimit() bool {
	if exists("/sys/fs/cgroup/cgroup.controllers") {
		// The file is missing in the root group, whose children have it unless
		// the kernel was told swapaccount=0.
		return exists("/proc/swaps")
	}
	return exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
}

// ownCapabilities are those in the bounding and permitted sets of the process.
func ownCapabilities() []string {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return nil
	}
	var caps []string
	for i, name := range capabilityNames {
		if data[i/32].Permitted&(1<<(i%32)) == 0 {
			continue
		}
		if set, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(i), 0, 0, 0); err != nil || set != 1 {
			continue
		}
		caps = append(caps, name)
	}
	return caps
}

// Labels allots SELinux labels for a container; both are "" where SELinux is off.
func Labels(o SecurityOptions, privileged bool) (process, mount string, err error) {
	opts := o.Labels
	if privileged && len(opts) == 0 {
		opts = []string{"disable"}
	}
	process, mount, err = label.InitLabels(opts)
	if err != nil {
		return "", "", fault.New(fault.Invalid, "cannot use security option label: %w", err)
	}
	return process, mount, nil
}

// LabelOf is the SELinux label of a running process, "" where SELinux is off.
func LabelOf(pid int) string {
	l, err := selinux.PidLabel(pid)
	if err != nil {
		return ""
	}
	return l
}

// SameLabels gives the options for a container that is to have another's labels.
func SameLabels(process string) ([]string, error) { return selinux.DupSecOpt(process) }

// ReserveLabel keeps a label's categories from being allotted again, until
// ReleaseLabel.
func ReserveLabel(l string) { selinux.ReserveLabel(l) }

// ReleaseLabel gives a label's categories back.
func ReleaseLabel(l string) {
	if l != "" {
		selinux.ReleaseLabel(l)
	}
}

// DevicesAt finds the device nodes at a host path: the node itself, links
// followed, or every node below a directory. Paths are given as below path.
func DevicesAt(path string) ([]specs.LinuxDevice, error) {
	if !filepath.IsAbs(path) {
		return nil, fault.New(fault.Invalid, "device path %q must be absolute", path)
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fault.As(fault.Invalid, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(resolved, &st); err != nil {
		return nil, fault.As(fault.Invalid, &os.PathError{Op: "lstat", Path: resolved, Err: err})
	}
	if d, ok := deviceOf(path, &st); ok {
		return []specs.LinuxDevice{d}, nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, fault.New(fault.Invalid, "%q: not a device node", path)
	}
	devs, err := devicesBelow(resolved, path, nil)
	if err == nil && len(devs) == 0 {
		err = fault.New(fault.Invalid, "%q: not a device node", path)
	}
	return devs, err
}

// HostDevices lists the host's device nodes for privileged containers. What the
// container has of its own (terminals, shm, mqueue, console) is left out.
func HostDevices() ([]specs.LinuxDevice, error) {
	return devicesBelow("/dev", "/dev", []string{"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console"})
}

func devicesBelow(dir, as string, skip []string) ([]specs.LinuxDevice, error) {
	var devs []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			// Nodes come and go; a part that cannot be read is as if it were not there.
			if e != nil && e.IsDir() && p != dir {
				return fs.SkipDir
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if p == dir {
			return nil
		}
		if filepath.Dir(p) == dir && slices.Contains(skip, e.Name()) {
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if e.Type()&fs.ModeDevice == 0 {
			return nil
		}
		var st unix.Stat_t
		if unix.Lstat(p, &st) != nil {
			return nil
		}
		if d, ok := deviceOf(as+strings.TrimPrefix(p, dir), &st); ok {
			devs = append(devs, d)
		}
		return nil
	})
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot list devices in %s: %w", dir, err)
	}
	return devs, nil
}

func deviceOf(path string, st *unix.Stat_t) (specs.LinuxDevice, bool) {
	d := specs.LinuxDevice{Path: path}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		d.Type = "b"
	case unix.S_IFCHR:
		d.Type = "c"
	default:
		return d, false
	}
	d.Major, d.Minor = int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))
	mode := os.FileMode(st.Mode & 0o777)
	uid, gid := st.Uid, st.Gid
	d.FileMode, d.UID, d.GID = &mode, &uid, &gid
	return d, true
}

// CPUSet parses a list such as "0-2,7" and returns its members, at most 8192.
func CPUSet(s string) ([]int, error) {
	var out []int
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		lo, hi, isRange := strings.Cut(strings.TrimSpace(part), "-")
		a, err := strconv.ParseUint(lo, 10, 13)
		if err != nil {
			return nil, fault.New(fault.Invalid, "invalid format: %s", s)
		}
		b := a
		if isRange {
			if b, err = strconv.ParseUint(hi, 10, 13); err != nil || b < a {
				return nil, fault.New(fault.Invalid, "invalid format: %s", s)
			}
		}
		for i := a; i <= b; i++ {
			if len(out) >= 8192 {
				return nil, fault.New(fault.Invalid, "invalid format: %s", s)
			}
			out = append(out, int(i))
		}
	}
	return out, nil
}

// kernelAtLeast compares the running kernel's release.
func kernelAtLeast(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var a, b int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a > major || a == major && b >= minor
}

// memoryNodes are the NUMA nodes with memory; ok is false where the kernel does
// not tell.
func memoryNodes() (nodes []int, ok bool) {
	b, err := os.ReadFile("/sys/devices/system/node/has_memory")
	if err != nil {
		return nil, false
	}
	nodes, err = CPUSet(strings.TrimSpace(string(b)))
	return nodes, err == nil && len(nodes) > 0
}
