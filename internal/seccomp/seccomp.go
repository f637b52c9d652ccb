// Package seccomp compiles a seccomp profile of the OCI runtime spec into a
// classic BPF program. The program gives the same verdict for every call as the
// one runc builds with libseccomp, its answer ENOSYS for calls newer than the
// profile included, but decides by a balanced tree over ranges of call numbers:
// the kernel walks a few instructions where a list has hundreds, both for each
// call and, worse, when it examines a new filter for every number there is.
//
// Package plan carries the program to the start-up stage; package
// runtime/native and the OCI command line compile it. It imports package fault.
package seccomp

import (
	"cmp"
	"runtime"
	"slices"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Program is a compiled filter.
type Program struct {
	// Filter holds struct sock_filter after struct sock_filter, as the kernel
	// takes them.
	Filter []byte
	// Flags are SECCOMP_FILTER_FLAG_*, without NEW_LISTENER.
	Flags uint32
	// Notify: the filter asks a listener about some calls.
	Notify bool
}

const (
	retKillProcess = 0x80000000
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retNotify      = 0x7fc00000
	retTrace       = 0x7ff00000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000

	x32Bit = 0x40000000
)

// Compile compiles the profile for this machine's architecture. A nil profile,
// or one that says nothing, gives nil.
func Compile(cfg *specs.LinuxSeccomp) (*Program, error) {
	return compile(cfg, runtime.GOARCH, syscallTable())
}

func compile(cfg *specs.LinuxSeccomp, goarch string, table *table) (*Program, error) {
	if cfg == nil || cfg.DefaultAction == "" && len(cfg.Syscalls) == 0 {
		return nil, nil
	}
	family, ok := families()[goarch]
	if !ok {
		return nil, fault.New(fault.Unsupported, "cannot compile seccomp profile: no table of system calls for %s", goarch)
	}
	p := &Program{}
	var err error
	if p.Flags, err = filterFlags(cfg); err != nil {
		return nil, err
	}
	def, err := verdict(cfg.DefaultAction, cfg.DefaultErrnoRet)
	if err != nil {
		return nil, err
	}
	p.Notify = def == retNotify
	archs, err := selected(cfg, family)
	if err != nil {
		return nil, err
	}
	c := &compiler{table: table, def: def}
	for i := range cfg.Syscalls {
		call := &cfg.Syscalls[i]
		act, err := verdict(call.Action, call.ErrnoRet)
		if err != nil {
			return nil, err
		}
		if act == def {
			continue
		}
		p.Notify = p.Notify || act == retNotify
		conds, err := conditions(call)
		if err != nil {
			return nil, err
		}
		for _, name := range call.Names {
			if name == "" {
				return nil, fault.New(fault.Invalid, "cannot compile seccomp profile: a system call has no name")
			}
			c.rules = append(c.rules, rule{name, act, conds})
		}
	}
	for i := range cfg.Syscalls {
		c.mentioned = append(c.mentioned, cfg.Syscalls[i].Names...)
	}
	if p.Filter, err = c.program(archs); err != nil {
		return nil, err
	}
	return p, nil
}

// selected are the architectures of the profile that can occur on this machine,
// the native one first and always among them.
func selected(cfg *specs.LinuxSeccomp, family []arch) ([]arch, error) {
	out := family[:1:1]
	for _, a := range cfg.Architectures {
		if !slices.Contains(knownArchs(), a) {
			return nil, fault.New(fault.Invalid, "cannot compile seccomp profile: architecture %.40q is unknown", a)
		}
		for _, f := range family[1:] {
			if f.oci == a && !slices.ContainsFunc(out, func(o arch) bool { return o.oci == a }) {
				out = append(out, f)
			}
		}
	}
	return out, nil
}

func knownArchs() []specs.Arch {
	return []specs.Arch{
		specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64, specs.ArchMIPS, specs.ArchMIPS64,
		specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32, specs.ArchPPC, specs.ArchPPC64,
		specs.ArchPPC64LE, specs.ArchS390, specs.ArchS390X, specs.ArchPARISC, specs.ArchPARISC64, specs.ArchRISCV64,
		specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
	}
}

// verdict turns an action into what the filter returns.
func verdict(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	data := uint32(unix.EPERM)
	if errno != nil {
		data = uint32(*errno) & 0xffff
	}
	switch a {
	case specs.ActKill, specs.ActKillThread:
		return retKillThread, nil
	case specs.ActKillProcess:
		return retKillProcess, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActErrno:
		return retErrno | data, nil
	case specs.ActTrace:
		return retTrace | data, nil
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActLog:
		return retLog, nil
	case specs.ActNotify:
		return retNotify, nil
	}
	return 0, fault.New(fault.Invalid, "cannot compile seccomp profile: action %.40q is unknown", a)
}

// filterFlags gives the flags for the kernel. Where the profile lists none at
// all, speculative stores are left alone, as runc has it.
func filterFlags(cfg *specs.LinuxSeccomp) (uint32, error) {
	if cfg.Flags == nil {
		return unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil
	}
	var out uint32
	for _, f := range cfg.Flags {
		switch f {
		case specs.LinuxSeccompFlagLog:
			out |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			out |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case specs.LinuxSeccompFlagWaitKillableRecv:
			out |= unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
		case "SECCOMP_FILTER_FLAG_TSYNC": // there is but one thread
		default:
			return 0, fault.New(fault.Invalid, "cannot compile seccomp profile: flag %.60q is unknown", f)
		}
	}
	return out, nil
}

// condition compares one argument.
type condition struct {
	index      uint
	op         specs.LinuxSeccompOperator
	value, two uint64
}

// conditions gives alternatives, each a list of conditions that must all hold.
// Several conditions on one argument are alternatives: runc has kept that from
// the time when libseccomp knew nothing else.
func conditions(call *specs.LinuxSyscall) ([][]condition, error) {
	var all []condition
	var count [6]int
	for _, a := range call.Args {
		if a.Index > 5 {
			return nil, fault.New(fault.Invalid, "cannot compile seccomp profile: a system call has no argument %d", a.Index)
		}
		switch a.Op {
		case specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual:
		default:
			return nil, fault.New(fault.Invalid, "cannot compile seccomp profile: operator %.40q is unknown", a.Op)
		}
		count[a.Index]++
		all = append(all, condition{a.Index, a.Op, a.Value, a.ValueTwo})
	}
	if len(all) == 0 {
		return nil, nil
	}
	slices.SortStableFunc(all, func(x, y condition) int { return cmp.Compare(x.index, y.index) })
	if slices.Max(count[:]) <= 1 {
		return [][]condition{all}, nil
	}
	var out [][]condition
	for _, c := range all {
		out = append(out, []condition{c})
	}
	return out, nil
}
