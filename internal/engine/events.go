package engine

import (
	"maps"

	"github.com/moby/moby/api/types/events"
)

// publish tells that something happened to a container.
func (e *Engine) publish(u *unit, a events.Action, attrs map[string]string) {
	r := u.rec.Load()
	m := make(map[string]string, len(r.Config.Labels)+len(attrs)+2)
	maps.Copy(m, r.Config.Labels)
	maps.Copy(m, attrs)
	m["image"], m["name"] = r.Config.Image, r.Name
	if r.Pod != nil {
		m[attrPod] = r.Pod.Pod
	}
	e.emit(events.ContainerEventType, a, r.ID, m)
}

func (e *Engine) emit(t events.Type, a events.Action, id string, attrs map[string]string) {
	e.cfg.Bus.Publish(events.Message{Type: t, Action: a, Actor: events.Actor{ID: id, Attributes: attrs}})
}

func (e *Engine) publishPrune(t events.Type, reclaimed uint64) {
	e.emit(t, events.ActionPrune, "", map[string]string{"reclaimed": uitoa(reclaimed)})
}
