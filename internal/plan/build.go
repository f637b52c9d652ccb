package plan

import (
	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// builder collects operations and slots. The first error is kept.
type builder struct {
	p          Plan
	err        error
	namespaces map[specs.LinuxNamespaceType]string // type to path, "" for a new one
	late       []string                            // mounts that become read-only once filled
	keepGroups bool                                // setgroups is denied in the user namespace
	preparing  bool                                // mounts are made, not attached
	joined     bool                                // what has a path has been entered
	hostRoot   string                              // of the root, "" where sources are not looked for there
	targets    []string                            // mounts made so far
}

func (b *builder) fail(format string, args ...any) {
	if b.err == nil {
		b.err = fault.New(fault.Invalid, format, args...)
	}
}

// slot adds a descriptor that the driver must send and gives its index.
func (b *builder) slot(s Slot) uint16 {
	if len(b.p.Slots) >= 4096 {
		b.fail("too many mounts and descriptors (limit 4096)")
		return NoSlot
	}
	b.p.Slots = append(b.p.Slots, s)
	return uint16(len(b.p.Slots) - 1)
}

func (b *builder) op(k Kind, flags uint16, name string, e *enc) {
	var payload []byte
	if e != nil {
		payload = e.b
		if e.err != nil && b.err == nil {
			b.err = e.err
		}
	}
	b.p.Ops = append(b.p.Ops, Op{Kind: k, Flags: flags, Name: name, Payload: payload})
}

func (b *builder) finish() (*Plan, error) {
	if b.err != nil {
		return nil, b.err
	}
	return &b.p, nil
}

func (b *builder) private()    { b.op(OpPrivate, 0, "make mounts private", nil) }
func (b *builder) base()       { b.op(OpBase, 0, "enter an empty root", nil) }
func (b *builder) loopback()   { b.op(OpLoopback, 0, "bring lo up", nil) }
func (b *builder) becomeRoot() { b.op(OpBecomeRoot, 0, "become root of the user namespace", nil) }
func (b *builder) noNewPrivs() { b.op(OpNoNewPrivs, 0, "set no_new_privs", nil) }

func (b *builder) cgroup(slot uint16, name string) {
	b.op(OpCgroup, 0, "enter cgroup "+name, new(enc).u16(slot))
}

func (b *builder) unshare(flags uint64, what string) {
	b.op(OpUnshare, 0, "create "+what+" namespace", new(enc).u64(flags))
}

func (b *builder) setns(slot uint16, flags uint64, what string) {
	b.op(OpSetns, 0, "enter "+what, new(enc).u16(slot).u64(flags))
}

func (b *builder) root(slot uint16, shared bool, at string) {
	if at != "" && !shared {
		b.op(OpRootAt, 0, "attach root file system", new(enc).u16(slot).str(at))
		return
	}
	var flags uint16
	if shared {
		flags = FlagShared
	}
	b.op(OpRoot, flags, "attach root file system", new(enc).u16(slot))
}

func (b *builder) pivot(shared bool) {
	if shared {
		b.op(OpPivot, FlagChroot, "chroot", nil)
		return
	}
	b.op(OpPivot, 0, "pivot_root", nil)
}

// mountFS is what one MOUNT makes.
type mountFS struct {
	target, fstype, source string
	attr, propagation      uint64
	params                 [][2]string
	flags                  uint16
}

func (b *builder) mount(m mountFS) {
	if b.preparing {
		b.prepare(m)
		return
	}
	e := new(enc).str(m.target).str(m.fstype).str(m.source).u64(m.attr).u64(m.propagation).count(len(m.params))
	for _, p := range m.params {
		e.str(p[0]).str(p[1])
	}
	b.op(OpMount, m.flags, "mount "+m.target, e)
}

func (b *builder) prepare(m mountFS) {
	e := new(enc).str(m.fstype).str(m.source).u64(m.attr).count(len(m.params))
	for _, p := range m.params {
		e.str(p[0]).str(p[1])
	}
	b.op(OpPrepare, FlagOptional, "prepare "+m.fstype, e)
}

func (b *builder) move(target string, slot, flags uint16) {
	b.op(OpMove, flags, "mount "+target, new(enc).str(target).u16(slot))
}

func (b *builder) attr(target string, set, clr, propagation uint64, flags uint16) {
	b.op(OpAttr, flags, "remount "+target, new(enc).str(target).u64(set).u64(clr).u64(propagation))
}

func (b *builder) readonly(path string) {
	b.op(OpReadonly, FlagRecursive, "write-protect "+path, new(enc).str(path))
}

func (b *builder) mask(path string) { b.op(OpMask, 0, "mask "+path, new(enc).str(path)) }

func (b *builder) symlink(target, path string) {
	b.op(OpSymlink, 0, "create "+path, new(enc).str(target).str(path))
}

func (b *builder) mknod(path string, mode, major, minor, uid, gid uint32) {
	b.op(OpMknod, 0, "create "+path, new(enc).str(path).u32(mode).u32(major).u32(minor).u32(uid).u32(gid))
}

func (b *builder) device(path string, slot uint16, mode, major, minor uint32) {
	b.op(OpDevice, 0, "bind "+path, new(enc).str(path).u16(slot).u32(mode).u32(major).u32(minor))
}

func (b *builder) self(file, fallback, value, name string) {
	b.op(OpSelf, 0, name, new(enc).str(file).str(fallback).str(value))
}

func (b *builder) stdio() {
	e := new(enc)
	for _, n := range []string{"stdin", "stdout", "stderr"} {
		e.u16(b.slot(Slot{Kind: SlotStdio, Source: n}))
	}
	b.op(OpStdio, 0, "connect standard streams", e)
}

func (b *builder) seccomp(o Options) {
	if len(o.Seccomp) == 0 {
		return
	}
	if len(o.Seccomp)%8 != 0 || len(o.Seccomp)/8 > unix.BPF_MAXINSNS {
		b.fail("seccomp program of %d bytes is malformed or too long", len(o.Seccomp))
	}
	var flags uint16
	if o.SeccompNotify {
		flags |= FlagNotify
	}
	b.op(OpSeccomp, flags, "load seccomp filter", new(enc).u32(o.SeccompFlags).bytes(o.Seccomp))
}

// SplitExec cuts the plan where a process is held before it runs: everything
// that can fail for reasons of the configuration comes before, and what needs
// the program's own restrictions (filter, ids, exec) after. The second plan
// continues the first and needs no slots. A plan without exec has no second part.
func (p *Plan) SplitExec() (before, last *Plan) { return p.cut(p.exec) }

// SplitPivot cuts the plan where createRuntime and createContainer hooks run:
// mounts are made, the host's are still there.
func (p *Plan) SplitPivot() (before, after *Plan) { return p.cut(p.pivot) }

func (p *Plan) cut(at int) (*Plan, *Plan) {
	before, after := *p, *p
	if at <= 0 || at >= len(p.Ops) {
		return &before, nil
	}
	before.Ops, after.Ops = p.Ops[:at:at], p.Ops[at:]
	after.Slots, after.Continues = nil, true
	before.exec, before.pivot = min(p.exec, at), min(p.pivot, at)
	after.exec, after.pivot = max(p.exec-at, 0), max(p.pivot-at, 0)
	return &before, &after
}
