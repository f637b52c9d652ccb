package host

import (
	"context"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// situation is what idling is decided from.
type situation struct {
	state      string
	containers int
	known      bool // containers was counted
	canSleep   bool
	idle       time.Duration // since somebody used the machine
	slept      time.Duration // since it fell asleep
	off        time.Duration // since it was off
	limits     limits
}

type limits struct {
	idle, off, leave time.Duration // 0 is never
}

// action is what to do about an unused machine.
type action int

const (
	nothing action = iota
	fallAsleep
	powerOff
	leaveHost
)

// decide says what to do now. A machine sleeps when nothing ran in it and nobody
// asked anything for the idle time, is stopped after the off time more, and servin-vmd
// leaves a while after. A machine that cannot sleep is stopped instead.
func decide(s situation) action {
	switch s.state {
	case api.VMRunning:
		if s.limits.idle == 0 || !s.known || s.containers > 0 || s.idle < s.limits.idle {
			return nothing
		}
		if s.canSleep {
			return fallAsleep
		}
		return powerOff
	case api.VMSleeping:
		if s.limits.off > 0 && s.slept >= s.limits.off {
			return powerOff
		}
	case api.VMOff:
		if s.limits.leave > 0 && min(s.off, s.idle) >= s.limits.leave {
			return leaveHost
		}
	}
	return nothing
}

// restartAfterFall says whether a machine that ended by itself is started again.
func restartAfterFall(containers, recent int) bool { return containers > 0 && recent < 3 }

// idle looks after an unused machine until ctx ends.
func (h *Host) idle(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s, l := h.situation()
		switch decide(s) {
		case nothing:
			continue
		case leaveHost:
			h.log.Info("the machine is off and nobody asks: leaving")
			h.leave()
			return
		}
		if h.takeTurn(ctx) != nil {
			return
		}
		// It may have been used while the turn was waited for.
		if s, cur := h.situation(); cur == l && l != nil {
			h.act(ctx, l, decide(s))
		}
		h.giveTurn()
	}
}

func (h *Host) act(ctx context.Context, l *live, a action) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	ctx, done := h.waiting(ctx)
	defer done()
	var err error
	switch a {
	case fallAsleep:
		var busy vmwire.Busy
		if err = l.call(ctx, "GET", "/v1/busy", nil, &busy); err == nil {
			if busy.Containers > 0 {
				l.mu.Lock()
				l.containers = busy.Containers
				l.mu.Unlock()
				return
			}
			err = h.sleep(ctx, l)
		}
	case powerOff:
		err = h.stop(ctx, false)
	}
	if err != nil {
		h.log.Warn("cannot put the unused machine away", "error", err)
		h.used() // not again before the idle time
	}
}

func (h *Host) situation() (situation, *live) {
	h.mu.Lock()
	c, state, l, since := h.config, h.state, h.live, h.since
	h.mu.Unlock()
	s := situation{state: state, idle: time.Since(time.Unix(0, h.lastUse.Load())), slept: time.Since(since), off: time.Since(since),
		limits: limits{idle: time.Duration(c.IdleSeconds) * time.Second, off: time.Duration(c.OffSeconds) * time.Second, leave: h.cfg.Leave}}
	if l != nil {
		l.mu.Lock()
		s.containers, s.known = l.containers, l.busy
		l.mu.Unlock()
		s.canSleep = pauses(l.machine)
	}
	return s, l
}

// leave ends Run.
func (h *Host) leave() { h.once.Do(func() { close(h.quit) }) }
