package oci

import (
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// DefaultCapabilities are what an ordinary container keeps: Docker's 14.
func DefaultCapabilities() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD",
		"CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP",
		"CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
}

// capabilityNames in the kernel's order; the index is the capability's number.
var capabilityNames = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE",
	"CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
	"CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF",
	"CAP_CHECKPOINT_RESTORE",
}

// KnownCapabilities are all that Linux has had so far, by number.
func KnownCapabilities() []string { return slices.Clone(capabilityNames) }

const allCapabilities = "ALL"

// normalCapabilities upper-cases, adds the prefix and refuses unknown names and
// those that the host cannot give.
func normalCapabilities(list []string, h Host) ([]string, error) {
	out := make([]string, 0, len(list))
	for _, c := range list {
		n := strings.ToUpper(c)
		if n != allCapabilities && !strings.HasPrefix(n, "CAP_") {
			n = "CAP_" + n
		}
		switch {
		case n == allCapabilities:
		case !slices.Contains(capabilityNames, n):
			return nil, fault.New(fault.Invalid, "unknown capability: %q", n)
		case !slices.Contains(h.Capabilities, n):
			return nil, fault.New(fault.Invalid, "capability not supported by your kernel or not available in the current environment: %q", n)
		}
		out = append(out, n)
	}
	return out, nil
}

// Capabilities are what a container's process gets: all when privileged, else
// the default set changed by CapAdd and CapDrop, in either of which ALL may stand.
func Capabilities(hc *container.HostConfig, h Host) ([]string, error) {
	if hc.Privileged {
		return slices.Clone(h.Capabilities), nil
	}
	add, err := normalCapabilities(hc.CapAdd, h)
	if err != nil {
		return nil, fault.New(fault.Invalid, "invalid CapAdd: %w", err)
	}
	drop, err := normalCapabilities(hc.CapDrop, h)
	if err != nil {
		return nil, fault.New(fault.Invalid, "invalid CapDrop: %w", err)
	}
	var caps []string
	switch {
	case slices.Contains(add, allCapabilities):
		for _, c := range h.Capabilities {
			if !slices.Contains(drop, c) {
				caps = append(caps, c)
			}
		}
	case slices.Contains(drop, allCapabilities):
		caps = add
	default:
		for _, c := range DefaultCapabilities() {
			// An engine without a capability (rootless in a container) cannot give it.
			if !slices.Contains(drop, c) && slices.Contains(h.Capabilities, c) {
				caps = append(caps, c)
			}
		}
		for _, c := range add {
			if !slices.Contains(caps, c) {
				caps = append(caps, c)
			}
		}
	}
	return caps, nil
}

// capabilitySets are those of a process of the user: executing a program takes them from all
// but root, and whether he may execute it is not to be asked while he still has them.
func capabilitySets(caps []string, uid uint32) *specs.LinuxCapabilities {
	if uid != 0 {
		return &specs.LinuxCapabilities{Bounding: caps}
	}
	return &specs.LinuxCapabilities{
		Bounding: caps, Effective: slices.Clone(caps), Permitted: slices.Clone(caps),
	}
}
