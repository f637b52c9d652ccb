package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
	"github.com/cloudos-io/cloudos/internal/compose/spec"
)

// Options of Execute.
type Options struct {
	// Timeout is for stops, in seconds; nil is each container's own.
	Timeout *int
	// RenewVolumes makes anonymous volumes anew instead of handing them on.
	RenewVolumes bool
	// RemoveVolumes removes anonymous volumes with their containers.
	RemoveVolumes bool
	// Signal is what a kill sends.
	Signal string
	// OnBarrier runs at a plan's barrier.
	OnBarrier func(ctx context.Context) error
	// HookOutput gets what hooks write; nil drops it.
	HookOutput func(service, container string) Output
	// Failed tells of steps that failed although the plan goes on.
	Warn func(text string)
}

// run is one execution of a plan.
type run struct {
	e  *Engine
	p  *types.Project
	pr display.Progress
	o  Options

	mu sync.Mutex
	// containers is what there is by now; made gives the ids of what steps made.
	containers []container.Summary
	made       map[place]string
}

// place is a container's in its project.
type place struct {
	service string
	number  int
}

// Execute carries a plan out: every step as soon as those before it are done. The
// first failure keeps what has not begun from beginning.
func (e *Engine) Execute(ctx context.Context, p *types.Project, pl *plan.Plan, ob plan.Observed, pr display.Progress, o Options) error {
	r := &run{e: e, p: p, pr: pr, o: o, containers: slices.Clone(ob.Containers), made: map[place]string{}}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make([]chan struct{}, len(pl.Steps))
	for i := range done {
		done[i] = make(chan struct{})
	}
	var wg sync.WaitGroup
	for i := range pl.Steps {
		s := &pl.Steps[i]
		wg.Add(1)
		go func() {
			defer wg.Done()
			for _, a := range s.After {
				select {
				case <-done[a]:
				case <-ctx.Done():
					return
				}
			}
			if ctx.Err() != nil {
				return
			}
			if err := r.step(ctx, s); err != nil {
				cancel(err)
				return
			}
			close(done[s.ID])
		}()
	}
	wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// step does one step.
func (r *run) step(ctx context.Context, s *plan.Step) error {
	switch s.Kind {
	case plan.Keep:
		r.show(s, "Running", display.Done)
		return nil
	case plan.Wait:
		return r.wait(ctx, s)
	case plan.Barrier:
		if r.o.OnBarrier == nil || r.e.DryRun {
			return nil
		}
		return r.o.OnBarrier(ctx)
	}
	release, err := r.e.slot(ctx)
	if err != nil {
		return err
	}
	defer release()
	v := verbs[s.Kind]
	// A network that is made anew is told when it is gone.
	if !silent(s) && (s.Kind != plan.RemoveNetwork || s.Why == "") {
		r.show(s, v.doing, display.Working)
	}
	if r.e.DryRun {
		r.show(s, v.done, display.Done)
		return nil
	}
	err = r.do(ctx, s)
	var note *noted
	switch {
	case errors.As(err, &note):
		r.show(s, note.text, display.Warning)
		return nil
	case err != nil:
		if ctx.Err() == nil {
			r.show(s, "Error "+err.Error(), display.Failed)
		}
		return err
	}
	if !silent(s) {
		r.show(s, v.done, display.Done)
	}
	return nil
}

// silent steps are parts of what others tell.
func silent(s *plan.Step) bool {
	return s.Kind == plan.DetachNetwork || s.Kind == plan.AttachNetwork
}

// noted is a failure that is told but does not count.
type noted struct{ text string }

func (n *noted) Error() string { return n.text }

var verbs = map[plan.Kind]struct{ doing, done string }{
	plan.CreateNetwork: {"Creating", "Created"}, plan.DetachNetwork: {"Disconnecting", "Disconnected"}, plan.AttachNetwork: {"Connecting", "Connected"}, plan.RemoveNetwork: {"Removing", "Removed"},
	plan.CreateVolume: {"Creating", "Created"}, plan.RemoveVolume: {"Removing", "Removed"}, plan.RemoveImage: {"Removing", "Removed"},
	plan.Create: {"Creating", "Created"}, plan.Recreate: {"Recreate", "Recreated"}, plan.Rename: {"Renaming", "Renamed"},
	plan.Start: {"Starting", "Started"}, plan.Stop: {"Stopping", "Stopped"}, plan.Restart: {"Restarting", "Started"}, plan.Kill: {"Killing", "Killed"},
	plan.Pause: {"Pausing", "Paused"}, plan.Unpause: {"Unpausing", "Unpaused"}, plan.Remove: {"Removing", "Removed"},
}

func (r *run) show(s *plan.Step, status string, st display.State) {
	id := title(s.Name)
	switch s.Kind {
	case plan.CreateNetwork, plan.RemoveNetwork, plan.DetachNetwork, plan.AttachNetwork:
		id = "Network " + s.Name
	case plan.CreateVolume, plan.RemoveVolume:
		id = "Volume " + s.Name
	case plan.RemoveImage:
		id = "Image " + s.Name
	}
	event(r.pr, id, status, st)
}

func (r *run) do(ctx context.Context, s *plan.Step) error {
	c := r.e.Client
	switch s.Kind {
	case plan.CreateNetwork:
		return r.createNetwork(ctx, s)
	case plan.DetachNetwork:
		return gone(c.NetworkDisconnect(ctx, s.Name, network.DisconnectRequest{Container: s.Container, Force: true}))
	case plan.AttachNetwork:
		svc := r.p.Services[s.Service]
		e, err := spec.Endpoint(r.p, &svc, s.Key, spec.Options{Separator: r.e.Separator, Number: s.Number, Aliases: true, Links: r.links(&svc, s.Number)})
		if err != nil {
			return err
		}
		return gone(c.NetworkConnect(ctx, s.Name, network.ConnectRequest{Container: s.Container, EndpointConfig: e}))
	case plan.RemoveNetwork:
		return r.removeNetwork(ctx, s)
	case plan.CreateVolume:
		req, err := spec.Volume(r.p, s.Key)
		if err == nil {
			_, err = c.VolumeCreate(ctx, req)
		}
		return err
	case plan.RemoveVolume:
		return inUse(gone(c.VolumeRemove(ctx, s.Name, true)))
	case plan.RemoveImage:
		_, err := c.ImageRemove(ctx, s.Name, client.ImageRemoveOptions{})
		return inUse(gone(err))
	case plan.Create:
		return r.create(ctx, s)
	case plan.Recreate:
		return r.recreate(ctx, s)
	case plan.Rename:
		return c.ContainerRename(ctx, s.Container, s.Name)
	case plan.Start:
		return r.start(ctx, s)
	case plan.Stop:
		return r.stop(ctx, s)
	case plan.Restart:
		return r.restart(ctx, s)
	case plan.Kill:
		return gone(c.ContainerKill(ctx, s.Container, r.o.Signal))
	case plan.Pause:
		return c.ContainerPause(ctx, s.Container)
	case plan.Unpause:
		return c.ContainerUnpause(ctx, s.Container)
	case plan.Remove:
		return r.remove(ctx, s)
	}
	return fmt.Errorf("cannot do step %s: it is not known", s.Kind)
}

// find gives the id of a step's container.
func (r *run) find(s *plan.Step) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id, ok := r.made[place{s.Service, s.Number}]; ok {
		return id, nil
	}
	if s.Container != "" {
		return s.Container, nil
	}
	return "", fmt.Errorf("cannot find container %s: was it removed?", s.Name)
}

func (r *run) first(service string) (string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return plan.First(r.containers, service)
}

// note remembers a container that was made, in place of old.
func (r *run) note(s *plan.Step, id, old string, labels map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.made[place{s.Service, s.Number}] = id
	r.containers = slices.DeleteFunc(r.containers, func(c container.Summary) bool { return c.ID == old })
	r.containers = append(r.containers, container.Summary{ID: id, Names: []string{"/" + s.Name}, Labels: labels})
}

// request makes the create request of a step's container.
func (r *run) request(ctx context.Context, s *plan.Step, replaced *container.Summary) (client.ContainerCreateOptions, error) {
	svc, ok := r.p.Services[s.Service]
	if !ok {
		return client.ContainerCreateOptions{}, fmt.Errorf("no such service: %s", s.Service)
	}
	svc, err := plan.Resolve(svc, r.first)
	if err != nil {
		return client.ContainerCreateOptions{}, err
	}
	o := spec.Options{Separator: r.e.Separator, Number: s.Number, Aliases: true, Platform: r.p.Environment["DOCKER_DEFAULT_PLATFORM"]}
	o.Links = r.links(&svc, s.Number)
	if replaced != nil {
		o.Labels = map[string]string{model.LabelReplace: model.ShortName(replaced)}
		if !r.o.RenewVolumes && slices.ContainsFunc(replaced.Mounts, func(m container.MountPoint) bool { return m.Type == mount.TypeVolume }) {
			o.Inherit = replaced.Mounts
			img, _, err := r.e.Client.ImageInspect(ctx, model.ImageName(&svc, r.p.Name, r.e.Separator), "")
			if err == nil && img.Config != nil {
				o.ImageVolumes = img.Config.Volumes
			}
		}
	}
	return spec.Container(r.p, svc, s.Name, o)
}

// links turns a service's links to services into links to containers.
func (r *run) links(s *types.ServiceConfig, number int) []string {
	var out []string
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range s.Links {
		target, alias, ok := strings.Cut(l, ":")
		if !ok {
			alias = target
		}
		for i := range r.containers {
			c := &r.containers[i]
			if model.Service(c) != target || model.IsOneOff(c) {
				continue
			}
			name := model.Name(c)
			out = append(out, name+":"+alias, name+":"+fmt.Sprintf("%s%s%d", target, r.e.Separator, number), name+":"+fmt.Sprintf("%s%s%s%s%d", r.p.Name, r.e.Separator, target, r.e.Separator, number))
		}
	}
	for _, l := range s.ExternalLinks {
		target, alias, ok := strings.Cut(l, ":")
		if !ok {
			alias = target
		}
		out = append(out, target+":"+alias)
	}
	return out
}

func (r *run) create(ctx context.Context, s *plan.Step) error {
	req, err := r.request(ctx, s, nil)
	if err != nil {
		return err
	}
	resp, err := r.e.Client.ContainerCreate(ctx, req)
	if err != nil {
		return err
	}
	r.warnings(s.Service, resp.Warnings)
	r.note(s, resp.ID, "", req.Config.Labels)
	return nil
}

func (r *run) warnings(service string, list []string) {
	for _, w := range list {
		r.pr.Event(display.Event{ID: service, Status: "Warning " + w, State: display.Warning})
	}
}

// recreate puts a new container in the place of another. The new one is made
// under a name that holds the old one's id, so that whoever comes after a crash
// sees what was going on.
func (r *run) recreate(ctx context.Context, s *plan.Step) error {
	c := r.e.Client
	r.mu.Lock()
	i := slices.IndexFunc(r.containers, func(c container.Summary) bool { return c.ID == s.Container })
	if i < 0 {
		r.mu.Unlock()
		return fmt.Errorf("cannot replace container %s: it is gone", s.Name)
	}
	old := r.containers[i]
	r.mu.Unlock()
	req, err := r.request(ctx, s, &old)
	if err != nil {
		return err
	}
	req.Name = old.ID[:12] + "_" + s.Name
	resp, err := c.ContainerCreate(ctx, req)
	if client.IsConflict(err) && r.clearLeftover(ctx, req.Name) {
		resp, err = c.ContainerCreate(ctx, req)
	}
	if err != nil {
		return err
	}
	r.warnings(s.Service, resp.Warnings)
	if err := gone(c.ContainerStop(ctx, old.ID, client.StopOptions{Timeout: r.o.Timeout})); err != nil {
		return err
	}
	if err := gone(c.ContainerRemove(ctx, old.ID, client.RemoveOptions{})); err != nil {
		return err
	}
	if err := c.ContainerRename(ctx, resp.ID, s.Name); err != nil {
		return err
	}
	r.note(s, resp.ID, old.ID, req.Config.Labels)
	return nil
}

// clearLeftover removes what a run that was killed has left under the name of a
// replacement: the engine may have made it after we looked. It tells whether the
// name is free now.
func (r *run) clearLeftover(ctx context.Context, name string) bool {
	c, _, err := r.e.Client.ContainerInspect(ctx, name, false)
	if err != nil {
		return client.IsNotFound(err)
	}
	l := c.Config.Labels
	if l[model.LabelProject] != r.p.Name || l[model.LabelReplace] == "" || c.State.Running {
		return false
	}
	return gone(r.e.Client.ContainerRemove(ctx, c.ID, client.RemoveOptions{})) == nil
}

func (r *run) start(ctx context.Context, s *plan.Step) error {
	id, err := r.find(s)
	if err != nil {
		return err
	}
	svc := r.p.Services[s.Service]
	if err := r.e.putFiles(ctx, r.p, &svc, id); err != nil {
		return err
	}
	if err := r.e.Client.ContainerStart(ctx, id, ""); err != nil {
		return err
	}
	return r.hooks(ctx, &svc, svc.PostStart, id, s.Name)
}

func (r *run) hooks(ctx context.Context, s *types.ServiceConfig, hooks []types.ServiceHook, id, name string) error {
	for _, h := range hooks {
		var out Output
		if r.o.HookOutput != nil {
			out = r.o.HookOutput(s.Name, name)
		}
		if err := r.e.Hook(ctx, s, h, id, out); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) stop(ctx context.Context, s *plan.Step) error {
	svc := r.p.Services[s.Service]
	if err := r.preStop(ctx, &svc, s); err != nil {
		return err
	}
	return gone(r.e.Client.ContainerStop(ctx, s.Container, client.StopOptions{Timeout: r.o.Timeout}))
}

// preStop runs hooks before a stop; a container that has stopped by itself has
// no need of them.
func (r *run) preStop(ctx context.Context, svc *types.ServiceConfig, s *plan.Step) error {
	if len(svc.PreStop) == 0 {
		return nil
	}
	err := r.hooks(ctx, svc, svc.PreStop, s.Container, s.Name)
	if client.IsNotFound(err) || client.IsConflict(err) {
		return nil
	}
	return err
}

func (r *run) restart(ctx context.Context, s *plan.Step) error {
	svc := r.p.Services[s.Service]
	if err := r.preStop(ctx, &svc, s); err != nil {
		return err
	}
	if err := r.e.Client.ContainerRestart(ctx, s.Container, client.StopOptions{Timeout: r.o.Timeout}); err != nil {
		return err
	}
	return r.hooks(ctx, &svc, svc.PostStart, s.Container, s.Name)
}

func (r *run) remove(ctx context.Context, s *plan.Step) error {
	if s.Gentle {
		r.show(s, "Stopping", display.Working)
		if err := r.stop(ctx, s); err != nil {
			return err
		}
		r.show(s, "Stopped", display.Done)
		r.show(s, "Removing", display.Working)
	}
	err := gone(r.e.Client.ContainerRemove(ctx, s.Container, client.RemoveOptions{Force: true, Volumes: r.o.RemoveVolumes}))
	if client.IsConflict(err) { // somebody else removes it
		err = r.vanish(ctx, s.Container)
	}
	if err == nil {
		r.mu.Lock()
		r.containers = slices.DeleteFunc(r.containers, func(c container.Summary) bool { return c.ID == s.Container })
		r.mu.Unlock()
	}
	return err
}

// vanish waits for a removal that is under way.
func (r *run) vanish(ctx context.Context, id string) error {
	d := 10 * time.Millisecond
	for deadline := time.Now().Add(30 * time.Second); ; {
		_, _, err := r.e.Client.ContainerInspect(ctx, id, false)
		if err != nil {
			return gone(err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("cannot remove container %s: it is being removed by somebody else, and has not gone within 30 seconds", id[:12])
		}
		if err := pause(ctx, &d); err != nil {
			return err
		}
	}
}
