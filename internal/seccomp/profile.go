package seccomp

import (
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Default is Docker's default profile for a process with the bounding
// capabilities caps ("CAP_CHOWN") on this kernel and architecture.
func Default(caps []string) (*specs.LinuxSeccomp, error) {
	cfg, err := seccomp.GetDefaultProfile(bounded(caps))
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot load the default seccomp profile: %w", err)
	}
	return cfg, nil
}

// Load reads a profile in Docker's JSON, whose rules may depend on
// capabilities, architecture and kernel.
func Load(json string, caps []string) (*specs.LinuxSeccomp, error) {
	cfg, err := seccomp.LoadProfile(json, bounded(caps))
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot load seccomp profile: %w", err)
	}
	return cfg, nil
}

func bounded(caps []string) *specs.Spec {
	return &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}}
}
