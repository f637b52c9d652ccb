package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// pusher is one push of one reference.
type pusher struct {
	s        *Service
	named    reference.Named
	remote   remotes.Pusher
	tracker  docker.StatusTracker
	progress func(Progress)
}

// Push sends an image, or all tags of a repository, to its registry.
func (s *Service) Push(ctx context.Context, o PushOptions) error {
	named, err := reference.ParseNormalizedNamed(o.Ref)
	if err != nil {
		return errBadRef(o.Ref, err)
	}
	if _, ok := named.(reference.Digested); ok {
		return fault.New(fault.Invalid, "cannot push a digest reference")
	}
	progress := o.Progress
	if progress == nil {
		progress = func(Progress) {}
	}
	progress(Progress{Action: "The push refers to repository [" + named.Name() + "]"})
	if !o.AllTags {
		return s.pushOne(ctx, reference.TagNameOnly(named), o, progress)
	}
	found := false
	for _, r := range s.cat.all() {
		n, err := reference.ParseNormalizedNamed(r.Name)
		if err != nil || isDangling(r.Name) || isDigestRef(r.Name) || n.Name() != named.Name() {
			continue
		}
		found = true
		if err := s.pushOne(ctx, n, o, progress); err != nil {
			return err
		}
	}
	if !found {
		return fault.New(fault.NotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(named))
	}
	return nil
}

func (s *Service) pushOne(ctx context.Context, named reference.Named, o PushOptions, progress func(Progress)) error {
	rec, ok := s.cat.get(s.recordName(named))
	if !ok {
		return fault.New(fault.NotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(named))
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	x, err := s.toPush(ctx, o.Ref, rec, o.Platform)
	if err != nil {
		return err
	}
	tracker := docker.NewInMemoryTracker()
	remote, err := s.resolver(o.Auth, tracker).Pusher(ctx, named.String())
	if err != nil {
		return pushFault(named, o.Auth, err)
	}
	p := &pusher{s: s, named: named, remote: remote, tracker: tracker, progress: progress}
	if err := p.run(ctx, x); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// The registry refuses what is damaged, in words of its own.
		if derr := s.sound(ctx, x.blobs); derr != nil {
			return fmt.Errorf("cannot push %s: %w", reference.FamiliarString(named), derr)
		}
		return pushFault(named, o.Auth, err)
	}
	desc := x.target
	if err := s.refer(ctx, desc, nil, named.Name()+"@"+desc.Digest.String()); err != nil {
		return err
	}
	tag := "latest"
	if t, ok := named.(reference.Tagged); ok {
		tag = t.Tag()
	}
	progress(Progress{Action: fmt.Sprintf("%s: digest: %s size: %d", tag, desc.Digest, desc.Size)})
	s.emit("push", x.id, reference.FamiliarString(named))
	return nil
}

// toPush decides what goes: the index if all of it is here, else one platform.
func (s *Service) toPush(ctx context.Context, ref string, rec images.Image, platform string) (*saved, error) {
	var only []ocispec.Platform
	f := found{name: rec.Name, target: rec.Target}
	if platform != "" {
		v, err := s.pick(ctx, ref, f, platform)
		if err != nil {
			return nil, err
		}
		only = []ocispec.Platform{v.platform}
	}
	x, err := s.savedOf(ctx, ref, f, only)
	if err != nil {
		return nil, err
	}
	if images.IsIndexType(x.target.MediaType) {
		t, err := s.target(ctx, rec.Target)
		if err != nil {
			return nil, err
		}
		whole := true
		for _, c := range t.children {
			if _, err := s.content.Info(ctx, c.Digest); err != nil {
				whole = false
			}
		}
		if !whole {
			v := t.best("")
			x = &saved{target: v.manifest, variants: []*variant{v}, id: v.id}
			x.blobs = append([]ocispec.Descriptor{v.manifest, v.config}, v.layers...)
		}
	}
	for _, b := range x.blobs {
		if err := s.holdBlob(ctx, b); err != nil {
			return nil, fault.As(fault.Of(err), fmt.Errorf("cannot push %s: some of it is not here: %w", ref, err))
		}
	}
	return x, nil
}

// run sends blobs side by side, then manifests, then what the tag names.
func (p *pusher) run(ctx context.Context, x *saved) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(p.s.cfg.MaxConcurrentUploads)
	seen := map[string]bool{}
	var manifests []ocispec.Descriptor
	isLayer := map[string]bool{}
	for _, v := range x.variants {
		for _, l := range v.layers {
			isLayer[l.Digest.String()] = true
		}
	}
	for _, b := range x.blobs {
		if seen[b.Digest.String()] || b.Digest == x.target.Digest {
			continue
		}
		seen[b.Digest.String()] = true
		if images.IsManifestType(b.MediaType) || images.IsIndexType(b.MediaType) {
			manifests = append(manifests, b)
			continue
		}
		tell := func(Progress) {}
		if isLayer[b.Digest.String()] {
			tell = p.progress
			tell(Progress{ID: short(b.Digest), Action: "Preparing"})
		}
		g.Go(func() error { return p.blob(gctx, b, tell) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, m := range append(manifests, x.target) {
		if err := p.blob(ctx, m, func(Progress) {}); err != nil {
			return err
		}
	}
	return nil
}

const uploadTries = 5

func (p *pusher) blob(ctx context.Context, desc ocispec.Descriptor, tell func(Progress)) error {
	for try := 1; ; try++ {
		err := p.send(ctx, desc, tell)
		if err == nil || ctx.Err() != nil || try >= uploadTries || !passing(err) || unauthorized(err) {
			return err
		}
		tell(Progress{ID: short(desc.Digest), Action: fmt.Sprintf("Retrying in %d second", try)})
		select {
		case <-time.After(time.Duration(try) * 500 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (p *pusher) send(ctx context.Context, desc ocispec.Descriptor, tell func(Progress)) error {
	id := short(desc.Digest)
	d := bare(desc)
	if info, err := p.s.content.Info(ctx, desc.Digest); err == nil {
		// Which of its repositories have the blob, for mounting it from there. The
		// pusher looks under the host's name without the port.
		host, _, _ := strings.Cut(reference.Domain(p.named), ":")
		if repos := info.Labels[sourceLabel(p.named)]; repos != "" {
			d.Annotations = map[string]string{sourcePrefix + host: repos}
		}
	}
	if d.MediaType == "" {
		d.MediaType = "application/octet-stream"
	}
	w, err := p.remote.Push(ctx, d)
	if errdefs.IsAlreadyExists(err) {
		st, _ := p.tracker.GetStatus(remotes.MakeRefKey(ctx, d))
		if from := st.MountedFrom; from != "" {
			_, repo, _ := strings.Cut(from, "/")
			tell(Progress{ID: id, Action: "Mounted from " + repo})
		} else {
			tell(Progress{ID: id, Action: "Layer already exists"})
		}
		return p.s.addSource(ctx, desc.Digest, p.named)
	}
	if err != nil {
		return err
	}
	defer w.Close()
	ra, err := p.s.content.ReaderAt(ctx, desc)
	if err != nil {
		return asFault(err)
	}
	defer ra.Close()
	r := &tellReader{ReadSeeker: io.NewSectionReader(ra, 0, ra.Size()), ctx: ctx, tell: func(n int64) {
		tell(Progress{ID: id, Action: "Pushing", Current: n, Total: desc.Size})
	}}
	if err := content.Copy(ctx, w, r, desc.Size, desc.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	tell(Progress{ID: id, Action: "Pushed"})
	return p.s.addSource(ctx, desc.Digest, p.named)
}

// addSource notes that a repository has the blob, so that it can be mounted from
// there into others of the same registry.
func (s *Service) addSource(ctx context.Context, d digest.Digest, named reference.Named) error {
	key, repo := sourceLabel(named), reference.Path(named)
	info, err := s.content.Info(ctx, d)
	if err != nil {
		return asFault(fmt.Errorf("cannot label %s: %w", d, err))
	}
	for r := range strings.SplitSeq(info.Labels[key], ",") {
		if r == repo {
			return nil
		}
	}
	if old := info.Labels[key]; old != "" {
		repo = old + "," + repo
	}
	if len(key)+len(repo) > 4000 {
		return nil
	}
	return s.label(ctx, d, map[string]string{key: repo})
}

// tellReader reports how far a seekable reader was read.
type tellReader struct {
	io.ReadSeeker
	ctx  context.Context
	tell func(int64)
	n    int64
	last time.Time
}

func (t *tellReader) Read(b []byte) (int, error) {
	if err := t.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := t.ReadSeeker.Read(b)
	t.n += int64(n)
	if now := time.Now(); now.Sub(t.last) > 100*time.Millisecond {
		t.last = now
		t.tell(t.n)
	}
	return n, err
}

func (t *tellReader) Seek(off int64, whence int) (int64, error) {
	n, err := t.ReadSeeker.Seek(off, whence)
	t.n = n
	return n, err
}

func pushFault(named reference.Named, auth *registry.AuthConfig, err error) error {
	short := reference.FamiliarString(named)
	if fault.Of(err) != fault.Internal {
		return fault.As(fault.Of(err), fmt.Errorf("cannot push %s: %w", short, err))
	}
	if unauthorized(err) {
		kind := fault.Forbidden
		if auth == nil || auth.Username == "" && auth.IdentityToken == "" && auth.RegistryToken == "" {
			kind = fault.Unauthorized
		}
		return fault.New(kind, "push access denied for %s, repository does not exist or may require authorization: %w", reference.FamiliarName(named), err)
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	return asFault(fmt.Errorf("cannot push %s: %w", short, err))
}
