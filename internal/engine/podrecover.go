package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/namespace"
	net "github.com/cloudos-io/cloudos/internal/network"
)

// loadPods takes the stored pods in, before the containers.
func (e *Engine) loadPods() error {
	if err := e.loadPodImages(); err != nil {
		return err
	}
	bad, err := e.cfg.Durable.Load(PodBucket, func(key string, value []byte) error {
		r, err := container.DecodePod(value)
		if err != nil {
			return err
		}
		if r.ID != key {
			return fmt.Errorf("the record is of pod %s", r.ID)
		}
		p := e.newPod(r)
		if err := e.names.Reserve(p.name, r.ID); err != nil {
			return err
		}
		e.pods.m[r.ID] = p
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot load the pods: %w", err)
	}
	for _, b := range bad {
		e.log.Error("a pod's record cannot be used and was set aside; the pod is lost", "pod", b.Key, "cause", b.Err)
	}
	return nil
}

// restorePods takes over the pauses of former daemons and finds out which pods
// still stand.
func (e *Engine) restorePods(ctx context.Context) (live []net.Live) {
	for _, p := range e.pods.m {
		r := p.rec.Load()
		if !r.Ready {
			live = append(live, e.liveNetwork(p, r)...) // until it is stopped to the end
			continue
		}
		stands := r.BootID == e.bootID && namespace.Mounted(p.dir)
		if stands && r.PID == container.NamespacePod {
			t, err := e.cfg.Driver.Restore(ctx, p.id)
			switch {
			case err == nil && !gone(t):
				e.setPause(p, t)
			case err == nil:
				_ = t.Delete(ctx)
				fallthrough
			default:
				e.log.Error("a pod's pause is gone; the pod is not ready any more", "pod", p.id, "cause", err)
				stands = false
			}
		}
		if !stands {
			e.notReady(p)
		}
		live = append(live, e.liveNetwork(p, r)...)
	}
	return live
}

func (e *Engine) liveNetwork(p *pod, r *container.Pod) []net.Live {
	if r.Network == container.NamespaceHost || !namespace.Mounted(p.dir) {
		return nil
	}
	f, err := os.Open(namespace.Path(p.dir, "net"))
	if err != nil {
		return nil
	}
	return []net.Live{{ContainerID: p.id, NetNS: f}}
}

// settlePods clears what belongs to no pod: half-made ones, and the remains of
// removed ones. Networks were restored before.
func (e *Engine) settlePods(ctx context.Context) {
	var live []net.Pod
	for _, p := range e.allPods() {
		if r := p.rec.Load(); r.Network != container.NamespaceHost && namespace.Mounted(p.dir) {
			live = append(live, e.podRequest(p, r))
		}
	}
	if e.cfg.PodNetwork != nil {
		rctx, cancel := context.WithTimeout(ctx, time.Minute)
		if err := e.cfg.PodNetwork.Restore(rctx, live); err != nil {
			e.log.Warn("cannot restore all of the pods' networks", "cause", err)
		}
		cancel()
	}
	for _, p := range e.allPods() {
		if p.rec.Load().Ready || !namespace.Mounted(p.dir) {
			continue
		}
		e.spawn(func() { // its stop was cut short, or its pause is gone
			if p.acquire(e.ctx) != nil {
				return
			}
			defer p.release()
			if err := e.lowerPod(e.background(), p); err != nil {
				e.log.Warn("cannot finish stopping a pod", "pod", p.id, "cause", err)
			}
		})
	}
	list, err := os.ReadDir(e.podsDir())
	if err != nil {
		return
	}
	for _, d := range list {
		if e.pods.m[d.Name()] != nil || !container.ValidID(d.Name()) {
			continue
		}
		dir := filepath.Join(e.podsDir(), d.Name())
		if err := errors.Join(namespace.Drop(dir), os.Remove(dir)); err != nil {
			e.log.Warn("cannot remove a directory that belongs to no pod", "path", d.Name(), "cause", err)
		}
	}
}

// endPods stops every pod when the engine ends its containers.
func (e *Engine) endPods(ctx context.Context) error {
	var errs []error
	for _, p := range e.allPods() {
		if err := p.acquire(ctx); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, e.lowerPod(ctx, p), ignoreMissing(os.Remove(p.dir)))
		p.release()
	}
	return errors.Join(append(errs, namespace.Unprepare(e.podsDir()))...)
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// isPause tells whether a task is a pod's pause.
func (e *Engine) isPause(id string) bool {
	p := e.pods.m[id]
	if p == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pause != nil
}
