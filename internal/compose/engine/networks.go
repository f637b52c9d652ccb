package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
	"github.com/cloudos-io/cloudos/internal/compose/spec"
)

// gone takes "there is no such thing" as done.
func gone(err error) error {
	if client.IsNotFound(err) {
		return nil
	}
	return err
}

// inUse takes "somebody uses it" as something to tell.
func inUse(err error) error {
	if s := client.Status(err); s == 409 || s == 403 {
		return &noted{"Resource is still in use"}
	}
	return err
}

func (r *run) createNetwork(ctx context.Context, s *plan.Step) error {
	req, err := spec.Network(r.p, s.Key)
	if err != nil {
		return err
	}
	_, err = r.e.Client.NetworkCreate(ctx, req)
	if client.IsConflict(err) {
		// Another compose made it in the meantime.
		if in, _, ierr := r.e.Client.NetworkInspect(ctx, s.Name, false); ierr == nil && in.Labels[model.LabelHash] == req.Labels[model.LabelHash] {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("failed to create network %s: %w", s.Name, err)
	}
	return nil
}

func (r *run) removeNetwork(ctx context.Context, s *plan.Step) error {
	in, _, err := r.e.Client.NetworkInspect(ctx, s.Name, false)
	if client.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(in.Containers) > 0 && s.Why == "" {
		return &noted{"Resource is still in use"}
	}
	err = gone(r.e.Client.NetworkRemove(ctx, in.ID))
	if s.Why == "" {
		err = inUse(err)
	}
	var n *noted
	if err != nil && !errors.As(err, &n) {
		err = fmt.Errorf("failed to remove network %s: %w", s.Name, err)
	}
	return err
}
