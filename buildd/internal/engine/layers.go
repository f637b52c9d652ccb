package engine

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// handedOn is the type of the one mount of a layer that the engine unpacks.
const handedOn = "servin-layer"

// layers is the engine's snapshotter for BuildKit. BuildKit unpacks the layers of
// an image into snapshots of its own; here the engine unpacks them, as for its
// containers, or has done so long ago, and BuildKit's snapshot becomes a second
// name of the engine's.
type layers struct {
	snapshots.Snapshotter
	engine contract.Engine

	mu sync.Mutex
	// pending are layers between Prepare and Commit, by the key of the snapshot.
	pending map[string]pendingLayer
}

type pendingLayer struct {
	chain  digest.Digest
	parent string        // the parent snapshot's name
	below  digest.Digest // the chain of the parent
	labels map[string]string
}

// Layers returns the snapshotter and the applier that goes with it; others
// applies what is no layer of an image.
func (e *Engine) Layers(others diff.Applier) (snapshots.Snapshotter, diff.Applier) {
	l := &layers{Snapshotter: e.Snapshots, engine: e.Client, pending: map[string]pendingLayer{}}
	return l, applier{l, others}
}

func (l *layers) get(key string) (pendingLayer, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.pending[key]
	return p, ok
}

// Prepare hands the layers of images on.
func (l *layers) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	p, ok := imageLayer(key, parent)
	if !ok {
		return l.Snapshotter.Prepare(ctx, key, parent, opts...)
	}
	var i snapshots.Info
	for _, o := range opts {
		if err := o(&i); err != nil {
			return nil, err
		}
	}
	p.labels = i.Labels
	l.mu.Lock()
	l.pending[key] = p
	l.mu.Unlock()
	return mountsOf(key), nil
}

func mountsOf(key string) []mount.Mount { return []mount.Mount{{Type: handedOn, Source: key}} }

// imageLayer tells whether a key is that of a layer being unpacked on layers of
// an image: "extract-UNIQUE CHAIN".
func imageLayer(key, parent string) (p pendingLayer, ok bool) {
	rest, ok := strings.CutPrefix(key, "extract-")
	if !ok {
		return p, false
	}
	_, chain, ok := strings.Cut(rest, " ")
	if !ok {
		return p, false
	}
	p.parent = parent
	var err error
	if p.chain, err = digest.Parse(chain); err != nil {
		return p, false
	}
	if parent != "" {
		if p.below, ok = snapshot.ParseLayerSnapshotID(parent); !ok {
			return p, false
		}
	}
	return p, true
}

// Mounts of a layer that was handed on name it for the applier.
func (l *layers) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	if _, ok := l.get(key); ok {
		return mountsOf(key), nil
	}
	return l.Snapshotter.Mounts(ctx, key)
}

// Stat knows layers that were handed on.
func (l *layers) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	if p, ok := l.get(key); ok {
		return snapshots.Info{Kind: snapshots.KindActive, Name: key, Parent: p.parent, Labels: p.labels}, nil
	}
	return l.Snapshotter.Stat(ctx, key)
}

// Commit names the engine's snapshot.
func (l *layers) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	p, ok := l.get(key)
	if !ok {
		return l.Snapshotter.Commit(ctx, name, key, opts...)
	}
	l.drop(key)
	return l.engine.Alias(ctx, contract.AliasRequest{From: p.chain.String(), To: name, Parent: p.parent})
}

func (l *layers) drop(key string) {
	l.mu.Lock()
	delete(l.pending, key)
	l.mu.Unlock()
}

// applier has the engine unpack the layers of images.
type applier struct {
	l      *layers
	others diff.Applier
}

// Apply unpacks a layer.
func (a applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	if len(mounts) != 1 || mounts[0].Type != handedOn {
		return a.others.Apply(ctx, desc, mounts, opts...)
	}
	key := mounts[0].Source
	p, ok := a.l.get(key)
	if !ok {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s is not being unpacked: %w", desc.Digest, errdefs.ErrFailedPrecondition)
	}
	diffID := desc.Annotations[labels.LabelUncompressed]
	err := a.l.engine.Layer(ctx, contract.LayerRequest{
		Blob:   ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size},
		DiffID: diffID, Chain: p.chain.String(), Parent: p.below.String(),
	})
	if err != nil {
		a.l.drop(key)
		return ocispec.Descriptor{}, fmt.Errorf("cannot unpack layer %s: %w", desc.Digest, err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.Digest(diffID)}, nil
}
