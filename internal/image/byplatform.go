package image

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// RemovePlatforms deletes single platforms of an image: their manifests and
// layers go, the names and the other platforms stay. With its last platform the
// image goes as a whole.
func (s *Service) RemovePlatforms(ctx context.Context, ref string, only []ocispec.Platform, o RemoveOptions) ([]mimage.DeleteResponse, error) {
	target, gone, left, err := s.dropPlatforms(ctx, ref, only, o)
	if err != nil {
		return nil, err
	}
	if left == 0 {
		return s.Remove(ctx, ref, o)
	}
	if err := s.Collect(ctx); err != nil {
		s.log.Warn("cannot collect a removed platform's content", "cause", err)
		s.markDirty()
	}
	s.cat.touch(target)
	out := make([]mimage.DeleteResponse, 0, len(gone))
	for _, d := range gone {
		out = append(out, mimage.DeleteResponse{Deleted: d.String()})
		s.emit("delete", d, "")
	}
	return out, nil
}

// dropPlatforms takes the index's references to the platforms' manifests away.
// It changes nothing where no platform would be left.
func (s *Service) dropPlatforms(ctx context.Context, ref string, only []ocispec.Platform, o RemoveOptions) (target digest.Digest, gone []digest.Digest, left int, err error) {
	s.mutate.Lock()
	defer s.mutate.Unlock()
	f, err := s.find(ctx, ref) // under the lock: another caller may just remove it
	if err != nil {
		return "", nil, 0, err
	}
	t, err := s.target(ctx, f.target)
	if err != nil {
		return "", nil, 0, asFault(fmt.Errorf("cannot read image %s: %w", ref, err))
	}
	for _, p := range only {
		m := platforms.OnlyStrict(p)
		i := slices.IndexFunc(t.variants, func(v variant) bool { return m.Match(v.platform) })
		if i < 0 {
			if len(t.variants) == 0 {
				return "", nil, 0, errNoImage(ref)
			}
			return "", nil, 0, errPlatform(ref, t.best(""), platforms.Format(p))
		}
		v := &t.variants[i]
		if slices.Contains(gone, v.manifest.Digest) {
			continue
		}
		if err := unused(v, o); err != nil {
			return "", nil, 0, err
		}
		gone = append(gone, v.manifest.Digest)
	}
	left = len(t.variants) - len(gone)
	if left == 0 || !images.IsIndexType(f.target.MediaType) {
		return f.target.Digest, gone, 0, nil
	}
	return f.target.Digest, gone, left, s.unlabel(s.ctx(ctx), f.target.Digest, t.children, gone)
}

func unused(v *variant, o RemoveOptions) error {
	if o.InUse == nil {
		return nil
	}
	for c, running := range o.InUse(v.id) {
		if running {
			return (&reason{hard: true, id: v.id, text: "image is being used by running container " + shortID(c)}).err()
		}
		if !o.Force {
			return (&reason{id: v.id, text: "image is being used by stopped container " + shortID(c)}).err()
		}
	}
	return nil
}

// unlabel drops the labels that keep manifests, and what attests them, from
// being collected with their index.
func (s *Service) unlabel(ctx context.Context, index digest.Digest, children []ocispec.Descriptor, gone []digest.Digest) error {
	drop := slices.Clone(gone)
	for _, c := range children {
		if isAttestation(c) && slices.Contains(gone, digest.Digest(c.Annotations[attestedDigest])) {
			drop = append(drop, c.Digest)
		}
	}
	info := content.Info{Digest: index, Labels: map[string]string{}}
	var paths []string
	for key, d := range labelsFor(children) {
		if slices.Contains(drop, digest.Digest(d)) {
			info.Labels[key] = "" // which removes it
			paths = append(paths, "labels."+key)
		}
	}
	if len(paths) == 0 {
		return fault.New(fault.Internal, "cannot remove the platform: its index names none of it")
	}
	if _, err := s.content.Update(ctx, info, paths...); err != nil {
		return asFault(fmt.Errorf("cannot label %s: %w", index, err))
	}
	return nil
}
