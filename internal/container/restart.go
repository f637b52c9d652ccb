package container

import (
	"time"

	"github.com/moby/moby/api/types/container"
)

// Back-off of restarts: the first waits RestartDelayMin, each next twice as
// long up to RestartDelayMax; a run of RestartStable or more starts over.
const (
	RestartDelayMin = 100 * time.Millisecond
	RestartDelayMax = time.Minute
	RestartStable   = 10 * time.Second
)

// Ended describes the end of a run to DecideRestart.
type Ended struct {
	Policy   container.RestartPolicy
	ExitCode int
	// ManualStop: a user stopped or killed it.
	ManualStop bool
	// Attempts is how often it was restarted by its policy so far.
	Attempts int
	// RanFor is how long this run lasted, LastDelay what was waited before it.
	RanFor, LastDelay time.Duration
	// AtBoot: the decision is made while a daemon starts, about a container that
	// it finds ended. "always" then starts what a user had stopped, too.
	AtBoot bool
}

// DecideRestart tells whether to start the container again and after what delay.
func DecideRestart(e Ended) (again bool, delay time.Duration) {
	switch e.Policy.Name {
	case container.RestartPolicyAlways:
		again = !e.ManualStop || e.AtBoot
	case container.RestartPolicyUnlessStopped:
		again = !e.ManualStop
	case container.RestartPolicyOnFailure:
		limit := e.Policy.MaximumRetryCount
		again = !e.ManualStop && e.ExitCode != 0 && (limit == 0 || e.Attempts < limit)
	}
	switch {
	case !again || e.AtBoot:
		return again, 0
	case e.LastDelay == 0 || e.RanFor >= RestartStable:
		return true, RestartDelayMin
	}
	return true, min(2*e.LastDelay, RestartDelayMax)
}
