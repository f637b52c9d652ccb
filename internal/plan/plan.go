// Package plan compiles an OCI runtime spec into a plan: a flat list of
// operations that servin-shim's start-up stage carries out one by one inside
// fresh namespaces. Compiling is pure; golden tests hold plans. A plan names
// root-relative paths and descriptor slots, never host paths: what lies on the
// host is opened by the runtime driver beforehand and sent as descriptors.
//
// Package runtime/native imports it; it imports the runtime-spec types, package
// seccomp's programs and nothing else of ours.
package plan

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Plan is an ordered list of operations and the descriptors they need.
type Plan struct {
	Ops []Op
	// Slots tells, in order, which descriptors the driver must send with the
	// encoded plan; operations refer to them by index.
	Slots []Slot
	// Continues: the operations refer to the slots sent with the plan before
	// (see SplitExec, SplitPivot); Slots is then empty.
	Continues bool

	// CloneFlags are the namespaces that the stage child is to be born in
	// (clone3). The cgroup and time namespaces are made by operations.
	CloneFlags uint64
	// PIDNamespace is the path of a pid namespace to be born in, "" for none:
	// whoever clones the child enters it for its children beforehand.
	PIDNamespace string
	// UserNamespace is the path of a user namespace that owns the child's others,
	// "" for none: whoever clones the child enters it first.
	UserNamespace string
	// UIDMap and GIDMap are to be written for the child before the plan is sent.
	UIDMap, GIDMap []specs.LinuxIDMapping

	pivot, exec int // where to split
}

// SlotKind says what a slot's descriptor is.
type SlotKind uint8

const (
	// SlotRoot is the detached mount of the root file system.
	SlotRoot SlotKind = iota + 1
	// SlotMount is a detached clone (open_tree) of Source with Attr applied.
	SlotMount
	// SlotNamespace is an open namespace file at Source.
	SlotNamespace
	// SlotCgroup is one open "tasks" (v1) file to write "0" to; Source is the
	// hierarchy as Options.V1Controllers names it. None on cgroup v2, where the
	// child is born in its cgroup.
	SlotCgroup
	// SlotDevice is a detached clone (open_tree) of the device node Source on the
	// host, attached where mknod is not permitted (user namespaces). The stage
	// checks its type and number.
	SlotDevice
	// SlotPidfd is the container's init, for exec.
	SlotPidfd
	// SlotStdio is a standard descriptor: Source is "stdin", "stdout" or "stderr".
	// A process with a terminal has none: its master comes back in an FD message.
	SlotStdio
	// SlotExtra is a descriptor preserved for the process (preserve-fds,
	// LISTEN_FDS): Source is the number it gets.
	SlotExtra
	// SlotGate is the pipe that the process waits at (Options.Gate).
	SlotGate
)

// Slot describes one descriptor that the driver must supply.
type Slot struct {
	Kind      SlotKind
	Source    string
	Recursive bool
	// Attr are mount_setattr flags to set and clear on the clone before it is sent.
	AttrSet, AttrClear uint64
	RecursiveAttr      bool
	// AttrReset are attributes to clear too, where the kernel permits it: bind
	// mounts with any option lose those that the source has and that are not asked for.
	AttrReset uint64
	// Locked: what the source's own mount forbids stays forbidden, and clearing it
	// is an error: the container's user namespace must not free itself of it.
	Locked bool
	// Late: the source lies on a mount that the plan itself makes. A placeholder is
	// sent with the plan, and the descriptor when the stage asks for it.
	Late bool
	// Propagation is an MS_* propagation flag for the clone, 0 for none.
	Propagation uint64
	UIDMap      []specs.LinuxIDMapping // idmapped mount, nil for none
	GIDMap      []specs.LinuxIDMapping
	RecursiveID bool // …with everything below
	// Device, of a SlotDevice, is the node's type (S_IFMT) and number: it may lie
	// elsewhere on the host than Source, its place in the container.
	Device struct{ Type, Major, Minor uint32 }
	// Optional: the driver sends a placeholder when the source is missing.
	Optional bool
}

// Options tell the compiler about the host and the driver.
type Options struct {
	// ID is the container's id; it names the session keyring.
	ID string
	// CgroupV2 reports a unified hierarchy. V1Controllers name the v1
	// hierarchies as /proc/self/cgroup does: "memory", "cpu,cpuacct", "name=systemd".
	CgroupV2      bool
	V1Controllers []string
	// CgroupPaths are the container's own cgroup directories on the host by
	// V1Controllers entry ("" on v2), needed only where a cgroup mount is asked
	// for without a cgroup namespace.
	CgroupPaths map[string]string
	// AppArmor and SELinux report that labels can be applied.
	AppArmor, SELinux bool
	// Seccomp is the compiled filter program (see package seccomp), nil for none;
	// SeccompFlags are SECCOMP_FILTER_FLAG_*.
	Seccomp      []byte
	SeccompFlags uint32
	// SeccompNotify: the filter has notify actions; the descriptor comes back
	// in an FD message.
	SeccompNotify bool
	// Init puts the built-in reaper in front of the process.
	Init bool
	// BindDevices has device nodes bound from the host's, because the driver itself
	// lives in a user namespace, where mknod is refused.
	BindDevices bool
	// KeepGroups: setgroups is denied to the driver and so to its containers (a
	// user namespace in which one id is mapped).
	KeepGroups bool
	// Parked is set when the park plan has been carried out already.
	Parked bool
	// Prepare, for Park, are the mounts that the container is likely to have (those
	// of the last one started, for instance); nil is Docker's usual ones. Of binds
	// nothing is prepared.
	Prepare []specs.Mount
	// PreserveFDs is how many descriptors from 3 on the process inherits.
	PreserveFDs int
	// UserNS reports, for Exec alone, that the container has a user namespace of
	// its own. Compile sees it in the spec.
	UserNS bool
	// Namespaces, for Exec alone, are the CLONE_NEW* to join, 0 for all but time:
	// one that the container shares with whoever execs may not be joined again.
	Namespaces uint64

	// What follows is for a driver without a monitor (package ociruntime).

	// Joined: whoever clones the child has entered every namespace that has a path.
	Joined bool
	// SharedMounts allows a container without a mount namespace of its own. The
	// root's slot is then an open directory, and the mounts are made below it.
	SharedMounts bool
	// Unprivileged: whoever clones the child cannot clone mounts, so the stage opens
	// the sources itself, inside its new user namespace; the driver fills the
	// slots of mounts with placeholders.
	Unprivileged bool
	// CgroupEntered: the child is put into its cgroup by other means.
	CgroupEntered bool
	// AllCPUs has the process run on every processor that its cgroup permits,
	// whatever whoever clones it is bound to, unless ExecCPUAffinity says otherwise.
	AllCPUs bool
	// RootPath is where on the host the root is to lie until it is entered, "" for
	// on top of everything. Hooks of the creation look for it there.
	RootPath string
	// PlainOutput has the terminal pass line feeds on as they are: whoever copies
	// its output has a terminal that adds the carriage returns.
	PlainOutput bool
	// OpenLate: whoever sends the plan answers RECEIVE. HostRoot is where the root
	// lies on the host, to tell sources in it from others.
	OpenLate bool
	HostRoot string
	// Personality and MemoryPolicy, for Exec alone, are the container's.
	Personality  *specs.LinuxPersonality
	MemoryPolicy *specs.LinuxMemoryPolicy
	// Lookup has the program looked up before anything irrevocable is said.
	Lookup bool
	// Gate has the process answer and wait before it runs.
	Gate bool
	// StartHooks run inside the container right before the program, with
	// StartState on their standard input.
	StartHooks []specs.Hook
	StartState []byte
}
