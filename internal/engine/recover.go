package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	net "github.com/cloudos-io/cloudos/internal/network"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/store"
)

// Recover loads every container of the root and takes over what runs: tasks of
// live containers are watched again, exits that nobody saw are processed with
// their true time and code, what belongs to no container is removed, and restart
// policies are applied. It returns when every container's state is right;
// restarts and removals go on behind it.
func (e *Engine) Recover(ctx context.Context) error {
	if err := e.loadPods(); err != nil {
		return err
	}
	for _, db := range []*store.DB{e.cfg.Durable, e.cfg.Ephemeral} {
		bad, err := db.Load(Bucket, e.load)
		if err != nil {
			return fmt.Errorf("cannot load the containers: %w", err)
		}
		for _, b := range bad {
			e.log.Error("a container's record cannot be used and was set aside; the container is lost", "container", b.Key, "cause", b.Err)
		}
	}
	e.referVolumes()
	e.retainLogs()
	if e.cfg.IDMaps != nil {
		if err := e.cfg.IDMaps.Retain(func(id string) bool { return e.units[id] != nil }); err != nil {
			e.log.Warn("cannot release id ranges of containers that are gone", "cause", err)
		}
	}

	live := append(e.restoreTasks(ctx), e.restorePods(ctx)...)
	e.letAllGo(ctx)
	e.killOrphans(ctx)
	if err := e.cfg.Networks.Restore(ctx, live); err != nil {
		e.log.Warn("cannot restore all networks", "cause", err)
	}
	for _, l := range live {
		l.NetNS.Close()
	}
	if err := e.cfg.Volumes.ReleaseUnused(ctx); err != nil {
		e.log.Warn("cannot unmount unused volumes", "cause", err)
	}
	e.dropUnknown(ctx)
	e.dropExecNotes()
	e.settlePods(ctx)
	e.settleCheckpoints(ctx)
	e.resume()
	return nil
}

// load takes in one stored record.
func (e *Engine) load(key string, value []byte) error {
	r, err := container.Decode(value)
	if err != nil {
		return err
	}
	if r.ID != key {
		return fmt.Errorf("the record is of container %s", r.ID)
	}
	if err := e.names.Reserve(r.Name, r.ID); err != nil {
		// Two cannot have one name; none is lost for that.
		e.log.Warn("two containers have one name; renaming one", "container", r.ID, "name", r.Name)
		r.Name = r.Name + "_" + short(r.ID)
		if err := e.names.Reserve(r.Name, r.ID); err != nil {
			return err
		}
	}
	e.units[r.ID] = e.newUnit(r)
	return nil
}

// referVolumes tells the volumes who names them.
func (e *Engine) referVolumes() {
	for _, u := range e.all() {
		for _, p := range u.rec.Load().Mounts {
			if p.Type == mount.TypeVolume {
				if err := e.cfg.Volumes.Reference(p.Name, u.id); err != nil {
					e.log.Warn("a container's volume is missing", "container", u.id, "volume", p.Name)
				}
			}
		}
	}
}

// restoreTasks takes over the tasks of former daemons, in parallel.
func (e *Engine) restoreTasks(ctx context.Context) []net.Live {
	var mu sync.Mutex
	var live []net.Live
	var wg sync.WaitGroup
	limit := make(chan struct{}, 32)
	known := map[string]bool{}
	for _, d := range e.drivers() {
		ids, err := d.Orphans()
		if err != nil {
			e.log.Error("cannot list running containers", "cause", err)
		}
		for _, id := range ids {
			known[id] = true
		}
	}
	for _, u := range e.all() {
		r := u.rec.Load()
		if !r.State.Running() && !known[u.id] {
			continue
		}
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			if ns := e.restore(ctx, u, r); ns != nil {
				mu.Lock()
				live = append(live, net.Live{ContainerID: u.id, NetNS: ns})
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return live
}

func (e *Engine) drivers() []runtime.Driver {
	l := []runtime.Driver{e.cfg.Driver}
	for _, r := range e.cfg.Runtimes {
		l = append(l, r.Driver)
	}
	return l
}

// restore takes one task over and returns the network namespace of a live one.
func (e *Engine) restore(ctx context.Context, u *unit, r *container.Record) *os.File {
	drv, err := e.driver(r.HostConfig.Runtime)
	var t runtime.Task
	if err == nil {
		t, err = drv.Restore(ctx, r.ID)
	}
	if err != nil {
		if !fault.Is(err, fault.NotFound) {
			e.log.Error("cannot take a container over", "container", u.id, "cause", err)
		}
		e.lost(u, r, err)
		return nil
	}
	if !r.State.Running() && !gone(t) {
		// The daemon died between the start and the record of it. Nobody was told
		// that it runs, and what its networks gave it is not known: it is undone.
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		if err := end(ctx, t); err != nil {
			e.log.Error("cannot undo a start that was cut short", "container", u.id, "cause", err)
		}
		return nil
	}
	for _, p := range r.Mounts {
		if p.Type == mount.TypeVolume {
			if _, err := e.cfg.Volumes.Use(ctx, p.Name, r.ID); err != nil {
				e.log.Warn("a running container's volume cannot be used", "container", u.id, "volume", p.Name, "cause", err)
			}
		}
	}
	u.mu.Lock()
	u.task, u.ended = t, make(chan struct{})
	if u.label = e.labelOf(t); u.label != "" {
		oci.ReserveLabel(u.label)
	}
	u.noRestart = r.State.ManualStop
	n := r.Clone()
	if !r.State.Running() {
		// It has ended, and so soon that its start was not recorded.
		n.State.Status, n.State.StartedAt, n.State.BootID = mcontainer.StateRunning, t.StartedAt().UTC(), e.bootID
	}
	n.State.Pid = t.Pid()
	u.rec.Store(n)
	u.mu.Unlock()
	if gone(t) {
		e.exited(u, t) // with its true time and code
		return nil
	}
	e.logStarted(n)
	e.settleFreezer(ctx, u, t, n.State.Status == mcontainer.StatePaused)
	e.restoreExecs(ctx, u, t)
	e.spawn(func() { e.await(u, t) })
	e.startHealth(u, n, t)
	if ns, err := t.NetNS(); err == nil && len(r.Attached) > 0 {
		return ns
	} else if err == nil && ns != nil {
		ns.Close()
	}
	return nil
}

// lost processes a container that should run but of whose task nothing is known:
// the host was rebooted, or the start never came to its end.
func (e *Engine) lost(u *unit, r *container.Record, cause error) {
	if !r.State.Running() {
		return
	}
	rebooted := r.State.BootID != e.bootID
	_, p, err := e.change(u, func(n *container.Record) {
		_ = step(n, container.EventExit)
		n.State.Pid, n.State.ExitCode = 0, 255
		n.State.FinishedAt = time.Now().UTC()
		if rebooted {
			n.State.FinishedAt = bootTime().UTC() // no later than this
			if n.State.FinishedAt.Before(n.State.StartedAt) {
				n.State.FinishedAt = n.State.StartedAt
			}
		} else {
			n.State.Error = "its monitor was lost: " + cause.Error()
		}
		n.Attached, n.Ports = nil, nil
	})
	e.saved(u, p, err)
}

// killOrphans ends tasks that no record knows.
func (e *Engine) killOrphans(ctx context.Context) {
	var wg sync.WaitGroup
	for _, d := range e.drivers() {
		ids, err := d.Orphans()
		if err != nil {
			continue
		}
		for _, id := range ids {
			if e.units[id] != nil || e.isPause(id) {
				continue
			}
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
				defer cancel()
				if err := killOrphan(ctx, d, id); err != nil {
					e.log.Error("cannot end a process that belongs to no container", "id", id, "cause", err)
				}
				_ = e.cfg.Networks.Release(ctx, id)
			})
		}
	}
	wg.Wait()
}

func killOrphan(ctx context.Context, d runtime.Driver, id string) error {
	t, err := d.Restore(ctx, id)
	if err != nil {
		if fault.Is(err, fault.NotFound) {
			return nil
		}
		return err
	}
	return end(ctx, t)
}

// end kills a task that no container is to have, and clears it.
func end(ctx context.Context, t runtime.Task) error {
	if !gone(t) {
		if err := t.Signal(ctx, int(unix.SIGKILL), true); err != nil && !gone(t) {
			return err
		}
		select {
		case <-t.Exited():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return t.Delete(ctx)
}

// settleFreezer makes the kernel agree with the record: the daemon may have died
// between freezing or thawing a container and saying so, or in a commit.
func (e *Engine) settleFreezer(ctx context.Context, u *unit, t runtime.Task, paused bool) {
	act := t.Resume
	if paused {
		act = t.Pause
	}
	if err := act(ctx); err != nil && (paused || !fault.Is(err, fault.Unsupported)) && !gone(t) {
		e.log.Debug("cannot settle whether a container is paused", "container", u.id, "cause", err)
	}
}

// dropUnknown removes layers, directories and logs that belong to no container:
// their creation or removal was cut short.
func (e *Engine) dropUnknown(ctx context.Context) {
	if ids, err := e.cfg.Snapshots.List(ctx); err == nil {
		for _, id := range ids {
			of, _, _ := strings.Cut(id, imageLayerMark)
			if e.units[of] == nil && container.ValidID(of) {
				if err := e.cfg.Snapshots.Remove(ctx, id); err != nil {
					e.log.Warn("cannot remove a layer that belongs to no container", "id", id, "cause", err)
				}
			}
		}
	}
	for _, dir := range []string{e.stateDir(false), e.stateDir(true)} {
		list, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, d := range list {
			if u := e.units[d.Name()]; u == nil {
				err := e.dropHostMounts(&unit{id: d.Name()})
				if err == nil {
					err = os.RemoveAll(filepath.Join(dir, d.Name()))
				}
				if err != nil {
					e.log.Warn("cannot remove a directory that belongs to no container", "path", d.Name(), "cause", err)
				}
			} else if u.running() == nil {
				_ = e.dropHostMounts(u)
			}
		}
	}
	if list, err := os.ReadDir(e.logDir()); err == nil {
		for _, f := range list {
			id, _, _ := strings.Cut(f.Name(), ".")
			if e.units[id] == nil {
				if err := os.Remove(filepath.Join(e.logDir(), f.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
					e.log.Warn("cannot remove a log that belongs to no container", "path", f.Name(), "cause", err)
				}
			}
		}
	}
}

// resume finishes removals that were begun, removes --rm containers that ended
// and starts what its policy wants running.
func (e *Engine) resume() {
	for _, u := range e.all() {
		r := u.rec.Load()
		if u.running() != nil {
			continue
		}
		st := r.State
		switch {
		case st.Status == mcontainer.StateRemoving, st.Status == mcontainer.StateDead, r.Ephemeral && st.Status != mcontainer.StateCreated,
			r.Ephemeral && time.Since(r.Created) > time.Minute:
			// What exited() let go is in its hands already.
			u.mu.Lock()
			handled := u.gone
			if !handled && r.State.Status == mcontainer.StateRemoving {
				n := r.Clone()
				n.State.Status = mcontainer.StateDead // a removal can begin again from there
				u.rec.Store(n)
			}
			u.mu.Unlock()
			if handled {
				continue
			}
			e.spawn(func() {
				if u.acquire(e.ctx) != nil {
					return
				}
				defer u.release()
				if err := e.remove(e.background(), u, r.Ephemeral); err != nil {
					e.log.Warn("cannot finish removing a container", "container", u.id, "cause", err)
				}
			})
		case st.Status == mcontainer.StateRestarting, st.Status == mcontainer.StateExited:
			u.mu.Lock()
			pending := u.restart != nil
			u.mu.Unlock()
			if pending {
				continue
			}
			again, _ := container.DecideRestart(container.Ended{
				Policy: r.HostConfig.RestartPolicy, ExitCode: st.ExitCode, ManualStop: st.ManualStop,
				Attempts: r.RestartCount, AtBoot: true,
			})
			// On-failure counts what happened under this boot: a power cut is no
			// failure of the container's that was not seen as one.
			if st.StartedAt.IsZero() {
				again = false
			}
			if again {
				e.startAgain(u)
			} else if st.Status == mcontainer.StateRestarting {
				if p, was := e.giveUp(u, true); was {
					e.saved(u, p, nil)
				}
			}
		}
	}
}

// startAgain starts a container because of its policy when the daemon starts.
func (e *Engine) startAgain(u *unit) {
	e.spawn(func() {
		if e.cfg.Ready != nil {
			select {
			case <-e.cfg.Ready:
			case <-e.ctx.Done():
				return
			}
		}
		e.slots <- struct{}{}
		defer func() { <-e.slots }()
		if u.acquire(e.ctx) != nil {
			return
		}
		defer u.release()
		if st := u.rec.Load().State.Status; st != mcontainer.StateExited && st != mcontainer.StateRestarting {
			return
		}
		p, err := e.launch(e.ctx, u, launch{restart: true})
		if err != nil {
			e.log.Warn("cannot start a container that is to be restarted", "container", u.id, "cause", err)
			return
		}
		e.saved(u, p, nil)
	})
}
