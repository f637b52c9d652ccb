package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// pinLease holds the chains that writable layers stand on.
const pinLease = "servin-containers"

// grace is how long after a Resolve its chain is safe although no writable layer
// stands on it yet.
const grace = 2 * time.Minute

// unsynced are layers that were unpacked but may not be on the disk yet.
type unsynced struct {
	mu     sync.Mutex
	chains []digest.Digest
	wake   chan struct{}
}

func (u *unsynced) add(d digest.Digest) {
	u.mu.Lock()
	u.chains = append(u.chains, d)
	u.mu.Unlock()
}

func (u *unsynced) take() []digest.Digest {
	u.mu.Lock()
	defer u.mu.Unlock()
	c := u.chains
	u.chains = nil
	return c
}

func (s *Service) wakeSync() {
	select {
	case s.unsynced.wake <- struct{}{}:
	default:
	}
}

func (s *Service) markDirty() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// Run collects what nothing refers to, and gets unpacked layers onto the disk,
// until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	hourly := time.NewTicker(time.Hour)
	defer hourly.Stop()
	graced := time.NewTicker(grace / 4)
	defer graced.Stop()
	var lazy sync.WaitGroup
	lazy.Go(func() { s.runLazy(ctx) })
	defer lazy.Wait()
	// What a killed engine left goes when the start is over.
	start := time.NewTimer(20 * time.Second)
	defer start.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.unsynced.wake:
			if err := s.flush(ctx); err != nil {
				s.log.Warn("cannot write layers to disk", "cause", err)
			}
			continue
		case <-graced.C:
			if int64(len(s.ready.recent())) >= s.graced.Load() {
				continue // nothing of what was kept for a moment can go yet
			}
		case <-hourly.C:
		case <-start.C:
		case <-s.dirty:
			// Removals come in groups.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(2 * time.Second):
			}
		}
		if err := s.Collect(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot collect unused content", "cause", err)
		}
	}
}

// flush writes unpacked layers to the disk and notes that they are there. Until
// then they count as lost if the machine stops: their blobs, which are synced,
// are unpacked again.
func (s *Service) flush(ctx context.Context) error {
	chains := s.unsynced.take()
	if len(chains) == 0 {
		return nil
	}
	if err := syncFS(s.cfg.Root); err != nil {
		return err
	}
	ctx = s.ctx(ctx)
	for _, c := range chains {
		_, err := s.snaps.Update(ctx, snapshots.Info{Name: c.String(), Labels: map[string]string{bootLabel: ""}}, "labels."+bootLabel)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// Collect removes what no image, container or operation refers to. References
// stand still meanwhile, so that no image goes between pinning and marking.
func (s *Service) Collect(ctx context.Context) error {
	s.mutate.Lock()
	defer s.mutate.Unlock()
	ctx = s.ctx(ctx)
	if err := s.pin(ctx); err != nil {
		return err
	}
	s.graced.Store(int64(len(s.ready.recent()))) // what is kept for a moment goes later
	if !s.swept {
		err := s.distrust(ctx)
		if err != nil && !errors.Is(err, syscall.ENOSPC) {
			return err
		}
		// On a full disk what the database knows must go first.
		s.swept = err == nil
	}
	if _, err := s.db.GarbageCollect(ctx); err != nil {
		return fmt.Errorf("cannot collect: %w", err)
	}
	if err := s.sweepLazy(ctx); err != nil {
		return fmt.Errorf("cannot let go of lazily pulled layers: %w", err)
	}
	if c, ok := s.layers.(snapshots.Cleaner); ok {
		// A store without any layer yet has no table of them.
		if err := c.Cleanup(ctx); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("cannot delete unused layers: %w", err)
		}
	}
	return nil
}

// distrust makes the next collection compare the stores with the database even
// where the database saw no removal: an engine that was killed between writing to
// a store and to the database has left what the database never knew.
func (s *Service) distrust(ctx context.Context) error {
	key := fmt.Sprintf("servin-sweep-%d", time.Now().UnixNano())
	if _, err := s.snaps.Prepare(ctx, key, ""); err != nil {
		return asFault(fmt.Errorf("cannot look for leftovers: %w", err))
	}
	if err := s.snaps.Remove(ctx, key); err != nil {
		return asFault(fmt.Errorf("cannot look for leftovers: %w", err))
	}
	d, err := s.putBlob(ctx, "text/plain", []byte(key), nil)
	if err != nil {
		return err
	}
	if err := s.content.Delete(ctx, d.Digest); err != nil {
		return asFault(fmt.Errorf("cannot look for leftovers: %w", err))
	}
	return nil
}

// pin makes one lease hold exactly the chains in use.
func (s *Service) pin(ctx context.Context) error {
	want := map[string]struct{}{}
	if s.cfg.PinnedChains != nil {
		maps.Copy(want, s.cfg.PinnedChains())
	}
	for _, c := range s.ready.recent() {
		want[c] = struct{}{}
	}
	lease := leases.Lease{ID: pinLease}
	have, err := s.leases.ListResources(ctx, lease)
	if errdefs.IsNotFound(err) {
		_, err = s.leases.Create(ctx, leases.WithID(pinLease))
	}
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("cannot hold the containers' layers: %w", err)
	}
	const typ = "snapshots/" + snapshotterName
	held := map[string]struct{}{}
	for _, r := range have {
		if _, ok := want[r.ID]; ok {
			held[r.ID] = struct{}{}
			continue
		}
		if err := s.leases.DeleteResource(ctx, lease, r); err != nil {
			return fmt.Errorf("cannot let go of layer %s: %w", r.ID, err)
		}
	}
	var errs []error
	for id := range want {
		if _, ok := held[id]; ok {
			continue
		}
		if _, err := s.snaps.Stat(ctx, id); errdefs.IsNotFound(err) {
			continue
		}
		if err := s.leases.AddResource(ctx, lease, leases.Resource{ID: id, Type: typ}); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
