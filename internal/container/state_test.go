package container

import (
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestNextCoversEveryStateAndEvent(t *testing.T) {
	const no = container.ContainerState("")
	states := []container.ContainerState{container.StateCreated, container.StateRunning, container.StatePaused,
		container.StateRestarting, container.StateExited, container.StateRemoving, container.StateDead}
	cr, ru, pa, re, ex, rm, de := states[0], states[1], states[2], states[3], states[4], states[5], states[6]
	// one row a state; columns in the order of the events
	want := map[container.ContainerState][eventCount]container.ContainerState{
		//   start failed exit exit-r give-up pause resume remove rm-failed
		cr: {ru, cr, no, no, no, no, no, rm, no},
		ru: {no, no, ex, re, no, pa, no, no, no},
		pa: {no, no, ex, re, no, no, ru, no, no},
		re: {ru, ex, no, no, ex, no, no, rm, no},
		ex: {ru, ex, no, no, no, no, no, rm, no},
		rm: {no, no, no, no, no, no, no, no, de},
		de: {no, no, no, no, no, no, no, rm, no},
	}
	for _, s := range states {
		if !Known(s) {
			t.Errorf("state %s is not known", s)
		}
		for e := range eventCount {
			got, err := Next(s, e)
			w := want[s][e]
			if w == no {
				if !fault.Is(err, fault.Conflict) || got != s {
					t.Errorf("%s on %s = %s, %v; want a conflict", e, s, got, err)
				}
				continue
			}
			if err != nil || got != w {
				t.Errorf("%s on %s = %s, %v; want %s", e, s, got, err, w)
			}
		}
	}
	if Known("sleeping") {
		t.Error("an unknown state is known")
	}
}
