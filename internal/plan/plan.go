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
	// SlotCgroup is one open "tasks" (v1) or "cgroup.threads"-free v2 file to
	// write "0" to; Source is the hierarchy.
	SlotCgroup
	// SlotDevice is an O_PATH descriptor of the device node Source on the host,
	// bind-mounted where mknod is not permitted (user namespaces).
	SlotDevice
	// SlotPidfd is the container's init, for exec.
	SlotPidfd
	// SlotStdio carries the three standard descriptors or the terminal.
	SlotStdio
	// SlotExtra is a descriptor preserved for the process (preserve-fds, LISTEN_FDS).
	SlotExtra
)

// Slot describes one descriptor that the driver must supply.
type Slot struct {
	Kind      SlotKind
	Source    string
	Recursive bool
	// Attr are mount_setattr flags to set and clear on the clone before it is sent.
	AttrSet, AttrClear uint64
	RecursiveAttr      bool
	// Propagation is an MS_* propagation flag for the clone, 0 for none.
	Propagation uint64
	UIDMap      []specs.LinuxIDMapping // idmapped mount, nil for none
	GIDMap      []specs.LinuxIDMapping
	// Optional: the driver sends a placeholder when the source is missing.
	Optional bool
}

// Options tell the compiler about the host and the driver.
type Options struct {
	// CgroupV2 reports a unified hierarchy; V1Controllers name the v1 ones.
	CgroupV2      bool
	V1Controllers []string
	// NewMountAPI reports fsopen/move_mount and mount_setattr.
	NewMountAPI bool
	// AppArmor and SELinux report that labels can be applied.
	AppArmor, SELinux bool
	// Seccomp is the compiled filter program (see package seccomp), nil for none.
	Seccomp []byte
	// Init puts the built-in reaper in front of the process.
	Init bool
	// Parked is set when the park plan has been carried out already.
	Parked bool
}
