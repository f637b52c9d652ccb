package image

import (
	"context"
	"strings"
	"time"

	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/storage"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Inspect describes one image.
func (s *Service) Inspect(ctx context.Context, ref, platform string, manifests bool) (mimage.InspectResponse, error) {
	f, err := s.find(ctx, ref)
	if err != nil {
		return mimage.InspectResponse{}, err
	}
	v, err := s.pick(ctx, ref, f, platform)
	if err != nil {
		return mimage.InspectResponse{}, err
	}
	es, err := s.entries(ctx)
	if err != nil {
		return mimage.InspectResponse{}, err
	}
	var e *entry
	for _, x := range es {
		for _, t := range x.targets {
			if t.Digest == f.target.Digest {
				e = x
			}
		}
		if x.id == v.id {
			e = x
			break
		}
	}
	if e == nil {
		return mimage.InspectResponse{}, errNoImage(ref)
	}
	ctx = s.ctx(ctx)
	sizes := newLayerSizes(s)
	conf := v.image.Config
	out := mimage.InspectResponse{
		ID:           v.id.String(),
		RepoTags:     nonNil(e.tags),
		RepoDigests:  nonNil(e.digests),
		Author:       v.image.Author,
		Config:       &conf,
		Architecture: v.image.Architecture,
		Variant:      v.image.Variant,
		Os:           v.image.OS,
		OsVersion:    v.image.OSVersion,
		Size:         s.sizeOf(ctx, v, sizes),
		RootFS:       mimage.RootFS{Type: "layers"},
	}
	if c := v.created(); !c.IsZero() {
		out.Created = c.Format(time.RFC3339Nano)
	}
	if n := len(v.image.History); n > 0 {
		out.Comment = v.image.History[n-1].Comment
	}
	for _, d := range v.diffIDs {
		out.RootFS.Layers = append(out.RootFS.Layers, d.String())
	}
	if len(v.diffIDs) > 0 {
		if chain, err := s.chainOf(ctx, v.chainID()); err == nil {
			data := map[string]string{"UpperDir": chain.Dirs[0]}
			if len(chain.Dirs) > 1 {
				data["LowerDir"] = strings.Join(chain.Dirs[1:], ":")
			}
			out.GraphDriver = &storage.DriverData{Name: "overlay2", Data: data}
		}
	}
	if out.GraphDriver == nil {
		out.GraphDriver = &storage.DriverData{Name: "overlay2", Data: map[string]string{}}
	}
	if len(e.tags) > 0 {
		out.Metadata.LastTagTime = e.updated
	}
	d := f.target
	if platform != "" {
		d = v.manifest
		if d.Platform == nil { // an index says it in its own words
			p := v.platform
			d.Platform = &p
		}
	}
	out.Descriptor = &d
	if manifests {
		t, err := s.target(ctx, f.target)
		if err != nil {
			return out, err
		}
		if out.Manifests, err = s.manifestSummaries(ctx, t, sizes); err != nil {
			return out, err
		}
	}
	return out, nil
}

// History tells how an image came about, newest first.
func (s *Service) History(ctx context.Context, ref, platform string) ([]mimage.HistoryResponseItem, error) {
	f, err := s.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	v, err := s.pick(ctx, ref, f, platform)
	if err != nil {
		return nil, err
	}
	e, err := s.entryOf(ctx, v.id)
	var tags []string
	if err == nil {
		tags = e.tags
	} else if !fault.Is(err, fault.NotFound) {
		return nil, err
	}
	ctx = s.ctx(ctx)
	// Sizes of layers, lowest first.
	layers := make([]int64, len(v.diffIDs))
	name := v.chainID().String()
	for i := len(layers) - 1; i >= 0; i-- {
		n, parent, err := s.layerSize(ctx, name)
		if err != nil {
			layers[i] = v.layers[i].Size // not unpacked
			continue
		}
		layers[i], name = n, parent
	}
	out := []mimage.HistoryResponseItem{}
	next := 0
	hist := v.image.History
	if len(hist) == 0 {
		for range v.diffIDs {
			hist = append(hist, ocispec.History{})
		}
	}
	for _, h := range hist {
		item := mimage.HistoryResponseItem{ID: "<missing>", Comment: h.Comment, CreatedBy: h.CreatedBy}
		if h.Created != nil {
			item.Created = h.Created.Unix()
		}
		if !h.EmptyLayer && next < len(layers) {
			item.Size = layers[next]
			next++
		}
		out = append(out, item)
	}
	for i, j := 0, len(out)-1; i < j; i, j = i+1, j-1 {
		out[i], out[j] = out[j], out[i]
	}
	if len(out) > 0 {
		out[0].ID, out[0].Tags = v.id.String(), tags
	}
	return out, nil
}

// Parent is the image that an image was committed from, "" where that is not known.
func (s *Service) Parent(ctx context.Context, id string) string {
	e, err := s.entryOf(ctx, digest.Digest(id))
	if err != nil {
		return ""
	}
	return s.parentOf(s.ctx(ctx), e).String()
}
