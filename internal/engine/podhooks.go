package engine

import (
	"context"
	"errors"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// SetPodHooks gives the engine its hooks, which in turn need the engine. It must
// be called before Recover.
func (e *Engine) SetPodHooks(h PodHooks) { e.hooks = h }

// hookCreate lets the hooks change the spec of a pod's container.
func (e *Engine) hookCreate(ctx context.Context, r *container.Record, spec *specs.Spec) error {
	if e.hooks == nil || r.Pod == nil {
		return nil
	}
	_, p, err := e.podOf(r)
	if err != nil {
		return err
	}
	changes, err := e.hooks.ContainerCreate(ctx, p, r, spec)
	if err == nil {
		err = e.applyLimits(ctx, changes)
	}
	if err != nil {
		return fmt.Errorf("a plugin refuses the container: %w", err)
	}
	return nil
}

// hookUpdate lets the hooks change the limits that a pod's container is to get.
func (e *Engine) hookUpdate(ctx context.Context, r *container.Record, res *specs.LinuxResources) error {
	if e.hooks == nil {
		return nil
	}
	_, p, err := e.podOf(r)
	if err != nil {
		return err
	}
	changes, err := e.hooks.ContainerUpdate(ctx, p, r, res)
	if err == nil {
		err = e.applyLimits(ctx, changes)
	}
	if err != nil {
		return fmt.Errorf("a plugin refuses the new limits: %w", err)
	}
	return nil
}

// hookContainer tells the hooks about a pod's container; what they ask for in
// return is done as far as it goes.
func (e *Engine) hookContainer(r *container.Record, tell func(h PodHooks, ctx context.Context, p *container.Pod) []LimitChange) {
	if e.hooks == nil || r.Pod == nil {
		return
	}
	_, p, err := e.podOf(r)
	if err != nil {
		return // the pod went with it
	}
	ctx := e.background()
	if err := e.applyLimits(ctx, tell(e.hooks, ctx, p)); err != nil {
		e.log.Warn("limits that a plugin asked for could not be set", "cause", err)
	}
}

// applyLimits changes the limits of containers that run. A container that has
// ended meanwhile has none.
func (e *Engine) applyLimits(ctx context.Context, changes []LimitChange) error {
	var errs error
	for _, c := range changes {
		if err := e.PodContainerLimit(ctx, c.ID, c.Resources); err != nil && !c.Optional {
			errs = errors.Join(errs, err)
		}
	}
	return errs
}

// PodContainerLimit changes limits of a pod's container in the kernel alone: they
// are a plugin's, and the record keeps what Kubernetes has asked for.
func (e *Engine) PodContainerLimit(ctx context.Context, id string, res *specs.LinuxResources) error {
	u, err := e.memberUnit(id)
	if err != nil {
		return err
	}
	t := u.running()
	if t == nil {
		return fault.New(fault.Conflict, "cannot change the limits of container %s: it does not run", short(u.id))
	}
	if err := t.Update(ctx, res); err != nil {
		return fault.New(fault.Of(err), "cannot change the limits of container %s: %w", short(u.id), err)
	}
	return nil
}
