package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Shutdown stops the daemon; with containers it ends them too and removes every
// trace but the files under the root.
func (s *SystemService) Shutdown(ctx context.Context, containers bool) error {
	e := s.e
	var err error
	if containers {
		err = e.endAll(context.WithoutCancel(ctx))
	}
	if e.shutdown != nil {
		e.shutdown(containers)
	}
	return err
}

// endAll stops every container, waits until nothing is left of their runs, and
// destroys networks and parked sandboxes.
func (e *Engine) endAll(ctx context.Context) error {
	e.noRestarts.Store(true)
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	limit := make(chan struct{}, 16)
	for _, u := range e.all() {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			if err := e.endOne(ctx, u); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	tctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	errs = append(errs, e.waitTearing(tctx, nil), e.endPods(tctx))
	for _, d := range e.drivers() {
		errs = append(errs, d.Close(), d.Drained(tctx, false))
	}
	errs = append(errs, e.cfg.Networks.Destroy(tctx), e.cfg.Volumes.ReleaseUnused(tctx))
	// Mounts of containers on the host are gone with their runs; what an earlier
	// crash left goes now.
	if list, err := os.ReadDir(e.stateDir(true)); err == nil {
		for _, d := range list {
			errs = append(errs, e.dropHostMounts(&unit{id: d.Name(), dir: filepath.Join(e.stateDir(false), d.Name())}))
		}
	}
	return errors.Join(errs...)
}

func (e *Engine) endOne(ctx context.Context, u *unit) error {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.ShutdownTimeout+40*time.Second)
	defer cancel()
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	if p, was := e.giveUp(u, true); was {
		return errors.Join(p.Wait(), u.settled(ctx))
	}
	r := u.rec.Load()
	sig, err := stopSignal(r, "")
	if err != nil {
		return err
	}
	patience := min(stopTimeout(r, nil), e.cfg.ShutdownTimeout)
	if patience < 0 {
		patience = e.cfg.ShutdownTimeout
	}
	// Not a user's wish about this container: "unless-stopped" starts it again.
	if err := e.halt(ctx, u, sig, patience, false); err != nil {
		return fmt.Errorf("cannot end container %s: %w", r.Name, err)
	}
	return u.settled(ctx)
}

// PoolDrained waits until nothing of ended containers is left to be cleared and,
// if full, the pool of parked sandboxes is full.
func (s *SystemService) PoolDrained(ctx context.Context, full bool) error {
	e := s.e
	for {
		e.mu.RLock()
		var one *unit
		for _, u := range e.tearing {
			one = u
			break
		}
		e.mu.RUnlock()
		if one == nil {
			break
		}
		if err := one.settled(ctx); err != nil {
			return err
		}
		// It leaves the list right behind that.
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for _, u := range e.all() {
		if err := u.settled(ctx); err != nil {
			return err
		}
	}
	for _, d := range e.drivers() {
		if err := d.Drained(ctx, full); err != nil {
			return err
		}
	}
	return e.cfg.Snapshots.Drain(ctx)
}
