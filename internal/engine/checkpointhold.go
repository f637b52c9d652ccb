package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// hold is a container that stands still for a checkpoint. Whatever happens to the
// engine meanwhile, the next one lets it go on (letAllGo): holdDir names it.
type hold struct {
	e     *Engine
	u     *unit
	t     runtime.Task
	at    time.Time
	quiet bool
}

// still has a running container stand still. It shows as paused, so that nobody
// begins an exec or a probe in it. The operation token is held.
func (e *Engine) still(ctx context.Context, u *unit, t runtime.Task, c runtime.Checkpointer) (*hold, error) {
	if err := os.MkdirAll(e.holdDir(), 0o700); err != nil {
		return nil, fault.New(fault.Internal, "cannot note what is paused: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(e.holdDir(), u.id), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil, fault.New(fault.Conflict, "a copy of a volume holds it; try again later")
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot note what is paused: %w", err)
	}
	f.Close()
	h := &hold{e: e, u: u, t: t}
	if err := e.mark(u, t, container.EventPause); err != nil {
		_ = os.Remove(filepath.Join(e.holdDir(), u.id))
		return nil, err
	}
	if c != nil {
		err = c.Checkpointable(ctx)
	}
	if err == nil {
		err = t.Pause(ctx)
		h.at = time.Now()
	}
	if err != nil {
		h.letGo(ctx)
		return nil, err
	}
	return h, nil
}

// mark moves the state of a running container without telling anybody.
func (e *Engine) mark(u *unit, t runtime.Task, ev container.Event) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.task != t {
		return fault.New(fault.Conflict, "container %s is not running", u.id)
	}
	var serr error
	_, _, err := e.changeLocked(u, func(n *container.Record) { serr = step(n, ev) })
	return errors.Join(serr, err)
}

// letGo lets the container go on. It is the same as what the next engine does.
func (h *hold) letGo(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if h.quiet {
		h.setQuiet(ctx, false)
	}
	if err := h.t.Resume(ctx); err != nil && !gone(h.t) {
		h.e.log.Error("cannot let a container go on after its checkpoint", "container", h.u.id, "cause", err)
		return // the file stays, and the next engine tries again
	}
	if h.u.rec.Load().State.Status == mcontainer.StatePaused {
		_ = h.e.mark(h.u, h.t, container.EventResume)
	}
	_ = os.Remove(filepath.Join(h.e.holdDir(), h.u.id))
}

// setQuiet cuts the container off its network, or undoes it.
func (h *hold) setQuiet(ctx context.Context, on bool) {
	if c, ok := h.t.(runtime.Checkpointer); ok {
		if err := c.Quiet(ctx, on); err != nil && !gone(h.t) {
			h.e.log.Warn("cannot change whether a container reaches its network", "container", h.u.id, "cause", err)
		}
		h.quiet = on
	}
}

// end kills the container, which has not moved since it was written down.
func (h *hold) end(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	h.u.mu.Lock()
	ended := h.u.ended
	h.u.noRestart = true
	_, p, err := h.e.changeLocked(h.u, func(n *container.Record) { n.State.ManualStop = true })
	h.u.mu.Unlock()
	h.e.saved(h.u, p, err)
	if err := h.t.Signal(ctx, int(unix.SIGKILL), true); err != nil && !gone(h.t) {
		return fault.New(fault.Internal, "cannot end container %s: %w", h.u.id, err)
	}
	_ = h.t.Resume(ctx)
	_ = os.Remove(filepath.Join(h.e.holdDir(), h.u.id))
	select {
	case <-ended:
		return nil
	case <-time.After(30 * time.Second):
		return fault.New(fault.Internal, "cannot end container %s: its process does not end", h.u.id)
	}
}

// criuLock is a file that whoever writes a container down holds a lock on, also
// when the engine has gone.
func (e *Engine) criuLock(id string) string { return filepath.Join(e.cfg.RunRoot, "criu", id) }

// lockCRIU takes the lock; the file is to be inherited, and to be closed.
func (e *Engine) lockCRIU(id string) (*os.File, error) {
	path := e.criuLock(id)
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	var f *os.File
	if err == nil {
		f, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot note that a checkpoint is made: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fault.New(fault.Conflict, "another checkpoint of it is being made")
	}
	return f, nil
}

// settleCheckpoints finishes what a killed engine left of checkpoints: CRIU may
// still be at work in a container; nothing is done to that until it has ended, and
// then it goes on. Half checkpoints are removed.
func (e *Engine) settleCheckpoints(ctx context.Context) {
	list, _ := os.ReadDir(filepath.Join(e.cfg.RunRoot, "criu"))
	for _, d := range list {
		path := e.criuLock(d.Name())
		f, err := os.OpenFile(path, os.O_RDWR, 0o600)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			f.Close()
			_ = os.Remove(path)
			continue
		}
		u := e.units[d.Name()]
		if u != nil {
			_ = u.acquire(ctx) // nobody has it yet
		}
		e.spawn(func() {
			defer f.Close()
			if u != nil {
				defer u.release()
			}
			for unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
				select {
				case <-e.ctx.Done():
					return
				case <-time.After(50 * time.Millisecond):
				}
			}
			_ = os.Remove(path)
			if u == nil {
				return
			}
			if t := u.running(); t != nil {
				// It may have frozen again what was let go of meanwhile.
				e.settleFreezer(e.ctx, u, t, u.rec.Load().State.Status == mcontainer.StatePaused)
			}
			e.sweepCheckpoints(u.id)
		})
	}
	dirs, _ := os.ReadDir(e.checkpointRoot())
	for _, d := range dirs {
		id := d.Name()
		if strings.HasPrefix(id, ".") || e.units[id] == nil {
			if err := os.RemoveAll(filepath.Join(e.checkpointRoot(), id)); err != nil {
				e.log.Warn("cannot remove a checkpoint that belongs to no container", "path", id, "cause", err)
			}
			continue
		}
		e.sweepCheckpoints(id)
		e.settleMove(e.units[id])
	}
}
