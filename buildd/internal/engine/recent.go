package engine

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
)

// fresh is how long an answer about a blob counts. BuildKit asks about each layer of
// an image once for every layer above it, within a few milliseconds; between such an
// answer and its use a blob may change as well.
const fresh = 100 * time.Millisecond

// recent is the engine's content store with a short memory of which blobs are there.
// What is not there is asked about again.
type recent struct {
	content.Store

	mu sync.Mutex
	m  map[blobKey]blobInfo
}

type blobKey struct {
	namespace string
	digest    digest.Digest
}

type blobInfo struct {
	content.Info
	at time.Time
}

// Info tells of a blob.
func (r *recent) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	ns, _ := namespaces.Namespace(ctx)
	k, now := blobKey{ns, d}, time.Now()
	r.mu.Lock()
	i, ok := r.m[k]
	r.mu.Unlock()
	if ok && now.Sub(i.at) < fresh {
		out := i.Info
		out.Labels = maps.Clone(out.Labels) // the caller's to change
		return out, nil
	}
	got, err := r.Store.Info(ctx, d)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		delete(r.m, k)
		return got, err
	}
	if len(r.m) >= 256 || r.m == nil { // builds ask about a few at a time
		r.m = map[blobKey]blobInfo{}
	}
	kept := got
	kept.Labels = maps.Clone(got.Labels)
	r.m[k] = blobInfo{kept, now}
	return got, nil
}

func (r *recent) forget(d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.m {
		if k.digest == d {
			delete(r.m, k)
		}
	}
}

// Update changes a blob's labels.
func (r *recent) Update(ctx context.Context, i content.Info, fields ...string) (content.Info, error) {
	defer r.forget(i.Digest)
	return r.Store.Update(ctx, i, fields...)
}

// Delete removes a blob.
func (r *recent) Delete(ctx context.Context, d digest.Digest) error {
	defer r.forget(d)
	return r.Store.Delete(ctx, d)
}
