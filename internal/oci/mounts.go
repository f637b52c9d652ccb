package oci

import (
	"path"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// defaultMounts are the file systems of every container.
func (g *generator) defaultMounts() []specs.Mount {
	pts := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	// Group 5 is tty everywhere; a user namespace may lack it.
	if !g.userNS && !g.in.Host.NoTTYGroup || g.userNS && mapped(g.spec.Linux.GIDMappings, 5) {
		pts = append(pts, "gid=5")
	}
	ms := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: pts},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777"}},
	}
	if !g.userNS && !g.in.Rootless {
		return ms
	}
	// sysfs, proc and mqueue belong to namespaces; without owning the namespace a
	// new instance is refused, but the host's can be bound.
	bind := func(dst string, ro bool) {
		for i := range ms {
			if ms[i].Destination != dst {
				continue
			}
			o := []string{"rbind", "nosuid", "noexec", "nodev"}
			if ro {
				o = append(o, "rro")
			}
			ms[i] = specs.Mount{Destination: dst, Type: "bind", Source: dst, Options: o}
		}
	}
	// A rootless engine owns its own namespaces and those of its containers, all
	// but the one with the host's processes.
	owner := g.in.Rootless && !g.userNS
	if !g.newNet && !owner && !(g.in.Join.Owned && g.in.Join.Network != "") {
		bind("/sys", true)
	}
	if !g.newPID && (!owner || g.in.HostConfig.PidMode.IsHost()) && !(g.in.Join.Owned && g.in.Join.PID != "") {
		bind("/proc", false)
	}
	if !g.newIPC && !owner && !(g.in.Join.Owned && g.in.Join.IPC != "") {
		bind("/dev/mqueue", false)
	}
	if g.in.CgroupPath == "" && g.in.Join.Cgroup == "" && !g.in.HostConfig.CgroupnsMode.IsPrivate() {
		bind("/sys/fs/cgroup", true)
	}
	return ms
}

// mounts puts the defaults, the user's mounts (shallow ones first) and the
// generated files together. A user's mount replaces a default at its place.
func (g *generator) mounts() error {
	hc := g.in.HostConfig
	user := slices.Clone(g.in.Mounts)
	slices.SortStableFunc(user, func(a, b Mount) int { return depth(a.Target) - depth(b.Target) })
	taken := make(map[string]bool, len(user))
	for _, m := range user {
		if !path.IsAbs(m.Target) || path.Clean(m.Target) != m.Target || m.Target == "/" {
			return fault.New(fault.Invalid, "invalid mount target %q: it must be a clean absolute path other than /", m.Target)
		}
		if taken[m.Target] {
			return fault.New(fault.Invalid, "Duplicate mount point: %s", m.Target)
		}
		taken[m.Target] = true
	}

	writableCgroups := hc.Privileged
	if w := g.opts.WritableCgroups; w != nil {
		if *w && (g.userNS || g.in.Rootless) {
			return fault.New(fault.Invalid, "option WritableCgroups conflicts with user namespaces and rootless mode")
		}
		writableCgroups = *w
	}
	var out []specs.Mount
	for _, m := range g.defaultMounts() {
		dst := m.Destination
		switch {
		case taken[dst], taken["/dev"] && strings.HasPrefix(dst, "/dev/"), taken["/sys"] && strings.HasPrefix(dst, "/sys/"):
			continue
		case dst == "/dev/shm" && hc.IpcMode.IsNone():
			continue
		case dst == "/dev/shm" && g.in.ShmSource != "":
			m = specs.Mount{Destination: dst, Type: "bind", Source: g.in.ShmSource, Options: []string{"rbind", "rprivate"}}
		case dst == "/dev/shm":
			size := hc.ShmSize
			if size <= 0 {
				size = DefaultShmSize
			}
			m.Options = append(m.Options, "size="+strconv.FormatInt(size, 10))
		case dst == "/sys" && hc.Privileged, m.Type == "cgroup" && writableCgroups:
			m.Options = without(m.Options, "ro", "rro")
		}
		out = append(out, m)
	}
	for _, m := range user {
		sm, err := g.userMount(m)
		if err != nil {
			return err
		}
		out = append(out, sm)
	}
	for _, f := range []struct{ source, target string }{
		{g.in.Files.ResolvConf, "/etc/resolv.conf"},
		{g.in.Files.Hostname, "/etc/hostname"},
		{g.in.Files.Hosts, "/etc/hosts"},
	} {
		if f.source == "" || taken[f.target] {
			continue
		}
		o := []string{"rbind", "rprivate"}
		if hc.ReadonlyRootfs {
			o = append(o, "ro")
		}
		out = append(out, specs.Mount{Destination: f.target, Type: "bind", Source: f.source, Options: o})
	}
	if hc.ReadonlyRootfs {
		for i, m := range out {
			switch m.Destination {
			case "/proc", "/dev/pts", "/dev/shm", "/dev/mqueue", "/dev":
				continue
			}
			if !taken[m.Destination] && !slices.Contains(m.Options, "ro") && !slices.Contains(m.Options, "rro") {
				out[i].Options = append(out[i].Options, "ro")
			}
		}
	}
	g.spec.Mounts = out
	g.spec.Linux.MaskedPaths, g.spec.Linux.ReadonlyPaths = paths(hc, g.opts, g.in.Host)
	return nil
}

func (g *generator) userMount(m Mount) (specs.Mount, error) {
	if m.Type == "tmpfs" {
		o := []string{"noexec", "nosuid", "nodev", "rprivate"}
		if m.ReadOnly {
			o = append(o, "ro")
		}
		o, err := MergeTmpfsOptions(append(o, m.Options...))
		return specs.Mount{Destination: m.Target, Type: "tmpfs", Source: "tmpfs", Options: o}, err
	}
	if m.Type != "bind" {
		o := slices.Clone(m.Options)
		if m.ReadOnly {
			o = append(o, "ro")
		}
		return specs.Mount{Destination: m.Target, Type: m.Type, Source: m.Source, Options: o}, nil
	}
	o := []string{"rbind"}
	if m.NonRecursive {
		o[0] = "bind"
	}
	if m.ReadOnly {
		ro := "ro"
		switch {
		case m.ReadOnlyNonRecursive && m.ReadOnlyForceRecursive:
			return specs.Mount{}, fault.New(fault.Invalid, "mount options conflict: ReadOnlyNonRecursive && ReadOnlyForceRecursive")
		case m.ReadOnlyNonRecursive:
		case g.in.Host.RecursiveReadonly:
			ro = "rro"
		case m.ReadOnlyForceRecursive:
			return specs.Mount{}, fault.New(fault.Unsupported, "cannot mount %s recursively read-only: the kernel lacks mount_setattr (Linux 5.12)", m.Target)
		}
		o = append(o, ro)
	}
	switch m.Propagation {
	case "":
		o = append(o, "rprivate")
	case "private", "rprivate":
		o = append(o, m.Propagation)
	case "shared", "rshared":
		o = append(o, m.Propagation)
		g.spec.Linux.RootfsPropagation = "shared"
	case "slave", "rslave":
		o = append(o, m.Propagation)
		if g.spec.Linux.RootfsPropagation == "" {
			g.spec.Linux.RootfsPropagation = "rslave"
		}
	default:
		return specs.Mount{}, fault.New(fault.Invalid, "invalid propagation mode: %s", m.Propagation)
	}
	sm := specs.Mount{Destination: m.Target, Type: "bind", Source: m.Source, Options: append(o, m.Options...)}
	if m.IDMap {
		g.idmap(&sm, m.IDMappings)
	}
	return sm, nil
}

// idmap asks for an idmapped mount by m, or by the container's mapping.
func (g *generator) idmap(sm *specs.Mount, m snapshot.IDMap) {
	if len(m.UIDs) > 0 {
		sm.UIDMappings, sm.GIDMappings = mappings(m.UIDs), mappings(m.GIDs)
		return
	}
	// Rootless user namespaces cannot idmap: the source's owner is not theirs.
	if len(g.in.IDMap.UIDs) > 0 && !g.in.Rootless {
		sm.UIDMappings = mappings(g.in.IDMap.UIDs)
		sm.GIDMappings = mappings(g.in.IDMap.GIDs)
	}
}

func depth(p string) int { return strings.Count(p, "/") }

func without(list []string, drop ...string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(drop, s) })
}

// tmpfsFlags maps each option to the group of options that exclude one another.
var tmpfsFlags = map[string]string{
	"defaults": "", "ro": "rw", "rw": "rw", "suid": "suid", "nosuid": "suid", "dev": "dev", "nodev": "dev",
	"exec": "exec", "noexec": "exec", "sync": "sync", "async": "sync", "dirsync": "dirsync",
	"mand": "mand", "nomand": "mand", "atime": "atime", "noatime": "atime", "strictatime": "atime",
	"relatime": "atime", "norelatime": "atime", "nostrictatime": "atime",
	"diratime": "diratime", "nodiratime": "diratime",
	"private": "prop", "rprivate": "prop", "shared": "prop", "rshared": "prop", "slave": "prop", "rslave": "prop",
	"unbindable": "prop", "runbindable": "prop",
}

// MergeTmpfsOptions keeps the last of options that exclude one another, in
// order, and refuses those that tmpfs does not know.
func MergeTmpfsOptions(options []string) ([]string, error) {
	var out []string
	seen := make(map[string]bool, len(options))
	for _, o := range slices.Backward(options) {
		if o == "" || o == "defaults" {
			continue
		}
		group, ok := tmpfsFlags[o]
		if !ok {
			k, v, has := strings.Cut(o, "=")
			switch k {
			case "size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol", "huge":
			default:
				has = false
			}
			if !has || v == "" {
				return nil, fault.New(fault.Invalid, "invalid tmpfs option %q", o)
			}
			group = "=" + k
		}
		if !seen[group] {
			seen[group] = true
			out = append(out, o)
		}
	}
	slices.Reverse(out)
	return out, nil
}
