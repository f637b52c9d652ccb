package engine

import (
	"context"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	net "github.com/cloudos-io/cloudos/internal/network"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// attached is what a container's endpoints came to be.
type attached struct {
	endpoints map[string]*network.EndpointSettings
	ports     network.PortMap
	dns       []string
}

// connect attaches the container to its networks and writes the files that
// depend on the addresses.
func (e *Engine) connect(ctx context.Context, u *unit, r *container.Record, sb runtime.Sandbox, files generated) (attached, error) {
	a := attached{endpoints: make(map[string]*network.EndpointSettings, len(r.Endpoints))}
	if r.HostConfig.NetworkMode.IsNone() {
		a.endpoints[network.NetworkNone] = &network.EndpointSettings{}
		return a, e.fill(files, r, a)
	}
	for i, name := range sortedEndpoints(r, r.Endpoints) {
		req := e.attachRequest(r, name, r.Endpoints[name])
		req.NetNS = sb.NetNS
		if i == 0 {
			req.Link, _ = sb.Link.(*net.Link)
			req.Ports = publishedPorts(r)
		}
		at, err := e.cfg.Networks.Attach(ctx, req)
		if err != nil {
			return a, err
		}
		ep := at.Settings
		a.endpoints[name] = &ep
		for p, b := range at.Ports {
			if a.ports == nil {
				a.ports = network.PortMap{}
			}
			a.ports[p] = b
		}
		if len(a.dns) == 0 {
			a.dns = at.DNS
		}
		for _, w := range at.Warnings {
			e.log.Warn("network attached with a restriction", "container", u.id, "network", name, "warning", w)
		}
	}
	return a, e.fill(files, r, a)
}

// attachRequest describes one endpoint to the networks.
func (e *Engine) attachRequest(r *container.Record, name string, ep *network.EndpointSettings) net.AttachRequest {
	return net.AttachRequest{
		ContainerID: r.ID, ContainerName: r.Name, Hostname: r.Config.Hostname, Network: name, Settings: ep.Copy(),
		DNS: e.servers(r), PublishThrough: r.Extra.PublishThrough || e.cfg.PublishThrough, Ephemeral: r.Ephemeral,
	}
}

// publishedPorts are the bindings asked for, with those of --publish-all.
func publishedPorts(r *container.Record) network.PortMap {
	hc := r.HostConfig
	if !hc.PublishAllPorts {
		return hc.PortBindings
	}
	m := make(network.PortMap, len(hc.PortBindings)+len(r.Config.ExposedPorts))
	for p := range r.Config.ExposedPorts {
		m[p] = []network.PortBinding{{}}
	}
	for p, b := range hc.PortBindings {
		if len(b) > 0 {
			m[p] = b
		}
	}
	return m
}
