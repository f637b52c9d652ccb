package oci

import (
	"path"
	"slices"

	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// ExecInput is everything the process of an exec depends on.
type ExecInput struct {
	// Init is the container's own process, as generated at its start.
	Init    *specs.Process
	Config  *container.Config
	Request container.ExecCreateRequest
	// User and Home are of Request.User, as LookupUser found them; where the
	// request names none, they are the container's own.
	User specs.User
	Home string

	LinkEnv []string
	Host    Host
}

// GenerateExec makes the process of an exec: the container's confinement, the
// request's command, user, directory and variables.
func GenerateExec(in ExecInput) (*specs.Process, error) {
	req := in.Request
	if len(req.Cmd) == 0 || req.Cmd[0] == "" {
		return nil, fault.New(fault.Invalid, "No exec command specified")
	}
	if err := validEnv(req.Env); err != nil {
		return nil, err
	}
	p := *in.Init
	p.Args = slices.Clone(req.Cmd)
	p.Terminal = req.Tty
	p.ConsoleSize = nil
	if req.Tty && req.ConsoleSize != nil && *req.ConsoleSize != [2]uint{} {
		p.ConsoleSize = &specs.Box{Height: req.ConsoleSize[0], Width: req.ConsoleSize[1]}
	}
	p.User = cloneUser(in.User)
	p.User.Umask = in.Init.User.Umask
	p.Env = Environment(in.Config, req.Tty, in.LinkEnv, req.Env, in.Home)
	if req.WorkingDir != "" {
		if !path.IsAbs(req.WorkingDir) {
			return nil, fault.New(fault.Invalid, "the working directory '%s' is invalid, it needs to be an absolute path", req.WorkingDir)
		}
		p.Cwd = path.Clean(req.WorkingDir)
	}
	p.Rlimits = slices.Clone(in.Init.Rlimits)
	if req.Privileged {
		p.Capabilities = capabilitySets(slices.Clone(in.Host.Capabilities), p.User.UID)
	} else if c := in.Init.Capabilities; c != nil {
		p.Capabilities = capabilitySets(slices.Clone(c.Bounding), p.User.UID)
		p.Capabilities.Inheritable, p.Capabilities.Ambient = slices.Clone(c.Inheritable), slices.Clone(c.Ambient)
		if p.User.UID != 0 { // those he keeps
			p.Capabilities.Permitted, p.Capabilities.Effective = slices.Clone(c.Ambient), slices.Clone(c.Ambient)
		}
	}
	return &p, nil
}
