// Package doctor looks at the host and says what stands in the way of containers,
// why, and what to do about it. Gather probes the host into Facts without changing
// it; Judge, a pure function, turns facts into findings. The engine imports it and
// adds what package network finds out about firewalls.
package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/api"
)

// Severities of findings.
const (
	OK      = "ok"
	Info    = "info"
	Warning = "warning"
	Error   = "error"
)

// Facts are what the judgement rests on. Probes hold "" where something works, else why not.
type Facts struct {
	Kernel       string // release
	Major, Minor int

	// Probes by system call or feature name.
	Syscalls map[string]string
	// Overlay mounts an overlay with layers below the root; IDMap idmaps a mount of
	// the root's file system; UserNS makes a user namespace.
	Overlay, IDMap, UserNS string
	Seccomp                bool

	Cgroup Cgroup

	NoFileSoft, NoFileHard           uint64
	KeysMax, KeysRootMax             int64 // kernel.keys.maxkeys, root_maxkeys; -1 unknown
	InotifyInstances, InotifyWatches int64
	PidMax, ThreadsMax               int64
	MaxUserNS, MaxNetNS, MaxMntNS    int64
	// UnprivilegedUserNS is kernel.unprivileged_userns_clone, AppArmorUserNS is
	// kernel.apparmor_restrict_unprivileged_userns; -1 where there is no such switch.
	UnprivilegedUserNS, AppArmorUserNS int64

	Rootless       bool
	MissingCaps    []string
	SubordinateIDs string // rootless: "" or why there are none

	Root, RunRoot            Disk
	ClockUnsynced            bool
	ClockBeforeBuild         bool
	AppArmor                 string // "" on and loadable, else why not
	SELinux                  string // "", "permissive", "enforcing"
	BridgeNF                 map[string]int64
	IPv4Forward, IPv6Forward int64
}

// Cgroup is how the host's cgroups are laid out.
type Cgroup struct {
	Mode        string   // "v2", "hybrid", "v1", "none"
	Controllers []string // that the engine can use
	// SwapAccounting: memory with swap can be limited.
	SwapAccounting bool
	// NoDomain is set where the engine's own v2 group cannot hold groups (why).
	NoDomain string
}

// Disk is the file system below one of the engine's directories.
type Disk struct {
	Path, Type              string
	Free, Total             uint64 // bytes, for the engine
	InodesFree, InodesTotal uint64 // 0, 0: no fixed number
	NoDType, ReadOnly       bool
}

// Judge turns facts into findings, the worst first. Each group that has nothing
// to complain about says so.
func Judge(f Facts) []api.Finding {
	var all []api.Finding
	for _, g := range []struct {
		title string
		judge func(Facts) []api.Finding
	}{
		{"kernel", kernel}, {"namespaces", namespaces}, {"storage", storage}, {"cgroups", cgroups},
		{"limits", limits}, {"capabilities", capabilities}, {"security modules", modules},
		{"forwarding", forwarding}, {"clock", clock},
	} {
		found := g.judge(f)
		if !slices.ContainsFunc(found, func(x api.Finding) bool { return x.Severity == Error || x.Severity == Warning }) {
			if s := summary(g.title, f); s != "" {
				all = append(all, api.Finding{Severity: OK, Title: g.title + ": " + s})
			}
		}
		all = append(all, found...)
	}
	rank := map[string]int{Error: 0, Warning: 1, Info: 2, OK: 3}
	slices.SortStableFunc(all, func(a, b api.Finding) int { return cmp.Compare(rank[a.Severity], rank[b.Severity]) })
	return all
}

// summary says in a few words what is well, "" if findings say enough.
func summary(group string, f Facts) string {
	switch group {
	case "kernel":
		return "Linux " + f.Kernel + " has every system call that is needed"
	case "namespaces":
		if f.Rootless {
			return "user namespaces work"
		}
		return "user namespaces and idmapped mounts work"
	case "storage":
		return fmt.Sprintf("overlay works on %s (%s), %s free", f.Root.Path, f.Root.Type, size(f.Root.Free))
	case "cgroups":
		return "layout " + f.Cgroup.Mode + ", controllers " + strings.Join(f.Cgroup.Controllers, " ")
	case "limits":
		return "enough for many containers"
	case "capabilities":
		if f.Rootless {
			return "rootless, as an ordinary user"
		}
		if len(f.MissingCaps) > 0 {
			return ""
		}
		return "the engine has all it uses"
	case "security modules":
		return "seccomp is on"
	case "forwarding":
		if f.IPv4Forward == 0 || f.Rootless {
			return ""
		}
		return "packets are forwarded"
	}
	if f.ClockUnsynced {
		return ""
	}
	return "synchronised"
}

func size(b uint64) string {
	switch {
	case b >= 10<<30:
		return fmt.Sprintf("%d GiB", b>>30)
	case b >= 10<<20:
		return fmt.Sprintf("%d MiB", b>>20)
	}
	return fmt.Sprintf("%d KiB", b>>10)
}

// needed tells what each system call is for and which kernel brought it.
var needed = []struct {
	name, since, use string
	required         bool
}{
	{"clone3", "5.3", "starting a container in all its namespaces at once", true},
	{"openat2", "5.6", "resolving paths inside containers safely", true},
	{"open_tree", "5.2", "handing mounts to containers", true},
	{"move_mount", "5.2", "attaching mounts", true},
	{"fsopen", "5.2", "mounting file systems without a path", true},
	{"mount_setattr", "5.12", "recursive read-only and idmapped mounts", true},
	{"pidfd_open", "5.3", "signalling the right process", true},
	{"pidfd_getfd", "5.6", "taking over descriptors of a process", false},
	{"close_range", "5.9", "closing leaked descriptors", true},
}

func kernel(f Facts) []api.Finding {
	var out []api.Finding
	if f.Major < 5 || f.Major == 5 && f.Minor < 15 {
		out = append(out, api.Finding{
			Severity: Error, Title: "Linux " + f.Kernel + " is too old",
			Detail: "The engine needs Linux 5.15 or newer.",
			Fix:    "install a newer kernel of your distribution and reboot",
		})
	}
	for _, n := range needed {
		why, probed := f.Syscalls[n.name]
		if !probed || why == "" {
			continue
		}
		sev := Warning
		if n.required {
			sev = Error
		}
		out = append(out, api.Finding{
			Severity: sev, Title: "the system call " + n.name + " does not work: " + why,
			Detail: "It is there since Linux " + n.since + " and used for " + n.use + ".",
			Fix:    "update the kernel; inside a container or sandbox, let its seccomp profile allow the call",
		})
	}
	return out
}

func namespaces(f Facts) []api.Finding {
	var out []api.Finding
	sev := Warning
	if f.Rootless {
		sev = Error
	}
	if f.MaxUserNS == 0 {
		out = append(out, api.Finding{
			Severity: sev, Title: "user namespaces are switched off",
			Detail: "user.max_user_namespaces is 0, so --userns=auto and rootless mode cannot work.",
			Fix:    "sysctl -w user.max_user_namespaces=15000, and in /etc/sysctl.d/ for good",
		})
	} else if f.UserNS != "" {
		out = append(out, api.Finding{
			Severity: sev, Title: "cannot make a user namespace: " + f.UserNS,
			Detail: "--userns=auto and rootless mode need them.",
			Fix:    "look at the sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns",
		})
	} else if f.MaxUserNS > 0 && f.MaxUserNS < 1000 {
		out = append(out, api.Finding{
			Severity: Info, Title: fmt.Sprintf("at most %d user namespaces", f.MaxUserNS),
			Fix: "raise user.max_user_namespaces for more containers with --userns=auto",
		})
	}
	if f.Rootless {
		if f.UnprivilegedUserNS == 0 {
			out = append(out, api.Finding{
				Severity: Error, Title: "ordinary users may not make user namespaces",
				Detail: "kernel.unprivileged_userns_clone is 0.", Fix: "sysctl -w kernel.unprivileged_userns_clone=1",
			})
		}
		if f.AppArmorUserNS > 0 {
			out = append(out, api.Finding{
				Severity: Warning, Title: "AppArmor restricts user namespaces of ordinary users",
				Detail: "kernel.apparmor_restrict_unprivileged_userns is 1: without a profile for servind the engine has no capability in them.",
				Fix:    "install the profile that comes with the package, or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
			})
		}
		if f.SubordinateIDs != "" {
			out = append(out, api.Finding{Severity: Error, Title: f.SubordinateIDs, Detail: "Images have files of more than one user; a rootless engine maps them to subordinate ids."})
		}
	} else if f.IDMap != "" && f.UserNS == "" {
		out = append(out, api.Finding{
			Severity: Warning, Title: "idmapped mounts do not work on " + f.Root.Path + ": " + f.IDMap,
			Detail: "With --userns=auto a container's files could not be mapped to its ids. Overlay over idmapped layers needs Linux 5.19; file systems came one by one (ext4, xfs, btrfs before tmpfs in 6.3).",
			Fix:    "update the kernel or keep the engine's root on ext4, xfs or btrfs",
		})
	}
	for _, m := range []struct {
		name  string
		value int64
	}{{"user.max_net_namespaces", f.MaxNetNS}, {"user.max_mnt_namespaces", f.MaxMntNS}} {
		if m.value >= 0 && m.value < 256 {
			out = append(out, api.Finding{
				Severity: Warning, Title: fmt.Sprintf("%s is %d", m.name, m.value),
				Detail: "Every container takes one, and a few wait ready.", Fix: "sysctl -w " + m.name + "=15000",
			})
		}
	}
	return out
}

const gib = 1 << 30

func storage(f Facts) []api.Finding {
	var out []api.Finding
	if f.Overlay != "" {
		out = append(out, api.Finding{
			Severity: Error, Title: "cannot mount an overlay on " + f.Root.Path + " (" + f.Root.Type + "): " + f.Overlay,
			Detail: "Layers of images are joined by overlayfs. Its writable directory must be on a local file system with extended attributes; overlay, nfs and some FUSE file systems are none.",
			Fix:    "modprobe overlay, or start servind with --root on ext4, xfs or btrfs",
		})
	}
	for _, d := range []struct {
		Disk
		flag string
	}{{f.Root, "--root"}, {f.RunRoot, "--run-root"}} {
		if d.Path == "" {
			continue
		}
		if d.ReadOnly {
			out = append(out, api.Finding{
				Severity: Error, Title: d.Path + " is read-only",
				Detail: "State cannot be written. A file system becomes read-only by itself after errors of the disk.",
				Fix:    "look at dmesg, then mount it writable or choose another directory with " + d.flag,
			})
		}
		if d.NoDType {
			out = append(out, api.Finding{
				Severity: Error, Title: d.Path + " is on a file system without d_type",
				Detail: "Deleted files of lower layers would show up again.", Fix: "make the file system anew (xfs: mkfs.xfs -n ftype=1)",
			})
		}
		out = append(out, space(d.Disk, d.flag)...)
	}
	return out
}

func space(d Disk, flag string) []api.Finding {
	var out []api.Finding
	// A run root holds little; a root holds images.
	low, critical := uint64(5*gib), uint64(gib)
	if flag == "--run-root" {
		low, critical = 64<<20, 16<<20
	}
	low, critical = min(low, d.Total/10), min(critical, d.Total/50)
	switch {
	case d.Total == 0:
	case d.Free < critical:
		out = append(out, api.Finding{
			Severity: Error, Title: fmt.Sprintf("only %s free on %s", size(d.Free), d.Path),
			Detail: "Pulls fail and containers that write stop.", Fix: "servin system prune, or enlarge the file system",
		})
	case d.Free < low:
		out = append(out, api.Finding{
			Severity: Warning, Title: fmt.Sprintf("%s free on %s", size(d.Free), d.Path), Fix: "servin system prune, or enlarge the file system",
		})
	}
	if d.InodesTotal > 0 && d.InodesFree < d.InodesTotal/50 {
		out = append(out, api.Finding{
			Severity: Warning, Title: fmt.Sprintf("only %d of %d inodes free on %s", d.InodesFree, d.InodesTotal, d.Path),
			Detail: "Images hold many small files; without inodes the disk is full although there is space.",
			Fix:    "servin system prune, or a file system made with more inodes",
		})
	}
	return out
}

func cgroups(f Facts) []api.Finding {
	c := f.Cgroup
	if c.Mode == "none" {
		sev := Error
		if f.Rootless {
			sev = Warning
		}
		return []api.Finding{{
			Severity: sev, Title: "no cgroup hierarchy can be used",
			Detail: "Resource limits, pause, statistics and killing a container as a whole need one.",
			Fix:    "mount -t cgroup2 none /sys/fs/cgroup; rootless: let systemd delegate (Delegate=yes in user@.service)",
		}}
	}
	var out []api.Finding
	var missing []string
	need := []string{"cpu", "memory", "pids"}
	if !f.Rootless {
		need = append(need, "cpuset", "io")
		if c.Mode != "v2" {
			need = []string{"cpu", "cpuset", "memory", "pids", "blkio", "devices", "freezer"}
		}
	}
	for _, n := range need {
		if !slices.Contains(c.Controllers, n) {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		fix := "boot without cgroup_disable= and enable the controllers in the kernel"
		if f.Rootless {
			fix = "delegate them: systemctl edit user@.service, [Service] Delegate=cpu cpuset io memory pids"
		}
		out = append(out, api.Finding{
			Severity: Warning, Title: "cgroup controllers are missing: " + strings.Join(missing, ", "),
			Detail: "Limits of these kinds are discarded with a warning.", Fix: fix,
		})
	}
	if c.NoDomain != "" {
		out = append(out, api.Finding{
			Severity: Error, Title: "the engine's cgroup cannot hold containers' groups: " + c.NoDomain,
			Fix: "start servind as a systemd service with Delegate=yes, or outside of any container's cgroup",
		})
	}
	if !c.SwapAccounting && slices.Contains(c.Controllers, "memory") {
		out = append(out, api.Finding{
			Severity: Info, Title: "memory with swap cannot be limited",
			Detail: "--memory-swap has no effect.", Fix: "boot with swapaccount=1",
		})
	}
	if c.Mode == "v1" || c.Mode == "hybrid" {
		out = append(out, api.Finding{
			Severity: Info, Title: "cgroup " + c.Mode + " works, v2 is faster and better",
			Detail: "On v2 a process is born in its cgroup, out-of-memory kills can take a container whole, and rootless engines can have limits.",
			Fix:    "boot with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all",
		})
	}
	return out
}

func limits(f Facts) []api.Finding {
	var out []api.Finding
	low := func(sev string, value, want int64, name, why, fix string) {
		if value < 0 || value >= want {
			return
		}
		out = append(out, api.Finding{Severity: sev, Title: fmt.Sprintf("%s is %d", name, value), Detail: why, Fix: fix})
	}
	low(Warning, int64(min(f.NoFileHard, 1<<62)), 65536, "the limit of open files of the engine (hard)",
		"Every container and published port takes descriptors; containers inherit the limit and cannot raise it.",
		"LimitNOFILE=1048576 in the service, or ulimit -Hn before starting servind")
	keys, name := f.KeysRootMax, "kernel.keys.root_maxkeys"
	if f.Rootless {
		keys, name = f.KeysMax, "kernel.keys.maxkeys"
	}
	low(Warning, keys, 1000, name, "Each container takes a session keyring of the user that starts it; without quota starts fail with EDQUOT.",
		"sysctl -w "+name+"=20000")
	if !f.Rootless {
		// Users in containers without a user namespace share the host's quota by number.
		low(Info, f.KeysMax, 1000, "kernel.keys.maxkeys", "Processes of one user id in many containers share this quota of keys.", "sysctl -w kernel.keys.maxkeys=20000")
	}
	low(Warning, f.InotifyInstances, 512, "fs.inotify.max_user_instances",
		"Programs that watch files (web servers, log tools, file managers) fail with \"too many open files\" when many containers run as one user.",
		"sysctl -w fs.inotify.max_user_instances=8192")
	low(Info, f.InotifyWatches, 65536, "fs.inotify.max_user_watches", "Development servers watch whole source trees.", "sysctl -w fs.inotify.max_user_watches=1048576")
	low(Info, f.PidMax, 65536, "kernel.pid_max", "All processes and threads of all containers share these numbers.", "sysctl -w kernel.pid_max=4194304")
	low(Warning, f.ThreadsMax, 8192, "kernel.threads-max", "All threads of the host together.", "sysctl -w kernel.threads-max=100000")
	return out
}
