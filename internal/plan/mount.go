package plan

import (
	"path"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountAttrs are the flags that belong to one mount: each option sets and
// clears attributes.
func mountAttr(opt string) (set, clr uint64, ok bool) {
	const times = unix.MOUNT_ATTR__ATIME
	switch opt {
	case "ro":
		return unix.MOUNT_ATTR_RDONLY, 0, true
	case "rw":
		return 0, unix.MOUNT_ATTR_RDONLY, true
	case "nosuid":
		return unix.MOUNT_ATTR_NOSUID, 0, true
	case "suid":
		return 0, unix.MOUNT_ATTR_NOSUID, true
	case "nodev":
		return unix.MOUNT_ATTR_NODEV, 0, true
	case "dev":
		return 0, unix.MOUNT_ATTR_NODEV, true
	case "noexec":
		return unix.MOUNT_ATTR_NOEXEC, 0, true
	case "exec":
		return 0, unix.MOUNT_ATTR_NOEXEC, true
	case "nodiratime":
		return unix.MOUNT_ATTR_NODIRATIME, 0, true
	case "diratime":
		return 0, unix.MOUNT_ATTR_NODIRATIME, true
	case "nosymfollow":
		return unix.MOUNT_ATTR_NOSYMFOLLOW, 0, true
	case "symfollow":
		return 0, unix.MOUNT_ATTR_NOSYMFOLLOW, true
	case "relatime":
		return unix.MOUNT_ATTR_RELATIME, times, true
	case "noatime":
		return unix.MOUNT_ATTR_NOATIME, times, true
	case "strictatime":
		return unix.MOUNT_ATTR_STRICTATIME, times, true
	case "atime", "norelatime", "nostrictatime":
		return unix.MOUNT_ATTR_RELATIME, times, true
	}
	return 0, 0, false
}

func propagationFlag(opt string) (uint64, bool) {
	rec := uint64(0)
	if strings.HasPrefix(opt, "r") {
		rec, opt = unix.MS_REC, opt[1:]
	}
	switch opt {
	case "private":
		return unix.MS_PRIVATE | rec, true
	case "shared":
		return unix.MS_SHARED | rec, true
	case "slave":
		return unix.MS_SLAVE | rec, true
	case "unbindable":
		return unix.MS_UNBINDABLE | rec, true
	}
	return 0, false
}

// superFlags are options of the file system itself that fsconfig takes as flags.
var superFlags = []string{"sync", "dirsync", "lazytime", "mand", "silent", "iversion"}

// ignoredOptions are defaults that ask for nothing.
var ignoredOptions = []string{"defaults", "async", "nomand", "loud", "nolazytime", "noiversion", "remount", "acl", "noacl"}

// options is what a mount's option list comes to.
type options struct {
	set, clr       uint64 // this mount
	recSet, recClr uint64 // with everything below it
	propagation    uint64
	bind, rbind    bool
	copyUp         bool
	idmap, ridmap  bool
	times          []string // words on access times, in order
	params         [][2]string
}

func parseOptions(list []string) (o options, err error) {
	for _, opt := range list {
		if set, clr, ok := mountAttr(opt); ok {
			if clr&unix.MOUNT_ATTR__ATIME != 0 || (set|clr)&unix.MOUNT_ATTR_NODIRATIME != 0 {
				o.times = append(o.times, opt)
			}
			o.set, o.clr = o.set&^(set|clr)|set, o.clr&^(set|clr)|clr
			continue
		}
		if strings.HasPrefix(opt, "r") {
			if set, clr, ok := mountAttr(opt[1:]); ok {
				o.recSet, o.recClr = o.recSet&^(set|clr)|set, o.recClr&^(set|clr)|clr
				continue
			}
		}
		if f, ok := propagationFlag(opt); ok {
			o.propagation = f
			continue
		}
		switch {
		case opt == "bind":
			o.bind = true
		case opt == "rbind":
			o.bind, o.rbind = true, true
		case opt == "tmpcopyup":
			o.copyUp = true
		case opt == "idmap":
			o.idmap = true
		case opt == "ridmap":
			o.idmap, o.ridmap = true, true
		case opt == "" || slices.Contains(ignoredOptions, opt):
		case slices.Contains(superFlags, opt):
			o.params = append(o.params, [2]string{opt, ""})
		default:
			k, v, hasValue := strings.Cut(opt, "=")
			if k == "" || strings.ContainsRune(opt, 0) || hasValue && v == "" {
				return o, fault.New(fault.Invalid, "malformed mount option %.64q", opt)
			}
			o.params = append(o.params, [2]string{k, v})
		}
	}
	return o, nil
}

// procTargets may be mounted over although they lie on procfs: they show values
// that the host's kernel cannot show per container, and grant nothing.
var procTargets = []string{
	"/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime",
	"/proc/loadavg", "/proc/slabinfo", "/proc/net/dev", "/proc/sys/kernel/ns_last_pid", "/proc/sys/crypto/fips_enabled",
}

// cleanTarget checks a path inside the container and makes it absolute and clean.
func cleanTarget(p string) (string, error) {
	if p == "" || len(p) >= unix.PathMax || strings.ContainsRune(p, 0) {
		return "", fault.New(fault.Invalid, "path inside the container is empty, too long or holds a NUL: %.64q", p)
	}
	return path.Clean("/" + p), nil
}

// mounts compiles spec.Mounts in order.
func (b *builder) mounts(spec *specs.Spec, o Options) {
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if err := b.oneMount(spec, m, o); err != nil && b.err == nil {
			b.err = fault.New(fault.Of(err), "cannot mount %.128q: %w", m.Destination, err)
		}
		if t, err := cleanTarget(m.Destination); err == nil {
			b.targets = append(b.targets, t)
		}
	}
}

func (b *builder) oneMount(spec *specs.Spec, m *specs.Mount, o Options) error {
	target, err := cleanTarget(m.Destination)
	if err != nil {
		return err
	}
	if target == "/" {
		return fault.New(fault.Invalid, "the root itself cannot be a mount's destination")
	}
	opt, err := parseOptions(m.Options)
	if err != nil {
		return err
	}
	if len(m.UIDMappings) != len(m.GIDMappings) && (len(m.UIDMappings) == 0 || len(m.GIDMappings) == 0) {
		return fault.New(fault.Invalid, "uid and gid mappings must be given together")
	}
	var flags uint16
	if target == "/proc" || strings.HasPrefix(target, "/proc/") {
		switch {
		case slices.Contains(procTargets, target):
			flags |= FlagOnProc
		case target == "/proc" && (m.Type == "proc" || opt.bind):
		default:
			return fault.New(fault.Invalid, "nothing but procfs may be mounted on or below /proc")
		}
	}
	if opt.bind || m.Type == "bind" {
		return b.bindMount(spec, m, target, opt, flags)
	}
	switch m.Type {
	case "", "none":
		return fault.New(fault.Invalid, "mount has neither a type nor the option bind")
	case "cgroup", "cgroup2":
		return b.cgroupMount(spec, target, opt, o)
	}
	if len(m.UIDMappings) != 0 || opt.idmap {
		return fault.New(fault.Invalid, "mappings of a %s mount: only bind mounts can be mapped", m.Type)
	}
	if len(m.Type) > 32 || strings.ContainsAny(m.Type, "/\x00") {
		return fault.New(fault.Invalid, "malformed file system type %.32q", m.Type)
	}
	fs := mountFS{target: target, fstype: m.Type, source: m.Source, attr: opt.set, propagation: opt.propagation,
		params: opt.params, flags: flags}
	if fs.source == "" {
		fs.source = m.Type
	}
	late := uint64(0) // read-only once it was filled
	switch m.Type {
	case "proc":
		fs.flags |= FlagNoSymlinks
		if target == "/proc" {
			fs.flags |= FlagIsProc
		}
	case "sysfs":
		fs.flags |= FlagNoSymlinks
	case "tmpfs":
		if opt.copyUp {
			fs.flags |= FlagCopyUp
		}
		if !slices.ContainsFunc(opt.params, func(p [2]string) bool { return p[0] == "mode" }) {
			fs.flags |= FlagKeepMode
		}
		if target == "/dev" || opt.copyUp {
			late = fs.attr & unix.MOUNT_ATTR_RDONLY
			fs.attr &^= late
		}
		fallthrough
	case "devpts", "mqueue":
		if l := mountLabel(spec); l != "" && m.Type != "mqueue" {
			fs.params = append(slices.Clone(fs.params), [2]string{"context", l})
		}
	}
	b.mount(fs)
	if late != 0 {
		b.late = append(b.late, target)
	}
	if opt.recSet|opt.recClr != 0 {
		b.attr(target, opt.recSet, opt.recClr, 0, FlagRecursive)
	}
	return nil
}

func mountLabel(spec *specs.Spec) string {
	if spec.Linux == nil {
		return ""
	}
	return spec.Linux.MountLabel
}

func (b *builder) bindMount(spec *specs.Spec, m *specs.Mount, target string, opt options, flags uint16) error {
	if !path.IsAbs(m.Source) || strings.ContainsRune(m.Source, 0) {
		return fault.New(fault.Invalid, "source %.128q is not an absolute path", m.Source)
	}
	if len(opt.params) != 0 {
		return fault.New(fault.Invalid, "a bind mount has no option %.64q", opt.params[0][0])
	}
	opt.bindTimes()
	s := Slot{Kind: SlotMount, Source: m.Source, Recursive: opt.rbind, AttrSet: opt.set, AttrClear: opt.clr,
		Propagation: opt.propagation}
	if s.Propagation == 0 {
		s.Propagation = inheritedPropagation(spec)
	}
	if opt.recSet|opt.recClr != 0 {
		// Attributes of the whole tree; what is asked of the top alone must not
		// contradict them.
		s.RecursiveAttr = true
		if extra := (opt.set | opt.clr) &^ (opt.recSet | opt.recClr); extra == 0 || !opt.rbind {
			s.AttrSet, s.AttrClear = opt.recSet|opt.set&^opt.recClr, opt.recClr|opt.clr&^opt.recSet
		} else {
			s.AttrSet, s.AttrClear = opt.recSet, opt.recClr
		}
	}
	_, s.Locked = b.namespaces[specs.UserNamespace]
	s.RecursiveID = opt.ridmap
	if !s.RecursiveAttr && opt.set|opt.clr != 0 {
		s.AttrReset = flagAttrs &^ (opt.set | opt.clr)
	}
	if len(m.UIDMappings) != 0 {
		s.UIDMap, s.GIDMap = m.UIDMappings, m.GIDMappings
	} else if opt.idmap {
		if spec.Linux == nil || len(spec.Linux.UIDMappings) == 0 {
			return fault.New(fault.Invalid, "option idmap needs mappings, of the mount or of the user namespace")
		}
		s.UIDMap, s.GIDMap = spec.Linux.UIDMappings, spec.Linux.GIDMappings
	}
	s.Late = b.isLate(m.Source)
	slot := b.slot(s)
	if s.Late {
		b.op(OpReceive, 0, "open mount source "+m.Source, new(enc).u16(slot))
	}
	b.move(target, slot, flags)
	if s.RecursiveAttr && s.AttrSet == opt.recSet && s.AttrClear == opt.recClr && opt.set|opt.clr != 0 {
		b.attr(target, opt.set, opt.clr, 0, 0)
	}
	return nil
}

// bindTimes gives the words on access times the meaning that they have for a bind
// mount, which is mount(2)'s: what takes a restriction back says nothing, one
// that stands implies relatime, and without any the source's stay.
func (o *options) bindTimes() {
	const mask = unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME
	on := map[string]bool{}
	for _, w := range o.times {
		switch w {
		case "noatime", "relatime", "strictatime", "nodiratime":
			on[w] = true
		case "atime":
			delete(on, "noatime")
		case "diratime", "norelatime", "nostrictatime":
			delete(on, map[string]string{"diratime": "nodiratime", "norelatime": "relatime", "nostrictatime": "strictatime"}[w])
		}
	}
	o.set, o.clr = o.set&^mask, o.clr&^mask
	if len(on) == 0 {
		return
	}
	o.clr |= unix.MOUNT_ATTR__ATIME
	switch {
	case on["strictatime"]:
		o.set |= unix.MOUNT_ATTR_STRICTATIME
	case on["noatime"]:
		o.set |= unix.MOUNT_ATTR_NOATIME
	}
	if on["nodiratime"] {
		o.set |= unix.MOUNT_ATTR_NODIRATIME
	} else {
		o.clr |= unix.MOUNT_ATTR_NODIRATIME
	}
}

// flagAttrs are the attributes that a bind mount with options loses unless it asks
// for them, as mount(2) has it: all but those on access times.
const flagAttrs = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOSYMFOLLOW

// isLate tells whether a source lies in the root, on or below a mount made before.
func (b *builder) isLate(source string) bool {
	in, ok := strings.CutPrefix(path.Clean(source), b.hostRoot+"/")
	if b.hostRoot == "" || !ok {
		return false
	}
	in = "/" + in
	return slices.ContainsFunc(b.targets, func(t string) bool { return in == t || strings.HasPrefix(in, t+"/") })
}

// inheritedPropagation is what a mount without a word on it gets: that of the
// root, and never the host's own peer group.
func inheritedPropagation(spec *specs.Spec) uint64 {
	if spec.Linux != nil {
		if f, ok := propagationFlag(spec.Linux.RootfsPropagation); ok && f&(unix.MS_PRIVATE|unix.MS_UNBINDABLE) != 0 {
			return unix.MS_PRIVATE | unix.MS_REC
		}
	}
	return unix.MS_SLAVE | unix.MS_REC
}

// cgroupMount shows the container its own cgroups: freshly mounted inside a
// cgroup namespace, else as binds of the directories.
func (b *builder) cgroupMount(spec *specs.Spec, target string, opt options, o Options) error {
	_, own := b.namespaces[specs.CgroupNamespace]
	// time flags are not for pseudo file systems, as the option list has it
	attr := opt.set | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	if o.CgroupV2 {
		if own {
			b.mount(mountFS{target: target, fstype: "cgroup2", source: "cgroup", attr: attr, propagation: opt.propagation, params: opt.params})
			return nil
		}
		return b.cgroupBind(target, "", attr, o)
	}
	b.mount(mountFS{target: target, fstype: "tmpfs", source: "tmpfs", propagation: opt.propagation,
		attr: attr &^ unix.MOUNT_ATTR_RDONLY, params: [][2]string{{"mode", "755"}}})
	for _, h := range o.V1Controllers {
		dir := target + "/" + strings.TrimPrefix(h, "name=")
		if h == "" || strings.ContainsAny(h, "/\x00") {
			return fault.New(fault.Invalid, "malformed cgroup hierarchy %.64q", h)
		}
		if !own {
			if err := b.cgroupBind(dir, h, attr, o); err != nil {
				return err
			}
		} else {
			fs := mountFS{target: dir, fstype: "cgroup", source: "cgroup", attr: attr}
			for _, c := range strings.Split(h, ",") {
				k, v, _ := strings.Cut(c, "=")
				fs.params = append(fs.params, [2]string{k, v})
			}
			b.mount(fs)
		}
		if parts := strings.Split(h, ","); len(parts) > 1 {
			for _, c := range parts {
				b.symlink(h, target+"/"+c)
			}
		}
	}
	if attr&unix.MOUNT_ATTR_RDONLY != 0 {
		b.attr(target, unix.MOUNT_ATTR_RDONLY, 0, 0, 0)
	}
	return nil
}

func (b *builder) cgroupBind(target, hierarchy string, attr uint64, o Options) error {
	src := o.CgroupPaths[hierarchy]
	if src == "" {
		return fault.New(fault.Invalid, "no cgroup directory is known for hierarchy %q, and there is no cgroup namespace", hierarchy)
	}
	b.move(target, b.slot(Slot{Kind: SlotMount, Source: src, AttrSet: attr, Propagation: unix.MS_PRIVATE}), 0)
	return nil
}
