package engine

import (
	"context"
	"maps"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// NetworkService is the use cases about networks.
type NetworkService struct{ e *Engine }

// NetworkService returns the use cases about networks.
func (e *Engine) NetworkService() *NetworkService { return &NetworkService{e} }

func (s *NetworkService) event(a events.Action, n network.Inspect, attrs map[string]string) {
	m := map[string]string{"name": n.Name, "type": n.Driver}
	maps.Copy(m, attrs)
	s.e.emit(events.NetworkEventType, a, n.ID, m)
}

// NetworkCreate makes a network.
func (s *NetworkService) NetworkCreate(ctx context.Context, req network.CreateRequest) (network.CreateResponse, error) {
	res, err := s.e.cfg.Networks.Create(ctx, req)
	if err != nil {
		return res, err
	}
	if n, err := s.e.cfg.Networks.Inspect(ctx, res.ID); err == nil {
		s.event(events.ActionCreate, n, nil)
	}
	return res, nil
}

// NetworkList lists networks.
func (s *NetworkService) NetworkList(ctx context.Context, f Filters) ([]network.Summary, error) {
	l, err := s.e.cfg.Networks.List(ctx, f)
	if err != nil {
		return nil, err
	}
	out := make([]network.Summary, len(l))
	for i, n := range l {
		out[i] = network.Summary{Network: n.Network}
	}
	return out, nil
}

// NetworkInspect describes a network.
func (s *NetworkService) NetworkInspect(ctx context.Context, name string) (network.Inspect, error) {
	return s.e.cfg.Networks.Inspect(ctx, name)
}

// NetworkRemove removes a network that no container is on.
func (s *NetworkService) NetworkRemove(ctx context.Context, name string) error {
	n, err := s.e.cfg.Networks.Inspect(ctx, name)
	if err != nil {
		return err
	}
	if err := s.e.waitTearing(ctx, func(r *container.Record) bool { return hasNetwork(r, n.Name) }); err != nil {
		return err
	}
	if err := s.e.cfg.Networks.Remove(ctx, name); err != nil {
		return err
	}
	s.event(events.ActionDestroy, n, nil)
	return nil
}

// NetworkPrune removes networks that no container is on.
func (s *NetworkService) NetworkPrune(ctx context.Context, f Filters) (network.PruneReport, error) {
	rep, err := s.e.cfg.Networks.Prune(ctx, f)
	if err == nil {
		s.e.publishPrune(events.NetworkEventType, 0)
	}
	return rep, err
}

// NetworkConnect attaches a container to a further network, at once if it runs.
func (s *NetworkService) NetworkConnect(ctx context.Context, name string, req network.ConnectRequest) error {
	e := s.e
	n, err := e.cfg.Networks.Inspect(ctx, name)
	if err != nil {
		return err
	}
	u, err := e.lookup(req.Container)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	if e.policed() {
		if err := e.mayConnect(ctx, r, n.Name); err != nil {
			return err
		}
	}
	switch mode := r.HostConfig.NetworkMode; {
	case mode.IsHost(), n.Name == network.NetworkHost:
		return fault.New(fault.Forbidden, "container cannot be connected to host network or disconnected from it")
	case mode.IsContainer():
		return fault.New(fault.Forbidden, "container sharing network namespace with another container or host cannot be connected to any other network")
	case mode.IsNone(), n.Name == network.NetworkNone:
		return fault.New(fault.Forbidden, "container cannot be connected to multiple networks with one of the networks in private (none) mode")
	}
	if r.Endpoints[n.Name] != nil {
		return fault.New(fault.Forbidden, "endpoint with name %s already exists in network %s", r.Name, n.Name)
	}
	ep := req.EndpointConfig.Copy()
	if ep == nil {
		ep = &network.EndpointSettings{}
	}
	var live *network.EndpointSettings
	var dns []string
	if t := u.running(); t != nil {
		ns, err := t.NetNS()
		if err != nil {
			return err
		}
		defer ns.Close()
		areq := e.attachRequest(r, n.Name, ep)
		areq.NetNS = ns
		at, err := e.cfg.Networks.Attach(ctx, areq)
		if err != nil {
			return err
		}
		live, dns = &at.Settings, at.DNS
	}
	nr, p, err := e.change(u, func(c *container.Record) {
		c.Endpoints = with(c.Endpoints, n.Name, ep)
		if live != nil {
			c.Attached = with(c.Attached, n.Name, live)
			if len(c.DNS) == 0 {
				c.DNS = dns
			}
		}
	})
	if err == nil {
		err = p.Wait()
	}
	if err != nil {
		if live != nil {
			_ = e.cfg.Networks.Detach(context.WithoutCancel(ctx), u.id, n.ID)
		}
		return err
	}
	if live != nil {
		e.refreshFiles(u, r, nr)
	}
	s.event(events.ActionConnect, n, map[string]string{"container": u.id})
	return nil
}

// NetworkDisconnect takes a container off a network.
func (s *NetworkService) NetworkDisconnect(ctx context.Context, name string, req network.DisconnectRequest) error {
	e := s.e
	n, err := e.cfg.Networks.Inspect(ctx, name)
	if err != nil {
		return err
	}
	u, err := e.lookup(req.Container)
	if err != nil {
		if req.Force {
			return e.cfg.Networks.Detach(ctx, req.Container, n.ID)
		}
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	if n.Name == network.NetworkHost || r.HostConfig.NetworkMode.IsHost() {
		return fault.New(fault.Forbidden, "container cannot be disconnected from host network or connected to host network")
	}
	if r.Endpoints[n.Name] == nil {
		return fault.New(fault.Forbidden, "container %s is not connected to network %s", u.id, n.Name)
	}
	running := u.running() != nil
	if running {
		if err := e.cfg.Networks.Detach(ctx, u.id, n.ID); err != nil && !fault.Is(err, fault.NotFound) {
			return err
		}
	}
	nr, p, err := e.change(u, func(c *container.Record) {
		c.Endpoints, c.Attached = without(c.Endpoints, n.Name), without(c.Attached, n.Name)
		if len(c.Attached) == 0 || len(c.Attached) == 1 && c.Attached[network.NetworkBridge] != nil {
			c.DNS = nil // names are served on networks of the user's alone
		}
	})
	if err == nil {
		err = p.Wait()
	}
	if err != nil {
		return err
	}
	if running {
		e.refreshFiles(u, r, nr)
	}
	s.event(events.ActionDisconnect, n, map[string]string{"container": u.id})
	return nil
}

func with(m map[string]*network.EndpointSettings, k string, v *network.EndpointSettings) map[string]*network.EndpointSettings {
	c := maps.Clone(m)
	if c == nil {
		c = map[string]*network.EndpointSettings{}
	}
	c[k] = v
	return c
}

func without(m map[string]*network.EndpointSettings, k string) map[string]*network.EndpointSettings {
	c := maps.Clone(m)
	delete(c, k)
	return c
}
