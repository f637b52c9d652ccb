package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// puller is one pull of one reference.
type puller struct {
	s        *Service
	named    reference.Named
	platform string
	auth     *registry.AuthConfig
	fetcher  remotes.Fetcher
	progress func(Progress)
	base     context.Context // without the lease: partial downloads outlive the pull
	slots    *semaphore.Weighted
	fetched  atomic.Bool // something was not here already
	lazy     bool
	admit    func(ctx context.Context, a Admission) error // nil admits all
}

// Pull fetches an image, or all tags of a repository, and unpacks it. Equal
// pulls at the same time are one.
func (s *Service) Pull(ctx context.Context, o PullOptions) (err error) {
	// The libraries below make their spans with the process's tracer, too.
	ctx, span := otel.Tracer("github.com/cloudos-io/cloudos/internal/image").Start(ctx, "image.pull", trace.WithAttributes(attribute.String("container.image.name", o.Ref)))
	defer func() {
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
	}()
	named, err := reference.ParseNormalizedNamed(o.Ref)
	if err != nil {
		return errBadRef(o.Ref, err)
	}
	if o.Platform != "" {
		if _, err := platforms.Parse(o.Platform); err != nil {
			return fault.New(fault.Invalid, "cannot read platform %q: %w", o.Platform, err)
		}
	}
	progress := o.Progress
	if progress == nil {
		progress = func(Progress) {}
	}
	if !o.AllTags {
		return s.pullOne(ctx, reference.TagNameOnly(named), o, progress)
	}
	if !reference.IsNameOnly(named) {
		return fault.New(fault.Invalid, "tag can't be used with --all-tags/-a")
	}
	tags, err := s.remoteTags(ctx, named, o.Auth)
	if err != nil {
		return s.pullFault(named, o.Auth, err)
	}
	for _, t := range tags {
		tagged, err := reference.WithTag(named, t)
		if err != nil {
			continue // no tag that could be asked for
		}
		if err := s.pullOne(ctx, tagged, o, progress); err != nil {
			return err
		}
	}
	return nil
}

func (s *Service) pullOne(ctx context.Context, named reference.Named, o PullOptions, progress func(Progress)) error {
	key := named.String() + "\x00" + o.Platform + "\x00" + authKey(o.Auth)
	lazily := s.lazily(o, progress)
	if lazily {
		key += "\x00lazy"
	}
	if o.Admit != nil {
		key += "\x00" + o.AdmitKey
	}
	span := trace.SpanFromContext(ctx)
	return s.pulls.do(ctx, key, progress, func(ctx context.Context, progress func(Progress)) error {
		ctx = trace.ContextWithSpan(ctx, span) // of who asked first
		p := &puller{s: s, named: named, platform: o.Platform, auth: o.Auth, progress: progress, lazy: lazily, admit: o.Admit,
			slots: semaphore.NewWeighted(int64(s.cfg.MaxConcurrentDownloads))}
		if err := p.run(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return s.pullFault(named, o.Auth, err)
		}
		return nil
	})
}

// authKey tells credentials apart without keeping them.
func authKey(a *registry.AuthConfig) string {
	if a == nil {
		return ""
	}
	b, _ := json.Marshal(a)
	return string(digest.SHA256.FromBytes(b))
}

func (p *puller) run(ctx context.Context) error {
	s := p.s
	p.base = s.ctx(ctx)
	tag := "latest"
	switch r := p.named.(type) {
	case reference.Digested:
		tag = r.Digest().String()
	case reference.Tagged:
		tag = r.Tag()
	}
	res := s.resolver(p.auth, nil)
	name, desc, err := res.Resolve(p.base, resolvable(p.named))
	if err != nil {
		if errdefs.IsNotFound(err) {
			if lerr := s.tooLarge(ctx, p.named, p.auth); lerr != nil {
				return lerr
			}
		}
		return err // before any progress: clients look at the status
	}
	p.progress(Progress{ID: tag, Action: "Pulling from " + reference.Path(p.named)})
	if isSchema1(desc.MediaType) {
		return errSchema1()
	}
	if p.fetcher, err = res.Fetcher(p.base, name); err != nil {
		return err
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	v, err := p.target(ctx, desc)
	if err != nil {
		return err
	}
	names := []string{s.recordName(p.named)}
	if _, ok := p.named.(reference.Digested); !ok {
		names = append(names, p.named.Name()+"@"+desc.Digest.String())
	}
	before, had := s.cat.get(names[0])
	if err := s.refer(ctx, desc, nil, names...); err != nil {
		return err
	}
	short := reference.FamiliarString(p.named)
	p.progress(Progress{Action: "Digest: " + desc.Digest.String()})
	if had && before.Target.Digest == desc.Digest && !p.fetched.Load() {
		p.progress(Progress{Action: "Status: Image is up to date for " + short})
	} else {
		p.progress(Progress{Action: "Status: Downloaded newer image for " + short})
	}
	s.emit("pull", v.id, short)
	return nil
}

// resolvable drops the tag of a reference that has a digest too: the digest rules.
func resolvable(named reference.Named) string {
	if d, ok := named.(reference.Digested); ok {
		return named.Name() + "@" + d.Digest().String()
	}
	return named.String()
}

func isSchema1(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.docker.distribution.manifest.v1")
}

// target fetches a manifest or index with all that the wanted platform needs.
func (p *puller) target(ctx context.Context, desc ocispec.Descriptor) (*variant, error) {
	b, err := p.manifest(ctx, desc)
	if err != nil {
		return nil, err
	}
	if !images.IsIndexType(desc.MediaType) {
		if err := p.admitted(ctx, desc, desc); err != nil {
			return nil, err
		}
		return p.image(ctx, desc, b)
	}
	idx, err := parseIndex(b)
	if err != nil {
		return nil, err
	}
	child, err := choose(idx, p.platform)
	if err != nil {
		return nil, err
	}
	cb, err := p.manifest(ctx, child)
	if err != nil {
		return nil, err
	}
	if err := p.admitted(ctx, desc, child); err != nil {
		return nil, err
	}
	v, err := p.image(ctx, child, cb)
	if err != nil {
		return nil, err
	}
	for _, m := range idx.Manifests {
		if isAttestation(m) && m.Annotations[attestedDigest] == child.Digest.String() {
			if err := p.attestation(ctx, m); err != nil {
				p.s.log.Info("an attestation cannot be fetched", "digest", m.Digest, "cause", err)
			}
		}
	}
	_, err = p.s.putBlob(ctx, desc.MediaType, b, p.labels(labelsFor(idx.Manifests)))
	return v, err
}

// admitted asks whether the pull may go on.
func (p *puller) admitted(ctx context.Context, target, manifest ocispec.Descriptor) error {
	if p.admit == nil {
		return nil
	}
	return p.admit(ctx, Admission{Ref: p.named.String(), Target: target.Digest, Manifest: manifest.Digest})
}

// choose picks the manifest of an index for a platform, the host's for "".
func choose(idx ocispec.Index, platform string) (ocispec.Descriptor, error) {
	m, name := platforms.Default(), platforms.DefaultString()
	if platform != "" {
		spec, err := platforms.Parse(platform)
		if err != nil {
			return ocispec.Descriptor{}, fault.New(fault.Invalid, "cannot read platform %q: %w", platform, err)
		}
		m, name = platforms.Only(spec), platform
	}
	var best ocispec.Descriptor
	for _, d := range idx.Manifests {
		if isAttestation(d) || !images.IsManifestType(d.MediaType) {
			continue
		}
		// One without a platform is for whoever asks, if nothing fits better.
		if d.Platform == nil {
			if best.Digest == "" {
				best = d
			}
			continue
		}
		if m.Match(*d.Platform) && (best.Digest == "" || best.Platform == nil || m.Less(*d.Platform, *best.Platform)) {
			best = d
		}
	}
	if best.Digest == "" {
		return best, fault.New(fault.NotFound, "no matching manifest for %s in the manifest list entries", name)
	}
	return best, nil
}

// manifest fetches a small blob and proves it.
func (p *puller) manifest(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	return p.small(ctx, desc, maxManifest)
}

func (p *puller) small(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	if desc.Size > limit {
		return nil, fault.New(fault.Invalid, "%s of %d bytes is larger than the %d allowed", desc.Digest, desc.Size, limit)
	}
	if b, err := content.ReadBlob(ctx, p.s.content, bare(desc)); err == nil && digest.FromBytes(b) == desc.Digest {
		return b, nil
	}
	p.fetched.Store(true)
	rc, err := p.fetcher.Fetch(p.base, bare(desc))
	if err != nil {
		return nil, missing(desc, err)
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, limit+1))
	if err != nil {
		return nil, fmt.Errorf("cannot fetch %s: %w", desc.Digest, broken(desc, err))
	}
	if got := desc.Digest.Algorithm().FromBytes(b); got != desc.Digest {
		return nil, fault.New(fault.Invalid, "the registry sent %s instead of %s", got, desc.Digest)
	}
	if desc.Size > 0 && int64(len(b)) != desc.Size {
		return nil, fault.New(fault.Invalid, "the registry sent %d bytes instead of %d for %s", len(b), desc.Size, desc.Digest)
	}
	return b, nil
}

// labels adds where the blob comes from, for mounting it across repositories.
func (p *puller) labels(l map[string]string) map[string]string {
	out := map[string]string{sourceLabel(p.named): reference.Path(p.named)}
	for k, v := range l {
		out[k] = v
	}
	return out
}

// sourcePrefix starts the labels that say which repositories have a blob.
const sourcePrefix = "containerd.io/distribution.source."

func sourceLabel(named reference.Named) string { return sourcePrefix + reference.Domain(named) }

// image fetches what a manifest names and unpacks it meanwhile.
func (p *puller) image(ctx context.Context, desc ocispec.Descriptor, b []byte) (*variant, error) {
	m, err := parseManifest(b)
	if err != nil {
		return nil, err
	}
	if !images.IsKnownConfig(m.Config.MediaType) && !strings.Contains(m.Config.MediaType, "config") {
		return nil, fault.New(fault.Unsupported, "the reference leads to no image but to an artifact (its config is of type %q)", m.Config.MediaType)
	}
	for _, l := range m.Layers {
		if !images.IsLayerType(l.MediaType) {
			return nil, fault.New(fault.Unsupported, "layer %s is of type %q, which is no file system", short(l.Digest), l.MediaType)
		}
	}
	cb, err := p.small(ctx, m.Config, maxConfig)
	if err != nil {
		return nil, err
	}
	img, err := parseConfig(cb)
	if err != nil {
		return nil, err
	}
	v, err := newVariant(desc, m, img)
	if err != nil {
		return nil, err
	}
	if p.platform != "" && !platforms.Only(platforms.MustParse(p.platform)).Match(v.platform) {
		return nil, errPlatform(reference.FamiliarString(p.named), &v, p.platform)
	}
	if err := p.room(m.Layers); err != nil {
		return nil, err
	}
	if err := p.layers(ctx, &v); err != nil {
		return nil, err
	}
	if _, err := p.s.putBlob(ctx, m.Config.MediaType, cb, p.labels(nil)); err != nil {
		return nil, err
	}
	if err := p.s.bind(ctx, &v); err != nil {
		return nil, err
	}
	_, err = p.s.putBlob(ctx, desc.MediaType, b, p.labels(labelsFor(append([]ocispec.Descriptor{m.Config}, m.Layers...))))
	return &v, err
}

// room refuses at once what cannot fit on the disk.
func (p *puller) room(layers []ocispec.Descriptor) error {
	var need int64
	for _, l := range layers {
		if l.Size > p.s.cfg.Limits.Bytes || need+l.Size < need {
			return fault.New(fault.Invalid, "layer %s of %d bytes is larger than the %d allowed", short(l.Digest), l.Size, p.s.cfg.Limits.Bytes)
		}
		need += l.Size
	}
	var st unix.Statfs_t
	if err := unix.Statfs(p.s.cfg.Root, &st); err != nil {
		return nil
	}
	if free := int64(st.Bavail) * st.Bsize; need > free {
		return fault.New(fault.Exhausted, "the image takes %d MB compressed, but %d MB are free on the disk of %s", need>>20, free>>20, p.s.cfg.Root)
	}
	return nil
}

// layers downloads side by side and unpacks each layer as it is complete.
func (p *puller) layers(ctx context.Context, v *variant) error {
	stacked := stack(v.layers, v.diffIDs)
	for _, l := range stacked {
		p.progress(Progress{ID: short(l.desc.Digest), Action: "Pulling fs layer"})
	}
	g, gctx := errgroup.WithContext(ctx)
	type arrival struct {
		c    chan struct{}
		lazy *lazyLayer
	}
	ready := map[digest.Digest]arrival{}
	for _, l := range stacked {
		if a, ok := ready[l.desc.Digest]; ok {
			l.ready, l.lazy = a.c, a.lazy // the same layer twice
			continue
		}
		a := arrival{c: make(chan struct{}), lazy: p.lazyLayer(l)}
		ready[l.desc.Digest] = a
		l.ready, l.lazy = a.c, a.lazy
		g.Go(func() error {
			if err := p.slots.Acquire(gctx, 1); err != nil {
				return err
			}
			defer p.slots.Release(1)
			if a.lazy == nil || !p.prepareLazy(gctx, l, a.lazy) {
				if err := p.blob(gctx, l.desc); err != nil {
					return err
				}
			}
			close(a.c)
			return nil
		})
	}
	g.Go(func() error { return p.s.unpack(gctx, stacked, p.progress) })
	return g.Wait()
}

const downloadTries = 6

// blob gets one layer into the content store.
func (p *puller) blob(ctx context.Context, desc ocispec.Descriptor) error {
	unlock, err := p.s.chains.lock(ctx, "blob "+desc.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	id := short(desc.Digest)
	if _, err := p.s.content.Info(ctx, desc.Digest); err == nil {
		err := p.s.holdBlob(ctx, desc)
		if err == nil {
			p.progress(Progress{ID: id, Action: "Already exists"})
			return p.s.addSource(ctx, desc.Digest, p.named)
		}
		if !fault.Is(err, fault.NotFound) {
			return err
		}
	}
	p.fetched.Store(true)
	var last int64
	for try := 1; ; try++ {
		got, err := p.download(ctx, desc)
		if err == nil {
			p.progress(Progress{ID: id, Action: "Download complete"})
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if got > last {
			try = 1 // it goes on
		}
		last = got
		if try >= downloadTries || !passing(err) {
			return err
		}
		p.progress(Progress{ID: id, Action: fmt.Sprintf("Retrying in %d second", try)})
		select {
		case <-time.After(time.Duration(try) * 500 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// passing tells whether an error may go away by itself.
func passing(err error) bool {
	switch fault.Of(asFault(err)) {
	case fault.Internal, fault.Unavailable:
		return !errors.Is(err, unix.ENOSPC)
	}
	return false
}

// download continues a layer where an earlier try stopped, also one of an
// earlier process. It returns how far it got.
func (p *puller) download(ctx context.Context, desc ocispec.Descriptor) (int64, error) {
	ref := "layer-" + desc.Digest.String()
	w, err := p.s.content.Writer(p.base, content.WithRef(ref), content.WithDescriptor(bare(desc)))
	if errdefs.IsAlreadyExists(err) {
		return 0, p.s.holdBlob(ctx, desc)
	}
	if err != nil {
		return 0, fmt.Errorf("cannot store layer %s: %w", short(desc.Digest), err)
	}
	defer w.Close()
	st, err := w.Status()
	if err != nil {
		return 0, err
	}
	off := st.Offset
	abort := func() {
		_ = w.Close()
		_ = p.s.content.Abort(context.WithoutCancel(p.base), ref)
	}
	if off > desc.Size {
		abort()
		return 0, fmt.Errorf("a partial download of %s was too long", short(desc.Digest))
	}
	if off < desc.Size {
		if off, err = p.transfer(ctx, desc, w, off); err != nil {
			if fault.Is(err, fault.Invalid) || st.Offset > 0 && noRanges(err) {
				abort() // begin again from the start
			}
			return off, err
		}
	}
	p.progress(Progress{ID: short(desc.Digest), Action: "Verifying Checksum"})
	if got := w.Digest(); got != desc.Digest {
		abort()
		if st.Offset > 0 {
			return 0, fmt.Errorf("a partial download of %s was corrupt", short(desc.Digest)) // once more from the start
		}
		return off, fault.New(fault.Invalid, "the registry sent %s instead of layer %s", got, desc.Digest)
	}
	err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(p.labels(nil)))
	if errdefs.IsAlreadyExists(err) {
		err = p.s.holdBlob(ctx, desc)
	}
	if err != nil {
		return off, asFault(fmt.Errorf("cannot store layer %s: %w", short(desc.Digest), err))
	}
	return off, nil
}

func (p *puller) transfer(ctx context.Context, desc ocispec.Descriptor, w content.Writer, off int64) (int64, error) {
	rc, err := p.fetcher.Fetch(ctx, bare(desc))
	if err != nil {
		return off, missing(desc, err)
	}
	defer rc.Close()
	if off > 0 {
		sk, ok := rc.(io.Seeker)
		if !ok {
			return off, fmt.Errorf("cannot continue layer %s", short(desc.Digest))
		}
		if _, err := sk.Seek(off, io.SeekStart); err != nil {
			return off, err
		}
	}
	buf := make([]byte, 256<<10)
	told := time.Time{}
	for {
		n, err := rc.Read(buf)
		if n > 0 {
			if off+int64(n) > desc.Size {
				return off, errTooLong(desc)
			}
			if _, werr := w.Write(buf[:n]); werr != nil {
				return off, diskFault(fmt.Errorf("cannot store layer %s: %w", short(desc.Digest), werr))
			}
			off += int64(n)
			if now := time.Now(); now.Sub(told) >= 100*time.Millisecond {
				told = now
				p.progress(Progress{ID: short(desc.Digest), Action: "Downloading", Current: off, Total: desc.Size})
			}
		}
		if ctx.Err() != nil {
			return off, ctx.Err()
		}
		switch {
		case err == nil:
			continue
		case !errors.Is(err, io.EOF):
			return off, fmt.Errorf("cannot download layer %s: %w", short(desc.Digest), broken(desc, err))
		case off < desc.Size:
			return off, fmt.Errorf("cannot download layer %s: the registry stopped after %d of %d bytes: %w", short(desc.Digest), off, desc.Size, io.ErrUnexpectedEOF)
		}
		return off, nil
	}
}

// missing tells that a part of an image is not there. Without it the error would
// read as if the image were unknown.
func missing(desc ocispec.Descriptor, err error) error {
	if errdefs.IsNotFound(err) {
		return fault.New(fault.NotFound, "the registry does not have %s, which the image names", desc.Digest)
	}
	return err
}

func errTooLong(desc ocispec.Descriptor) error {
	return fault.New(fault.Invalid, "the registry sends more than the %d bytes of %s", desc.Size, desc.Digest)
}

// broken gives what a fetcher's read fails with its kind and its words.
func broken(desc ocispec.Descriptor, err error) error {
	if errdefs.IsFailedPrecondition(err) {
		return errTooLong(desc)
	}
	return missing(desc, err) // the request goes out with the first read
}

// noRanges tells that the registry does not go on with a download in its midst.
func noRanges(err error) bool {
	var st remoteerrors.ErrUnexpectedStatus
	return errors.As(err, &st) && st.StatusCode == http.StatusRequestedRangeNotSatisfiable
}

// attestation fetches what BuildKit says about an image, for saving and pushing.
func (p *puller) attestation(ctx context.Context, desc ocispec.Descriptor) error {
	b, err := p.manifest(ctx, desc)
	if err != nil {
		return err
	}
	m, err := parseManifest(b)
	if err != nil {
		return err
	}
	parts := append([]ocispec.Descriptor{m.Config}, m.Layers...)
	for _, d := range parts {
		pb, err := p.small(ctx, d, maxConfig)
		if err != nil {
			return err
		}
		if _, err := p.s.putBlob(ctx, d.MediaType, pb, p.labels(nil)); err != nil {
			return err
		}
	}
	_, err = p.s.putBlob(ctx, desc.MediaType, b, p.labels(labelsFor(parts)))
	return err
}
