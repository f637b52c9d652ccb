package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/image"
	"golang.org/x/sync/errgroup"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// ImageOptions of EnsureImages.
type ImageOptions struct {
	Build     *BuildOptions // nil builds nothing
	QuietPull bool
}

// EnsureImages gets the images that services need, as their pull policies say,
// and notes their ids in the services' labels.
func (e *Engine) EnsureImages(ctx context.Context, p *types.Project, pr display.Progress, o ImageOptions) error {
	local, err := e.inspectImages(ctx, p)
	if err != nil {
		return err
	}
	pulls, err := required(p, local)
	if err != nil {
		return err
	}
	if err := e.pullAll(ctx, p, pr, pulls, o.QuietPull, local); err != nil {
		return err
	}
	if o.Build != nil {
		var names []string
		for _, n := range p.ServiceNames() {
			s := p.Services[n]
			if s.Build == nil {
				continue
			}
			_, have := local[model.ImageName(&s, p.Name, e.Separator)]
			if !have || s.PullPolicy == types.PullPolicyBuild {
				names = append(names, n)
			}
		}
		if len(names) > 0 {
			whole := *p
			whole.Services = types.Services{}
			maps.Copy(whole.Services, p.Services)
			if names = WithBuildDependencies(p, names); len(names) > 0 {
				for _, n := range names {
					whole.Services[n] = p.AllServices()[n]
				}
			}
			built, err := e.Build(ctx, &whole, pr, names, *o.Build)
			if err != nil {
				return err
			}
			for img, id := range built {
				local[img] = image.InspectResponse{ID: id}
			}
		}
	}
	for n, s := range p.Services {
		name := model.ImageName(&s, p.Name, e.Separator)
		if in, ok := local[name]; ok && in.ID != "" {
			s.CustomLabels = s.CustomLabels.Add(model.LabelImage, in.ID)
			p.Services[n] = s
		} else if s.Image == "" && s.Build != nil && !e.DryRun {
			return fmt.Errorf("cannot run service %q: its image %s is not built: leave --no-build out or run 'servin compose build %s'", n, name, n)
		}
	}
	return nil
}

// inspectImages looks at what is here of the images that a project names.
func (e *Engine) inspectImages(ctx context.Context, p *types.Project) (map[string]image.InspectResponse, error) {
	names := model.Images(p, e.Separator)
	for _, s := range p.Services {
		for _, v := range s.Volumes {
			if v.Type == types.VolumeTypeImage {
				names = append(names, v.Source)
			}
		}
	}
	slices.Sort(names)
	out := map[string]image.InspectResponse{}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for _, name := range slices.Compact(names) {
		g.Go(func() error {
			in, _, err := e.Client.ImageInspect(ctx, name, "")
			if client.IsNotFound(err) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("cannot look at image %s: %w", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			out[name] = in
			return nil
		})
	}
	return out, g.Wait()
}

// pull is one image to get, and for whom.
type pull struct {
	service, image, platform string
	buildable                bool
}

// required decides what must be pulled.
func required(p *types.Project, local map[string]image.InspectResponse) ([]pull, error) {
	var out []pull
	for _, n := range p.ServiceNames() {
		s := p.Services[n]
		need, err := mustPull(&s, local)
		if err != nil {
			return nil, err
		}
		if need && !slices.ContainsFunc(out, func(x pull) bool { return x.image == s.Image && x.platform == s.Platform }) {
			out = append(out, pull{n, s.Image, s.Platform, buildable(p, &s)})
		}
		for i, v := range s.Volumes {
			if _, have := local[v.Source]; v.Type == types.VolumeTypeImage && !have {
				out = append(out, pull{fmt.Sprintf("%s:volume %d", n, i), v.Source, s.Platform, false})
			}
		}
	}
	return out, nil
}

func mustPull(s *types.ServiceConfig, local map[string]image.InspectResponse) (bool, error) {
	if s.Image == "" {
		return false, nil
	}
	policy, age, err := s.GetPullPolicy()
	if err != nil {
		return false, fmt.Errorf("service %q: %w", s.Name, err)
	}
	in, have := local[s.Image]
	switch policy {
	case types.PullPolicyAlways:
		return true, nil
	case types.PullPolicyNever, types.PullPolicyBuild:
		return false, nil
	case types.PullPolicyRefresh:
		return !have || time.Now().After(in.Metadata.LastTagTime.Add(age)), nil
	}
	return !have, nil
}

// buildable tells whether the image of s can be built if it cannot be pulled.
func buildable(p *types.Project, s *types.ServiceConfig) bool {
	if s.Build != nil {
		return true
	}
	for _, o := range p.Services {
		if o.Image == s.Image && o.Build != nil {
			return true
		}
	}
	return false
}

func (e *Engine) pullAll(ctx context.Context, p *types.Project, pr display.Progress, pulls []pull, quiet bool, local map[string]image.InspectResponse) error {
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	for _, x := range pulls {
		g.Go(func() error {
			err := e.pullOne(ctx, pr, x, quiet, p.Environment["DOCKER_DEFAULT_PLATFORM"])
			if err != nil {
				if x.buildable && ctx.Err() == nil {
					return nil
				}
				return err
			}
			if e.DryRun {
				return nil
			}
			in, _, err := e.Client.ImageInspect(ctx, x.image, "")
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				local[x.image] = in
			}
			return err
		})
	}
	return g.Wait()
}

// pullOne pulls an image and shows it under the name of its service.
func (e *Engine) pullOne(ctx context.Context, pr display.Progress, x pull, quiet bool, platform string) error {
	release, err := e.slot(ctx)
	if err != nil {
		return err
	}
	defer release()
	pr.Event(display.Event{ID: x.service, Text: "Pulling"})
	if x.platform != "" {
		platform = x.platform
	}
	if !e.DryRun {
		err = e.fetch(ctx, pr, x, quiet, platform)
	}
	switch {
	case err == nil:
		pr.Event(display.Event{ID: x.service, Text: "Pulled", State: display.Done})
	case ctx.Err() != nil:
		pr.Event(display.Event{ID: x.service, Status: "Interrupted", State: display.Warning})
	case x.buildable:
		pr.Event(display.Event{ID: x.service, Text: "Warning", Status: err.Error(), State: display.Warning})
	default:
		pr.Event(display.Event{ID: x.service, Text: "Error", Status: err.Error(), State: display.Failed})
	}
	return err
}

func (e *Engine) fetch(ctx context.Context, pr display.Progress, x pull, quiet bool, platform string) error {
	o := client.PullOptions{Platform: platform}
	if e.Auth != nil {
		auth, err := e.Auth(ctx, x.image)
		if err != nil {
			return err
		}
		o.Auth = auth
	}
	return e.Client.ImagePull(ctx, x.image, o, func(m client.Progress) error {
		if !quiet {
			layer(pr, x.service, m)
		}
		return nil
	})
}

// layer shows a message about a layer under its image.
func layer(pr display.Progress, parent string, m client.Progress) {
	if m.ID == "" {
		return
	}
	ev := display.Event{ID: m.ID, Parent: parent, Text: m.Status}
	if m.Progress != nil {
		ev.Current, ev.Total = m.Progress.Current, m.Progress.Total
	}
	switch m.Status {
	case "Download complete", "Already exists", "Pull complete", "Layer already exists", "Pushed":
		ev.State = display.Done
		if ev.Total > 0 {
			ev.Current = ev.Total
		}
	}
	if ev.Total > 0 || ev.State == display.Done {
		pr.Event(ev)
	}
}

// PullOptions of Pull.
type PullOptions struct {
	Quiet, IgnoreFailures, IgnoreBuildable bool
}

// Pull pulls the images of a project's services.
func (e *Engine) Pull(ctx context.Context, p *types.Project, pr display.Progress, o PullOptions) error {
	local, err := e.inspectImages(ctx, p)
	if err != nil {
		return err
	}
	skip := func(id, why string) { pr.Event(display.Event{ID: id, Text: "Skipped" + why, State: display.Done}) }
	var (
		mu    sync.Mutex
		errs  []error
		build []string
	)
	g, ctx := errgroup.WithContext(ctx)
	busy := map[string]string{}
	for _, n := range p.ServiceNames() {
		s := p.Services[n]
		switch {
		case s.Image == "":
			skip(n, " - No image to be pulled")
			continue
		case s.PullPolicy == types.PullPolicyNever || s.PullPolicy == types.PullPolicyBuild:
			skip(n, "")
			continue
		case s.PullPolicy == types.PullPolicyMissing || s.PullPolicy == types.PullPolicyIfNotPresent:
			if _, have := local[s.Image]; have && !isLatest(s.Image) {
				skip(n, " - Image is already present locally")
				continue
			}
		}
		if s.Build != nil && o.IgnoreBuildable {
			skip(n, " - Image can be built")
			continue
		}
		if by, ok := busy[s.Image]; ok {
			skip(n, " - Image is already being pulled by "+by)
			continue
		}
		busy[s.Image] = n
		g.Go(func() error {
			err := e.pullOne(ctx, pr, pull{n, s.Image, s.Platform, s.Build != nil}, o.Quiet, p.Environment["DOCKER_DEFAULT_PLATFORM"])
			if err == nil {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
			if s.Build != nil || o.IgnoreFailures {
				build = append(build, n)
				return nil
			}
			return err
		})
	}
	err = g.Wait()
	if len(build) > 0 {
		slices.Sort(build)
		pr.Print("WARNING: Some service image(s) must be built from source by running:\n    servin compose build " + strings.Join(build, " "))
	}
	if err != nil || o.IgnoreFailures {
		return err
	}
	return errors.Join(errs...)
}

// isLatest tells of names that say "latest" or nothing.
func isLatest(name string) bool {
	_, tag := client.SplitTag(name)
	return tag == "" || tag == "latest"
}

// PushOptions of Push.
type PushOptions struct{ Quiet, IgnoreFailures bool }

// Push pushes the images that a project's services are built to.
func (e *Engine) Push(ctx context.Context, p *types.Project, pr display.Progress, o PushOptions) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range p.ServiceNames() {
		s := p.Services[n]
		if s.Build == nil || s.Image == "" {
			pr.Event(display.Event{ID: n, Status: "Skipped", State: display.Done})
			continue
		}
		for _, tag := range append([]string{s.Image}, s.Build.Tags...) {
			g.Go(func() error {
				release, err := e.slot(ctx)
				if err != nil {
					return err
				}
				defer release()
				pr.Event(display.Event{ID: tag, Text: "Pushing"})
				err = e.pushOne(ctx, pr, tag, o.Quiet)
				if err != nil {
					pr.Event(display.Event{ID: tag, Text: "Error", Status: err.Error(), State: display.Failed})
					if o.IgnoreFailures {
						return nil
					}
					return err
				}
				pr.Event(display.Event{ID: tag, Text: "Pushed", State: display.Done})
				return nil
			})
		}
	}
	return g.Wait()
}

func (e *Engine) pushOne(ctx context.Context, pr display.Progress, name string, quiet bool) error {
	if e.DryRun {
		return nil
	}
	var o client.PushOptions
	if e.Auth != nil {
		auth, err := e.Auth(ctx, name)
		if err != nil {
			return err
		}
		o.Auth = auth
	}
	return e.Client.ImagePush(ctx, name, o, func(m client.Progress) error {
		if !quiet {
			layer(pr, name, m)
		}
		return nil
	})
}

// ImagesToRemove lists what "down --rmi" removes: with all, the services' images
// too that were not built here.
func (e *Engine) ImagesToRemove(ctx context.Context, p *types.Project, mode string, orphans bool) ([]string, error) {
	set := map[string]bool{}
	local, err := e.inspectImages(ctx, p)
	if err != nil {
		return nil, err
	}
	for _, s := range p.Services {
		name := model.ImageName(&s, p.Name, e.Separator)
		if _, have := local[name]; have && (mode == "all" || s.Image == "") {
			set[name] = true
		}
	}
	built, err := e.Client.ImageList(ctx, client.ImageListOptions{Filters: client.Filters{"label": {model.LabelProject + "=" + p.Name}, "dangling": {"false"}}})
	if err != nil {
		return nil, err
	}
	for _, img := range built {
		if len(img.RepoTags) == 0 {
			continue
		}
		if _, known := p.Services[img.Labels[model.LabelService]]; known || orphans {
			set[img.RepoTags[0]] = true
		}
	}
	var out []string
	for name := range set {
		if _, tag := client.SplitTag(name); tag == "" {
			if set[name+":latest"] {
				continue
			}
			name += ":latest"
		}
		out = append(out, name)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}
