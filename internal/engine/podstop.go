package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/namespace"
	"github.com/cloudos-io/cloudos/internal/store"
)

// PodStop ends a pod: its containers are killed and its network is given back.
// A pod that is stopped, or gone, stays so.
func (e *Engine) PodStop(ctx context.Context, id string) error {
	p, err := e.lookupPod(id)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	return e.lowerPod(context.WithoutCancel(ctx), p)
}

// lowerPod stops a pod; its token is held. Every step can be repeated.
func (e *Engine) lowerPod(ctx context.Context, p *pod) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	was := p.rec.Load().Ready
	var stored store.Pending
	if was {
		// No container starts in it from here on.
		var err error
		if _, stored, err = e.changePod(p, func(n *container.Pod) { n.Ready = false }); err != nil {
			return err
		}
	}
	err := e.haltMembers(ctx, p)
	if serr := stored.Wait(); err == nil {
		err = serr // a pod that is said to be ready has its network
	}
	if err == nil {
		err = e.endNetwork(ctx, p)
	}
	if err != nil {
		return fmt.Errorf("cannot stop pod %s: %w", short(p.id), err)
	}
	e.endPause(ctx, p)
	if err := namespace.Drop(p.dir); err != nil {
		return err
	}
	if was {
		if e.hooks != nil {
			e.hooks.PodStop(ctx, p.rec.Load())
		}
		e.podEvent(p, events.ActionStop)
	}
	return nil
}

// haltMembers kills what runs of a pod, all at the same time.
func (e *Engine) haltMembers(ctx context.Context, p *pod) error {
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for _, u := range e.members(p.id) {
		wg.Go(func() {
			e.killForRemoval(ctx, u) // starts under way see the pod's state
			err := u.acquire(ctx)
			if err == nil {
				err = e.halt(ctx, u, int(unix.SIGKILL), 0, false) // nothing restarts it
				u.release()
			}
			if err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// endNetwork gives a pod's network back, once.
func (e *Engine) endNetwork(ctx context.Context, p *pod) error {
	r := p.rec.Load()
	if r.Network == container.NamespaceHost || len(r.IPs) == 0 && r.Detail == nil && !namespace.Mounted(p.dir) {
		return nil
	}
	if err := e.cfg.PodNetwork.Teardown(ctx, e.podRequest(p, r)); err != nil {
		return err
	}
	// Lost in a power cut, this is done again.
	_, _, err := e.changePod(p, func(n *container.Pod) { n.IPs, n.Detail = nil, nil })
	return err
}

// PodRemove removes a pod and its containers; those that run are killed. A pod
// that is gone stays so.
func (e *Engine) PodRemove(ctx context.Context, id string) error {
	p, err := e.lookupPod(id)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	return e.erasePod(context.WithoutCancel(ctx), p)
}

func (e *Engine) erasePod(ctx context.Context, p *pod) error {
	p.mu.Lock()
	already := p.gone
	p.mu.Unlock()
	if already {
		return nil
	}
	if err := e.lowerPod(ctx, p); err != nil {
		return err
	}
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for _, u := range e.members(p.id) {
		wg.Go(func() {
			if err := e.removeUnit(ctx, u, true, true); err != nil && !fault.Is(err, fault.NotFound) {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot remove pod %s: %w", short(p.id), err)
	}
	if err := os.Remove(p.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot remove pod %s: %w", short(p.id), err)
	}
	p.mu.Lock()
	p.gone = true // no change may bring the record back
	p.mu.Unlock()
	if err := e.cfg.Durable.Delete(PodBucket, p.id).Wait(); err != nil {
		p.mu.Lock()
		p.gone = false
		p.mu.Unlock()
		return fmt.Errorf("cannot remove pod %s: %w", short(p.id), err)
	}
	e.pods.mu.Lock()
	delete(e.pods.m, p.id)
	e.pods.mu.Unlock()
	e.names.Release(p.name, p.id)
	if e.hooks != nil {
		e.hooks.PodRemove(ctx, p.rec.Load())
	}
	e.podEvent(p, events.ActionDestroy)
	return nil
}
