package engine

import (
	"context"
	"strconv"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/volume"
)

// What containers do to networks and volumes is told as events of those.

// publishEndpoints tells that a container was connected to its networks, or left
// them.
func (e *Engine) publishEndpoints(r *container.Record, eps map[string]*network.EndpointSettings, a events.Action) {
	for _, name := range sortedEndpoints(r, eps) {
		e.emit(events.NetworkEventType, a, eps[name].NetworkID, map[string]string{
			"container": r.ID, "name": name, "type": e.networkDriver(name),
		})
	}
}

// networkDriver is the driver of a network; the names of the built-in ones tell.
func (e *Engine) networkDriver(name string) string {
	switch name {
	case network.NetworkBridge, network.NetworkHost:
		return name
	case network.NetworkNone:
		return "null"
	}
	n, err := e.cfg.Networks.Inspect(context.Background(), name)
	if err != nil {
		return ""
	}
	return n.Driver
}

// publishMounts tells that a container's volumes were mounted, or unmounted.
func (e *Engine) publishMounts(r *container.Record, a events.Action) {
	for _, p := range r.Mounts {
		if p.Type != mount.TypeVolume {
			continue
		}
		m := map[string]string{"driver": p.Driver, "container": r.ID}
		if a == events.ActionMount {
			m["destination"], m["read/write"], m["propagation"] = p.Target, strconv.FormatBool(!p.ReadOnly), string(p.Propagation)
		}
		e.emit(events.VolumeEventType, a, p.Name, m)
	}
}

// publishVolume tells that a volume was made for a container, or went with it.
func (e *Engine) publishVolume(name, driver string, a events.Action) {
	if driver == "" {
		driver = volume.Driver
	}
	e.emit(events.VolumeEventType, a, name, map[string]string{"driver": driver})
}
