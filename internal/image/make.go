package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Import makes an image of one layer from a root file system's tar.
func (s *Service) Import(ctx context.Context, r io.Reader, ref, message, platform string, changes []string) (digest.Digest, error) {
	name, err := s.newName(ref)
	if err != nil {
		return "", err
	}
	p := platforms.DefaultSpec()
	if platform != "" {
		if p, err = platforms.Parse(platform); err != nil {
			return "", fault.New(fault.Invalid, "cannot read platform %q: %w", platform, err)
		}
	}
	now := time.Now().UTC()
	img := dockerspec.DockerOCIImage{Image: ocispec.Image{Created: &now, Platform: ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}}}
	if err := change(&img.Config, changes); err != nil {
		return "", err
	}
	if message == "" {
		message = "Imported from -"
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	plain, stop, err := decompressAny(ctx, r)
	if errors.Is(err, errEmptyStream) {
		plain, stop, err = bytes.NewReader(make([]byte, 1024)), func() {}, nil // no file at all
	}
	if err != nil {
		return "", err
	}
	defer stop()
	layer, err := s.putStream(ctx, plain, nil, s.cfg.Limits.Bytes)
	if err != nil {
		return "", err
	}
	layer.MediaType = ocispec.MediaTypeImageLayer
	img.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}}
	img.History = []ocispec.History{{Created: &now, Comment: message}}
	id, err := s.record(ctx, img, []ocispec.Descriptor{layer}, "", name)
	if err != nil {
		return "", err
	}
	s.emit("import", id, familiarOrID(name, id))
	return id, nil
}

// Commit makes an image of a parent's layers and a new one.
func (s *Service) Commit(ctx context.Context, req CommitRequest, r io.Reader) (digest.Digest, error) {
	name, err := s.newName(req.Ref)
	if err != nil {
		return "", err
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	created := req.Created
	if created.IsZero() {
		created = time.Now()
	}
	created = created.UTC()
	p := platforms.DefaultSpec()
	img := dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}}}
	var layers []ocispec.Descriptor
	if req.Parent.ID != "" {
		parent, err := s.readVariant(ctx, req.Parent.Manifest)
		if err != nil {
			return "", asFault(fmt.Errorf("cannot read the parent image: %w", err))
		}
		img.Platform = parent.image.Platform
		img.History = parent.image.History
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, parent.diffIDs...)
		layers = append(layers, parent.layers...)
	}
	img.Created, img.Author = &created, req.Author
	img.Config = req.Config
	if err := change(&img.Config, req.Changes); err != nil {
		return "", err
	}
	layer, err := s.putStream(ctx, r, nil, s.cfg.Limits.Bytes)
	if err != nil {
		return "", err
	}
	layer.MediaType = ocispec.MediaTypeImageLayer
	img.RootFS.Type = "layers"
	img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, layer.Digest)
	img.History = append(img.History, ocispec.History{Created: &created, CreatedBy: req.CreatedBy, Author: req.Author, Comment: req.Comment})
	return s.record(ctx, img, append(layers, layer), req.Parent.ID, name)
}

// newName checks the reference of an image to be made; "" is none.
func (s *Service) newName(ref string) (string, error) {
	if ref == "" {
		return "", nil
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", errBadRef(ref, err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", fault.New(fault.Invalid, "cannot name the new image %q: a digest is not for choosing", ref)
	}
	return s.recordName(named), nil
}

func familiarOrID(name string, id digest.Digest) string {
	if name == "" {
		return id.String()
	}
	return familiar(name)
}

// record stores an image made here, unpacked, under a name or untagged.
func (s *Service) record(ctx context.Context, img dockerspec.DockerOCIImage, layers []ocispec.Descriptor, parent digest.Digest, name string) (digest.Digest, error) {
	b, err := json.Marshal(img)
	if err != nil {
		return "", fmt.Errorf("cannot encode the image's config: %w", err)
	}
	desc, v, err := s.makeImage(ctx, b, layers)
	if err != nil {
		return "", err
	}
	if err := s.settle(ctx, v, nil); err != nil {
		return "", err
	}
	if parent != "" {
		if err := s.label(ctx, v.id, map[string]string{parentLabel: parent.String()}); err != nil {
			return "", err
		}
	}
	names := []string{name}
	if name == "" {
		names = nil
		if !s.referredTo(desc.Digest) {
			names = []string{danglingName + desc.Digest.String()}
		}
	}
	return v.id, s.refer(ctx, desc, nil, names...)
}
