package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// putBlob stores a small blob with labels; one that is there gets the labels.
func (s *Service) putBlob(ctx context.Context, mediaType string, b []byte, labels map[string]string) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	w, err := content.OpenWriter(ctx, s.content, content.WithRef("servin-blob-"+desc.Digest.String()), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return desc, s.label(ctx, desc.Digest, labels)
	}
	if err != nil {
		return desc, asFault(fmt.Errorf("cannot store %s: %w", desc.Digest, err))
	}
	defer w.Close()
	if err := w.Truncate(0); err != nil {
		return desc, asFault(fmt.Errorf("cannot store %s: %w", desc.Digest, err))
	}
	if _, err := w.Write(b); err != nil {
		return desc, asFault(fmt.Errorf("cannot store %s: %w", desc.Digest, err))
	}
	err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(labels))
	if errdefs.IsAlreadyExists(err) {
		return desc, s.label(ctx, desc.Digest, labels)
	}
	if err != nil {
		return desc, asFault(fmt.Errorf("cannot store %s: %w", desc.Digest, err))
	}
	return desc, nil
}

// label adds labels to a blob.
func (s *Service) label(ctx context.Context, d digest.Digest, labels map[string]string) error {
	if len(labels) == 0 {
		return nil
	}
	info, err := s.content.Info(ctx, d)
	if err != nil {
		return asFault(fmt.Errorf("cannot label %s: %w", d, err))
	}
	var paths []string
	for k, v := range labels {
		if info.Labels[k] != v {
			paths = append(paths, "labels."+k)
		}
	}
	if len(paths) == 0 {
		return nil
	}
	if info.Labels == nil {
		info.Labels = map[string]string{}
	}
	maps.Copy(info.Labels, labels)
	if _, err := s.content.Update(ctx, info, paths...); err != nil {
		return asFault(fmt.Errorf("cannot label %s: %w", d, err))
	}
	return nil
}

func (s *Service) putJSON(ctx context.Context, mediaType string, v any, labels map[string]string) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("cannot encode %s: %w", mediaType, err)
	}
	return s.putBlob(ctx, mediaType, b, labels)
}

// putStream stores a stream of unknown digest. Tee, if not nil, gets all of it.
func (s *Service) putStream(ctx context.Context, r io.Reader, tee io.Writer, limit int64) (desc ocispec.Descriptor, err error) {
	ref := fmt.Sprintf("servin-stream-%d-%d", time.Now().UnixNano(), s.cat.serial.Add(1))
	w, err := s.content.Writer(ctx, content.WithRef(ref))
	if err != nil {
		return desc, asFault(fmt.Errorf("cannot store a layer: %w", err))
	}
	committed := false
	defer func() {
		_ = w.Close()
		if !committed {
			if e := s.content.Abort(context.WithoutCancel(ctx), ref); e != nil && !errdefs.IsNotFound(e) {
				s.log.Warn("cannot abort storing a layer", "cause", e)
			}
		}
	}()
	if err := w.Truncate(0); err != nil {
		return desc, asFault(fmt.Errorf("cannot store a layer: %w", err))
	}
	var dst io.Writer = w
	if tee != nil {
		dst = io.MultiWriter(w, tee)
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{dst}, io.LimitReader(ctxReader{ctx, r}, limit+1), make([]byte, 256<<10))
	if err != nil {
		return desc, asFault(fmt.Errorf("cannot store a layer: %w", err))
	}
	if n > limit {
		return desc, errTooLarge(limit)
	}
	desc = ocispec.Descriptor{Digest: w.Digest(), Size: n}
	err = w.Commit(ctx, n, desc.Digest)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return desc, asFault(fmt.Errorf("cannot store a layer: %w", err))
	}
	committed = err == nil
	return desc, nil
}

// ctxReader ends a copy when the context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && c.ctx.Err() != nil {
		err = c.ctx.Err()
	}
	return n, err
}
