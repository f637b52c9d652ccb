package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image/lazy"
)

// lazyState is what a Service knows of the process that serves layers.
type lazyState struct {
	client *lazy.Client // nil without a directory for it
	wake   chan struct{}

	mu      sync.Mutex
	change  chan struct{} // closed and renewed when a layer settled or got into trouble
	trouble map[digest.Digest]string
}

func (z *lazyState) init(cfg Config, userns bool) {
	z.wake, z.change = make(chan struct{}, 1), make(chan struct{})
	if cfg.LazyDir == "" {
		return
	}
	idle := cfg.LazyIdle
	if idle == 0 {
		idle = 2 * time.Second
	}
	z.client = &lazy.Client{Dir: cfg.LazyDir, UserNS: userns, Idle: idle}
}

func (z *lazyState) kick() {
	select {
	case z.wake <- struct{}{}:
	default:
	}
}

func (z *lazyState) set(t map[digest.Digest]string) {
	z.mu.Lock()
	z.trouble = t
	close(z.change)
	z.change = make(chan struct{})
	z.mu.Unlock()
}

// LazyTrouble says which lazily pulled layers cannot be read, and why.
func (s *Service) LazyTrouble() []string {
	s.lazy.mu.Lock()
	defer s.lazy.mu.Unlock()
	var out []string
	for d, why := range s.lazy.trouble {
		out = append(out, fmt.Sprintf("lazily pulled layer %s: %s", short(d), why))
	}
	slices.Sort(out)
	return out
}

// lazyOne is a layer that is lazy now.
type lazyOne struct {
	lazyRecord
	chain, parent, dir string
}

func lazyOf(i snapshots.Info) (lazyOne, bool) {
	o := lazyOne{chain: i.Name, parent: i.Parent, dir: i.Labels[upperLabel]}
	if i.Labels[lazyLabel] == "" || o.dir == "" {
		return o, false
	}
	return o, json.Unmarshal([]byte(i.Labels[lazyLabel]), &o.lazyRecord) == nil
}

func (s *Service) lazies(ctx context.Context) ([]lazyOne, error) {
	var out []lazyOne
	err := s.snaps.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if o, ok := lazyOf(i); ok {
			out = append(out, o)
		}
		return nil
	})
	return out, asFault(err)
}

// takeOver sees to it that the lazy layers of an earlier engine are mounted. A
// process that serves them goes on; one that is gone, as after a reboot, is
// started again, without credentials until somebody pulls the image again.
func (s *Service) takeOver(ctx context.Context, infos []snapshots.Info) {
	if len(infos) == 0 {
		return
	}
	byChain := map[string]lazyOne{}
	for _, i := range infos {
		if o, ok := lazyOf(i); ok {
			byChain[o.chain] = o
		}
	}
	s.remount(ctx, byChain)
	s.lazy.kick()
}

func (s *Service) remount(ctx context.Context, byChain map[string]lazyOne) {
	trouble := map[digest.Digest]string{}
	done := map[string]bool{}
	var mend func(o lazyOne)
	mend = func(o lazyOne) {
		if done[o.chain] {
			return
		}
		done[o.chain] = true
		if below, ok := byChain[o.parent]; ok {
			mend(below)
		}
		if lazy.Mounted(o.dir) {
			return
		}
		err := errors.New("lazy pulls are off")
		if s.lazy.client != nil {
			err = s.mountAgain(ctx, o)
		}
		if err != nil {
			trouble[o.Blob.Digest] = err.Error()
			s.log.Error("cannot mount a lazily pulled layer: pull its image again", "layer", o.Blob.Digest, "cause", err)
		}
	}
	for _, o := range byChain {
		mend(o)
	}
	s.lazy.set(trouble)
}

func (s *Service) mountAgain(ctx context.Context, o lazyOne) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := lazy.Detach(o.dir); err != nil {
		return err
	}
	got, err := s.lazy.client.Prepare(ctx, o.Blob, s.lazyState(o.Blob.Digest), lazyAccess{Registries: s.registries, Ref: o.Ref})
	if err != nil {
		return err
	}
	attrs, err := s.impliedAttrs(ctx, digest.Digest(o.parent), got.Implied)
	if err != nil {
		return err
	}
	return s.lazy.client.Mount(ctx, o.Blob, o.chain, o.dir, attrs)
}

// runLazy follows the process that serves layers, as long as there are any, and
// settles those that are complete.
func (s *Service) runLazy(ctx context.Context) {
	if s.lazy.client == nil {
		return
	}
	ctx = s.ctx(ctx)
	var gen uint64
	failed := map[digest.Digest]time.Time{}
	var told map[digest.Digest]string
	for ctx.Err() == nil {
		ones, err := s.lazies(ctx)
		if err != nil {
			s.log.Warn("cannot list lazily pulled layers", "cause", err)
		}
		if len(ones) == 0 {
			s.lazy.set(nil)
			select {
			case <-s.lazy.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		wctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		st, err := s.lazy.client.Wait(wctx, gen)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, context.DeadlineExceeded):
			if st, err = s.lazy.client.Status(ctx); err == nil {
				break
			}
			fallthrough
		case err != nil:
			// It was killed: what uses its mounts sees errors, what comes next need not.
			s.log.Error("the process that serves lazily pulled layers is gone, start it again", "cause", err)
			byChain := map[string]lazyOne{}
			for _, o := range ones {
				byChain[o.chain] = o
			}
			s.remount(ctx, byChain)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			gen = 0
			continue
		}
		gen = st.Gen
		trouble := map[digest.Digest]string{}
		for _, b := range st.Blobs {
			if b.Trouble != "" {
				trouble[b.Digest] = b.Trouble
				if told[b.Digest] != b.Trouble {
					s.log.Error("a lazily pulled layer cannot be read", "layer", b.Digest, "cause", b.Trouble)
				}
			}
			if !b.Complete || time.Since(failed[b.Digest]) < time.Minute {
				continue
			}
			if err := s.settleAll(ctx, b.Digest); err != nil && ctx.Err() == nil {
				failed[b.Digest] = time.Now()
				trouble[b.Digest] = err.Error()
				s.log.Error("cannot settle a lazily pulled layer", "layer", b.Digest, "cause", err)
			}
		}
		s.lazy.set(trouble)
		told = trouble
	}
}

// settleAll settles every layer of a blob that is complete.
func (s *Service) settleAll(ctx context.Context, d digest.Digest) error {
	ones, err := s.lazies(ctx)
	if err != nil {
		return err
	}
	ones = slices.DeleteFunc(ones, func(o lazyOne) bool { return o.Blob.Digest != d })
	if len(ones) == 0 {
		return nil
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := s.importLazy(ctx, ones[0].lazyRecord); err != nil {
		if fault.Is(err, fault.Invalid) {
			// A torn sparse file, or a registry that lies: from the start.
			err = errors.Join(err, s.lazy.client.Spoil(ctx, d))
		}
		return err
	}
	for _, o := range ones {
		err := func() error {
			unlock, err := s.chains.lock(ctx, o.chain)
			if err != nil {
				return err
			}
			defer unlock()
			if err := s.hold(ctx, digest.Digest(o.chain)); err != nil {
				return err
			}
			return s.settleLazy(ctx, digest.Digest(o.chain))
		}()
		if err != nil && !fault.Is(err, fault.NotFound) {
			return err
		}
	}
	return nil
}

// whole waits until the blobs of layers are here, for those that are lazy.
func (s *Service) whole(ctx context.Context, layers []ocispec.Descriptor) error {
	if s.lazy.client == nil {
		return nil
	}
	ctx = s.ctx(ctx)
	for _, l := range layers {
		for hurried := false; ; {
			s.lazy.mu.Lock()
			change, why := s.lazy.change, s.lazy.trouble[l.Digest]
			s.lazy.mu.Unlock()
			if _, err := s.content.Info(ctx, l.Digest); err == nil {
				break
			}
			ones, err := s.lazies(ctx)
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(ones, func(o lazyOne) bool { return o.Blob.Digest == l.Digest }) {
				break // the caller finds out
			}
			if hurried && why != "" {
				return fault.New(fault.Unavailable, "cannot get all of the lazily pulled layer %s: %s", short(l.Digest), why)
			}
			if !hurried {
				if err := s.lazy.client.Hurry(ctx, l.Digest); err != nil {
					return fmt.Errorf("cannot get all of layer %s: %w", short(l.Digest), err)
				}
				hurried = true
			}
			select {
			case <-change:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// sweepLazy takes mounts away that no lazy layer has, and the directories of
// blobs that none needs. Collection calls it.
func (s *Service) sweepLazy(ctx context.Context) error {
	base := filepath.Join(s.cfg.Root, "lazy")
	ents, err := os.ReadDir(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing was ever pulled lazily
	}
	if err != nil {
		return err
	}
	ones, err := s.lazies(ctx)
	if err != nil {
		return err
	}
	dirs, states := map[string]bool{}, map[string]bool{}
	for _, o := range ones {
		dirs[o.dir], states[s.lazyState(o.Blob.Digest)] = true, true
	}
	detached, err := detachLazy(s.cfg.Root, dirs)
	if err != nil {
		return err
	}
	for _, e := range ents {
		dir := filepath.Join(base, e.Name())
		// A pull makes its directory before its layer: leave what is new.
		if st, err := e.Info(); states[dir] || err == nil && time.Since(st.ModTime()) < grace && detached == 0 && !s.lazySettled(ctx, e.Name()) {
			continue
		}
		if err := removeState(dir); err != nil {
			return err
		}
	}
	return nil
}

// DetachLazy takes the mounts of all lazily pulled layers of the image store at
// root away, for a shutdown that ends every container. The next start mounts
// them again.
func DetachLazy(root string) error {
	_, err := detachLazy(root, nil)
	return err
}

func detachLazy(root string, keep map[string]bool) (int, error) {
	layers := filepath.Join(root, "layers") + "/"
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "fuse.servin" || !strings.HasPrefix(m.Mountpoint, layers) || keep[m.Mountpoint], false
	})
	if err != nil {
		return 0, err
	}
	for _, m := range mounts {
		if err := lazy.Detach(m.Mountpoint); err != nil {
			return 0, err
		}
	}
	return len(mounts), nil
}

// lazySettled tells whether the blob of a directory's name is stored.
func (s *Service) lazySettled(ctx context.Context, name string) bool {
	alg, hex, _ := strings.Cut(name, "-")
	_, err := s.content.Info(ctx, digest.NewDigestFromEncoded(digest.Algorithm(alg), hex))
	return err == nil
}

// cleaningSnapshotter is what the overlay snapshotter is.
type cleaningSnapshotter interface {
	snapshots.Snapshotter
	snapshots.Cleaner
}

// detaching takes the mount off a layer's directory when the layer is removed,
// so that the directory can be deleted.
type detaching struct{ cleaningSnapshotter }

// Remove removes a layer.
func (d *detaching) Remove(ctx context.Context, key string) error {
	info, err := d.Stat(ctx, key)
	if err != nil {
		return err
	}
	if err := d.cleaningSnapshotter.Remove(ctx, key); err != nil {
		return err
	}
	if dir := info.Labels[upperLabel]; dir != "" {
		return lazy.Detach(dir)
	}
	return nil
}
