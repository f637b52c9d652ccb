package host

import (
	"context"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// A turn may take minutes: a start waits for a guest that boots slowly, a stop for containers. Who pulls the plug
// ('vm stop --force', 'vm reset') is not to wait for that. He says so first (force), which ends what the turn under way
// waits for, and those behind it, and then takes his turn like everybody.

// errForced is what a turn gives as its reason that was ended so.
var errForced = fault.New(fault.Conflict, "it was stopped meanwhile ('servin vm stop --force' or 'servin vm reset')")

// force ends waiting until done is called: no turn waits for the machine in between, and none starts it. The
// caller has no turn yet.
func (h *Host) force() (done func()) {
	h.mu.Lock()
	h.forced++
	end := h.interrupt
	h.mu.Unlock()
	if end != nil {
		end(errForced)
	}
	return func() {
		h.mu.Lock()
		h.forced--
		h.mu.Unlock()
	}
}

// waiting gives a turn the context that it waits for the machine with. The caller has the turn; those within
// one another are done in the opposite order.
func (h *Host) waiting(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	h.mu.Lock()
	outer, forced := h.interrupt, h.forced > 0
	h.interrupt = func(why error) {
		cancel(why)
		if outer != nil {
			outer(why)
		}
	}
	h.mu.Unlock()
	if forced {
		cancel(errForced)
	}
	return ctx, func() {
		h.mu.Lock()
		h.interrupt = outer
		h.mu.Unlock()
		cancel(nil)
	}
}
