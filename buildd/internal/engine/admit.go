package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/containerimage"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// Callers knows whose the sessions are. Its methods are safe for concurrent use.
type Callers struct {
	mu sync.Mutex
	m  map[string]string // session to the engine's name for who opened it
}

// Set notes who opened a session, until forget is called.
func (c *Callers) Set(session, caller string) (forget func()) {
	if session == "" || caller == "" {
		return func() {}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = map[string]string{}
	}
	if _, taken := c.m[session]; taken { // the first has it
		return func() {}
	}
	c.m[session] = caller
	return func() {
		c.mu.Lock()
		delete(c.m, session)
		c.mu.Unlock()
	}
}

func (c *Callers) of(g session.Group) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, id := range session.AllSessionIDs(g) {
		if who := c.m[id]; who != "" {
			out = append(out, who)
		}
	}
	return out
}

// admitter asks the engine whether a build may use an image.
type admitter struct {
	engine  contract.Engine
	callers *Callers
	content content.Provider
}

// before asks by the name alone; more tells that the digests are to be judged, too.
func (a admitter) before(ctx context.Context, g session.Group, ref string) (more bool, err error) {
	r, err := a.engine.Admit(ctx, contract.AdmitRequest{Callers: a.callers.of(g), Ref: ref})
	return r.More, err
}

// resolved asks about what a name led to.
func (a admitter) resolved(ctx context.Context, g session.Group, ref string, target digest.Digest, p *ocispec.Platform) error {
	m, err := a.manifest(ctx, target, p)
	if err != nil {
		return err
	}
	_, err = a.engine.Admit(ctx, contract.AdmitRequest{Callers: a.callers.of(g), Ref: ref, Target: target.String(), Manifest: m.String()})
	return err
}

// manifest finds what of an image a platform takes.
func (a admitter) manifest(ctx context.Context, target digest.Digest, p *ocispec.Platform) (digest.Digest, error) {
	match := platforms.Default()
	if p != nil {
		match = platforms.Only(*p)
	}
	blob, err := content.ReadBlob(ctx, a.content, ocispec.Descriptor{Digest: target})
	if err != nil {
		return "", fmt.Errorf("cannot read image %s: %w", target, err)
	}
	var index ocispec.Index // of both kinds
	if err := json.Unmarshal(blob, &index); err != nil {
		return "", fmt.Errorf("cannot read image %s: %w", target, err)
	}
	if len(index.Manifests) == 0 {
		return target, nil
	}
	var best *ocispec.Descriptor
	for i, c := range index.Manifests {
		if c.Platform == nil || !match.Match(*c.Platform) || !images.IsManifestType(c.MediaType) {
			continue
		}
		if best == nil || match.Less(*c.Platform, *best.Platform) {
			best = &index.Manifests[i]
		}
	}
	if best == nil {
		return "", fmt.Errorf("the index %s has no image for this platform", target)
	}
	return best.Digest, nil
}

// guarded is a source of images that asks before they are used, for what reaches it
// without the frontend having asked.
type guarded struct {
	source.Source
	a admitter
}

// Resolve makes the source of one image.
func (s guarded) Resolve(ctx context.Context, id source.Identifier, sm *session.Manager, v solver.Vertex) (source.SourceInstance, error) {
	i, err := s.Source.Resolve(ctx, id, sm, v)
	if err != nil {
		return nil, err
	}
	img, ok := id.(*containerimage.ImageIdentifier)
	if !ok {
		return i, nil
	}
	return guardedInstance{i, s.a, img}, nil
}

type guardedInstance struct {
	source.SourceInstance
	a  admitter
	id *containerimage.ImageIdentifier
}

// CacheKey asks the registry what the name leads to: before that, and once it is known.
func (i guardedInstance) CacheKey(ctx context.Context, j solver.JobContext, index int) (string, string, solver.CacheOpts, bool, error) {
	var g session.Group
	if j != nil {
		g = j.Session()
	}
	ref := i.id.Reference.String()
	more, err := i.a.before(ctx, g, ref)
	if err != nil {
		return "", "", nil, false, err
	}
	key, pin, opts, done, err := i.SourceInstance.CacheKey(ctx, j, index)
	if err == nil && more {
		var d digest.Digest
		if d, err = digest.Parse(pin); err == nil {
			err = i.a.resolved(ctx, g, ref, d, i.id.Platform)
		}
	}
	return key, pin, opts, done, err
}

// ResolveSourceMetadata tells a frontend what an image is, if the build may use it.
func (w *Worker) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt, sm *session.Manager, j solver.JobContext) (*sourceresolver.MetaResponse, error) {
	id, err := w.ParseSource(op, nil)
	if err != nil {
		return nil, err
	}
	img, ok := id.(*containerimage.ImageIdentifier)
	if !ok {
		return w.Worker.ResolveSourceMetadata(ctx, op, opt, sm, j)
	}
	var g session.Group
	if j != nil {
		g = j.Session()
	}
	ref := img.Reference.String()
	more, err := w.admit.before(ctx, g, ref)
	if err != nil {
		return nil, err
	}
	m, err := w.Worker.ResolveSourceMetadata(ctx, op, opt, sm, j)
	if err != nil || !more || m.Image == nil || m.Image.Config == nil {
		return m, err
	}
	var p *ocispec.Platform
	if opt.ImageOpt != nil {
		p = opt.ImageOpt.Platform
	}
	if err := w.admit.resolved(ctx, g, ref, m.Image.Digest, p); err != nil {
		return nil, err
	}
	return m, nil
}
