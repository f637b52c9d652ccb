// Package engine carries the plans of Compose out over the engine's client: it
// observes what there is, gets images, does the steps of a plan as soon as those
// before them are done, waits for health, and follows containers' output.
package engine

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/registry"
	"golang.org/x/sync/errgroup"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
)

// Config of New.
type Config struct {
	Client *client.Client
	// Auth finds credentials for an image's registry, nil for none.
	Auth func(ctx context.Context, image string) (*registry.AuthConfig, error)
	// Builder runs `servin build` with arguments and environment, and gives its
	// exit code.
	Builder func(ctx context.Context, args, env []string, out io.Writer) (int, error)
	// Separator stands between the parts of names.
	Separator string
	// Parallel bounds calls to the engine at a time.
	Parallel int
	DryRun   bool
}

// Engine does things to a project's objects.
type Engine struct {
	Config
	slots chan struct{}
}

// defaultParallel bounds what runs at a time when nobody says.
const defaultParallel = 32

// New returns an Engine.
func New(cfg Config) *Engine {
	n := cfg.Parallel
	if n <= 0 {
		n = defaultParallel
	}
	return &Engine{Config: cfg, slots: make(chan struct{}, n)}
}

// slot waits for its turn.
func (e *Engine) slot(ctx context.Context) (release func(), err error) {
	select {
	case e.slots <- struct{}{}:
		return func() { <-e.slots }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// OneOff says which containers Containers gives.
type OneOff int

// What to do about containers that "run" made.
const (
	WithoutOneOff OneOff = iota
	WithOneOff
	OnlyOneOff
)

// Containers lists a project's containers, by name; services limits it.
func (e *Engine) Containers(ctx context.Context, project string, all bool, one OneOff, services ...string) ([]container.Summary, error) {
	f := client.Filters{"label": {model.LabelProject + "=" + project, model.LabelHash}}
	switch one {
	case WithoutOneOff:
		f.Add("label", model.LabelOneOff+"=False")
	case OnlyOneOff:
		f.Add("label", model.LabelOneOff+"=True")
	}
	list, err := e.Client.ContainerList(ctx, client.ContainerListOptions{All: all, Filters: f})
	if err != nil {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(c container.Summary) bool {
		return len(services) > 0 && !slices.Contains(services, model.Service(&c))
	})
	slices.SortFunc(list, func(a, b container.Summary) int { return naturally(model.Name(&a), model.Name(&b)) })
	return list, nil
}

// One finds a service's container: the one with that number, or the first.
func (e *Engine) One(ctx context.Context, project, service string, index int, all bool, one OneOff) (container.Summary, error) {
	list, err := e.Containers(ctx, project, all, one, service)
	if err != nil {
		return container.Summary{}, err
	}
	slices.SortStableFunc(list, func(a, b container.Summary) int {
		if x, y := model.IsOneOff(&a), model.IsOneOff(&b); x != y {
			if x {
				return 1
			}
			return -1
		}
		return model.Number(&a) - model.Number(&b)
	})
	for _, c := range list {
		if index == 0 || model.Number(&c) == index {
			return c, nil
		}
	}
	if index > 0 {
		return container.Summary{}, fmt.Errorf("service %q is not running container #%d", service, index)
	}
	return container.Summary{}, fmt.Errorf("service %q is not running", service)
}

// Observe looks at what there is of a project.
func (e *Engine) Observe(ctx context.Context, p *types.Project) (plan.Observed, error) {
	o := plan.Observed{Networks: map[string]plan.Object{}, Volumes: map[string]plan.Object{}, Images: map[string]string{}}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	g.Go(func() (err error) {
		o.Containers, err = e.Containers(ctx, p.Name, true, WithOneOff)
		return err
	})
	for key, n := range p.Networks {
		g.Go(func() error {
			// A name may be the beginning of another network's id.
			in, _, err := e.Client.NetworkInspect(ctx, n.Name, false)
			switch {
			case client.IsNotFound(err), err == nil && in.Name != n.Name && in.ID != n.Name:
				return nil
			case err != nil:
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			o.Networks[key] = plan.Object{ID: in.ID, Labels: in.Labels}
			return nil
		})
	}
	for key, v := range p.Volumes {
		g.Go(func() error {
			in, _, err := e.Client.VolumeInspect(ctx, v.Name)
			if client.IsNotFound(err) {
				return nil
			}
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			o.Volumes[key] = plan.Object{ID: in.Name, Labels: in.Labels}
			return nil
		})
	}
	for _, name := range model.Images(p, e.Separator) {
		g.Go(func() error {
			id, err := e.imageID(ctx, name)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			o.Images[name] = id
			return nil
		})
	}
	return o, g.Wait()
}

// imageID is "" for an image that is not here.
func (e *Engine) imageID(ctx context.Context, name string) (string, error) {
	in, _, err := e.Client.ImageInspect(ctx, name, "")
	if client.IsNotFound(err) {
		return "", nil
	}
	return in.ID, err
}

// Named makes up a project for a name alone: from its containers, networks and
// volumes.
func (e *Engine) Named(ctx context.Context, name string) (*types.Project, error) {
	list, err := e.Containers(ctx, name, true, WithoutOneOff)
	if err != nil {
		return nil, err
	}
	p, err := model.FromContainers(name, list)
	if err != nil {
		return nil, err
	}
	f := client.Filters{"label": {model.LabelProject + "=" + name}}
	nets, err := e.Client.NetworkList(ctx, f)
	if err != nil {
		return nil, err
	}
	for _, n := range nets {
		if key := n.Labels[model.LabelNetwork]; key != "" {
			p.Networks[key] = types.NetworkConfig{Name: n.Name, Driver: n.Driver, Labels: n.Labels}
		}
	}
	vols, err := e.Client.VolumeList(ctx, f)
	if err != nil {
		return nil, err
	}
	for _, v := range vols.Volumes {
		if key := v.Labels[model.LabelVolume]; key != "" {
			p.Volumes[key] = types.VolumeConfig{Name: v.Name, Driver: v.Driver, Labels: v.Labels}
		}
	}
	return p, nil
}

// title is how progress calls a container.
func title(name string) string { return "Container " + name }

// pause waits between two looks at something, longer each time.
func pause(ctx context.Context, d *time.Duration) error {
	t := time.NewTimer(*d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	*d = min(*d*3/2, 500*time.Millisecond)
	return nil
}

func event(pr display.Progress, id, status string, st display.State) {
	pr.Event(display.Event{ID: id, Status: status, State: st})
}

// naturally orders names with the numbers in them as numbers.
func naturally(a, b string) int {
	for a != "" && b != "" {
		i, j := digits(a), digits(b)
		if i > 0 && j > 0 {
			if i != j {
				return i - j
			}
			if a[:i] != b[:j] {
				if a[:i] < b[:j] {
					return -1
				}
				return 1
			}
			a, b = a[i:], b[j:]
			continue
		}
		if a[0] != b[0] {
			return int(a[0]) - int(b[0])
		}
		a, b = a[1:], b[1:]
	}
	return len(a) - len(b)
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}
