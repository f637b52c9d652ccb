package engine

import (
	"context"

	"github.com/compose-spec/compose-go/v2/types"

	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
	"github.com/cloudos-io/cloudos/internal/compose/spec"
)

// OneOffOptions of CreateOneOff.
type OneOffOptions struct{ Aliases, AutoRemove, AttachStdin bool }

// CreateOneOff makes the container of a "run" and gives its id.
func (e *Engine) CreateOneOff(ctx context.Context, p *types.Project, s types.ServiceConfig, ob plan.Observed, pr display.Progress, o OneOffOptions) (string, error) {
	r := &run{e: e, p: p, pr: pr, containers: ob.Containers}
	s, err := plan.Resolve(s, r.first)
	if err != nil {
		return "", err
	}
	event(pr, title(s.ContainerName), "Creating", display.Working)
	req, err := spec.Container(p, s, s.ContainerName, spec.Options{Separator: e.Separator, Aliases: o.Aliases, AutoRemove: o.AutoRemove, AttachStdin: o.AttachStdin,
		Links: r.links(&s, 1), Platform: p.Environment["DOCKER_DEFAULT_PLATFORM"]})
	if err != nil {
		return "", err
	}
	if e.DryRun {
		event(pr, title(s.ContainerName), "Created", display.Done)
		return "", nil
	}
	resp, err := e.Client.ContainerCreate(ctx, req)
	if err != nil {
		event(pr, title(s.ContainerName), "Error "+err.Error(), display.Failed)
		return "", err
	}
	r.warnings(s.Name, resp.Warnings)
	event(pr, title(s.ContainerName), "Created", display.Done)
	return resp.ID, e.putFiles(ctx, p, &s, resp.ID)
}
