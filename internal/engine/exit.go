package engine

import (
	"context"
	"strconv"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/store"
)

func itoa(i int) string { return strconv.Itoa(i) }

// await processes the end of a task.
func (e *Engine) await(u *unit, t runtime.Task) {
	select {
	case <-t.Exited():
		e.exited(u, t)
	case <-e.ctx.Done():
	}
}

// exited takes the end of a run into account: state, waiters, events, the
// decision about a restart. What remains of the run is torn down behind it.
func (e *Engine) exited(u *unit, t runtime.Task) {
	x := t.Exit()
	if x.At.IsZero() {
		x.At = time.Now()
	}
	var again bool
	var delay time.Duration
	u.mu.Lock()
	if u.task != t {
		u.mu.Unlock()
		return
	}
	r := u.rec.Load()
	u.task, u.process = nil, nil
	oci.ReleaseLabel(u.label)
	u.label = ""
	u.stopTimers()
	e.logEnded(r)
	down := make(chan struct{})
	u.down = down
	stopped := u.noRestart || e.noRestarts.Load()
	if !r.Ephemeral {
		again, delay = container.DecideRestart(container.Ended{
			Policy: r.HostConfig.RestartPolicy, ExitCode: x.Code, ManualStop: stopped,
			Attempts: r.RestartCount, RanFor: x.At.Sub(r.State.StartedAt), LastDelay: u.lastDelay,
		})
	}
	ev := container.EventExit
	if again {
		ev = container.EventExitRestart
		u.lastDelay = delay
	}
	apply := func(n *container.Record) {
		if err := step(n, ev); err != nil {
			e.log.Error("unexpected state", "container", u.id, "cause", err)
		}
		n.State.Pid, n.State.ExitCode, n.State.OOMKilled = 0, x.Code, x.OOMKilled
		n.State.FinishedAt = x.At.UTC()
		n.Attached, n.Ports = nil, nil
		if n.State.Health != nil {
			h := *n.State.Health
			if h.Status != mcontainer.Healthy {
				h.Status = mcontainer.Unhealthy
			}
			n.State.Health = &h
		}
	}
	if r.Ephemeral && !u.keep {
		// For everybody else it is gone now; the stored record goes when nothing
		// of it is left.
		n := r.Clone()
		apply(n)
		n.State.Status = mcontainer.StateRemoving
		u.rec.Store(n)
		u.gone = true
		ended := u.ended
		u.mu.Unlock()
		e.ephemeralEnded(u, r, n, t, x, down, ended)
		return
	}
	n, p, err := e.changeLocked(u, apply)
	ended := u.ended
	u.mu.Unlock()

	published := len(r.Ports) > 0
	if published {
		// Whoever learns of the exit may use the ports again at once.
		e.releaseNetwork(r)
	}
	if x.OOMKilled {
		e.publish(u, events.ActionOOM, nil)
	}
	e.publishExit(u, n, x)
	e.hookContainer(r, func(h PodHooks, ctx context.Context, p *container.Pod) []LimitChange {
		return h.ContainerStopped(ctx, p, n)
	})
	e.publishEndpoints(r, r.Attached, events.ActionDisconnect)
	e.publishMounts(r, events.ActionUnmount)
	e.notify(u, false)
	close(ended)
	e.spawn(func() {
		defer close(down)
		e.slots <- struct{}{}
		defer func() { <-e.slots }()
		// The monitor's own record of the exit is deleted below: ours comes first.
		e.saved(u, p, err)
		e.teardown(u, r, t, !published)
	})
	if again {
		e.restartLater(u, delay)
	}
}

func (e *Engine) publishExit(u *unit, n *container.Record, x runtime.Exit) {
	e.meters.exited()
	secs := int64(0)
	if !n.State.StartedAt.IsZero() {
		secs = max(0, int64(n.State.FinishedAt.Sub(n.State.StartedAt).Seconds()))
	}
	e.publish(u, events.ActionDie, map[string]string{"exitCode": itoa(x.Code), "execDuration": strconv.FormatInt(secs, 10)})
}

// ephemeralEnded makes a --rm container vanish.
func (e *Engine) ephemeralEnded(u *unit, r, n *container.Record, t runtime.Task, x runtime.Exit, down, ended chan struct{}) {
	e.mu.Lock()
	delete(e.units, u.id)
	e.tearing[u.id] = u
	e.mu.Unlock()
	published := len(r.Ports) > 0
	if published {
		e.releaseNetwork(r)
	}
	e.names.Release(r.Name, u.id)
	if x.OOMKilled {
		e.publish(u, events.ActionOOM, nil)
	}
	e.publishExit(u, n, x)
	e.publishEndpoints(r, r.Attached, events.ActionDisconnect)
	e.publishMounts(r, events.ActionUnmount)
	e.notify(u, true)
	close(ended)
	e.spawn(func() {
		defer close(down)
		e.slots <- struct{}{}
		defer func() { <-e.slots }()
		e.teardown(u, r, t, !published)
		if err := fault.Outwait(e.background(), func() error { return e.erase(e.background(), u, r, true) }); err != nil {
			e.log.Warn("cannot clear what is left of a container", "container", u.id, "cause", err)
		}
		e.mu.Lock()
		delete(e.tearing, u.id)
		e.mu.Unlock()
		e.publish(u, events.ActionDestroy, nil)
	})
}

// background is the context of work that nobody waits for: it outlives requests
// but not the engine's patience.
func (e *Engine) background() context.Context { return context.WithoutCancel(e.ctx) }

func (e *Engine) releaseNetwork(r *container.Record) {
	m := r.HostConfig.NetworkMode
	if m.IsHost() || m.IsNone() || m.IsContainer() {
		return
	}
	ctx, cancel := context.WithTimeout(e.background(), 30*time.Second)
	defer cancel()
	if err := e.cfg.Networks.Release(ctx, r.ID); err != nil {
		e.log.Warn("cannot release a container's networks", "container", r.ID, "cause", err)
	}
}

// teardown clears what a run leaves: cgroup, mounts, endpoints, uses of volumes.
func (e *Engine) teardown(u *unit, r *container.Record, t runtime.Task, network bool) {
	if network {
		e.releaseNetwork(r)
	}
	ctx, cancel := context.WithTimeout(e.background(), time.Minute)
	defer cancel()
	if t != nil {
		if err := fault.Outwait(ctx, func() error { return t.Delete(ctx) }); err != nil {
			e.log.Warn("cannot clear what a container's run left", "container", u.id, "cause", err)
		}
	}
	e.releaseMounts(ctx, r)
	if r.HostConfig.IpcMode.IsShareable() || len(r.Mounts) > 0 || len(r.Extra.Secrets) > 0 {
		if err := fault.Outwait(ctx, func() error { return e.dropHostMounts(u) }); err != nil {
			e.log.Warn("cannot unmount what a container's run left", "container", u.id, "cause", err)
		}
	}
	e.dropExecs(u)
}

// notify answers waiters. Removed ones get their answer when the unit is gone.
func (e *Engine) notify(u *unit, removed bool) {
	u.mu.Lock()
	st := u.rec.Load().State
	res := mcontainer.WaitResponse{StatusCode: int64(st.ExitCode)}
	if st.Error != "" {
		res.Error = &mcontainer.WaitExitError{Message: st.Error}
	}
	keep := u.waiters[:0]
	var done []waiter
	for _, w := range u.waiters {
		if w.cond == mcontainer.WaitConditionRemoved && !(removed && u.gone) {
			keep = append(keep, w)
			continue
		}
		if w.cond == mcontainer.WaitConditionRemoved {
			w.ch <- mcontainer.WaitResponse{StatusCode: res.StatusCode} // it went as it should
			close(w.ch)
			continue
		}
		done = append(done, w)
	}
	clear(u.waiters[len(keep):])
	u.waiters = keep
	u.mu.Unlock()
	for _, w := range done {
		w.ch <- res // has room for the one answer
		close(w.ch)
	}
}

// restartLater starts the container again after delay, unless called off.
func (e *Engine) restartLater(u *unit, delay time.Duration) {
	ctx, cancel := context.WithCancel(e.ctx)
	u.mu.Lock()
	u.restart = cancel
	u.mu.Unlock()
	e.spawn(func() {
		defer cancel()
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
		if u.acquire(ctx) != nil {
			return
		}
		defer u.release()
		if ctx.Err() != nil || u.rec.Load().State.Status != mcontainer.StateRestarting {
			return
		}
		u.mu.Lock()
		u.restart = nil
		u.mu.Unlock()
		if p, err := e.launch(e.ctx, u, launch{restart: true}); err != nil {
			e.log.Warn("cannot restart a container", "container", u.id, "cause", err)
		} else {
			e.saved(u, p, nil)
		}
	})
}

// giveUp calls a pending restart off; reports whether there was one. A restart
// that has begun holds the operation token: only who has that (held) can tell
// that a container is restarting and nobody is at it.
func (e *Engine) giveUp(u *unit, held bool) (store.Pending, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.restart == nil && !(held && u.rec.Load().State.Status == mcontainer.StateRestarting) {
		return store.Pending{}, false
	}
	if u.restart != nil {
		u.restart()
		u.restart = nil
	}
	var serr error
	_, p, err := e.changeLocked(u, func(n *container.Record) {
		serr = step(n, container.EventGiveUp)
		n.State.ManualStop = true
	})
	if err != nil || serr != nil {
		return store.Pending{}, false
	}
	return p, true
}

// ContainerWait returns a channel that yields once, when the condition holds.
func (e *Engine) ContainerWait(ctx context.Context, name string, cond mcontainer.WaitCondition) (<-chan mcontainer.WaitResponse, error) {
	u, err := e.lookup(name)
	if err != nil {
		return nil, err
	}
	switch cond {
	case "":
		cond = mcontainer.WaitConditionNotRunning
	case mcontainer.WaitConditionNotRunning, mcontainer.WaitConditionNextExit, mcontainer.WaitConditionRemoved:
	default:
		return nil, fault.New(fault.Invalid, "invalid condition: %q", cond)
	}
	ch := u.wait(cond)
	// A client that goes away is not kept in mind for as long as the container runs.
	context.AfterFunc(ctx, func() { u.unwait(ch) })
	return ch, nil
}

func (u *unit) unwait(ch <-chan mcontainer.WaitResponse) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, w := range u.waiters {
		if w.ch == ch {
			u.waiters = append(u.waiters[:i:i], u.waiters[i+1:]...)
			return
		}
	}
}

func (u *unit) wait(cond mcontainer.WaitCondition) <-chan mcontainer.WaitResponse {
	ch := make(chan mcontainer.WaitResponse, 1)
	u.mu.Lock()
	defer u.mu.Unlock()
	st := u.rec.Load().State
	if u.gone || cond == mcontainer.WaitConditionNotRunning && !st.Running() && st.Status != mcontainer.StateRestarting {
		ch <- mcontainer.WaitResponse{StatusCode: int64(st.ExitCode)}
		close(ch)
		return ch
	}
	u.waiters = append(u.waiters, waiter{cond, ch})
	return ch
}
