package engine

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

// ContainerCommit makes an image of a container's changes and returns its id.
func (e *Engine) ContainerCommit(ctx context.Context, o CommitOptions) (string, error) {
	u, err := e.lookup(o.Container)
	if err != nil {
		return "", err
	}
	if err := u.acquire(ctx); err != nil {
		return "", err
	}
	defer u.release()
	r := u.rec.Load()
	if r.State.Status == mcontainer.StateRemoving || r.State.Status == mcontainer.StateDead {
		return "", fault.New(fault.Conflict, "cannot commit container %s: it is marked for removal", u.id)
	}
	req, err := e.commitRequest(ctx, r, o)
	if err != nil {
		return "", err
	}
	if t := u.running(); t != nil {
		if o.Pause && r.State.Status == mcontainer.StateRunning {
			if err := t.Pause(ctx); err != nil {
				return "", fmt.Errorf("cannot pause the container for the commit: %w", err)
			}
			defer func() { _ = t.Resume(context.WithoutCancel(ctx)) }()
		}
	} else if err := u.settled(ctx); err != nil {
		return "", err
	}
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := e.cfg.Snapshots.Diff(ctx, r.ID, pw)
		pw.CloseWithError(err)
		done <- err
	}()
	id, err := e.cfg.Images.Commit(ctx, req, pr)
	pr.Close() // ends the writer if the reader gave up
	if derr := <-done; err == nil {
		err = derr
	}
	if err != nil {
		return "", fmt.Errorf("cannot commit container %s: %w", r.Name, err)
	}
	e.publish(u, events.ActionCommit, map[string]string{"comment": o.Comment, "imageID": id.String(), "imageRef": o.Ref})
	return id.String(), nil
}

// commitRequest puts the new image's configuration together: the container's,
// what the request says, the changes.
func (e *Engine) commitRequest(ctx context.Context, r *container.Record, o CommitOptions) (image.CommitRequest, error) {
	cfg := *r.Config
	if o.Config != nil {
		overlayConfig(&cfg, o.Config)
	}
	req := image.CommitRequest{
		Ref: o.Ref, Author: o.Author, Comment: o.Comment, Created: time.Now().UTC(), Changes: o.Changes,
		CreatedBy: strings.TrimSpace(r.Path + " " + strings.Join(r.Args, " ")),
	}
	c := &req.Config
	c.User, c.Env, c.Entrypoint, c.Cmd, c.WorkingDir = cfg.User, cfg.Env, cfg.Entrypoint, cfg.Cmd, cfg.WorkingDir
	c.Labels, c.StopSignal, c.Shell, c.Healthcheck = cfg.Labels, cfg.StopSignal, cfg.Shell, cfg.Healthcheck
	if len(cfg.Volumes) > 0 {
		c.Volumes = cfg.Volumes
	}
	for p := range cfg.ExposedPorts {
		if c.ExposedPorts == nil {
			c.ExposedPorts = map[string]struct{}{}
		}
		c.ExposedPorts[p.String()] = struct{}{}
	}
	if r.Image.ID != "" {
		parent, err := e.cfg.Images.Resolve(ctx, r.Image.ID, "")
		if err != nil {
			return req, fmt.Errorf("cannot find the container's image: %w", err)
		}
		req.Parent = parent
	}
	return req, nil
}

// overlayConfig lets what a commit's request sets win.
func overlayConfig(c, over *mcontainer.Config) {
	set := func(to *string, v string) {
		if v != "" {
			*to = v
		}
	}
	set(&c.User, over.User)
	set(&c.WorkingDir, over.WorkingDir)
	set(&c.StopSignal, over.StopSignal)
	if len(over.Entrypoint) > 0 {
		c.Entrypoint, c.Cmd = over.Entrypoint, over.Cmd
	} else if len(over.Cmd) > 0 {
		c.Cmd = over.Cmd
	}
	c.Env = slices.Clone(c.Env)
	for _, e := range over.Env {
		setEnv(&c.Env, e)
	}
	c.Labels = joinMaps(c.Labels, over.Labels)
	c.Volumes = joinMaps(c.Volumes, over.Volumes)
	c.ExposedPorts = joinMaps(c.ExposedPorts, over.ExposedPorts)
	if over.Healthcheck != nil {
		c.Healthcheck = over.Healthcheck
	}
	if len(over.Shell) > 0 {
		c.Shell = over.Shell
	}
}

func joinMaps[K comparable, V any](a, b map[K]V) map[K]V {
	if len(b) == 0 {
		return a
	}
	out := make(map[K]V, len(a)+len(b))
	maps.Copy(out, a)
	maps.Copy(out, b)
	return out
}

func setEnv(env *[]string, e string) {
	k, _, _ := strings.Cut(e, "=")
	for i, have := range *env {
		if hk, _, _ := strings.Cut(have, "="); hk == k {
			(*env)[i] = e
			return
		}
	}
	*env = append(*env, e)
}
