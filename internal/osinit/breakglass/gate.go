// Package breakglass decides about the shell for emergencies: it is off, until the
// configuration or a caller of the engine's API switches it on for a while. A *session* is a container
// of the engine's with the machine's own namespaces; it is ended when the time is over. What
// happens is written to the machine's log and console; the engine's audit log has it, too.
// The first process imports it.
package breakglass

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	maxSessions = 16
	maxText     = 200
	// glance is how often the clock is looked at: it may be set, and a paused machine's timers stand still.
	glance = 5 * time.Second
)

// Config of a gate.
type Config struct {
	// Now is the clock (time.Now).
	Now func() time.Time
	// Log takes what happens.
	Log func(format string, args ...any)
	// Wait returns when a session's container is gone, or ctx is done.
	Wait func(ctx context.Context, id string)
	// Kill ends a session's container.
	Kill func(ctx context.Context, id string) error
	// Record has the engine note in its audit log that a session has ended; it comes back
	// as a call of End.
	Record func(ctx context.Context, id string) error
	// Changed is called after each change.
	Changed func()
}

// Gate is the shell's. Its methods are safe for concurrent use.
type Gate struct {
	c Config

	mu       sync.Mutex
	watching func(func(ctx context.Context)) // starts a watcher; nil until Run, and after it
	status   debugshell.Status
	sessions []*session
	watchers sync.WaitGroup
}

type session struct {
	debugshell.Session
	gone bool // its container
}

// New returns a gate that is shut.
func New(c Config) *Gate {
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Gate{c: c}
}

// Run ends sessions when their time is over, until ctx is done.
func (g *Gate) Run(ctx context.Context) {
	g.mu.Lock()
	g.watching = func(f func(context.Context)) { g.watchers.Go(func() { f(ctx) }) }
	g.mu.Unlock()
	t := time.NewTicker(glance)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			g.mu.Lock()
			g.watching = nil
			g.mu.Unlock()
			g.watchers.Wait()
			return
		case <-t.C:
			g.expire(ctx)
		}
	}
}

// over reports whether the time is; mu is held. Both clocks are asked: the one
// that only runs on, and the one that says the time.
func (g *Gate) over() bool {
	now, until := g.c.Now(), g.status.Until
	return !until.IsZero() && (!now.Before(until) || !now.Round(0).Before(until.Round(0)))
}

func (g *Gate) expire(ctx context.Context) {
	g.mu.Lock()
	over := g.status.On && g.over()
	g.mu.Unlock()
	if over {
		g.shut(ctx, "its time is over")
	}
}

// text is what somebody wrote, fit for a log.
func text(s string) (string, bool) {
	s = strings.TrimSpace(s)
	bad := !utf8.ValidString(s) || len(s) > maxText || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 })
	return s, !bad
}

// Enable switches the shell on, or on anew, for as long as the request says.
func (g *Gate) Enable(r debugshell.Request) (debugshell.Status, error) {
	d, err := time.ParseDuration(r.For)
	if err != nil || d < time.Second || d > debugshell.MaxFor {
		return debugshell.Status{}, fault.New(fault.Invalid, "cannot switch the debug shell on for %.40q: write a duration from 1s to %v, such as 1h", r.For, debugshell.MaxFor)
	}
	reason, ok := text(r.Reason)
	if reason == "" || !ok {
		return debugshell.Status{}, fault.New(fault.Invalid, "cannot switch the debug shell on: give a reason of one line and %d bytes at most", maxText)
	}
	by, ok := text(r.By)
	if !ok || by == "" {
		by = "somebody"
	}
	g.Open(g.c.Now().Add(d), by, reason)
	return g.Status(), nil
}

// Open switches the shell on until a time; the zero time is until the machine starts again.
func (g *Gate) Open(until time.Time, by, reason string) {
	g.mu.Lock()
	g.status = debugshell.Status{On: true, Since: g.c.Now(), Until: until, By: by, Reason: reason}
	over := g.over()
	if over {
		g.status = debugshell.Status{}
	}
	g.mu.Unlock()
	if over {
		g.c.Log("debug shell: it stays off: the time that %s gave is over", by)
		return
	}
	when := "until the machine starts again"
	if !until.IsZero() {
		when = "until " + until.UTC().Format(time.RFC3339)
	}
	g.c.Log("debug shell: switched ON %s by %s: %s", when, by, reason)
	g.c.Changed()
}

// Disable switches the shell off and ends the sessions.
func (g *Gate) Disable(ctx context.Context, by string) debugshell.Status {
	g.shut(ctx, "by "+by)
	return g.Status()
}

func (g *Gate) shut(ctx context.Context, why string) {
	g.mu.Lock()
	was := g.status.On
	g.status = debugshell.Status{}
	open := slices.Clone(g.sessions)
	g.mu.Unlock()
	if was {
		g.c.Log("debug shell: switched off, %s", why)
		g.c.Changed()
	}
	for _, s := range open {
		g.kill(ctx, s.ID)
	}
}

func (g *Gate) kill(ctx context.Context, id string) {
	if err := g.c.Kill(ctx, id); err != nil {
		g.c.Log("debug shell: cannot end session %.12s: %v", id, err)
	}
}

// Status tells how things are.
func (g *Gate) Status() debugshell.Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.status
	if g.over() {
		s = debugshell.Status{}
	}
	for _, x := range g.sessions {
		s.Sessions = append(s.Sessions, x.Session)
	}
	return s
}

// Begin lets a session begin, or says why not.
func (g *Gate) Begin(s debugshell.Session) error {
	by, ok := text(s.By)
	if !ok || by == "" {
		by = "somebody"
	}
	if s.ID == "" || len(s.ID) > 64 || strings.Trim(s.ID, "0123456789abcdef") != "" {
		return fault.New(fault.Invalid, "%.80q is no container's id", s.ID)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case !g.status.On || g.over() || g.watching == nil:
		g.c.Log("debug shell: refused to %s: it is off", by)
		return fault.New(fault.Forbidden, "the debug shell of this machine is off: switch it on with `cloudos debug enable --reason TEXT`, or in the machine's configuration (debugShell)")
	case len(g.sessions) >= maxSessions:
		return fault.New(fault.Conflict, "there are %d debug sessions on this machine: end one", maxSessions)
	case slices.ContainsFunc(g.sessions, func(x *session) bool { return x.ID == s.ID }):
		return nil
	}
	x := &session{Session: debugshell.Session{ID: s.ID, By: by, Since: g.c.Now()}}
	g.sessions = append(g.sessions, x)
	g.c.Log("debug shell: session %.12s OPENED by %s", x.ID, by)
	g.watching(func(ctx context.Context) { g.watch(ctx, x) })
	return nil
}

// watch has the end of a session recorded.
func (g *Gate) watch(ctx context.Context, x *session) {
	g.c.Wait(ctx, x.ID)
	if ctx.Err() != nil {
		return
	}
	g.mu.Lock()
	x.gone = true
	g.mu.Unlock()
	if err := g.c.Record(ctx, x.ID); err != nil {
		g.c.Log("debug shell: the end of session %.12s is not in the audit log: %v", x.ID, err)
		g.End(ctx, x.ID)
	}
}

// End ends a session. Of one whose container is gone already it notes that.
func (g *Gate) End(ctx context.Context, id string) error {
	g.mu.Lock()
	i := slices.IndexFunc(g.sessions, func(x *session) bool { return x.ID == id })
	if i < 0 {
		g.mu.Unlock()
		return fault.New(fault.NotFound, "there is no debug session %.80q", id)
	}
	x := g.sessions[i]
	gone := x.gone
	if gone {
		g.sessions = slices.Delete(g.sessions, i, i+1)
	}
	g.mu.Unlock()
	if !gone {
		return g.c.Kill(ctx, id)
	}
	g.c.Log("debug shell: session %.12s of %s CLOSED after %v", id, x.By, g.c.Now().Sub(x.Since).Round(time.Second))
	return nil
}
