package container

import (
	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// The life cycle:
//
//	                 start-failed (stays)
//	                  ┌──┐
//	            ┌─────▼──┴─┐ start                    pause
//	 create ───►│ created  ├──────────► ┌─────────┐ ──────► ┌────────┐
//	            └───┬──────┘            │ running │         │ paused │
//	                │       start ┌───► └─┬──┬────┘ ◄────── └─┬──┬───┘
//	         remove │     ┌───────┴──┐    │  │ exit  resume    │  │
//	                │     │  exited  │◄───┼──┴─────────────────┘  │
//	                │     └─┬──────▲─┘    │ exit-restart          │
//	                │ remove│      │      ▼                       │
//	                │       │      │ ┌────────────┐ exit-restart  │
//	                │       │      └─┤ restarting │◄──────────────┘
//	                │       │ give-up└─┬──┬───────┘
//	                ▼       ▼  or      │  └─ start ──► running
//	            ┌──────────────┐ start-│
//	            │   removing   │ failed│
//	            │              │◄──────┘ remove
//	            └───┬──────▲───┘
//	  remove-failed │      │ remove
//	            ┌───▼──────┴───┐
//	            │     dead     │
//	            └──────────────┘
//
// A record that is gone was "removing" before.

// Event is something that happens to a container.
type Event uint8

// The events of the life cycle.
const (
	EventStart        Event = iota // its process was executed
	EventStartFailed               // a start left nothing behind
	EventExit                      // its process ended for good
	EventExitRestart               // its process ended and will be started again
	EventGiveUp                    // a pending restart was called off
	EventPause                     // its processes were frozen
	EventResume                    // and thawed
	EventRemove                    // its removal began
	EventRemoveFailed              // and could not be finished
	eventCount
)

var eventNames = [eventCount]string{"start", "start-failed", "exit", "exit-restart", "give-up", "pause", "resume", "remove", "remove-failed"}

func (e Event) String() string {
	if e < eventCount {
		return eventNames[e]
	}
	return "unknown"
}

var transitions = map[container.ContainerState]map[Event]container.ContainerState{
	container.StateCreated: {
		EventStart:       container.StateRunning,
		EventStartFailed: container.StateCreated,
		EventRemove:      container.StateRemoving,
	},
	container.StateRunning: {
		EventExit:        container.StateExited,
		EventExitRestart: container.StateRestarting,
		EventPause:       container.StatePaused,
	},
	container.StatePaused: {
		EventExit:        container.StateExited,
		EventExitRestart: container.StateRestarting,
		EventResume:      container.StateRunning,
	},
	container.StateRestarting: {
		EventStart:       container.StateRunning,
		EventStartFailed: container.StateExited,
		EventGiveUp:      container.StateExited,
		EventRemove:      container.StateRemoving,
	},
	container.StateExited: {
		EventStart:       container.StateRunning,
		EventStartFailed: container.StateExited,
		EventRemove:      container.StateRemoving,
	},
	container.StateRemoving: {
		EventRemoveFailed: container.StateDead,
	},
	container.StateDead: {
		EventRemove: container.StateRemoving,
	},
}

// Known reports whether s is a state of the life cycle.
func Known(s container.ContainerState) bool {
	_, ok := transitions[s]
	return ok
}

// Next tells the state that follows s on e, or a fault.Conflict.
func Next(s container.ContainerState, e Event) (container.ContainerState, error) {
	if n, ok := transitions[s][e]; ok {
		return n, nil
	}
	return s, fault.New(fault.Conflict, "container is %s: %s is not possible now", s, e)
}
