package engine

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/checkpoint"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// CheckpointSink takes a checkpoint as it is made.
type CheckpointSink interface {
	// Write takes the tar.
	io.Writer
	// Tell takes what happens.
	Tell(api.CheckpointEvent) error
	// Confirm waits until the tar has arrived: nil means that it has, and that the
	// container is not needed here any more.
	Confirm(ctx context.Context) error
}

// CheckpointStream writes a container down to a sink and, when that confirms it,
// ends the container. In every other case the container goes on as it did before.
func (e *Engine) CheckpointStream(ctx context.Context, name string, o api.CheckpointStart, s CheckpointSink) error {
	if o.Cold {
		return e.streamCold(ctx, name, o, s)
	}
	u, t, c, err := e.checkpointer(ctx, name)
	if err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	if err := c.Checkpointable(ctx); err != nil {
		return checkpointFailed(r, err)
	}
	d, err := e.streamDraft(u)
	if err != nil {
		return checkpointFailed(r, err)
	}
	defer d.close()
	d.options(o.TCPEstablished, o.FileLocks)
	m := e.manifest(r, o.Volumes)
	m.WithImage = o.Image && r.Image.ID != ""
	m.TCPEstablished, m.FileLocks = o.TCPEstablished, o.FileLocks
	rounds := max(0, min(o.Rounds, 8))
	if rounds > 0 && !c.Tracks() {
		rounds = 0 // nobody could tell what has changed since
	}
	m.Rounds = rounds + 1
	x := &streaming{e: e, d: d, s: s, m: m, image: imageRef(r)}
	if x.w, err = checkpoint.NewWriter(s, m); err != nil {
		return err
	}
	if err := x.sendImage(ctx); err != nil {
		return checkpointFailed(r, err)
	}
	if err := x.precopy(ctx, c, rounds); err != nil {
		return checkpointFailed(r, err)
	}
	h, err := e.still(ctx, u, t, c)
	if err != nil {
		return checkpointFailed(r, err)
	}
	if err := x.last(ctx, h, c, r); err != nil {
		h.letGo(ctx)
		return checkpointFailed(r, err)
	}
	e.publish(u, events.ActionCheckpoint, nil)
	if o.LeaveRunning {
		h.letGo(ctx)
		return s.Tell(api.CheckpointEvent{Done: true})
	}
	if err := h.end(ctx); err != nil {
		return err
	}
	return x.done(ctx, u, o)
}

// streaming is a checkpoint on its way to a sink.
type streaming struct {
	e     *Engine
	d     *draft
	s     CheckpointSink
	m     *checkpoint.Manifest
	w     *checkpoint.Writer
	image string
}

// imageRef names the image so that it is saved with its name, if it has one still.
func imageRef(r *container.Record) string {
	if r.Image.Ref != "" {
		return r.Image.Ref
	}
	return r.Image.ID
}

// streamDraft makes a draft below the engine's own directory.
func (e *Engine) streamDraft(u *unit) (*draft, error) {
	place := e.checkpointDir(u.id)
	if err := os.MkdirAll(place, 0o700); err != nil {
		return nil, fault.New(fault.Internal, "cannot make the checkpoint's directory: %w", err)
	}
	return e.beginDraft(u, place, "stream."+newID()[:12])
}

// sendImage saves the image, which may take long, while the container still runs.
func (x *streaming) sendImage(ctx context.Context) error {
	if !x.m.WithImage {
		return nil
	}
	if err := x.s.Tell(api.CheckpointEvent{Stage: "image"}); err != nil {
		return err
	}
	ref := x.image
	if got, err := x.e.cfg.Images.Resolve(ctx, ref, ""); err != nil || got.ID.String() != x.m.Container.Image.ID {
		ref = x.m.Container.Image.ID
	}
	f, err := checkpoint.Create(x.d.dir, checkpoint.ImageName)
	if err != nil {
		return err
	}
	defer os.Remove(filepath.Join(x.d.path, checkpoint.ImageName))
	err = x.e.cfg.Images.Save(ctx, []string{ref}, nil, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return x.w.PutFile(x.d.dir, checkpoint.ImageName)
}

// precopy sends the memory while the container runs, as long as each round is
// notably smaller than the one before.
func (x *streaming) precopy(ctx context.Context, c runtime.Checkpointer, rounds int) error {
	var last int64
	for n := 1; n <= rounds; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := x.s.Tell(api.CheckpointEvent{Stage: "memory", Round: n}); err != nil {
			return err
		}
		if err := x.d.round(context.WithoutCancel(ctx), c, true); err != nil {
			return err
		}
		size := sizeOf(filepath.Join(x.d.path, checkpoint.RoundDir(x.d.rounds)))
		if err := x.w.PutDir(x.d.dir, checkpoint.RoundDir(x.d.rounds)); err != nil {
			return err
		}
		if n > 1 && size > last/2 {
			break
		}
		last = size
	}
	return nil
}

// last sends what must not change any more, and has it confirmed.
func (x *streaming) last(ctx context.Context, h *hold, c runtime.Checkpointer, r *container.Record) error {
	if err := x.s.Tell(api.CheckpointEvent{Stage: "processes", Frozen: h.at}); err != nil {
		return err
	}
	if err := x.d.round(context.WithoutCancel(ctx), c, false); err != nil {
		return err
	}
	if x.m.TCPEstablished {
		h.setQuiet(ctx, true)
	}
	x.d.describe(x.m)
	if err := x.w.PutDir(x.d.dir, checkpoint.RoundDir(x.d.rounds)); err != nil {
		return err
	}
	return x.rest(ctx, r)
}

// rest sends files and volumes, seals all and waits for the confirmation.
func (x *streaming) rest(ctx context.Context, r *container.Record) error {
	if err := x.s.Tell(api.CheckpointEvent{Stage: "files"}); err != nil {
		return err
	}
	if err := x.d.files(ctx, r, x.m); err != nil {
		return err
	}
	if err := x.w.PutFile(x.d.dir, checkpoint.LayerName); err != nil {
		return err
	}
	for i := range x.m.Volumes {
		if i == 0 {
			if err := x.s.Tell(api.CheckpointEvent{Stage: "volumes"}); err != nil {
				return err
			}
		}
		if err := x.w.PutFile(x.d.dir, checkpoint.VolumeName(i+1)); err != nil {
			return err
		}
	}
	if err := x.w.Final(x.m); err != nil {
		return err
	}
	if err := x.w.Close(); err != nil {
		return err
	}
	if err := x.s.Tell(api.CheckpointEvent{Ready: true}); err != nil {
		return err
	}
	if err := x.s.Confirm(ctx); err != nil {
		return fault.New(fault.Unavailable, "nobody has confirmed that it arrived; it goes on here: %w", err)
	}
	return nil
}

// done removes the container if that was asked for. The token is held.
func (x *streaming) done(ctx context.Context, u *unit, o api.CheckpointStart) error {
	ctx = context.WithoutCancel(ctx)
	u.mu.Lock()
	already := u.gone
	u.mu.Unlock()
	if o.Remove && !already {
		if err := x.e.remove(ctx, u, false); err != nil {
			return err
		}
	}
	return x.s.Tell(api.CheckpointEvent{Done: true})
}

// streamCold is a checkpoint without processes: a container that runs is stopped,
// and started again unless all has arrived.
func (e *Engine) streamCold(ctx context.Context, name string, o api.CheckpointStart, s CheckpointSink) (err error) {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	switch {
	case r.State.Status == mcontainer.StatePaused:
		return fault.New(fault.Conflict, "cannot checkpoint container %s: it is paused: unpause it first", r.Name)
	case r.State.Status == mcontainer.StateRemoving, r.State.Status == mcontainer.StateDead:
		return fault.New(fault.Conflict, "cannot checkpoint container %s: it is marked for removal", r.Name)
	case o.LeaveRunning:
		return fault.New(fault.Invalid, "cannot leave a container running whose processes are not written down")
	case r.Ephemeral:
		return fault.New(fault.Unsupported, "cannot checkpoint container %s: it is removed as soon as it stops (--rm)", r.Name)
	}
	runs := u.running() != nil
	d, err := e.streamDraft(u)
	if err != nil {
		return checkpointFailed(r, err)
	}
	defer d.close()
	m := e.manifest(r, o.Volumes)
	m.Cold, m.Stopped, m.WithImage = true, !runs, o.Image && r.Image.ID != ""
	x := &streaming{e: e, d: d, s: s, m: m, image: imageRef(r)}
	if x.w, err = checkpoint.NewWriter(s, m); err != nil {
		return err
	}
	if err := x.sendImage(ctx); err != nil {
		return checkpointFailed(r, err)
	}
	if runs {
		if err := s.Tell(api.CheckpointEvent{Stage: "stop", Frozen: time.Now()}); err != nil {
			return checkpointFailed(r, err)
		}
		if err := e.markMoving(u.id, true); err != nil {
			return checkpointFailed(r, err)
		}
		defer func() {
			if err != nil {
				e.startAfterMove(ctx, u, r)
			}
			_ = e.markMoving(u.id, false)
		}()
		sig, serr := stopSignal(r, "")
		if serr != nil {
			return serr
		}
		if err := e.halt(context.WithoutCancel(ctx), u, sig, stopTimeout(r, o.Timeout), true); err != nil {
			return err
		}
		e.publish(u, events.ActionStop, nil)
		if err := u.settled(context.WithoutCancel(ctx)); err != nil {
			return err
		}
	}
	if err := x.rest(ctx, r); err != nil {
		return checkpointFailed(r, err)
	}
	// From here on it is the other one that counts.
	if runs {
		if err := e.markMoving(u.id, false); err != nil {
			e.log.Warn("cannot forget that a container is carried elsewhere", "container", u.id, "cause", err)
		}
	}
	if derr := x.done(ctx, u, o); derr != nil {
		e.log.Warn("cannot finish carrying a container elsewhere", "container", u.id, "cause", derr)
	}
	return nil
}

// startAfterMove starts a container that was to be carried elsewhere and was not.
func (e *Engine) startAfterMove(ctx context.Context, u *unit, r *container.Record) {
	p, err := e.launch(context.WithoutCancel(ctx), u, launch{})
	if err == nil {
		err = p.Wait()
	}
	if err != nil {
		e.log.Error("cannot start a container again that was to be carried elsewhere", "container", u.id, "name", r.Name, "cause", err)
	}
}
