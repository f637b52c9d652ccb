package image

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	mimage "github.com/moby/moby/api/types/image"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// What BuildKit writes beside images: manifests of in-toto statements.
const (
	attestedDigest = "vnd.docker.reference.digest"
	predicateType  = "in-toto.io/predicate-type"
	maxStatement   = 64 << 20
)

// Attestations lists the statements that an image's index holds about the image
// of a platform: provenance, bills of materials. With types, those alone; with
// bodies, their text too. An image that is no index has none.
func (s *Service) Attestations(ctx context.Context, ref, platform string, types []string, bodies bool) ([]mimage.AttestationStatement, error) {
	f, err := s.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	v, err := s.pick(ctx, ref, f, platform)
	if err != nil {
		return nil, err
	}
	if !images.IsIndexType(f.target.MediaType) {
		return nil, nil
	}
	t, err := s.target(ctx, f.target)
	if err != nil {
		return nil, asFault(fmt.Errorf("cannot read image %s: %w", ref, err))
	}
	ctx = s.ctx(ctx)
	var out []mimage.AttestationStatement
	for _, c := range t.children {
		if !isAttestation(c) || c.Annotations[attestedDigest] != v.manifest.Digest.String() {
			continue
		}
		b, err := s.readBlob(ctx, c, maxManifest)
		if fault.Is(err, fault.NotFound) {
			continue // never fetched
		}
		if err != nil {
			return nil, err
		}
		m, err := parseManifest(b)
		if err != nil {
			return nil, err
		}
		for _, l := range m.Layers {
			kind := l.Annotations[predicateType]
			if kind == "" || len(types) > 0 && !slices.Contains(types, kind) {
				continue
			}
			st := mimage.AttestationStatement{Descriptor: l, PredicateType: kind}
			if bodies {
				text, err := s.readBlob(ctx, l, maxStatement)
				if err != nil {
					return nil, err
				}
				if !json.Valid(text) {
					return nil, fault.New(fault.Invalid, "the statement %s is no JSON", l.Digest)
				}
				raw := json.RawMessage(text)
				st.Statement = &raw
			}
			out = append(out, st)
		}
	}
	return out, nil
}
