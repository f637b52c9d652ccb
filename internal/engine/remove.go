package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// ContainerRemove removes a container; with force, a running one is killed
// first; with volumes, its anonymous volumes go too.
func (e *Engine) ContainerRemove(ctx context.Context, name string, force, volumes, link bool) error {
	if link {
		return e.removeLink(ctx, name)
	}
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	return e.removeUnit(ctx, u, force, volumes)
}

func (e *Engine) removeUnit(ctx context.Context, u *unit, force, volumes bool) error {
	if force {
		_, _ = e.giveUp(u, false)
		e.killForRemoval(ctx, u)
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	u.mu.Lock()
	already := u.gone
	u.mu.Unlock()
	if already { // an ephemeral one that ended, or a removal before ours
		return u.settled(ctx)
	}
	st := u.rec.Load().State
	if u.running() != nil {
		if !force {
			fix := "stop the container before removing or force remove"
			if st.Status == mcontainer.StatePaused {
				fix = "unpause and then " + fix
			}
			return fault.New(fault.Conflict, "cannot remove container %q: container is %s: %s", u.rec.Load().Name, st.Status, fix)
		}
		if err := e.halt(ctx, u, int(unix.SIGKILL), 0, true); err != nil {
			return err
		}
	}
	if st := u.rec.Load().State; st.Status == mcontainer.StateRestarting && !force {
		return fault.New(fault.Conflict, "cannot remove container %q: container is restarting: stop the container before removing or force remove", u.rec.Load().Name)
	}
	u.mu.Lock()
	already = u.gone
	u.mu.Unlock()
	if already {
		return u.settled(ctx)
	}
	return e.remove(context.WithoutCancel(ctx), u, volumes)
}

// killForRemoval ends a running container without waiting for operations on it
// that are under way: a stop in progress would take its whole timeout.
func (e *Engine) killForRemoval(ctx context.Context, u *unit) {
	u.mu.Lock()
	t := u.task
	u.noRestart = true
	u.mu.Unlock()
	if t == nil {
		return
	}
	_ = t.Signal(ctx, int(unix.SIGKILL), false)
	if u.rec.Load().State.Status == mcontainer.StatePaused {
		_ = t.Resume(ctx)
	}
}

// remove removes a container that does not run; the operation token is held, or
// nobody else knows the unit.
func (e *Engine) remove(ctx context.Context, u *unit, volumes bool) error {
	if err := u.settled(ctx); err != nil {
		return err
	}
	var serr error
	r, p, err := e.change(u, func(n *container.Record) { serr = step(n, container.EventRemove) })
	if serr != nil {
		return serr
	}
	if err == nil {
		err = p.Wait() // a power cut from here on finishes the removal
	}
	if err == nil {
		err = fault.Outwait(ctx, func() error { return e.erase(ctx, u, r, volumes) })
	}
	if err != nil {
		_, p, serr := e.change(u, func(n *container.Record) {
			_ = step(n, container.EventRemoveFailed)
			n.State.Error = err.Error()
		})
		e.saved(u, p, serr)
		return fmt.Errorf("cannot remove container %s: %w", r.Name, err)
	}
	u.mu.Lock()
	u.gone = true
	pend := u.pending
	u.pending = nil
	u.mu.Unlock()
	e.mu.Lock()
	delete(e.units, u.id)
	e.mu.Unlock()
	e.names.Release(r.Name, u.id)
	e.execs.forget(u)
	for _, a := range pend {
		a.Close()
	}
	e.publish(u, events.ActionDestroy, nil)
	e.hookContainer(r, func(h PodHooks, ctx context.Context, p *container.Pod) []LimitChange {
		h.ContainerRemoved(ctx, p, r)
		return nil
	})
	e.notify(u, true)
	return nil
}

// erase removes what a container has on disk, its record last. Every step can
// be repeated.
func (e *Engine) erase(ctx context.Context, u *unit, r *container.Record, volumes bool) error {
	if err := errors.Join(e.cfg.Snapshots.Remove(ctx, r.ID), e.dropImages(ctx, r)); err != nil {
		return err
	}
	e.dropVolumes(ctx, r, volumes)
	if r.Extra.UsernsAuto && e.cfg.IDMaps != nil {
		if err := e.cfg.IDMaps.Release(r.ID); err != nil {
			return err
		}
	}
	e.cfg.Driver.Release(r.ID)
	e.forgetLayer(r.ID)
	// Nothing may be mounted below what is removed next.
	if err := e.dropHostMounts(u); err != nil {
		return err
	}
	if err := os.RemoveAll(u.dir); err != nil {
		return err
	}
	if err := os.RemoveAll(e.checkpointDir(r.ID)); err != nil {
		return err
	}
	if err := e.dropLog(u, r); err != nil {
		return err
	}
	u.mu.Lock()
	u.gone = true // no change may bring the record back
	u.mu.Unlock()
	p := e.db(r).Delete(Bucket, r.ID)
	if r.Ephemeral {
		return nil
	}
	return p.Wait()
}

// removeLogs removes a log and its rotated siblings.
func removeLogs(path string) error {
	for n := 0; ; n++ {
		p := path
		if n > 0 {
			p += "." + strconv.Itoa(n)
		}
		if err := os.Remove(p); err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if n > 0 {
				return nil
			}
		}
	}
}

// ContainerPrune removes containers that do not run.
func (e *Engine) ContainerPrune(ctx context.Context, f Filters) (mcontainer.PruneReport, error) {
	rep := mcontainer.PruneReport{ContainersDeleted: []string{}}
	match, err := pruneFilter(f)
	if err != nil {
		return rep, err
	}
	for _, u := range e.all() {
		r := u.rec.Load()
		if r.Pod != nil || r.State.Running() || r.State.Status == mcontainer.StateRestarting || !match(r.Created, r.Config.Labels) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return rep, err
		}
		size, _ := e.cfg.Snapshots.Usage(ctx, r.ID)
		err := e.removeUnit(ctx, u, false, false)
		if fault.Is(err, fault.Conflict) || fault.Is(err, fault.NotFound) {
			continue // it was started, or somebody else removed it
		}
		if err != nil {
			return rep, err
		}
		rep.ContainersDeleted = append(rep.ContainersDeleted, r.ID)
		rep.SpaceReclaimed += uint64(max(size, 0))
	}
	e.publishPrune(events.ContainerEventType, rep.SpaceReclaimed)
	return rep, nil
}

// waitTearing waits until units that used a volume or layer are cleared.
func (e *Engine) waitTearing(ctx context.Context, uses func(r *container.Record) bool) error {
	e.mu.RLock()
	var l []*unit
	for _, u := range e.tearing {
		if uses == nil || uses(u.rec.Load()) {
			l = append(l, u)
		}
	}
	for _, u := range e.units {
		if uses == nil {
			l = append(l, u)
		}
	}
	e.mu.RUnlock()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, u := range l {
		if err := u.settled(ctx); err != nil {
			return err
		}
	}
	return nil
}
