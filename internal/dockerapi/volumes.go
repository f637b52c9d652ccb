package dockerapi

import (
	"net/http"

	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// volumesAPI serves volumes.
type volumesAPI struct{ b Volumes }

func (a volumesAPI) list(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	l, err := a.b.VolumeList(r.Context(), f)
	if err != nil {
		return err
	}
	if l.Volumes == nil {
		l.Volumes = []volume.Volume{}
	}
	return w.json(http.StatusOK, l)
}

func (a volumesAPI) inspect(w *response, r *request) error {
	v, err := a.b.VolumeInspect(r.Context(), r.name)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, v)
}

func (a volumesAPI) create(w *response, r *request) error {
	var req volume.CreateRequest
	if err := r.decode(w, &req); err != nil {
		return err
	}
	if req.ClusterVolumeSpec != nil && r.version >= 42 {
		return errNoManager
	}
	if err := checkName(req.Name); err != nil {
		return err
	}
	v, err := a.b.VolumeCreate(r.Context(), req)
	if err != nil {
		return err
	}
	return w.json(http.StatusCreated, v)
}

// update exists for cluster volumes alone.
func (a volumesAPI) update(*response, *request) error {
	return fault.New(fault.Unavailable, "volume update only valid for cluster volumes, but swarm is unavailable")
}

func (a volumesAPI) remove(w *response, r *request) error {
	force := r.flag("force")
	err := a.b.VolumeRemove(r.Context(), r.name, force)
	if err != nil && !(force && fault.Is(err, fault.NotFound)) {
		return err
	}
	return w.noContent()
}

func (a volumesAPI) prune(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	if r.version < 42 {
		// Named volumes were pruned too, then.
		f["all"] = map[string]bool{"true": true}
	}
	rep, err := a.b.VolumePrune(r.Context(), f)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, rep)
}
