package wire

import (
	"context"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/alert"
	"github.com/cloudos-io/cloudos/internal/engine"
)

// readings gives alert rules what the engine knows.
type readings struct{ e *engine.Engine }

func subject(r engine.Reading) alert.Container {
	c := alert.Container{Disk: -1}
	if r.Record == nil {
		return c
	}
	st := r.Record.State
	c.ID, c.Name, c.Image, c.Labels = r.Record.ID, r.Record.Name, r.Record.Config.Image, r.Record.Config.Labels
	c.State, c.ExitCode, c.Restarts, c.StartedAt = string(st.Status), st.ExitCode, r.Record.RestartCount, st.StartedAt
	if st.Health != nil {
		c.Health = string(st.Health.Status)
	}
	return c
}

func (s readings) Containers() []alert.Container {
	l := s.e.Readings()
	out := make([]alert.Container, len(l))
	for i, r := range l {
		out[i] = subject(r)
	}
	return out
}

func (s readings) Read(ctx context.Context, c *alert.Container, stats, disk bool) {
	r := s.e.Read(ctx, c.ID, stats, disk)
	c.Read, c.CPU, c.Memory, c.MemoryLimit, c.Pids, c.Disk = r.At, r.CPU, r.Memory, r.MemoryLimit, r.Pids, r.Disk
}

func (s readings) Engine() alert.Engine {
	e := alert.Engine{DiskUsed: s.e.RootUsed()}
	for _, r := range s.e.Readings() {
		if r.Record.State.Running() {
			e.Running++
		}
	}
	return e
}

// Events names a health verdict by itself: "unhealthy", not "health_status: unhealthy".
func (s readings) Events(ctx context.Context, fn func(action string, c alert.Container)) {
	s.e.WatchContainers(ctx, func(m events.Message) {
		action := strings.TrimPrefix(string(m.Action), string(events.ActionHealthStatus)+": ")
		c := alert.Container{Disk: -1}
		if r := s.e.Read(ctx, m.Actor.ID, false, false); r.Record != nil {
			c = subject(r)
		} else { // it is gone: the event says what there is to know
			c.ID, c.Name, c.Image, c.Labels = m.Actor.ID, m.Actor.Attributes["name"], m.Actor.Attributes["image"], m.Actor.Attributes
		}
		if code, err := strconv.Atoi(m.Actor.Attributes["exitCode"]); err == nil && m.Action == events.ActionDie {
			c.ExitCode, c.State = code, "exited"
		}
		fn(action, c)
	})
}
