package engine

import (
	"context"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/store"
)

// unit is a container as this daemon knows it.
type unit struct {
	id  string
	dir string // its generated files
	log string // its log

	rec atomic.Pointer[container.Record]
	op  chan struct{} // the operation token

	mu      sync.Mutex // guards what follows
	task    runtime.Task
	process *specs.Process // of the running task, for exec; nil after a restart of the daemon
	label   string         // SELinux label of the running task
	waiters []waiter
	pending []*attachment // clients that attached before the start
	execs   map[string]struct{}
	// restart calls a pending restart off; nil if none is pending.
	restart   context.CancelFunc
	lastDelay time.Duration
	// noRestart: this run was stopped by a user.
	noRestart bool
	// keep: a restart is under way; the end of a run does not remove a --rm container.
	keep bool
	// down is closed when the teardown of the last run is done; nil if none is on.
	down   chan struct{}
	ended  chan struct{} // closed when the present run's exit has been processed
	health context.CancelFunc
	// unsaved: the last change could not be stored and must be tried again.
	unsaved bool
	gone    bool // removed: nothing may be stored any more
}

type waiter struct {
	cond mcontainer.WaitCondition
	ch   chan mcontainer.WaitResponse
}

func (e *Engine) newUnit(r *container.Record) *unit {
	u := &unit{id: r.ID, op: make(chan struct{}, 1)}
	u.dir = filepath.Join(e.stateDir(r.Ephemeral), r.ID)
	u.log = e.logPath(r)
	u.rec.Store(r)
	return u
}

// logPath is where a container's monitor writes its log.
func (e *Engine) logPath(r *container.Record) string {
	switch {
	case r.Pod != nil:
		return r.Pod.Log
	case e.remoteLog(r):
		return e.cfg.LogShipper.Path(r.ID)
	case r.Ephemeral:
		return filepath.Join(e.logDir(), r.ID+".log")
	}
	return filepath.Join(e.stateDir(false), r.ID, r.ID+"-json.log")
}

// acquire takes the operation token.
func (u *unit) acquire(ctx context.Context) error {
	select {
	case u.op <- struct{}{}:
		return nil
	default:
	}
	select {
	case u.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fault.New(fault.DeadlineExceeded, "cannot change container %s: another operation on it is under way: %w", short(u.id), ctx.Err())
	}
}

func (u *unit) release() { <-u.op }

// running returns the task, or nil.
func (u *unit) running() runtime.Task {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.task
}

// needTask returns the task of a running container or the error users know.
func (u *unit) needTask() (runtime.Task, error) {
	if t := u.running(); t != nil {
		return t, nil
	}
	return nil, fault.New(fault.Conflict, "container %s is not running", u.id)
}

func (e *Engine) db(r *container.Record) *store.DB {
	if r.Ephemeral {
		return e.cfg.Ephemeral
	}
	return e.cfg.Durable
}

// change publishes an altered copy of the record and has it stored; f must
// replace what it changes. The order of publishing is the order of storing.
func (e *Engine) change(u *unit, f func(r *container.Record)) (*container.Record, store.Pending, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return e.changeLocked(u, f)
}

// changeLocked is change for who holds u.mu.
func (e *Engine) changeLocked(u *unit, f func(r *container.Record)) (*container.Record, store.Pending, error) {
	r := u.rec.Load().Clone()
	f(r)
	if u.gone {
		u.rec.Store(r)
		return r, store.Pending{}, nil
	}
	b, err := r.Encode()
	if err != nil {
		return nil, store.Pending{}, err
	}
	u.rec.Store(r)
	return r, e.db(r).Put(Bucket, r.ID, b), nil
}

// saved waits for a stored change that was not asked for by anybody who could be
// told of its failure; it is tried again until it succeeds.
func (e *Engine) saved(u *unit, p store.Pending, err error) {
	if err == nil {
		err = p.Wait()
	}
	if err == nil {
		return
	}
	e.log.Error("cannot store a container's state; trying again", "container", u.id, "cause", err)
	u.mu.Lock()
	again := !u.unsaved && !u.gone
	u.unsaved = true
	u.mu.Unlock()
	if !again {
		return
	}
	e.spawn(func() {
		for {
			select {
			case <-e.ctx.Done():
				return
			case <-time.After(time.Second):
			}
			_, p, err := e.change(u, func(*container.Record) {})
			if err == nil && p.Wait() == nil {
				u.mu.Lock()
				u.unsaved = false
				u.mu.Unlock()
				return
			}
		}
	})
}

// step moves the record to the state that follows on ev; who holds u.mu calls it
// within change.
func step(r *container.Record, ev container.Event) error {
	next, err := container.Next(r.State.Status, ev)
	if err != nil {
		return err
	}
	r.State.Status = next
	return nil
}

// stopTimers ends the pending restart and the health checks; u.mu is held.
func (u *unit) stopTimers() {
	if u.restart != nil {
		u.restart()
		u.restart = nil
	}
	if u.health != nil {
		u.health()
		u.health = nil
	}
}

// settled waits until the teardown of the last run is done.
func (u *unit) settled(ctx context.Context) error {
	u.mu.Lock()
	down := u.down
	u.mu.Unlock()
	if down == nil {
		return nil
	}
	select {
	case <-down:
		return nil
	case <-ctx.Done():
		return fault.New(fault.DeadlineExceeded, "cannot go on with container %s: what is left of its last run is still being removed: %w", short(u.id), ctx.Err())
	}
}

func short(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}
