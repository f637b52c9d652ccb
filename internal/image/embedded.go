package image

import (
	"bytes"
	"context"
	"fmt"

	"github.com/cloudos-io/cloudos/internal/hello"
)

const (
	embeddedName  = "docker.io/servin/hello:latest"
	embeddedLabel = "io.servin.embedded"
)

// EnsureEmbedded loads the image that the engine carries in itself, if the store
// lacks it or has the one of another build. What a user put under its name stays.
func (s *Service) EnsureEmbedded(ctx context.Context) error {
	sum, ok := hello.Identity()
	if !ok {
		s.log.Info("this build carries no image of its own (make hello)")
		return nil
	}
	if r, ok := s.cat.get(embeddedName); ok && (r.Labels[embeddedLabel] == "" || r.Labels[embeddedLabel] == sum) {
		return nil
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	b, _ := hello.Image()
	old, had := s.cat.get(embeddedName)
	if _, err := s.load(ctx, bytes.NewReader(b), nil, nil); err != nil {
		return fmt.Errorf("cannot load the engine's own image: %w", err)
	}
	r, ok := s.cat.get(embeddedName)
	if !ok {
		return fmt.Errorf("cannot load the engine's own image: it is not called %s", familiar(embeddedName))
	}
	s.mutate.Lock()
	defer s.mutate.Unlock()
	if had && old.Target.Digest != r.Target.Digest {
		// The former build's is nobody's image.
		if err := s.dropRecord(ctx, danglingName+old.Target.Digest.String()); err != nil {
			return err
		}
		s.markDirty()
	}
	return s.setRecord(ctx, embeddedName, r.Target, map[string]string{embeddedLabel: sum})
}
