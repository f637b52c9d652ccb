package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// danglingName starts the name of a record that keeps an image with no
// reference. It cannot be a normalised reference: those begin with a domain.
const danglingName = "dangling@"

// catalog mirrors the image records of the database, which this process alone
// writes, and remembers what their targets hold.
type catalog struct {
	serial atomic.Uint64
	mu     sync.RWMutex
	byName map[string]images.Image
	// targets holds what was read of a manifest or index, by its digest.
	targets map[digest.Digest]*target
	// gen counts changes, so that caches know when they are stale.
	gen uint64
}

func (c *catalog) load(list []images.Image) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byName = make(map[string]images.Image, len(list))
	c.targets = map[digest.Digest]*target{}
	for _, i := range list {
		c.byName[i.Name] = i
	}
}

func (c *catalog) get(name string) (images.Image, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	i, ok := c.byName[name]
	return i, ok
}

// all lists the records by name.
func (c *catalog) all() []images.Image {
	c.mu.RLock()
	list := slices.Collect(maps.Values(c.byName))
	c.mu.RUnlock()
	slices.SortFunc(list, func(a, b images.Image) int { return strings.Compare(a.Name, b.Name) })
	return list
}

func (c *catalog) put(i images.Image) {
	c.mu.Lock()
	c.byName[i.Name] = i
	c.gen++
	c.mu.Unlock()
}

func (c *catalog) drop(name string) {
	c.mu.Lock()
	delete(c.byName, name)
	c.gen++
	c.mu.Unlock()
}

// touch says that content changed under unchanged references.
func (c *catalog) touch(d digest.Digest) {
	c.mu.Lock()
	delete(c.targets, d)
	c.gen++
	c.mu.Unlock()
}

func (c *catalog) generation() uint64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.gen
}

// setRecord points a reference at a target, in the database first.
func (s *Service) setRecord(ctx context.Context, name string, desc ocispec.Descriptor, labels map[string]string) error {
	img := images.Image{Name: name, Target: bare(desc), Labels: labels, UpdatedAt: time.Now()}
	got, err := s.store.Update(ctx, img, "target", "labels")
	if errdefs.IsNotFound(err) {
		got, err = s.store.Create(ctx, img)
	}
	if err != nil {
		return asFault(fmt.Errorf("cannot record image %s: %w", name, err))
	}
	s.cat.touch(desc.Digest)
	s.cat.put(got)
	return nil
}

func (s *Service) dropRecord(ctx context.Context, name string) error {
	if err := s.store.Delete(ctx, name); err != nil && !errdefs.IsNotFound(err) {
		return asFault(fmt.Errorf("cannot remove image %s: %w", name, err))
	}
	s.cat.drop(name)
	return nil
}

// bare is the descriptor without what a registry may have hung on it.
func bare(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Platform: d.Platform}
}

// refer points names at a target and keeps the images that lose their last
// reference by it, untagged. The caller holds no lock.
func (s *Service) refer(ctx context.Context, desc ocispec.Descriptor, labels map[string]string, names ...string) error {
	s.mutate.Lock()
	defer s.mutate.Unlock()
	return s.referLocked(ctx, desc, labels, names...)
}

func (s *Service) referLocked(ctx context.Context, desc ocispec.Descriptor, labels map[string]string, names ...string) error {
	for _, name := range names {
		old, had := s.cat.get(name)
		if had && old.Target.Digest == desc.Digest && maps.Equal(old.Labels, labels) {
			s.cat.touch(desc.Digest)
			continue
		}
		if had && old.Target.Digest != desc.Digest {
			if err := s.keepUntagged(ctx, name, old.Target); err != nil {
				return err
			}
		}
		if err := s.setRecord(ctx, name, desc, labels); err != nil {
			return err
		}
	}
	// The target is referred to now.
	if !slices.Contains(names, danglingName+desc.Digest.String()) {
		if err := s.dropRecord(ctx, danglingName+desc.Digest.String()); err != nil {
			return err
		}
	}
	return nil
}

// keepUntagged records target as untagged if name is the last that refers to it.
func (s *Service) keepUntagged(ctx context.Context, name string, target ocispec.Descriptor) error {
	for _, r := range s.cat.all() {
		if r.Name != name && r.Target.Digest == target.Digest {
			return nil
		}
	}
	return s.setRecord(ctx, danglingName+target.Digest.String(), target, nil)
}

// errNoImage is Docker's text, which its clients look for to pull and run.
func errNoImage(ref string) error {
	if named, err := reference.ParseNormalizedNamed(ref); err == nil {
		if _, isDigest := named.(reference.Digested); !isDigest {
			ref = reference.FamiliarString(reference.TagNameOnly(named))
		}
	}
	return fault.New(fault.NotFound, "No such image: %s", ref)
}

func errBadRef(ref string, err error) error {
	if errors.Is(err, reference.ErrReferenceInvalidFormat) {
		return fault.As(fault.Invalid, err) // clients compare these words
	}
	return fault.New(fault.Invalid, "cannot read image reference %q: %w", ref, err)
}

// isDangling tells a record without a reference.
func isDangling(name string) bool { return strings.HasPrefix(name, danglingName) }

// found is what a reference leads to: a record's target, and if the reference
// was an id, the one variant meant.
type found struct {
	name    string // of the record; "" when found by id
	target  ocispec.Descriptor
	id      digest.Digest // set when found by the id of a config or manifest
	variant *variant
}

// find looks a reference up: a name first, then an id or a unique prefix of one.
func (s *Service) find(ctx context.Context, ref string) (found, error) {
	if ref == "" {
		return found{}, fault.New(fault.Invalid, "cannot look up an image without a name")
	}
	parsed, err := reference.ParseAnyReference(ref)
	if err == nil {
		if named, ok := parsed.(reference.Named); ok {
			if img, ok := s.cat.get(s.recordName(named)); ok {
				return found{name: img.Name, target: img.Target}, nil
			}
			// name:tag@digest and name@digest of what was got by another way.
			if d, ok := named.(reference.Digested); ok {
				if img, ok := s.byRepoDigest(named, d.Digest()); ok {
					return found{name: img.Name, target: img.Target}, nil
				}
				return found{}, errNoImage(ref)
			}
		}
	}
	hex := strings.TrimPrefix(ref, "sha256:")
	if isHex(hex) && len(hex) <= 64 && (len(hex) >= 4 || len(hex) == 64) {
		return s.findID(ctx, ref, hex)
	}
	if err != nil {
		return found{}, errBadRef(ref, err)
	}
	return found{}, errNoImage(ref)
}

// recordName is the key of a reference: name:tag, or name@digest without tag.
func (s *Service) recordName(named reference.Named) string {
	if d, ok := named.(reference.Digested); ok {
		return named.Name() + "@" + d.Digest().String()
	}
	return reference.TagNameOnly(named).String()
}

func (s *Service) byRepoDigest(named reference.Named, d digest.Digest) (images.Image, bool) {
	for _, r := range s.cat.all() {
		if r.Target.Digest == d && !isDangling(r.Name) {
			if n, err := reference.ParseNormalizedNamed(r.Name); err == nil && n.Name() == named.Name() {
				return r, true
			}
		}
	}
	return images.Image{}, false
}

func isHex(h string) bool {
	for _, c := range []byte(h) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return h != ""
}

// findID looks for ids (digests of configs, manifests and indexes) by prefix.
func (s *Service) findID(ctx context.Context, ref, hex string) (found, error) {
	var got found
	var ids []digest.Digest
	note := func(d digest.Digest, f found) {
		if !strings.HasPrefix(d.Encoded(), hex) || slices.Contains(ids, f.id) {
			return
		}
		ids = append(ids, f.id)
		got = f
	}
	seen := map[digest.Digest]bool{}
	for _, r := range s.cat.all() {
		if seen[r.Target.Digest] {
			continue
		}
		seen[r.Target.Digest] = true
		t, err := s.target(ctx, r.Target)
		if err != nil {
			if errors.Is(err, context.Canceled) {
				return found{}, err
			}
			continue // shown as broken by inspect of its name
		}
		for i := range t.variants {
			v := &t.variants[i]
			f := found{target: r.Target, id: v.id, variant: v}
			note(v.id, f)
			note(v.manifest.Digest, f)
		}
		if best := t.best(""); best != nil {
			note(r.Target.Digest, found{target: r.Target, id: best.id, variant: nil})
		}
	}
	switch len(ids) {
	case 0:
		return found{}, errNoImage(ref)
	case 1:
		return got, nil
	}
	return found{}, fault.New(fault.Conflict, "cannot tell which image %s is: %d ids start with it", ref, len(ids))
}
