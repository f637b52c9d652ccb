package image

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Bounds of what is read into memory.
const (
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	maxChildren = 1024
	maxLayers   = 512
)

// target is what a manifest or an index holds here.
type target struct {
	desc     ocispec.Descriptor
	variants []variant
	// children are all manifests of an index, also those not here.
	children []ocispec.Descriptor
}

// variant is the image of one platform.
type variant struct {
	manifest ocispec.Descriptor
	config   ocispec.Descriptor
	id       digest.Digest // of the config
	platform ocispec.Platform
	layers   []ocispec.Descriptor
	diffIDs  []digest.Digest
	image    dockerspec.DockerOCIImage
	size     int64 // of manifest, config and layers as stored
}

func (v *variant) chainID() digest.Digest {
	if len(v.diffIDs) == 0 {
		return ""
	}
	return identity.ChainID(v.diffIDs)
}

func (v *variant) created() time.Time {
	if v.image.Created != nil {
		return *v.image.Created
	}
	return time.Time{}
}

// best picks the variant for a platform; "" is the host's, or failing that
// whatever there is.
func (t *target) best(platform string) *variant {
	if len(t.variants) == 0 {
		return nil
	}
	m := platforms.Default()
	if platform != "" {
		p, err := platforms.Parse(platform)
		if err != nil {
			return nil
		}
		m = platforms.Only(p)
	}
	var best *variant
	for i := range t.variants {
		v := &t.variants[i]
		if m.Match(v.platform) && (best == nil || m.Less(v.platform, best.platform)) {
			best = v
		}
	}
	if best == nil && platform == "" {
		best = &t.variants[0]
	}
	return best
}

// target reads what a descriptor holds, from the catalog's memory if it can.
func (s *Service) target(ctx context.Context, desc ocispec.Descriptor) (*target, error) {
	s.cat.mu.RLock()
	t := s.cat.targets[desc.Digest]
	gen := s.cat.gen
	s.cat.mu.RUnlock()
	if t != nil {
		return t, nil
	}
	t, err := s.readTarget(s.ctx(ctx), desc)
	if err != nil {
		return nil, err
	}
	s.cat.mu.Lock()
	if s.cat.gen == gen {
		s.cat.targets[desc.Digest] = t
	}
	s.cat.mu.Unlock()
	return t, nil
}

func (s *Service) readTarget(ctx context.Context, desc ocispec.Descriptor) (*target, error) {
	t := &target{desc: desc}
	if !images.IsIndexType(desc.MediaType) {
		v, err := s.readVariant(ctx, desc)
		if err != nil {
			return nil, err
		}
		t.variants = []variant{v}
		return t, nil
	}
	b, err := s.readBlob(ctx, desc, maxManifest)
	if err != nil {
		return nil, err
	}
	idx, err := parseIndex(b)
	if err != nil {
		return nil, err
	}
	t.children = idx.Manifests
	for _, m := range idx.Manifests {
		if isAttestation(m) || !images.IsManifestType(m.MediaType) {
			continue
		}
		v, err := s.readVariant(ctx, m)
		if errdefs.IsNotFound(err) || fault.Is(err, fault.NotFound) {
			continue // another platform's, never fetched
		}
		if err != nil {
			return nil, err
		}
		t.variants = append(t.variants, v)
	}
	return t, nil
}

// isAttestation tells what BuildKit adds to an index beside images.
func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] == "attestation-manifest"
}

func (s *Service) readVariant(ctx context.Context, desc ocispec.Descriptor) (variant, error) {
	b, err := s.readBlob(ctx, desc, maxManifest)
	if err != nil {
		return variant{}, err
	}
	m, err := parseManifest(b)
	if err != nil {
		return variant{}, err
	}
	cb, err := s.readBlob(ctx, m.Config, maxConfig)
	if err != nil {
		return variant{}, err
	}
	img, err := parseConfig(cb)
	if err != nil {
		return variant{}, err
	}
	return newVariant(desc, m, img)
}

func newVariant(desc ocispec.Descriptor, m ocispec.Manifest, img dockerspec.DockerOCIImage) (variant, error) {
	v := variant{manifest: bare(desc), config: m.Config, id: m.Config.Digest, layers: m.Layers, diffIDs: img.RootFS.DiffIDs, image: img}
	v.platform = platforms.Normalize(img.Platform)
	if img.OS == "" && desc.Platform != nil {
		v.platform = platforms.Normalize(*desc.Platform)
	}
	v.size = desc.Size + m.Config.Size
	for _, l := range m.Layers {
		v.size += l.Size
	}
	if len(v.diffIDs) != len(m.Layers) {
		return variant{}, fault.New(fault.Invalid, "the image's config names %d layers, its manifest %d", len(v.diffIDs), len(m.Layers))
	}
	return v, nil
}

// readBlob reads a small blob that must be present and as long as described.
func (s *Service) readBlob(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	if desc.Size > limit {
		return nil, fault.New(fault.Invalid, "%s of %d bytes is larger than the %d allowed", desc.Digest, desc.Size, limit)
	}
	b, err := content.ReadBlob(ctx, s.content, ocispec.Descriptor{Digest: desc.Digest, Size: desc.Size, MediaType: desc.MediaType})
	if err != nil {
		return nil, asFault(fmt.Errorf("cannot read %s: %w", desc.Digest, err))
	}
	if int64(len(b)) != desc.Size && desc.Size != 0 {
		return nil, fault.New(fault.Invalid, "%s has %d bytes, not %d", desc.Digest, len(b), desc.Size)
	}
	return b, nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fault.New(fault.Invalid, "a descriptor's digest %q is wrong: %w", d.Digest, err)
	}
	if d.Size < 0 {
		return fault.New(fault.Invalid, "the size %d of %s is wrong", d.Size, d.Digest)
	}
	return nil
}

// parseIndex reads an index and checks what it refers to.
func parseIndex(b []byte) (ocispec.Index, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(b, &idx); err != nil {
		return idx, fault.New(fault.Invalid, "cannot read the image index: %w", err)
	}
	if len(idx.Manifests) > maxChildren {
		return idx, fault.New(fault.Invalid, "the image index names %d manifests, more than %d", len(idx.Manifests), maxChildren)
	}
	for _, m := range idx.Manifests {
		if err := checkDescriptor(m); err != nil {
			return idx, err
		}
	}
	return idx, nil
}

// parseManifest reads a manifest and checks what it refers to.
func parseManifest(b []byte) (ocispec.Manifest, error) {
	var doc struct {
		ocispec.Manifest
		SchemaVersion int             `json:"schemaVersion"`
		FSLayers      json.RawMessage `json:"fsLayers"`
		Manifests     json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return ocispec.Manifest{}, fault.New(fault.Invalid, "cannot read the image manifest: %w", err)
	}
	m := doc.Manifest
	switch {
	case doc.SchemaVersion == 1 || len(doc.FSLayers) > 0:
		return m, errSchema1()
	case len(doc.Manifests) > 0:
		return m, fault.New(fault.Invalid, "the manifest is an index in disguise")
	case len(m.Layers) > maxLayers:
		return m, fault.New(fault.Invalid, "the manifest names %d layers, more than %d", len(m.Layers), maxLayers)
	}
	for i := range m.Layers {
		if err := checkDescriptor(m.Layers[i]); err != nil {
			return m, err
		}
		// Where else the blob could be fetched from is not for a manifest to say.
		m.Layers[i].URLs = nil
	}
	m.Config.URLs = nil
	return m, checkDescriptor(m.Config)
}

func errSchema1() error {
	return fault.New(fault.Unsupported, "the image has a manifest of schema 1, which registries gave up in 2023; push it again with a newer tool")
}

func parseConfig(b []byte) (dockerspec.DockerOCIImage, error) {
	var img dockerspec.DockerOCIImage
	if err := json.Unmarshal(b, &img); err != nil {
		return img, fault.New(fault.Invalid, "cannot read the image config: %w", err)
	}
	for _, d := range img.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return img, fault.New(fault.Invalid, "the image config's layer digest %q is wrong: %w", d, err)
		}
	}
	if img.RootFS.Type != "" && img.RootFS.Type != "layers" {
		return img, fault.New(fault.Unsupported, "the image config's root file system is of type %q", img.RootFS.Type)
	}
	return img, nil
}

// labelsFor are the references that keep a manifest's or index's parts from
// collection.
func labelsFor(children []ocispec.Descriptor) map[string]string {
	out := map[string]string{}
	counts := map[string]int{}
	for _, c := range children {
		for _, key := range images.ChildGCLabels(c) {
			if strings.HasSuffix(key, ".") {
				n := counts[key]
				counts[key]++
				key = fmt.Sprintf("%s%d", key, n)
			}
			out[key] = c.Digest.String()
		}
	}
	return out
}

// sortVariants puts the host's platform first, for stable lists.
func sortVariants(vs []variant) {
	m := platforms.Default()
	slices.SortStableFunc(vs, func(a, b variant) int {
		switch {
		case m.Less(a.platform, b.platform):
			return -1
		case m.Less(b.platform, a.platform):
			return 1
		}
		return 0
	})
}
