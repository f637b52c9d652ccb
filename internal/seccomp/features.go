package seccomp

import specs "github.com/opencontainers/runtime-spec/specs-go"

// FeatureSet lists the words of a profile that are understood.
type FeatureSet struct{ Actions, Operators, Archs, Flags []string }

// Features lists them.
func Features() FeatureSet {
	var f FeatureSet
	for _, a := range []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActKill, specs.ActKillProcess, specs.ActKillThread,
		specs.ActLog, specs.ActNotify, specs.ActTrace, specs.ActTrap} {
		f.Actions = append(f.Actions, string(a))
	}
	for _, o := range []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpLessEqual,
		specs.OpLessThan, specs.OpMaskedEqual, specs.OpNotEqual} {
		f.Operators = append(f.Operators, string(o))
	}
	for _, a := range knownArchs() {
		f.Archs = append(f.Archs, string(a))
	}
	for _, l := range []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow, specs.LinuxSeccompFlagWaitKillableRecv} {
		f.Flags = append(f.Flags, string(l))
	}
	f.Flags = append(f.Flags, "SECCOMP_FILTER_FLAG_TSYNC")
	return f
}
