package engine

import (
	"context"
	"os"

	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// HostShell is what the machine says to shells with its own namespaces. There is one on
// CloudOS alone (docs/cloudos-debug.md).
type HostShell interface {
	// Status tells whether one may be opened, or that this is no such machine.
	Status(ctx context.Context) (debugshell.Status, error)
	// Begin asks for a container to become one; who asks is recorded there.
	Begin(ctx context.Context, s debugshell.Session) error
}

// debuggingHost completes the request of a container that looks into the machine itself.
// It is asked for by name, so that it is told from a container with the same powers: the
// machine has to have been opened for it, and keeps record.
func (e *Engine) debuggingHost(ctx context.Context, req *CreateRequest, hc *mcontainer.HostConfig) error {
	if e.cfg.HostShell == nil {
		return fault.New(fault.Unsupported, "cannot open a shell on this computer: it does not run CloudOS")
	}
	// A refusal is better said before anything is made; the one that counts is at the start.
	s, err := e.cfg.HostShell.Status(ctx)
	if err != nil {
		return err
	}
	if !s.On {
		return errShellOff()
	}
	if err := e.tools(ctx, req.Config, hc, debugshell.Target); err != nil {
		return err
	}
	hc.Privileged = true
	hc.PidMode, hc.NetworkMode, hc.IpcMode, hc.UTSMode, hc.UsernsMode, hc.CgroupnsMode = "host", "host", "host", "host", "host", "host"
	return nil
}

func errShellOff() error {
	return fault.New(fault.Forbidden, "the debug shell of this machine is off: switch it on with `cloudos debug enable --reason TEXT`, or in the machine's configuration (debugShell)")
}

// debugHost lets the container begin if the machine does, and makes the machine's files visible.
func (e *Engine) debugHost(ctx context.Context, u *unit, r *container.Record, root *os.File) error {
	if e.cfg.HostShell == nil {
		return fault.New(fault.Unsupported, "cannot open a shell on this computer: it does not run CloudOS")
	}
	if err := e.cfg.HostShell.Begin(ctx, debugshell.Session{ID: u.id, By: caller.From(ctx).String()}); err != nil {
		return err
	}
	return linkRoot(1, r, root)
}
