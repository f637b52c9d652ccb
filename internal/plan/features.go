package plan

import (
	"maps"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// MountOptions lists the options of mounts that are understood apart from those of
// single file systems.
func MountOptions() []string {
	var out []string
	for _, o := range []string{"ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "nodiratime", "diratime", "nosymfollow", "symfollow",
		"relatime", "noatime", "strictatime", "atime", "norelatime", "nostrictatime"} {
		out = append(out, o, "r"+o)
	}
	for _, p := range []string{"private", "shared", "slave", "unbindable"} {
		out = append(out, p, "r"+p)
	}
	out = append(out, "bind", "rbind", "tmpcopyup", "idmap", "ridmap")
	out = append(out, superFlags...)
	out = append(out, ignoredOptions...)
	slices.Sort(out)
	return slices.Compact(out)
}

// Capabilities lists the capabilities that are known.
func Capabilities() []string {
	var out []string
	for _, c := range capabilityNames {
		out = append(out, "CAP_"+c)
	}
	return out
}

// MemoryPolicyModes lists the modes of a memory policy.
func MemoryPolicyModes() []string { return sortedNames(maps.Keys(policyModes)) }

// MemoryPolicyFlags lists the flags of a memory policy.
func MemoryPolicyFlags() []string { return sortedNames(maps.Keys(policyFlags)) }

func sortedNames[T ~string](names func(func(T) bool)) []string {
	var out []string
	for n := range names {
		out = append(out, string(n))
	}
	slices.Sort(out)
	return out
}

var policyModes = map[specs.MemoryPolicyModeType]uint32{
	specs.MpolDefault: 0, specs.MpolPreferred: 1, specs.MpolBind: 2, specs.MpolInterleave: 3, specs.MpolLocal: 4,
	specs.MpolPreferredMany: 5, specs.MpolWeightedInterleave: 6,
}

var policyFlags = map[specs.MemoryPolicyFlagType]uint32{
	specs.MpolFNumaBalancing: 1 << 13, specs.MpolFRelativeNodes: 1 << 14, specs.MpolFStaticNodes: 1 << 15,
}
