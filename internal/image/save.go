package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// saved is one image on its way into an archive.
type saved struct {
	target   ocispec.Descriptor
	tags     []string // normalised
	variants []*variant
	blobs    []ocispec.Descriptor
	id       digest.Digest
}

// Save writes images as a tar that is both an OCI layout and what docker load
// takes. Everything is checked to be there, and undamaged, before the first byte is
// written: after that the only way to tell of an error is to hang up.
func (s *Service) Save(ctx context.Context, refNames []string, only []ocispec.Platform, w io.Writer) error {
	if len(refNames) == 0 {
		return fault.New(fault.Invalid, "cannot save: no image is named")
	}
	// The lease keeps the blobs while they are read.
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	var list []*saved
	for _, ref := range refNames {
		more, err := s.toSave(ctx, ref, only)
		if err != nil {
			return err
		}
		for _, m := range more {
			if i := slices.IndexFunc(list, func(x *saved) bool { return x.target.Digest == m.target.Digest }); i >= 0 {
				for _, t := range m.tags {
					if !slices.Contains(list[i].tags, t) {
						list[i].tags = append(list[i].tags, t)
					}
				}
				continue
			}
			list = append(list, m)
		}
	}
	for _, x := range list {
		for _, b := range x.blobs {
			if err := s.holdBlob(ctx, b); err != nil {
				return err
			}
		}
	}
	for _, x := range list {
		if err := s.sound(ctx, x.blobs); err != nil {
			return fmt.Errorf("cannot save: %w", err)
		}
	}
	if err := s.writeArchive(ctx, list, w); err != nil {
		return err
	}
	for _, x := range list {
		s.emit("save", x.id, x.id.String())
	}
	return nil
}

// toSave looks up a reference; a repository without tag means all its tags.
func (s *Service) toSave(ctx context.Context, ref string, only []ocispec.Platform) ([]*saved, error) {
	if named, err := reference.ParseNormalizedNamed(ref); err == nil && reference.IsNameOnly(named) {
		var out []*saved
		for _, r := range s.cat.all() {
			if isDangling(r.Name) || isDigestRef(r.Name) || repoOf(r.Name) != named.Name() {
				continue
			}
			x, err := s.savedOf(ctx, familiar(r.Name), found{name: r.Name, target: r.Target}, only)
			if err != nil {
				return nil, err
			}
			out = append(out, x)
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	f, err := s.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	x, err := s.savedOf(ctx, ref, f, only)
	if err != nil {
		return nil, err
	}
	return []*saved{x}, nil
}

func (s *Service) savedOf(ctx context.Context, ref string, f found, only []ocispec.Platform) (*saved, error) {
	t, err := s.target(ctx, f.target)
	if err != nil {
		return nil, asFault(fmt.Errorf("cannot read image %s: %w", ref, err))
	}
	x := &saved{target: f.target}
	for i := range t.variants {
		v := &t.variants[i]
		if f.variant != nil && f.variant.id != v.id || !wantPlatform(only, v.platform) {
			continue
		}
		x.variants = append(x.variants, v)
	}
	if len(x.variants) == 0 {
		if len(t.variants) > 0 && len(only) > 0 {
			return nil, errPlatform(ref, t.best(""), platforms.Format(only[0]))
		}
		return nil, errNoImage(ref)
	}
	x.id = x.variants[0].id
	if best := t.best(""); best != nil && slices.Contains(x.variants, best) {
		x.id = best.id
	}
	if f.name != "" && !isDigestRef(f.name) && !isDangling(f.name) {
		x.tags = []string{f.name}
	}
	// The index goes along when it says more than the manifest of one platform.
	if f.variant != nil && f.variant.manifest.Digest != x.target.Digest || len(only) > 0 && len(x.variants) == 1 {
		x.target = x.variants[0].manifest
	}
	if x.target.Digest == f.target.Digest && images.IsIndexType(x.target.MediaType) {
		x.blobs = append(x.blobs, x.target)
		for _, c := range t.children {
			if !isAttestation(c) {
				continue
			}
			if parts, err := s.parts(ctx, c); err == nil {
				x.blobs = append(append(x.blobs, c), parts...)
			}
		}
	}
	for _, v := range x.variants {
		if err := s.whole(ctx, v.layers); err != nil {
			return nil, err
		}
		x.blobs = append(append(x.blobs, v.manifest, v.config), v.layers...)
	}
	return x, nil
}

// parts lists what a manifest that is here refers to.
func (s *Service) parts(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	b, err := s.readBlob(s.ctx(ctx), d, maxManifest)
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(b)
	if err != nil {
		return nil, err
	}
	out := append([]ocispec.Descriptor{m.Config}, m.Layers...)
	for _, p := range out {
		if _, err := s.content.Info(ctx, p.Digest); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// holdBlob takes a blob into the operation's lease and checks that it is there.
func (s *Service) holdBlob(ctx context.Context, d ocispec.Descriptor) error {
	w, err := s.content.Writer(ctx, content.WithRef("servin-hold-"+d.Digest.String()), content.WithDescriptor(bare(d)))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return asFault(fmt.Errorf("cannot read %s: %w", d.Digest, err))
	}
	_ = w.Close()
	_ = s.content.Abort(ctx, "servin-hold-"+d.Digest.String())
	return fault.New(fault.NotFound, "cannot save: the content %s is not here (pull the image again)", d.Digest)
}

// sound reads blobs and compares them with their digests: a disk may have lost or
// changed what it stored.
func (s *Service) sound(ctx context.Context, blobs []ocispec.Descriptor) error {
	buf := make([]byte, 256<<10)
	for _, d := range blobs {
		ra, err := s.content.ReaderAt(ctx, bare(d))
		if errdefs.IsNotFound(err) {
			return errDamaged(d, "is lost")
		}
		if err != nil {
			return asFault(err)
		}
		v := d.Digest.Verifier()
		_, err = io.CopyBuffer(struct{ io.Writer }{v}, ctxReader{ctx, io.NewSectionReader(ra, 0, ra.Size())}, buf)
		ra.Close()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil || !v.Verified() {
			return errDamaged(d, "is damaged")
		}
	}
	return nil
}

func errDamaged(d ocispec.Descriptor, how string) error {
	return fmt.Errorf("the stored content %s %s (remove the image and pull it again)", d.Digest, how)
}

func (s *Service) writeArchive(ctx context.Context, list []*saved, w io.Writer) error {
	tw := tar.NewWriter(w)
	put := func(name string, b []byte) error {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o444, Size: int64(len(b)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err := tw.Write(b)
		return err
	}
	fail := func(err error) error { return fmt.Errorf("cannot save: %w", err) }
	if err := put(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return fail(err)
	}
	for _, d := range []string{"blobs/", "blobs/sha256/"} {
		if err := tw.WriteHeader(&tar.Header{Name: d, Mode: 0o755, Typeflag: tar.TypeDir, ModTime: time.Unix(0, 0)}); err != nil {
			return fail(err)
		}
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	var dm []dockerManifest
	written := map[digest.Digest]bool{}
	for _, x := range list {
		for _, b := range x.blobs {
			if written[b.Digest] {
				continue
			}
			written[b.Digest] = true
			if err := s.writeBlob(ctx, tw, b); err != nil {
				return fail(err)
			}
		}
		d := bare(x.target)
		if len(x.tags) == 0 {
			idx.Manifests = append(idx.Manifests, d)
		}
		for _, t := range x.tags {
			d := d
			d.Annotations = map[string]string{images.AnnotationImageName: t, ocispec.AnnotationRefName: t[strings.LastIndexByte(t, ':')+1:]}
			idx.Manifests = append(idx.Manifests, d)
		}
		dm = append(dm, dockerManifestOf(x))
	}
	ib, err := json.Marshal(idx)
	if err != nil {
		return fail(err)
	}
	mb, err := json.Marshal(dm)
	if err != nil {
		return fail(err)
	}
	if err := put(ocispec.ImageIndexFile, ib); err != nil {
		return fail(err)
	}
	if err := put("manifest.json", mb); err != nil {
		return fail(err)
	}
	if err := tw.Close(); err != nil {
		return fail(err)
	}
	return nil
}

// dockerManifestOf describes the one platform that docker's manifest has room for.
func dockerManifestOf(x *saved) dockerManifest {
	v := x.variants[0]
	for _, o := range x.variants {
		if o.id == x.id {
			v = o
		}
	}
	m := dockerManifest{Config: blobPath(v.config.Digest), Layers: []string{}, LayerSources: map[digest.Digest]ocispec.Descriptor{}}
	for _, t := range x.tags {
		m.RepoTags = append(m.RepoTags, familiar(t))
	}
	for i, l := range v.layers {
		m.Layers = append(m.Layers, blobPath(l.Digest))
		m.LayerSources[v.diffIDs[i]] = bare(l)
	}
	return m
}

func blobPath(d digest.Digest) string {
	return path.Join("blobs", d.Algorithm().String(), d.Encoded())
}

func (s *Service) writeBlob(ctx context.Context, tw *tar.Writer, d ocispec.Descriptor) error {
	ra, err := s.content.ReaderAt(ctx, d)
	if err != nil {
		return asFault(err)
	}
	defer ra.Close()
	if err := tw.WriteHeader(&tar.Header{Name: blobPath(d.Digest), Mode: 0o444, Size: ra.Size(), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{tw}, ctxReader{ctx, content.NewReader(ra)}, make([]byte, 256<<10))
	return err
}
