package dockerapi

import (
	"context"
	"net/http"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// DebugShell is the machine's say over the shell for emergencies.
type DebugShell interface {
	Status(ctx context.Context) (debugshell.Status, error)
	Enable(ctx context.Context, req debugshell.Request) (debugshell.Status, error)
	Disable(ctx context.Context, by string) (debugshell.Status, error)
	// End ends a session, or notes that one has ended.
	End(ctx context.Context, id string) error
}

// debugShellRun is /servin/run for shells on the machine, by a path of its own: the record of the
// call's beginning, which is synced before the shell says anything, then tells what it is.
const debugShellRun = "/servin/debug-shell/run"

// debugShellAPI serves /servin/debug-shell. What switches it on and off, and the end of each session,
// are calls like any other, so that the audit log has them.
// Switching is for who may be root of the host, as the shell is.
type debugShellAPI struct {
	b   DebugShell
	sys System
}

func (a debugShellAPI) backend() (DebugShell, error) {
	if a.b == nil {
		return nil, fault.New(fault.Unsupported, "this computer does not run CloudOS: it has no debug shell")
	}
	return a.b, nil
}

func (a debugShellAPI) show(w *response, r *request) error {
	b, err := a.backend()
	if err != nil {
		return err
	}
	s, err := b.Status(r.Context())
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, s)
}

// may is backend for what only some may do.
func (a debugShellAPI) may(ctx context.Context) (DebugShell, error) {
	if err := a.sys.MayActAsHost(ctx); err != nil {
		return nil, err
	}
	return a.backend()
}

func (a debugShellAPI) enable(w *response, r *request) error {
	b, err := a.may(r.Context())
	if err != nil {
		return err
	}
	var in debugshell.Request
	if err := r.decode(w, &in); err != nil {
		return err
	}
	if r.entry != nil {
		r.entry.Note("for", in.For)
		r.entry.Note("reason", in.Reason)
	}
	in.By = caller.From(r.Context()).String()
	s, err := b.Enable(r.Context(), in)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, s)
}

func (a debugShellAPI) disable(w *response, r *request) error {
	b, err := a.may(r.Context())
	if err != nil {
		return err
	}
	s, err := b.Disable(r.Context(), caller.From(r.Context()).String())
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, s)
}

func (a debugShellAPI) end(w *response, r *request) error {
	b, err := a.backend() // the first process tells of ends, whatever policies say of its user
	if err != nil {
		return err
	}
	if err := b.End(r.Context(), r.name); err != nil {
		return err
	}
	return w.noContent()
}
