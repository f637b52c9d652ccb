package engine

import (
	"context"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/signal"
)

// defaultStopTimeout is how long a container has to end by itself.
const defaultStopTimeout = 10 * time.Second

// stopSignal is what a container is stopped with.
func stopSignal(r *container.Record, asked string) (int, error) {
	if asked == "" {
		asked = r.Config.StopSignal
	}
	if asked == "" {
		return int(unix.SIGTERM), nil
	}
	return signal.Parse(asked)
}

// stopTimeout is how long to wait after that; negative is for ever.
func stopTimeout(r *container.Record, asked *int) time.Duration {
	if asked == nil {
		asked = r.Config.StopTimeout
	}
	if asked == nil {
		return defaultStopTimeout
	}
	return time.Duration(*asked) * time.Second
}

// ContainerStop ends a container: its stop signal, then after the timeout SIGKILL.
// fault.NotModified if it does not run.
func (e *Engine) ContainerStop(ctx context.Context, name, signal string, timeout *int) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	r := u.rec.Load()
	sig, err := stopSignal(r, signal)
	if err != nil {
		return err
	}
	if p, was := e.giveUp(u, false); was {
		return p.Wait()
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	// A stop once begun is carried out, even if the client does not wait for it.
	ctx = context.WithoutCancel(ctx)
	if p, was := e.giveUp(u, true); was { // it ended meanwhile
		return p.Wait()
	}
	if u.running() == nil {
		return fault.New(fault.NotModified, "container %s is already stopped", r.Name)
	}
	if err := e.halt(ctx, u, sig, stopTimeout(r, timeout), true); err != nil {
		return err
	}
	e.publish(u, events.ActionStop, nil)
	return nil
}

// halt ends the running task and waits until its exit was processed. manual
// notes that a user wanted it, which keeps it from being restarted.
func (e *Engine) halt(ctx context.Context, u *unit, sig int, patience time.Duration, manual bool) error {
	u.mu.Lock()
	t, ended := u.task, u.ended
	if t == nil {
		u.mu.Unlock()
		return nil
	}
	u.noRestart = true
	if manual {
		_, p, err := e.changeLocked(u, func(n *container.Record) { n.State.ManualStop = true })
		u.mu.Unlock()
		e.saved(u, p, err)
	} else {
		u.mu.Unlock()
	}
	paused := u.rec.Load().State.Status == mcontainer.StatePaused
	e.publish(u, events.ActionKill, map[string]string{"signal": itoa(sig)})
	if err := t.Signal(ctx, sig, false); err != nil && !gone(t) && !fault.Is(err, fault.Conflict) && !fault.Is(err, fault.NotFound) {
		e.log.Warn("cannot signal a container", "container", u.id, "signal", sig, "cause", err)
		patience = 0
	}
	if paused && t.Resume(ctx) == nil {
		e.resumed(u)
	}
	var after <-chan time.Time
	if patience >= 0 && sig != int(unix.SIGKILL) {
		tm := time.NewTimer(patience)
		defer tm.Stop()
		after = tm.C
	}
	if sig != int(unix.SIGKILL) {
		select {
		case <-ended:
			return nil
		case <-ctx.Done():
			return fault.As(fault.DeadlineExceeded, ctx.Err())
		case <-after:
		}
		e.publish(u, events.ActionKill, map[string]string{"signal": itoa(int(unix.SIGKILL))})
		if err := t.Signal(ctx, int(unix.SIGKILL), false); err != nil && !gone(t) {
			e.log.Warn("cannot kill a container", "container", u.id, "cause", err)
		}
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fault.As(fault.DeadlineExceeded, ctx.Err())
	case <-time.After(10 * time.Second):
	}
	// Processes that joined the cgroup but not the pid namespace may keep it.
	if err := t.Signal(ctx, int(unix.SIGKILL), true); err != nil && !gone(t) {
		return fault.New(fault.Internal, "cannot kill container %s: %w", u.id, err)
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fault.As(fault.DeadlineExceeded, ctx.Err())
	case <-time.After(20 * time.Second):
		return fault.New(fault.Internal, "cannot kill container %s: its process does not end; it may wait for a device or a network file system", u.id)
	}
}

func gone(t runtime.Task) bool {
	select {
	case <-t.Exited():
		return true
	default:
		return false
	}
}

// ContainerKill sends a signal to the container's first process.
func (e *Engine) ContainerKill(ctx context.Context, name, asked string) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	sig := int(unix.SIGKILL)
	if asked != "" {
		if sig, err = signal.Parse(asked); err != nil {
			return err
		}
	}
	r := u.rec.Load()
	t := u.running()
	if t == nil {
		if p, was := e.giveUp(u, false); was {
			return p.Wait()
		}
		return fault.New(fault.Conflict, "cannot kill container: %s: container %s is not running", name, u.id)
	}
	stop, _ := stopSignal(r, "")
	ends := sig == int(unix.SIGKILL) || sig == stop
	if ends {
		u.mu.Lock()
		u.noRestart = true
		_, p, cerr := e.changeLocked(u, func(n *container.Record) { n.State.ManualStop = true })
		u.mu.Unlock()
		e.saved(u, p, cerr)
	}
	if err := t.Signal(ctx, sig, false); err != nil {
		if gone(t) {
			return fault.New(fault.Conflict, "cannot kill container: %s: container %s is not running", name, u.id)
		}
		return err
	}
	e.publish(u, events.ActionKill, map[string]string{"signal": itoa(sig)})
	if sig != int(unix.SIGKILL) {
		return nil
	}
	if r.State.Status == mcontainer.StatePaused {
		// A frozen process dies when it is thawed (cgroup v1).
		_ = t.Resume(ctx)
	}
	u.mu.Lock()
	ended := u.ended
	u.mu.Unlock()
	select {
	case <-ended:
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
	}
	return nil
}

// ContainerRestart stops a container if it runs, and starts it.
func (e *Engine) ContainerRestart(ctx context.Context, name, signal string, timeout *int) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	r := u.rec.Load()
	sig, err := stopSignal(r, signal)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	// Half a restart would be a stop: it is carried out, even if the client goes.
	ctx = context.WithoutCancel(ctx)
	if p, was := e.giveUp(u, true); was {
		if err := p.Wait(); err != nil {
			return err
		}
	}
	u.mu.Lock()
	u.keep = u.task != nil // a container with --rm survives this end
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		u.keep = false
		u.mu.Unlock()
	}()
	if err := e.halt(ctx, u, sig, stopTimeout(r, timeout), false); err != nil {
		return err
	}
	p, err := e.launch(ctx, u, launch{})
	if err != nil {
		if r.Ephemeral && u.running() == nil {
			if rerr := e.remove(ctx, u, true); rerr != nil {
				e.log.Warn("cannot remove a container that could not be started", "container", u.id, "cause", rerr)
			}
		}
		return err
	}
	if err := p.Wait(); err != nil {
		return err
	}
	e.publish(u, events.ActionRestart, nil)
	return nil
}

// ContainerPause freezes every process of a container.
func (e *Engine) ContainerPause(ctx context.Context, name string) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	t, err := u.needTask()
	if err != nil {
		return err
	}
	if u.rec.Load().State.Status == mcontainer.StatePaused {
		return fault.New(fault.Conflict, "container %s is already paused", u.id)
	}
	if err := t.Pause(ctx); err != nil {
		return err
	}
	return e.transition(u, t, container.EventPause, events.ActionPause)
}

// ContainerUnpause thaws them.
func (e *Engine) ContainerUnpause(ctx context.Context, name string) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	t := u.running()
	if t == nil || u.rec.Load().State.Status != mcontainer.StatePaused {
		return fault.New(fault.Conflict, "container %s is not paused", u.id)
	}
	if err := t.Resume(ctx); err != nil {
		return err
	}
	return e.transition(u, t, container.EventResume, events.ActionUnPause)
}

// transition moves the state of a running container, unless it ended meanwhile.
func (e *Engine) transition(u *unit, t runtime.Task, ev container.Event, a events.Action) error {
	u.mu.Lock()
	if u.task != t {
		u.mu.Unlock()
		return fault.New(fault.Conflict, "container %s is not running", u.id)
	}
	var serr error
	_, p, err := e.changeLocked(u, func(n *container.Record) { serr = step(n, ev) })
	u.mu.Unlock()
	if serr != nil {
		return serr
	}
	if err == nil {
		err = p.Wait()
	}
	e.publish(u, a, nil)
	return err
}

// resumed notes that a stop thawed the container.
func (e *Engine) resumed(u *unit) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.task == nil || u.rec.Load().State.Status != mcontainer.StatePaused {
		return
	}
	_, _, _ = e.changeLocked(u, func(n *container.Record) { _ = step(n, container.EventResume) })
}
