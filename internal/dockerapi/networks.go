package dockerapi

import (
	"net/http"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// networksAPI serves networks.
type networksAPI struct{ b Networks }

func (a networksAPI) list(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	l, err := a.b.NetworkList(r.Context(), f)
	if err != nil {
		return err
	}
	if r.version >= 28 {
		if l == nil {
			l = []network.Summary{}
		}
		return w.json(http.StatusOK, l)
	}
	// Lists held the endpoints too, then.
	full := make([]network.Inspect, 0, len(l))
	for _, s := range l {
		n, err := a.b.NetworkInspect(r.Context(), s.ID)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		if err != nil {
			return err
		}
		n.Status = nil
		full = append(full, n)
	}
	return w.json(http.StatusOK, full)
}

func (a networksAPI) inspect(w *response, r *request) error {
	if s := r.query.Get("scope"); s != "" && s != "local" {
		return fault.New(fault.NotFound, "network %s not found", r.name)
	}
	n, err := a.b.NetworkInspect(r.Context(), r.name)
	if err != nil {
		return err
	}
	if r.version < 52 {
		n.Status = nil
	}
	if n.Containers == nil {
		n.Containers = map[string]network.EndpointResource{}
	}
	return w.json(http.StatusOK, n)
}

func (a networksAPI) create(w *response, r *request) error {
	var req network.CreateRequest
	if err := r.decode(w, &req); err != nil {
		return err
	}
	if req.Name == "" {
		return fault.New(fault.Invalid, "invalid network name: name is empty")
	}
	if err := checkName(req.Name); err != nil {
		return err
	}
	if r.version < 48 {
		req.EnableIPv4 = nil
	}
	if req.Scope == "swarm" || req.Driver == "overlay" {
		return errNoManager
	}
	resp, err := a.b.NetworkCreate(r.Context(), req)
	if err != nil {
		return err
	}
	return w.json(http.StatusCreated, resp)
}

func (a networksAPI) remove(w *response, r *request) error {
	if err := a.b.NetworkRemove(r.Context(), r.name); err != nil {
		return err
	}
	return w.noContent()
}

func (a networksAPI) connect(w *response, r *request) error {
	var req network.ConnectRequest
	if err := r.decode(w, &req); err != nil {
		return err
	}
	if req.Container == "" {
		return fault.New(fault.Invalid, "cannot connect: no container was named")
	}
	if ep := req.EndpointConfig; ep != nil {
		if r.version < 54 {
			ep.MacAddress = nil
		}
		if r.version < 48 {
			ep.GwPriority = 0
		}
	}
	if err := a.b.NetworkConnect(r.Context(), r.name, req); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (a networksAPI) disconnect(w *response, r *request) error {
	var req network.DisconnectRequest
	if err := r.decode(w, &req); err != nil {
		return err
	}
	if req.Container == "" {
		return fault.New(fault.Invalid, "cannot disconnect: no container was named")
	}
	if err := a.b.NetworkDisconnect(r.Context(), r.name, req); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (a networksAPI) prune(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	rep, err := a.b.NetworkPrune(r.Context(), f)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, rep)
}
