package dockerapi

import (
	"net/http"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func (a containersAPI) commit(w *response, r *request) error {
	// A pointer keeps "no configuration given" apart from an empty one.
	var body struct{ *container.Config }
	if err := r.decode(w, &body); err != nil {
		return err
	}
	ref, err := tagReference(r.query.Get("repo"), r.query.Get("tag"))
	if err != nil {
		return err
	}
	name := r.query.Get("container")
	if name == "" {
		return fault.New(fault.NotFound, "cannot commit: no container was named")
	}
	if err := checkName(name); err != nil {
		return err
	}
	id, err := a.b.ContainerCommit(r.Context(), CommitOptions{
		Container: name, Ref: ref, Comment: r.query.Get("comment"), Author: r.query.Get("author"),
		Pause: r.flagOr("pause", true), Changes: r.query["changes"], Config: body.Config,
	})
	if err != nil {
		return err
	}
	return w.json(http.StatusCreated, container.CommitResponse{ID: id})
}
