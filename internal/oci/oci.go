// Package oci turns a container's configuration into an OCI runtime spec. It
// merges image defaults into a request (Merge), fills in engine defaults
// (ApplyDefaults), refuses what cannot be run (Validate) and generates the spec
// (Generate) and the process of an exec (GenerateExec), all without I/O. What
// the host can do is probed once by ProbeHost; what lies inside an image is read
// by LookupUser; host device nodes by HostDevices and DevicesAt.
//
// The results are those of the Docker Engine: 14 capabilities, its masked and
// read-only paths, mounts, environment and resource rules. The engine imports
// this package; the spec goes to package runtime.
package oci

import (
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// DefaultPath is the PATH of a process whose image sets none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// DefaultShmSize is the size of /dev/shm in bytes where none is asked for.
const DefaultShmSize = 64 << 20

// Input is everything a spec depends on. Generate changes nothing in it, and the
// spec shares no slice with it but the cached seccomp profile.
type Input struct {
	ID, Name   string
	Config     *container.Config     // image defaults merged (Merge)
	HostConfig *container.HostConfig // engine defaults filled in (ApplyDefaults)

	// RootPath goes to Root.Path, for runtimes that need a path. The native
	// runtime gets a descriptor instead and ignores it.
	RootPath string
	Mounts   []Mount
	Files    Files
	// ShmSource is the host path to bind at /dev/shm when the IPC namespace is
	// the host's or another container's; empty gives a tmpfs of ShmSize bytes.
	ShmSource string

	User specs.User // as LookupUser found it
	Home string     // HOME unless the environment has one; "" is "/"
	// LinkEnv are variables of legacy links; the container's own win.
	LinkEnv []string

	Join  Join
	IDMap snapshot.IDMap // zero: the host's user namespace

	// CgroupPath is the cgroup below the mount point of the hierarchies, or
	// "slice:prefix:name" for the systemd driver. Empty: no cgroup can be had
	// (rootless without delegation), resources are left out with a warning.
	CgroupPath string
	CgroupV2   bool
	// Rootless leaves out what an unprivileged engine cannot do.
	Rootless bool

	// Devices resolves a --device path to its nodes (DevicesAt on a real host).
	Devices func(path string) ([]specs.LinuxDevice, error)
	// AllDevices are the host's device nodes, for privileged containers.
	AllDevices []specs.LinuxDevice

	Host Host
	// Seccomp caches profiles; nil means that each call builds its own.
	Seccomp *Profiles
	// AppArmorProfile is the name of the loaded default profile, "" if none.
	AppArmorProfile string
	// ProcessLabel and MountLabel are SELinux labels (see Labels), "" for none.
	ProcessLabel, MountLabel string
	// NoNewPrivileges is the engine's default; security options override it.
	NoNewPrivileges bool
}

// Mount is a resolved mount: a source on the host, or a file system of its own.
type Mount struct {
	// Type is "bind", "tmpfs" or another file system's name.
	Type   string
	Source string
	Target string // absolute, clean, inside the container
	// Options are further mount options ("nosuid", "size=64m").
	Options  []string
	ReadOnly bool
	// NonRecursive binds the source's top mount alone. ReadOnlyNonRecursive makes
	// only that one read-only; ReadOnlyForceRecursive fails where the kernel cannot
	// make all of them so. Otherwise read-only is recursive if the kernel can.
	NonRecursive, ReadOnlyNonRecursive, ReadOnlyForceRecursive bool
	// Propagation is private, rprivate (the default), shared, rshared, slave or rslave.
	Propagation string
	// IDMap maps the source's owners by the container's user namespace.
	IDMap bool
	// IDMappings, if set, is used instead of the container's mapping.
	IDMappings snapshot.IDMap
}

// Files are the generated files of a container, host paths; "" leaves the
// image's own in place. A mount of the user's at the same place wins. They are
// not idmapped (tmpfs can be since Linux 6.3 only): who writes them gives them to
// the container's root.
type Files struct{ Hosts, Hostname, ResolvConf string }

// Join holds paths of namespaces to join instead of making new ones.
type Join struct {
	Network, IPC, PID, UTS, User, Cgroup, Time string
	// Owned: the user namespace joined owns the others, so that file systems of
	// theirs can be mounted anew.
	Owned bool
}

// Generate makes the runtime spec. Warnings are for the user. Errors carry fault.Invalid.
func Generate(in Input) (*specs.Spec, []string, error) {
	g := &generator{in: in, spec: &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: in.RootPath, Readonly: in.HostConfig.ReadonlyRootfs},
		Linux:   &specs.Linux{},
	}}
	for _, step := range []func() error{
		g.security, g.namespaces, g.process, g.mounts, g.devices,
		g.resources, g.sysctls, g.seccomp, g.annotations,
	} {
		if err := step(); err != nil {
			return nil, nil, err
		}
	}
	return g.spec, g.warnings, nil
}

// generator carries one generation from step to step.
type generator struct {
	in       Input
	spec     *specs.Spec
	opts     SecurityOptions
	warnings []string

	newNet, newIPC, newUTS, newPID bool
	userNS                         bool
}

func (g *generator) warn(s string) { g.warnings = append(g.warnings, s) }

func (g *generator) security() (err error) {
	g.opts, err = ParseSecurityOpt(g.in.HostConfig.SecurityOpt)
	return err
}

func (g *generator) annotations() error {
	if len(g.in.HostConfig.Annotations) == 0 {
		return nil
	}
	g.spec.Annotations = make(map[string]string, len(g.in.HostConfig.Annotations))
	for k, v := range g.in.HostConfig.Annotations {
		g.spec.Annotations[k] = v
	}
	return nil
}

func mappings(r []snapshot.IDRange) []specs.LinuxIDMapping {
	out := make([]specs.LinuxIDMapping, len(r))
	for i, m := range r {
		out[i] = specs.LinuxIDMapping{ContainerID: m.Container, HostID: m.Host, Size: m.Size}
	}
	return out
}

func mapped(r []specs.LinuxIDMapping, id uint32) bool {
	for _, m := range r {
		if id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size) {
			return true
		}
	}
	return false
}
