package engine

import (
	"context"
	"fmt"
	"slices"
	"sync"

	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/volume"
)

// ImageBucket holds the names of images that Kubernetes pulled with their ids, in
// the durable database. A prune by a user leaves them alone, and the kubelet leaves
// the others alone, which it is told are pinned.
const ImageBucket = "podimages"

// podImages are those names.
type podImages struct {
	mu sync.RWMutex
	m  map[string]string
}

func (e *Engine) loadPodImages() error {
	e.pods.images.m = map[string]string{}
	_, err := e.cfg.Durable.Load(ImageBucket, func(key string, id []byte) error {
		e.pods.images.m[key] = string(id)
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot load the names of Kubernetes' images: %w", err)
	}
	return nil
}

// PodImagePulled notes that an image is Kubernetes', by its full name and id.
func (e *Engine) PodImagePulled(_ context.Context, ref, id string) error {
	i := &e.pods.images
	i.mu.Lock()
	known := i.m[ref] == id
	i.m[ref] = id
	i.mu.Unlock()
	if known {
		return nil
	}
	return e.cfg.Durable.Put(ImageBucket, ref, []byte(id)).Wait()
}

// PodImageRemoved forgets a name, or all names of an id.
func (e *Engine) PodImageRemoved(_ context.Context, refOrID string) error {
	i := &e.pods.images
	var gone []string
	i.mu.Lock()
	for ref, id := range i.m {
		if ref == refOrID || id == refOrID {
			gone = append(gone, ref)
			delete(i.m, ref)
		}
	}
	i.mu.Unlock()
	for _, ref := range gone {
		if err := e.cfg.Durable.Delete(ImageBucket, ref).Wait(); err != nil {
			return err
		}
	}
	return nil
}

// PodImage tells whether an image of that id is Kubernetes'.
func (e *Engine) PodImage(id string) bool {
	i := &e.pods.images
	i.mu.RLock()
	defer i.mu.RUnlock()
	for _, have := range i.m {
		if have == id {
			return true
		}
	}
	return false
}

// ImageUsers tells which containers use an image id: container id to whether it runs.
func (e *Engine) ImageUsers(id string) map[string]bool {
	m := map[string]bool{}
	for _, u := range e.all() {
		r := u.rec.Load()
		if r.Image.ID == id || slices.ContainsFunc(r.Mounts, func(p volume.Point) bool { return p.ImageID == id }) {
			m[r.ID] = r.State.Running() || r.State.Status == mcontainer.StateRestarting
		}
	}
	return m
}
