package image

import (
	"archive/tar"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/therootcompany/xz"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	maxArchiveEntries = 100_000
	// smallEntry is up to where an archive's file is also kept in memory, all
	// such files together up to smallTotal: indexes, manifests and configs.
	smallEntry = 1 << 20
	smallTotal = 32 << 20
)

// archive is what an image archive held, its blobs stored by digest.
type archive struct {
	blobs map[string]ocispec.Descriptor // by path
	magic map[string]string             // media type by first bytes
	small map[string][]byte
	links map[string]string
}

func errTooLarge(limit int64) error {
	return fault.New(fault.Invalid, "cannot take the stream: it is larger than %d bytes", limit)
}

// Load reads an archive made by Save, docker save or any tool that writes OCI
// layouts, compressed or not.
func (s *Service) Load(ctx context.Context, r io.Reader, only []ocispec.Platform, progress func(Progress)) (loaded []string, err error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	names, err := s.load(ctx, r, only, progress)
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		s.emit("load", n.id, n.name)
		loaded = append(loaded, n.name)
	}
	return loaded, nil
}

// loadedImage is one line of what Load answers: a familiar name or an id.
type loadedImage struct {
	name string
	id   digest.Digest
}

func (s *Service) load(ctx context.Context, r io.Reader, only []ocispec.Platform, progress func(Progress)) ([]loadedImage, error) {
	plain, stop, err := decompressAny(ctx, r)
	if err != nil {
		return nil, err
	}
	defer stop()
	a, err := s.readArchive(ctx, plain, progress)
	if err != nil {
		return nil, err
	}
	switch {
	case a.small["index.json"] != nil:
		return s.loadLayout(ctx, a, only, progress)
	case a.small["manifest.json"] != nil:
		return s.loadDocker(ctx, a, only, progress)
	}
	return nil, fault.New(fault.Invalid, "cannot load: the archive has neither manifest.json nor index.json (for a root file system, use import)")
}

// readArchive stores every file of the archive and keeps the small ones at hand.
func (s *Service) readArchive(ctx context.Context, r io.Reader, progress func(Progress)) (*archive, error) {
	a := &archive{blobs: map[string]ocispec.Descriptor{}, magic: map[string]string{}, small: map[string][]byte{}, links: map[string]string{}}
	kept := 0
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fault.New(fault.Invalid, "cannot read the archive: %w", err)
		}
		if n >= maxArchiveEntries {
			return nil, fault.New(fault.Invalid, "cannot load: the archive has more than %d entries", maxArchiveEntries)
		}
		name := path.Clean(strings.TrimLeft(h.Name, "/"))
		switch h.Typeflag {
		case tar.TypeSymlink:
			a.links[name] = path.Join(path.Dir(name), h.Linkname)
			continue
		case tar.TypeLink:
			a.links[name] = path.Clean(strings.TrimLeft(h.Linkname, "/"))
			continue
		case tar.TypeReg:
		default:
			continue
		}
		head := make([]byte, min(h.Size, 512))
		if _, err := io.ReadFull(tr, head); err != nil {
			return nil, fault.New(fault.Invalid, "cannot read the archive: %w", err)
		}
		body := io.MultiReader(bytes.NewReader(head), tr)
		if h.Size <= smallEntry && kept+int(h.Size) <= smallTotal {
			b, err := io.ReadAll(body)
			if err != nil {
				return nil, fault.New(fault.Invalid, "cannot read the archive: %w", err)
			}
			kept += len(b)
			a.small[name] = b
			if name == "index.json" || name == "manifest.json" || looksJSON(head) && !strings.HasPrefix(name, "blobs/") && !strings.HasSuffix(name, ".json") {
				continue
			}
			body = bytes.NewReader(b)
		}
		a.magic[name] = layerType(head)
		if progress != nil && h.Size > smallEntry {
			body = &countReader{r: body, total: h.Size, tell: func(cur int64) {
				progress(Progress{ID: shortPath(name), Action: "Loading layer", Current: cur, Total: h.Size})
			}}
		}
		if a.blobs[name], err = s.putStream(ctx, body, nil, s.cfg.Limits.Bytes); err != nil {
			return nil, err
		}
	}
}

func looksJSON(b []byte) bool {
	b = bytes.TrimLeft(b, " \t\r\n")
	return len(b) > 0 && (b[0] == '{' || b[0] == '[')
}

func shortPath(p string) string {
	base := path.Base(p)
	if base == "layer.tar" {
		base = path.Base(path.Dir(p))
	}
	if len(base) > 12 {
		base = base[:12]
	}
	return base
}

// countReader tells how far a reader got, each MiB.
type countReader struct {
	r       io.Reader
	n, told int64
	total   int64
	tell    func(int64)
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.told >= 1<<20 || err == nil && c.n == c.total {
		c.told = c.n
		c.tell(c.n)
	}
	return n, err
}

// layerType is the media type of a layer by its first bytes.
func layerType(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return ocispec.MediaTypeImageLayerGzip
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}

// at finds a path, through the links of old archives.
func (a *archive) at(p string) string {
	p = path.Clean(strings.TrimLeft(p, "/"))
	for range 8 {
		to, ok := a.links[p]
		if !ok {
			return p
		}
		p = to
	}
	return p
}

// dockerManifest is an entry of manifest.json.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
	// LayerSources describe layers that the archive may hold compressed.
	LayerSources map[digest.Digest]ocispec.Descriptor `json:",omitempty"`
}

func (s *Service) loadDocker(ctx context.Context, a *archive, only []ocispec.Platform, progress func(Progress)) ([]loadedImage, error) {
	var ms []dockerManifest
	if err := json.Unmarshal(a.small["manifest.json"], &ms); err != nil {
		return nil, fault.New(fault.Invalid, "cannot load: manifest.json: %w", err)
	}
	var out []loadedImage
	for _, m := range ms {
		cb := a.small[a.at(m.Config)]
		if cb == nil {
			return nil, fault.New(fault.Invalid, "cannot load: the archive lacks the config %q", m.Config)
		}
		img, err := parseConfig(cb)
		if err != nil {
			return nil, err
		}
		if !wantPlatform(only, img.Platform) {
			continue
		}
		if len(m.Layers) != len(img.RootFS.DiffIDs) || len(m.Layers) > maxLayers {
			return nil, fault.New(fault.Invalid, "cannot load: manifest.json names %d layers, the config %d", len(m.Layers), len(img.RootFS.DiffIDs))
		}
		var layers []ocispec.Descriptor
		for _, l := range m.Layers {
			p := a.at(l)
			d, ok := a.blobs[p]
			if !ok {
				return nil, fault.New(fault.Invalid, "cannot load: the archive lacks the layer %q", l)
			}
			d.MediaType = a.magic[p]
			layers = append(layers, d)
		}
		desc, v, err := s.makeImage(ctx, cb, layers)
		if err != nil {
			return nil, err
		}
		if err := s.settle(ctx, v, progress); err != nil {
			return nil, err
		}
		got, err := s.nameLoaded(ctx, desc, v.id, m.RepoTags)
		if err != nil {
			return nil, err
		}
		out = append(out, got...)
	}
	return out, nil
}

func wantPlatform(only []ocispec.Platform, p ocispec.Platform) bool {
	if len(only) == 0 {
		return true
	}
	return slices.ContainsFunc(only, func(o ocispec.Platform) bool { return platforms.OnlyStrict(o).Match(p) })
}

// makeImage stores a config and a manifest over layers that are stored.
func (s *Service) makeImage(ctx context.Context, config []byte, layers []ocispec.Descriptor) (ocispec.Descriptor, *variant, error) {
	img, err := parseConfig(config)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	cd, err := s.putBlob(ctx, ocispec.MediaTypeImageConfig, config, nil)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	if layers == nil {
		layers = []ocispec.Descriptor{}
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: cd, Layers: layers}
	desc, err := s.putJSON(ctx, m.MediaType, m, labelsFor(append([]ocispec.Descriptor{cd}, layers...)))
	if err != nil {
		return desc, nil, err
	}
	v, err := newVariant(desc, m, img)
	return desc, &v, err
}

// settle unpacks a variant, which proves its layers, and binds them to it.
func (s *Service) settle(ctx context.Context, v *variant, progress func(Progress)) error {
	if err := s.unpack(ctx, stack(v.layers, v.diffIDs), progress); err != nil {
		return err
	}
	return s.bind(ctx, v)
}

// nameLoaded records an image under its tags, or untagged.
func (s *Service) nameLoaded(ctx context.Context, desc ocispec.Descriptor, id digest.Digest, tags []string) ([]loadedImage, error) {
	var names []string
	var out []loadedImage
	for _, t := range tags {
		n, err := reference.ParseNormalizedNamed(t)
		if err != nil {
			return nil, errBadRef(t, err)
		}
		names = append(names, s.recordName(n))
		out = append(out, loadedImage{reference.FamiliarString(reference.TagNameOnly(n)), id})
	}
	if len(names) == 0 {
		if !s.referredTo(desc.Digest) {
			names = append(names, danglingName+desc.Digest.String())
		}
		out = append(out, loadedImage{id.String(), id})
	}
	return out, s.refer(ctx, desc, nil, names...)
}

func (s *Service) referredTo(d digest.Digest) bool {
	return slices.ContainsFunc(s.cat.all(), func(i images.Image) bool { return i.Target.Digest == d })
}

func (s *Service) loadLayout(ctx context.Context, a *archive, only []ocispec.Platform, progress func(Progress)) ([]loadedImage, error) {
	idx, err := parseIndex(a.small["index.json"])
	if err != nil {
		return nil, err
	}
	// Names that only manifest.json has, by config.
	var ms []dockerManifest
	if b := a.small["manifest.json"]; b != nil {
		if err := json.Unmarshal(b, &ms); err != nil {
			return nil, fault.New(fault.Invalid, "cannot load: manifest.json: %w", err)
		}
	}
	tags := map[digest.Digest][]string{}
	for _, m := range ms {
		if d, ok := a.blobs[a.at(m.Config)]; ok {
			tags[d.Digest] = append(tags[d.Digest], m.RepoTags...)
		}
	}
	var out []loadedImage
	byTarget := map[digest.Digest][]string{}
	var order []ocispec.Descriptor
	for _, d := range idx.Manifests {
		if _, seen := byTarget[d.Digest]; !seen {
			order = append(order, d)
		}
		byTarget[d.Digest] = append(byTarget[d.Digest], layoutNames(d)...)
	}
	for _, d := range order {
		if isAttestation(d) {
			continue
		}
		vs, err := s.adopt(ctx, a, d, only)
		if err != nil {
			return nil, err
		}
		if len(vs) == 0 {
			continue
		}
		sortVariants(vs)
		for i := range vs {
			if err := s.settle(ctx, &vs[i], progress); err != nil {
				return nil, err
			}
		}
		names := byTarget[d.Digest]
		for i := range vs {
			for _, t := range tags[vs[i].id] {
				if !slices.ContainsFunc(names, func(n string) bool { return sameRef(n, t) }) {
					names = append(names, t)
				}
			}
		}
		got, err := s.nameLoaded(ctx, d, vs[0].id, names)
		if err != nil {
			return nil, err
		}
		out = append(out, got...)
	}
	return out, nil
}

func sameRef(a, b string) bool {
	x, err1 := reference.ParseNormalizedNamed(a)
	y, err2 := reference.ParseNormalizedNamed(b)
	return err1 == nil && err2 == nil && reference.TagNameOnly(x).String() == reference.TagNameOnly(y).String()
}

// layoutNames are the references that an index's annotations give a manifest.
func layoutNames(d ocispec.Descriptor) []string {
	if n := d.Annotations[images.AnnotationImageName]; n != "" {
		return []string{n}
	}
	// A full reference by some tools, a mere tag by others.
	n := d.Annotations[ocispec.AnnotationRefName]
	if strings.ContainsAny(n, "/:") {
		if _, err := reference.ParseNormalizedNamed(n); err == nil {
			return []string{n}
		}
	}
	return nil
}

// adopt labels the stored manifests below d so that their parts stay, and reads
// their variants.
func (s *Service) adopt(ctx context.Context, a *archive, d ocispec.Descriptor, only []ocispec.Platform) ([]variant, error) {
	b := a.small["blobs/"+d.Digest.Algorithm().String()+"/"+d.Digest.Encoded()]
	if b == nil || digest.FromBytes(b) != d.Digest {
		return nil, fault.New(fault.Invalid, "cannot load: the archive lacks %s, or holds something else under its name", d.Digest)
	}
	if images.IsIndexType(d.MediaType) {
		idx, err := parseIndex(b)
		if err != nil {
			return nil, err
		}
		var out []variant
		var missing error
		for _, m := range idx.Manifests {
			if images.IsIndexType(m.MediaType) {
				return nil, fault.New(fault.Unsupported, "cannot load: an index within an index")
			}
			if a.small["blobs/"+m.Digest.Algorithm().String()+"/"+m.Digest.Encoded()] == nil {
				missing = fault.New(fault.Invalid, "cannot load: the archive lacks %s", m.Digest)
				continue
			}
			if isAttestation(m) {
				if err := s.adoptParts(ctx, a, m); err != nil {
					return nil, err
				}
				continue
			}
			if m.Platform != nil && !wantPlatform(only, *m.Platform) {
				continue
			}
			vs, err := s.adopt(ctx, a, m, only)
			if err != nil {
				return nil, err
			}
			out = append(out, vs...)
		}
		if len(out) == 0 && missing != nil && len(only) == 0 {
			return nil, missing
		}
		return out, s.label(ctx, d.Digest, labelsFor(idx.Manifests))
	}
	m, err := parseManifest(b)
	if err != nil {
		return nil, err
	}
	cb, err := s.readBlob(ctx, m.Config, maxConfig)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot load: the archive lacks the config %s", m.Config.Digest)
	}
	img, err := parseConfig(cb)
	if err != nil {
		return nil, err
	}
	if !wantPlatform(only, img.Platform) {
		return nil, nil
	}
	for _, l := range m.Layers {
		if _, err := s.content.Info(ctx, l.Digest); err != nil {
			return nil, fault.New(fault.Invalid, "cannot load: the archive lacks the layer %s, or holds something else under its name", l.Digest)
		}
	}
	if err := s.label(ctx, d.Digest, labelsFor(append([]ocispec.Descriptor{m.Config}, m.Layers...))); err != nil {
		return nil, err
	}
	v, err := newVariant(d, m, img)
	if err != nil {
		return nil, err
	}
	return []variant{v}, nil
}

func (s *Service) adoptParts(ctx context.Context, a *archive, d ocispec.Descriptor) error {
	m, err := parseManifest(a.small["blobs/"+d.Digest.Algorithm().String()+"/"+d.Digest.Encoded()])
	if err != nil {
		return err
	}
	return s.label(ctx, d.Digest, labelsFor(append([]ocispec.Descriptor{m.Config}, m.Layers...)))
}

var errEmptyStream = fault.New(fault.Invalid, "cannot read an empty stream")

// decompressAny opens what load and import accept: plain, gzip, zstd, bzip2, xz.
func decompressAny(ctx context.Context, r io.Reader) (io.Reader, func(), error) {
	head := make([]byte, 6)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		if errors.Is(err, io.EOF) {
			return nil, nil, errEmptyStream
		}
		return nil, nil, fmt.Errorf("cannot read the stream: %w", err)
	}
	r = io.MultiReader(bytes.NewReader(head[:n]), ctxReader{ctx, r})
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, fault.New(fault.Invalid, "cannot read the gzip stream: %w", err)
		}
		return z, func() { _ = z.Close() }, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(64<<20))
		if err != nil {
			return nil, nil, fault.New(fault.Invalid, "cannot read the zstd stream: %w", err)
		}
		return z, z.Close, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(r), func() {}, nil
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		z, err := xz.NewReader(r, 64<<20)
		if err != nil {
			return nil, nil, fault.New(fault.Invalid, "cannot read the xz stream: %w", err)
		}
		return z, func() {}, nil
	}
	return r, func() {}, nil
}
