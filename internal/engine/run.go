package engine

import (
	"context"

	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/runtime"
)

// ContainerRun creates a container, attaches to it, starts it and begins to
// wait, with one stored change. If it fails, nothing is left.
func (e *Engine) ContainerRun(ctx context.Context, req CreateRequest, attach AttachRequest) (RunningContainer, error) {
	u, warnings, err := e.create(ctx, req)
	if err != nil {
		return RunningContainer{}, err
	}
	bg := context.WithoutCancel(ctx)
	if err := u.acquire(ctx); err != nil {
		e.discard(bg, u)
		return RunningContainer{}, err
	}
	r := u.rec.Load()
	out := RunningContainer{ID: u.id, Warnings: warnings, Wait: u.wait(mcontainer.WaitConditionNextExit)}
	o := attachOptions(r, attach)
	l := launch{create: true, warnings: &out.Warnings}
	if o != (runtime.AttachOptions{}) {
		l.attach = newAttachment(o)
	}
	p, err := e.launch(bg, u, l)
	u.release()
	if err != nil {
		e.discard(bg, u)
		return RunningContainer{}, err
	}
	if l.attach != nil {
		out.Streams = streamsFor(r, l.attach.streams)
	}
	if err := p.Wait(); err != nil {
		e.log.Error("cannot store a container that runs", "container", u.id, "cause", err)
		if out.Streams.Close != nil {
			_ = out.Streams.Close()
		}
		_ = e.removeUnit(bg, u, true, true)
		return RunningContainer{}, err
	}
	return out, nil
}
