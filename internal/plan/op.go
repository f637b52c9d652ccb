package plan

import "strings"

// Op is one operation of a plan.
type Op struct {
	Kind  Kind
	Flags uint16
	// Name says what the operation does, for errors: "mount /proc".
	Name    string
	Payload []byte
}

// Kind tells what an operation does. Numbers are never used twice: a daemon
// may talk to a shim of an earlier build.
type Kind uint16

// The kinds. Layouts, field names and flags stand in the table below; shim/op.h
// is generated from it.
const (
	OpPrivate     Kind = 1
	OpBase        Kind = 2
	OpCgroup      Kind = 3
	OpUnshare     Kind = 4
	OpSetns       Kind = 5
	OpRoot        Kind = 6
	OpMount       Kind = 7
	OpMove        Kind = 8
	OpAttr        Kind = 9
	OpReadonly    Kind = 10
	OpMask        Kind = 11
	OpMkdir       Kind = 12
	OpSymlink     Kind = 13
	OpMknod       Kind = 14
	OpDevice      Kind = 15
	OpPivot       Kind = 16
	OpHostname    Kind = 17
	OpDomainname  Kind = 18
	OpSysctl      Kind = 19
	OpSelf        Kind = 20
	OpLoopback    Kind = 21
	OpKeyring     Kind = 22
	OpRlimits     Kind = 23
	OpScheduler   Kind = 24
	OpIOPriority  Kind = 25
	OpPersonality Kind = 26
	OpUmask       Kind = 27
	OpStdio       Kind = 28
	OpConsole     Kind = 29
	OpNoNewPrivs  Kind = 30
	OpSeccomp     Kind = 31
	OpCreds       Kind = 32
	OpCwd         Kind = 33
	OpHome        Kind = 34
	OpFDs         Kind = 35
	OpHook        Kind = 36
	OpExec        Kind = 37
	OpLookup      Kind = 38
	OpBecomeRoot  Kind = 39
	OpAffinity    Kind = 40
	OpMemPolicy   Kind = 41
	OpPrepare     Kind = 42
	OpGate        Kind = 43
	OpClose       Kind = 44
	OpSource      Kind = 45
	OpRootAt      Kind = 46
	OpReceive     Kind = 47
)

// Flags, by kind.
const (
	FlagNoSymlinks uint16 = 1 << 0 // MOUNT: the target must be reached without symlinks
	FlagOnProc     uint16 = 1 << 1 // MOUNT, MOVE: the target may lie on procfs
	FlagIsProc     uint16 = 1 << 2 // MOUNT: the container's /proc; kept for later writes
	FlagCopyUp     uint16 = 1 << 3 // MOUNT: copy what the target holds into the new file system
	FlagKeepMode   uint16 = 1 << 4 // MOUNT: the mode of the target, if it was there before

	FlagRecursive uint16 = 1 << 0 // ATTR, READONLY: with everything below

	FlagNotify uint16 = 1 << 0 // SECCOMP: ask for the notification descriptor

	FlagHasCaps    uint16 = 1 << 0 // CREDS: the capability sets are valid
	FlagKeepGroups uint16 = 1 << 1 // CREDS: setgroups is denied in this user namespace

	FlagCreate uint16 = 1 << 0 // CWD: make the directory where it is missing

	FlagInit uint16 = 1 << 0 // EXEC: stay as reaper, run the program as a child

	FlagShared uint16 = 1 << 0 // ROOT: the root is where it is, the mount namespace is somebody else's
	FlagChroot uint16 = 1 << 0 // PIVOT: by chroot(2), for the same reason

	FlagAttrTree uint16 = 1 << 0 // SOURCE: attributes with everything below
	FlagPropTree uint16 = 1 << 1 // SOURCE: propagation with everything below

	FlagHookHome uint16 = 1 << 0 // HOOK: with what HOME found out

	FlagDevConsole  uint16 = 1 << 0 // CONSOLE: bind the terminal onto /dev/console
	FlagPlainOutput uint16 = 1 << 1 // CONSOLE: no carriage returns before line feeds

	FlagOptional uint16 = 1 << 15 // any: failure is not an error
)

// NoSlot stands for a descriptor that is not sent.
const NoSlot = 0xffff

// layout describes a payload: fields in order, "name:type". Types: h, i, q
// (16, 32, 64 bits), s (u16 length, bytes, NUL), S (u32 length, bytes, NUL),
// b (u32 length, bytes), […] (u16 count, then the bracketed types repeated).
type layout struct {
	kind   Kind
	name   string
	fields string
	doc    string
}

func layouts() []layout {
	return []layout{
		{OpPrivate, "PRIVATE", "", "make every mount of the namespace private"},
		{OpBase, "BASE", "", "tmpfs as root, everything else detached"},
		{OpCgroup, "CGROUP", "slot:h", "write 0 to the tasks file"},
		{OpUnshare, "UNSHARE", "flags:q", "unshare(2)"},
		{OpSetns, "SETNS", "slot:h flags:q", "setns(2) with a namespace or pid descriptor"},
		{OpRoot, "ROOT", "slot:h", "attach the root file system"},
		{OpMount, "MOUNT", "target:s fstype:s source:s attr:q propagation:q params:[ss]", "a new file system; an empty value is a flag"},
		{OpMove, "MOVE", "target:s slot:h", "attach a detached mount"},
		{OpAttr, "ATTR", "target:s set:q clear:q propagation:q", "mount_setattr(2)"},
		{OpReadonly, "READONLY", "path:s", "read-only bind of a path onto itself, if it exists"},
		{OpMask, "MASK", "path:s", "hide a path, if it exists"},
		{OpMkdir, "MKDIR", "path:s mode:i uid:i gid:i", "directory, if missing"},
		{OpSymlink, "SYMLINK", "target:s path:s", "symlink, if nothing is there"},
		{OpMknod, "MKNOD", "path:s mode:i major:i minor:i uid:i gid:i", "device node"},
		{OpDevice, "DEVICE", "path:s slot:h mode:i major:i minor:i", "bind a detached mount of a device node"},
		{OpPivot, "PIVOT", "", "pivot_root(2), detach the old root"},
		{OpHostname, "HOSTNAME", "name:s", ""},
		{OpDomainname, "DOMAINNAME", "name:s", ""},
		{OpSysctl, "SYSCTL", "path:s value:s", "write to a file under /proc/sys"},
		{OpSelf, "SELF", "file:s fallback:s value:s", "write to a file under /proc/self"},
		{OpLoopback, "LOOPBACK", "", "bring lo up"},
		{OpKeyring, "KEYRING", "name:s", "join a session keyring"},
		{OpRlimits, "RLIMITS", "limits:[iqq]", "resource, soft, hard"},
		{OpScheduler, "SCHEDULER", "policy:i flags:q nice:i priority:i runtime:q deadline:q period:q", "sched_setattr(2)"},
		{OpIOPriority, "IOPRIO", "value:i", "ioprio_set(2)"},
		{OpPersonality, "PERSONALITY", "persona:i", ""},
		{OpUmask, "UMASK", "mask:i", "takes effect at exec"},
		{OpStdio, "STDIO", "stdin:h stdout:h stderr:h", "slots become descriptors 0, 1, 2"},
		{OpConsole, "CONSOLE", "width:h height:h uid:i", "open a terminal, send its master"},
		{OpNoNewPrivs, "NO_NEW_PRIVS", "", ""},
		{OpSeccomp, "SECCOMP", "flags:i program:b", "load a filter"},
		{OpCreds, "CREDS", "uid:i gid:i bounding:q effective:q permitted:q inheritable:q ambient:q groups:[i]", ""},
		{OpCwd, "CWD", "path:s", ""},
		{OpHome, "HOME", "uid:i", "set HOME from the container's /etc/passwd"},
		{OpFDs, "FDS", "slots:[h]", "slots become descriptors 3 and up"},
		{OpHook, "HOOK", "path:s timeout:i args:[S] env:[S] stdin:b", "run a program to its end; timeout in seconds, 0 none"},
		{OpExec, "EXEC", "paths:[s] args:[S] env:[S]", "paths are tried in order as execvpe does"},
		{OpLookup, "LOOKUP", "paths:[s]", "fail as EXEC would if no path can be executed"},
		{OpBecomeRoot, "BECOME_ROOT", "", "ids 0 in the user namespace"},
		{OpAffinity, "AFFINITY", "cpus:b", "sched_setaffinity(2)"},
		{OpMemPolicy, "MEMPOLICY", "mode:i nodes:b", "set_mempolicy(2)"},
		{OpPrepare, "PREPARE", "fstype:s source:s attr:q params:[ss]", "make a file system that a later MOUNT will use"},
		{OpGate, "GATE", "slot:h", "answer, then wait for a byte in the pipe"},
		{OpClose, "CLOSE", "keep:h", "close what the rest of the plan has no use for"},
		{OpSource, "SOURCE", "slot:h path:s flags:i set:q clear:q propagation:q", "open_tree(2) of the host's path in the slot's place"},
		{OpRootAt, "ROOT_AT", "slot:h path:s", "ROOT, at a path of the host's, which becomes the working directory"},
		{OpReceive, "RECEIVE", "slot:h", "ask for the slot's descriptor, now that its source is there"},
	}
}

func (l layout) split() (names, types []string) {
	for _, f := range strings.Fields(l.fields) {
		n, t, _ := strings.Cut(f, ":")
		names, types = append(names, n), append(types, t)
	}
	return names, types
}

// String names the kind as shim/op.h does.
func (k Kind) String() string {
	for _, l := range layouts() {
		if l.kind == k {
			return l.name
		}
	}
	return "UNKNOWN"
}
