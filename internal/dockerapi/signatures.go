package dockerapi

import (
	"context"
	"net/http"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Signatures is the optional ability behind GET /servin/signatures?image=.
type Signatures interface {
	Signatures(ctx context.Context, ref string, auth *registry.AuthConfig) (api.Signatures, error)
}

// signatures hands out what registries hold, unchecked: who asks decides whom to trust.
func (a imagesAPI) signatures(w *response, r *request) error {
	ref := r.query.Get("image")
	if ref == "" {
		return fault.New(fault.Invalid, "cannot look for signatures: the parameter image names none")
	}
	s, ok := a.b.(Signatures)
	if !ok {
		return fault.New(fault.Unsupported, "cannot look for signatures: the image store reaches no registry")
	}
	out, err := s.Signatures(r.Context(), ref, r.registryAuth())
	if err != nil {
		return err
	}
	out.Items = nonNil(out.Items)
	return w.json(http.StatusOK, out)
}
