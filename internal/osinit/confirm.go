package osinit

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/osinit/efiboot"
	"github.com/cloudos-io/cloudos/internal/osinit/upgrade"
	"github.com/cloudos-io/cloudos/internal/slots"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// confirm watches a system that is tried: one that comes up well is kept, one that
// does not within the limit is given up, and the machine starts the earlier one. Where the
// earlier one runs again, it says what became of the other.
func (c *changes) confirm(ctx context.Context) {
	running, err := c.running()
	if err != nil {
		return
	}
	var state slots.State
	err = c.boot.With(false, func(dir string) (err error) { state, err = upgrade.State(dir); return err })
	if err != nil {
		c.m.problem(fmt.Errorf("cannot tell whether this system is tried: %w", err))
		return
	}
	if c.owners() {
		if state, err = c.byFirmware(state, running); err != nil {
			c.m.problem(err)
		}
	}
	byItself := c.owners() && state.Try == "" && state.Good != running
	if byItself {
		c.m.problem(fmt.Errorf("the firmware started slot %s by itself, and slot %s is the one that came up well last", running, state.Good))
	} else if state.Try != running {
		switch change := last(); {
		case state.Fallen():
			c.fellBack(state.Try, running)
		case state.Good == running && change != nil && change.Slot == running && change.Outcome == system.Pending:
			c.note(change, system.Succeeded, "") // the power went between the two
		case state.Try == "" && change != nil && change.Outcome == system.Pending:
			c.note(change, system.RolledBack, "the machine stopped before it was to start next")
		}
		if c.owners() {
			if err := c.settleUnified(running, state); err != nil {
				c.m.problem(err)
			}
		}
		// The starts that follow are like this one.
		if err := c.m.tighten(ctx); err != nil {
			c.m.problem(err)
		}
		return
	}
	change := last()
	if change != nil && (change.Slot != running || change.Outcome != system.Pending) {
		change = nil
	}
	why := c.awaitHealth(ctx, change != nil && change.Network)
	if ctx.Err() != nil {
		return
	}
	end, err := c.begin("confirm the system")
	if err != nil {
		c.m.problem(err)
		return
	}
	defer end()
	if why != "" && byItself {
		return // there is nothing that is known to be better
	}
	if why == "" && c.owners() {
		// Before it is the good one: cut off between the two, it is started and watched once more.
		if err := c.orderUnified(running, slots.State{Good: running}); err != nil {
			why = err.Error()
		}
	}
	if why != "" && c.owners() {
		if err := c.withFirmware(func(v efiboot.Vars) error { _, err := c.goodAlone(v, state.Good); return err }); err != nil {
			c.m.problem(err)
		}
	}
	if why != "" {
		c.m.log.Printf("the system in slot %s did not come up well: %s. Slot %s starts again.", running, why, state.Good)
		c.note(change, system.RolledBack, why) // before the one that runs next reads it
		if err := c.next(func(s slots.State) slots.State { return s.GiveUp() }); err != nil {
			c.m.problem(err) // each start counts: it is given up all the same
		}
		c.m.Shutdown(true, 10*time.Second)
		return
	}
	if err := c.next(func(s slots.State) slots.State { return s.Confirm(running) }); err != nil {
		c.m.problem(fmt.Errorf("cannot confirm the system in slot %s: %w", running, err))
		return
	}
	c.note(change, system.Succeeded, "") // after it is true; the next start makes up for it
	if c.owners() {
		// What it will be measured as at its next start is what it was at this one.
		if err := errors.Join(c.settleUnified(running, slots.State{Good: running}), c.m.tighten(ctx)); err != nil {
			c.m.problem(err)
		}
	}
	c.m.log.Printf("the system in slot %s came up well and is kept", running)
}

// note keeps what became of a change.
func (c *changes) note(change *system.Change, outcome, reason string) {
	if change == nil {
		return
	}
	change.Outcome, change.Reason, change.Ended = outcome, reason, time.Now().UTC()
	if err := keep(change); err != nil {
		c.m.problem(err)
	}
}

func (c *changes) fellBack(tried, running string) {
	reason := "it was started several times and never came up"
	if c.owners() {
		reason = "it was started once and never came up, or the firmware did not start it"
	}
	if change := last(); change != nil && change.Slot == tried {
		if change.Outcome == system.Pending {
			c.note(change, system.RolledBack, reason)
		}
		if change.Reason != "" {
			reason = change.Reason
		}
	}
	c.m.problem(fmt.Errorf("the system in slot %s did not come up: slot %s runs instead (%s)", tried, running, reason))
}

// awaitHealth waits until the system is well, and returns why it is not.
func (c *changes) awaitHealth(ctx context.Context, network bool) string {
	end := time.Now().Add(healthLimit)
	var since time.Time
	why := ""
	for ctx.Err() == nil {
		switch why = c.unwell(ctx, network); {
		case why != "":
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) >= healthyFor:
			return ""
		}
		s := c.m.Status()
		switch {
		case s.Engine.Restarts >= maxRestarts:
			return fmt.Sprintf("the engine does not stay up (started again %d times: %s)", s.Engine.Restarts, s.Engine.LastExit)
		case s.State == vmwire.StateSafe && why != "", why != "" && time.Now().After(end):
			return why
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return ctx.Err().Error()
}

// unwell says what keeps the system from being well at this moment.
func (c *changes) unwell(ctx context.Context, network bool) string {
	s := c.m.Status()
	switch {
	case s.State == vmwire.StateSafe:
		return "safe mode: " + strings.Join(s.Problems, "; ")
	case s.State != vmwire.StateReady || !s.Engine.Ready:
		return fmt.Sprintf("the engine does not run (started again %d times: %s)", s.Engine.Restarts, s.Engine.LastExit)
	case s.Data.Kind != "disk":
		return "what is kept was not found"
	case network && !c.m.hasAddress():
		return "no link has an address, and the earlier system had one"
	}
	if err := c.ping(ctx); err != nil {
		return fmt.Sprintf("the engine does not answer: %v", err)
	}
	return ""
}

func (c *changes) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine/_ping", nil)
	if err != nil {
		return err
	}
	res, err := c.m.engineClient().Do(req)
	if err != nil {
		return err
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}
