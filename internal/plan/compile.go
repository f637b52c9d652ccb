package plan

import (
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Compile turns a runtime spec into the plan that starts it in a freshly
// cloned stage child (or, with Options.Parked, in one that carried Park out).
// Slot 0 is the root. Errors are of kind fault.Invalid or fault.Unsupported.
func Compile(spec *specs.Spec, o Options) (*Plan, error) {
	if spec == nil || spec.Process == nil || spec.Linux == nil {
		return nil, fault.New(fault.Invalid, "cannot compile the container's spec: it lacks process or linux")
	}
	b := &builder{joined: o.Joined}
	b.readNamespaces(spec)
	if b.err != nil {
		return nil, b.err
	}
	_, ownMounts := b.namespaces[specs.MountNamespace]
	if !ownMounts && !o.SharedMounts {
		return nil, fault.New(fault.Invalid, "cannot compile the container's spec: it has no mount namespace of its own")
	}
	if o.Parked {
		if err := b.parkable(spec, o); err != nil {
			return nil, err
		}
	}

	if spec.Linux.MountLabel != "" && !o.SELinux {
		return nil, fault.New(fault.Unsupported, "SELinux label %.64q of mounts cannot be applied: the host has no SELinux", spec.Linux.MountLabel)
	}
	rootProp := uint64(unix.MS_SLAVE | unix.MS_REC)
	if spec.Linux.RootfsPropagation != "" {
		f, ok := propagationFlag(spec.Linux.RootfsPropagation)
		if !ok {
			return nil, fault.New(fault.Invalid, "rootfsPropagation %.32q is unknown", spec.Linux.RootfsPropagation)
		}
		rootProp = f
	}
	if rootProp&unix.MS_SHARED != 0 {
		// pivot_root takes no shared mount; finishRoot makes it one
		rootProp = unix.MS_SLAVE | unix.MS_REC
	}
	root := Slot{Kind: SlotRoot, Propagation: rootProp, Recursive: true}
	if spec.Root != nil {
		root.Source = spec.Root.Path
	}
	rootSlot := b.slot(root)

	if !o.Parked {
		b.isolate(spec, o)
		if ownMounts {
			b.private()
		}
	}
	b.joinNamespaces()
	b.timeOffsets(spec)
	b.priorities(spec.Process)
	b.root(rootSlot, !ownMounts, o.RootPath)
	if o.OpenLate {
		b.hostRoot = path.Clean(o.HostRoot)
	}
	b.mounts(spec, o)
	b.devices(spec, o)
	b.p.pivot = len(b.p.Ops)
	b.pivot(!ownMounts)
	b.hostname(spec)
	b.process(spec, o, false)
	if o.Unprivileged {
		b.openSources()
	}
	return b.finish()
}

// openSources puts operations that open every mount before the first that uses
// one, right behind those that give the stage its privileges.
func (b *builder) openSources() {
	at := slices.IndexFunc(b.p.Ops, func(op Op) bool { return op.Kind == OpPrivate })
	if at < 0 || b.err != nil {
		b.fail("an unprivileged container needs a mount namespace of its own")
		return
	}
	rest := slices.Clone(b.p.Ops[at+1:])
	b.p.Ops = b.p.Ops[:at+1]
	for i := range b.p.Slots {
		s := &b.p.Slots[i]
		if s.Kind != SlotRoot && s.Kind != SlotMount && s.Kind != SlotDevice || s.Late {
			continue
		}
		if s.UIDMap != nil || s.GIDMap != nil {
			b.fail("id-mapped mounts are not supported for rootless containers")
			return
		}
		var how, flags uint16
		if s.Recursive {
			how = 1
		}
		if s.RecursiveAttr {
			flags |= FlagAttrTree
		}
		if s.Recursive || s.Propagation&unix.MS_REC != 0 {
			flags |= FlagPropTree
		}
		b.op(OpSource, flags, "open "+s.Source, new(enc).u16(uint16(i)).str(s.Source).u32(uint32(how)).u64(s.AttrSet).u64(s.AttrClear).
			u64(s.Propagation&^uint64(unix.MS_REC)))
	}
	added := len(b.p.Ops) - at - 1
	b.p.Ops = append(b.p.Ops, rest...)
	b.p.pivot += added
	b.p.exec += added
}

// Park is the plan carried out when a sandbox is parked: everything that
// depends on the key alone. No mount of the host is left when it is done. The
// hostname, the mounts and the process follow with Compile's plan, which uses
// the file systems made here (Options.Prepare) where it asks for the same ones.
// netns tells whether the child has a network namespace of its own.
func Park(netns bool, o Options) (*Plan, error) {
	b := &builder{namespaces: map[specs.LinuxNamespaceType]string{specs.CgroupNamespace: ""}}
	b.enterCgroups(o)
	b.unshare(unix.CLONE_NEWCGROUP, "cgroup")
	if netns {
		b.loopback()
	}
	b.private()
	if !o.BindDevices {
		b.base()
	}
	b.preparing = true
	for _, m := range o.likely() {
		if m.Type == "sysfs" && !netns || m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			continue
		}
		if err := b.oneMount(&specs.Spec{}, &m, o); err != nil {
			return nil, err
		}
	}
	if o.BindDevices {
		// In a user namespace the kernel gives a procfs or sysfs only to those who
		// see one already, so the host's goes after that.
		b.base()
	}
	b.p.Ops = slices.DeleteFunc(b.p.Ops, func(op Op) bool { return op.Kind == OpSymlink || op.Kind == OpAttr })
	b.p.CloneFlags = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID
	if netns {
		b.p.CloneFlags |= unix.CLONE_NEWNET
	}
	return b.finish()
}

// likely are the mounts that Park prepares.
func (o *Options) likely() []specs.Mount {
	if o.Prepare == nil {
		return usualMounts()
	}
	return o.Prepare
}

// usualMounts are those of a container of which nothing special is asked.
func usualMounts() []specs.Mount {
	ro := []string{"ro", "nosuid", "noexec", "nodev"}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: ro[1:]},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: ro},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: ro},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: ro[1:]},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: append(ro[1:3:3], "nodev", "mode=1777", "size=67108864")},
	}
}

// parkable reports why a spec cannot be started in a parked sandbox.
func (b *builder) parkable(spec *specs.Spec, o Options) error {
	for _, t := range []specs.LinuxNamespaceType{specs.MountNamespace, specs.UTSNamespace, specs.IPCNamespace, specs.PIDNamespace, specs.CgroupNamespace} {
		if p, ok := b.namespaces[t]; !ok || p != "" {
			return fault.New(fault.Invalid, "a parked sandbox has a %s namespace of its own, the container has not", t)
		}
	}
	if b.namespaces[specs.NetworkNamespace] != "" {
		return fault.New(fault.Invalid, "a parked sandbox cannot join a network namespace: its file systems belong to another")
	}
	if _, ok := b.namespaces[specs.UserNamespace]; ok {
		return fault.New(fault.Invalid, "a parked sandbox has no user namespace of its own")
	}
	if o.BindDevices {
		for _, m := range spec.Mounts {
			if (m.Type == "proc" || m.Type == "sysfs") && !slices.ContainsFunc(o.likely(), func(l specs.Mount) bool { return sameMount(l, m) }) {
				return fault.New(fault.Invalid, "no %s like that of %s was prepared, and it is too late for one", m.Type, m.Destination)
			}
		}
	}
	if o.BindDevices {
		// Inside a user namespace procfs and sysfs cannot be mounted any more once
		// the host's are out of sight: they are there as prepared, or not at all.
		for _, m := range spec.Mounts {
			if (m.Type == "proc" || m.Type == "sysfs") && !slices.ContainsFunc(o.likely(), func(l specs.Mount) bool {
				return l.Type == m.Type && l.Source == m.Source && slices.Equal(l.Options, m.Options)
			}) {
				return fault.New(fault.Invalid, "a parked sandbox has no %s of the kind that the container wants", m.Type)
			}
		}
	}
	// A time namespace is unshared by the container's own plan and entered at
	// exec, so that a parked sandbox need not have one.
	if h := spec.Hooks; h != nil && (len(h.CreateContainer) != 0 || len(h.Prestart) != 0 || len(h.CreateRuntime) != 0) {
		return fault.New(fault.Invalid, "hooks of the creation need the host's mounts, which a parked sandbox has not")
	}
	return nil
}

func sameMount(a, b specs.Mount) bool {
	sorted := func(l []string) []string { return slices.Sorted(slices.Values(l)) }
	return a.Type == b.Type && a.Source == b.Source && slices.Equal(sorted(a.Options), sorted(b.Options))
}

var cloneFlags = map[specs.LinuxNamespaceType]uint64{
	specs.MountNamespace: unix.CLONE_NEWNS, specs.UTSNamespace: unix.CLONE_NEWUTS, specs.IPCNamespace: unix.CLONE_NEWIPC,
	specs.PIDNamespace: unix.CLONE_NEWPID, specs.NetworkNamespace: unix.CLONE_NEWNET, specs.UserNamespace: unix.CLONE_NEWUSER,
	specs.CgroupNamespace: unix.CLONE_NEWCGROUP, specs.TimeNamespace: unix.CLONE_NEWTIME,
}

// readNamespaces sorts out what is new and what is joined.
func (b *builder) readNamespaces(spec *specs.Spec) {
	b.namespaces = map[specs.LinuxNamespaceType]string{}
	for _, ns := range spec.Linux.Namespaces {
		f, ok := cloneFlags[ns.Type]
		if !ok {
			b.fail("namespace type %.32q is unknown", ns.Type)
			return
		}
		if _, twice := b.namespaces[ns.Type]; twice {
			b.fail("namespace type %s is given twice", ns.Type)
			return
		}
		if ns.Path != "" && (ns.Path[0] != '/' || strings.ContainsRune(ns.Path, 0)) {
			b.fail("path %.128q of the %s namespace is not absolute", ns.Path, ns.Type)
			return
		}
		b.namespaces[ns.Type] = ns.Path
		if ns.Path == "" && ns.Type != specs.CgroupNamespace && ns.Type != specs.TimeNamespace {
			b.p.CloneFlags |= f
		}
	}
	b.p.PIDNamespace = b.namespaces[specs.PIDNamespace]
	b.p.UserNamespace = b.namespaces[specs.UserNamespace]
	_, user := b.namespaces[specs.UserNamespace]
	fresh := b.isNew(specs.UserNamespace)
	l := spec.Linux
	switch {
	case fresh && (len(l.UIDMappings) == 0 || len(l.GIDMappings) == 0):
		b.fail("a new user namespace needs uid and gid mappings")
	case !user && len(l.UIDMappings)+len(l.GIDMappings) != 0:
		b.fail("uid and gid mappings need a user namespace")
	case fresh:
		b.p.UIDMap, b.p.GIDMap = l.UIDMappings, l.GIDMappings
	}
	if len(l.UIDMappings) > 340 || len(l.GIDMappings) > 340 {
		b.fail("a user namespace takes no more than 340 mappings")
	}
	if p, ok := b.namespaces[specs.MountNamespace]; ok && p != "" && !b.joined {
		b.fail("an existing mount namespace cannot be joined by a new container")
	}
}

func (b *builder) isNew(t specs.LinuxNamespaceType) bool {
	p, ok := b.namespaces[t]
	return ok && p == ""
}

func (b *builder) enterCgroups(o Options) {
	if o.CgroupV2 || o.CgroupEntered {
		return
	}
	for _, h := range o.V1Controllers {
		b.cgroup(b.slot(Slot{Kind: SlotCgroup, Source: h}), h)
	}
}

// isolate is what Park does beforehand, as this spec wants it.
func (b *builder) isolate(spec *specs.Spec, o Options) {
	b.enterCgroups(o)
	if o.AllCPUs {
		b.allCPUs()
	}
	if _, ok := b.namespaces[specs.UserNamespace]; ok {
		b.becomeRoot()
	}
	if b.isNew(specs.CgroupNamespace) {
		b.unshare(unix.CLONE_NEWCGROUP, "cgroup")
	}
	if b.isNew(specs.NetworkNamespace) {
		b.loopback()
	}
}

// joinNamespaces enters what exists already. The pid and user namespaces are
// not among them: the child was born there.
func (b *builder) joinNamespaces() {
	if b.joined {
		return
	}
	for _, t := range []specs.LinuxNamespaceType{specs.CgroupNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.NetworkNamespace, specs.TimeNamespace} {
		if p := b.namespaces[t]; p != "" {
			b.setns(b.slot(Slot{Kind: SlotNamespace, Source: p}), cloneFlags[t], fmt.Sprintf("%s namespace %s", t, p))
		}
	}
}

func (b *builder) timeOffsets(spec *specs.Spec) {
	offsets := spec.Linux.TimeOffsets
	if !b.isNew(specs.TimeNamespace) {
		if len(offsets) != 0 {
			b.fail("time offsets need a new time namespace")
		}
		return
	}
	// The namespace is entered by exec, as kernels from 6.2 do, or by the fork
	// of the reaper.
	b.unshare(unix.CLONE_NEWTIME, "time")
	if len(offsets) == 0 {
		return
	}
	var sb strings.Builder
	for _, clock := range slices.Sorted(maps.Keys(offsets)) {
		if clock != "monotonic" && clock != "boottime" {
			b.fail("clock %.32q has no offset (monotonic and boottime have)", clock)
			return
		}
		fmt.Fprintf(&sb, "%s %d %d\n", clock, offsets[clock].Secs, offsets[clock].Nanosecs)
	}
	b.op(OpSelf, 0, "set time offsets", new(enc).str("timens_offsets").str("").str(sb.String()))
}

// device is one node of the container's /dev.
type device struct {
	path         string
	mode         uint32
	major, minor uint32
	uid, gid     uint32
}

func defaultDevices() []device {
	const m = unix.S_IFCHR | 0o666
	return []device{
		{path: "/dev/null", mode: m, major: 1, minor: 3}, {path: "/dev/zero", mode: m, major: 1, minor: 5},
		{path: "/dev/full", mode: m, major: 1, minor: 7}, {path: "/dev/random", mode: m, major: 1, minor: 8},
		{path: "/dev/urandom", mode: m, major: 1, minor: 9}, {path: "/dev/tty", mode: m, major: 5, minor: 0},
	}
}

func specDevice(d *specs.LinuxDevice) (device, error) {
	p, err := cleanTarget(d.Path)
	if err != nil || p == "/" {
		return device{}, fault.New(fault.Invalid, "malformed path %.64q of a device", d.Path)
	}
	if p == "/proc" || strings.HasPrefix(p, "/proc/") || p == "/sys" || strings.HasPrefix(p, "/sys/") {
		return device{}, fault.New(fault.Invalid, "device %.64q cannot lie there", d.Path)
	}
	dev := device{path: p, mode: 0o666}
	switch d.Type {
	case "c", "u":
		dev.mode |= unix.S_IFCHR
	case "b":
		dev.mode |= unix.S_IFBLK
	case "p":
		dev.mode |= unix.S_IFIFO
	default:
		return device{}, fault.New(fault.Invalid, "type %.16q of device %.64q is unknown", d.Type, d.Path)
	}
	if d.Type != "p" {
		if d.Major < 0 || d.Major > 0xfff || d.Minor < 0 || d.Minor > 0xfffff {
			return device{}, fault.New(fault.Invalid, "number %d:%d of device %.64q is out of range", d.Major, d.Minor, d.Path)
		}
		dev.major, dev.minor = uint32(d.Major), uint32(d.Minor)
	}
	if d.FileMode != nil {
		fm := *d.FileMode
		dev.mode = dev.mode&unix.S_IFMT | uint32(fm.Perm())
		// both ways of writing the special bits are in use
		if fm&os.ModeSetuid != 0 || fm&0o4000 != 0 {
			dev.mode |= unix.S_ISUID
		}
		if fm&os.ModeSetgid != 0 || fm&0o2000 != 0 {
			dev.mode |= unix.S_ISGID
		}
	}
	if d.UID != nil {
		dev.uid = *d.UID
	}
	if d.GID != nil {
		dev.gid = *d.GID
	}
	return dev, nil
}

// devices makes nodes and links in /dev, unless /dev is somebody else's
// (a bind mount).
func (b *builder) devices(spec *specs.Spec, o Options) {
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if t, err := cleanTarget(m.Destination); err == nil && t == "/dev" &&
			(m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")) {
			return
		}
	}
	all := defaultDevices()
	for i := range spec.Linux.Devices {
		d, err := specDevice(&spec.Linux.Devices[i])
		if err != nil {
			if b.err == nil {
				b.err = err
			}
			return
		}
		if k := slices.IndexFunc(all, func(x device) bool { return x.path == d.path }); k >= 0 {
			all[k] = d
		} else {
			all = append(all, d)
		}
	}
	_, userns := b.namespaces[specs.UserNamespace]
	for _, d := range all {
		if d.path == "/dev/ptmx" || d.path == "/dev/console" {
			continue // a link into devpts, the terminal
		}
		if (userns || o.BindDevices) && d.mode&unix.S_IFMT != unix.S_IFIFO {
			slot := Slot{Kind: SlotDevice, Source: d.path, Propagation: unix.MS_PRIVATE}
			slot.Device.Type, slot.Device.Major, slot.Device.Minor = d.mode&unix.S_IFMT, d.major, d.minor
			b.device(d.path, b.slot(slot), d.mode, d.major, d.minor)
			continue
		}
		b.mknod(d.path, d.mode, d.major, d.minor, d.uid, d.gid)
	}
	for _, l := range [][2]string{
		{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"}, {"/proc/self/fd/1", "/dev/stdout"},
		{"/proc/self/fd/2", "/dev/stderr"}, {"/proc/kcore", "/dev/core"}, {"pts/ptmx", "/dev/ptmx"},
	} {
		b.symlink(l[0], l[1])
	}
}

func (b *builder) hostname(spec *specs.Spec) {
	for _, n := range []struct {
		kind        Kind
		what, value string
	}{{OpHostname, "hostname", spec.Hostname}, {OpDomainname, "domainname", spec.Domainname}} {
		if n.value == "" {
			continue
		}
		if _, ok := b.namespaces[specs.UTSNamespace]; !b.isNew(specs.UTSNamespace) && !(ok && b.joined) {
			b.fail("%s cannot be set without a UTS namespace of the container's own", n.what)
		}
		if len(n.value) > 64 {
			b.fail("%s of %d bytes is too long (limit 64)", n.what, len(n.value))
		}
		b.op(n.kind, 0, "set "+n.what, new(enc).str(n.value))
	}
}
