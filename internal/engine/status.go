package engine

import (
	"fmt"
	"time"

	"github.com/docker/go-units"
	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/container"
)

// status is the human-readable state of a container, as lists show it.
func status(s container.State, now time.Time) string {
	switch s.Status {
	case mcontainer.StateRunning, mcontainer.StatePaused:
		up := "Up " + units.HumanDuration(now.Sub(s.StartedAt))
		if s.Status == mcontainer.StatePaused {
			return up + " (Paused)"
		}
		if s.Health != nil {
			if s.Health.Status == mcontainer.Starting {
				return up + " (health: starting)"
			}
			return up + " (" + string(s.Health.Status) + ")"
		}
		return up
	case mcontainer.StateRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", s.ExitCode, units.HumanDuration(now.Sub(s.FinishedAt)))
	case mcontainer.StateRemoving:
		return "Removal In Progress"
	case mcontainer.StateDead:
		return "Dead"
	case mcontainer.StateCreated:
		return "Created"
	}
	if s.FinishedAt.IsZero() {
		return "Created"
	}
	return fmt.Sprintf("Exited (%d) %s ago", s.ExitCode, units.HumanDuration(now.Sub(s.FinishedAt)))
}
