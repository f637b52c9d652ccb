package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
)

// wait carries out a wait step.
func (r *run) wait(ctx context.Context, s *plan.Step) error {
	ids := r.of(s.Service)
	if len(ids) == 0 && r.e.DryRun {
		return nil
	}
	if len(ids) == 0 {
		err := fmt.Errorf("%s is missing dependency %s", s.Dependent, s.Service)
		if !s.Optional {
			return err
		}
		r.warn(err.Error())
		return nil
	}
	all := func(status string, st display.State) {
		for _, c := range ids {
			event(r.pr, title(c.name), status, st)
		}
	}
	all("Waiting", display.Working)
	if r.e.DryRun {
		all("Healthy", display.Done)
		return nil
	}
	status, err := r.condition(ctx, s, ids)
	switch {
	case err == nil:
		all(status, display.Done)
		return nil
	case ctx.Err() != nil:
		return err
	case s.Optional:
		all("Skipped: optional dependency "+err.Error(), display.Warning)
		r.warn(fmt.Sprintf("optional dependency %q failed to start: %v", s.Service, err))
		return nil
	}
	all("Error "+err.Error(), display.Failed)
	return err
}

func (r *run) warn(text string) {
	if r.o.Warn != nil {
		r.o.Warn(text)
	}
}

type named struct{ id, name string }

// of lists the containers of a service.
func (r *run) of(service string) []named {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []named
	for i := range r.containers {
		if c := &r.containers[i]; model.Service(c) == service && !model.IsOneOff(c) {
			out = append(out, named{c.ID, model.Name(c)})
		}
	}
	return out
}

// condition waits until it holds and gives the word for that.
func (r *run) condition(ctx context.Context, s *plan.Step, list []named) (string, error) {
	d, begun := 20*time.Millisecond, time.Now()
	for {
		holds, status := true, "Healthy"
		for _, c := range list {
			in, _, err := r.e.Client.ContainerInspect(ctx, c.id, false)
			if err != nil {
				return "", err
			}
			var ok bool
			switch s.Condition {
			case types.ServiceConditionCompletedSuccessfully:
				status = "Exited"
				ok, err = completed(&in, s.Service)
			case types.ServiceConditionHealthy:
				ok, err = healthy(&in, c.name, false)
				// One that fails right away is better told by its end.
				if errors.Is(err, errNoHealth) && time.Since(begun) < grace {
					ok, err = false, nil
				}
			case plan.RunningOrHealthy:
				ok, err = healthy(&in, c.name, true)
			default:
				return "", fmt.Errorf("unsupported depends_on condition: %s", s.Condition)
			}
			if err != nil {
				return "", err
			}
			if !ok {
				holds = false
				break
			}
			if s.Condition == types.ServiceConditionCompletedSuccessfully {
				break // one that has completed stands for all
			}
		}
		if holds {
			return status, nil
		}
		if err := pause(ctx, &d); err != nil {
			return "", err
		}
	}
}

func completed(in *container.InspectResponse, service string) (bool, error) {
	if in.State == nil || in.State.Status != container.StateExited {
		return false, nil
	}
	if in.State.ExitCode != 0 {
		return false, fmt.Errorf("service %q didn't complete successfully: exit %d", service, in.State.ExitCode)
	}
	return true, nil
}

func healthy(in *container.InspectResponse, name string, runningWillDo bool) (bool, error) {
	st := in.State
	if st == nil {
		return false, nil
	}
	if st.Status == container.StateExited || st.Status == container.StateDead {
		return false, failed(runningWillDo, "container %s exited (%d)", name, st.ExitCode)
	}
	if st.Health == nil || st.Health.Status == container.NoHealthcheck {
		if !runningWillDo {
			return false, fmt.Errorf("dependency failed to start: container %s %w", name, errNoHealth)
		}
		return st.Status == container.StateRunning, nil
	}
	switch st.Health.Status {
	case container.Healthy:
		return true, nil
	case container.Unhealthy:
		return false, failed(runningWillDo, "container %s is unhealthy", name)
	}
	return false, nil
}

var errNoHealth = errors.New("has no healthcheck configured")

// grace is how long a container may take to show that it ends.
const grace = 500 * time.Millisecond

func failed(whole bool, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if whole {
		return err
	}
	return fmt.Errorf("dependency failed to start: %w", err)
}
