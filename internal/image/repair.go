package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image/unpack"
)

// openLayers opens the snapshotter. It names a layer's directory by the next
// number of its database before the number is taken for good, so an engine that
// was killed in between has left a directory in the way of the next layer: such
// are moved aside first, for collection to delete.
func (s *Service) openLayers(ctx context.Context, root string) (snapshots.Snapshotter, error) {
	if err := os.MkdirAll(filepath.Join(root, "snapshots"), 0o700); err != nil {
		return nil, err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, err
	}
	aside := 0
	err = ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		known, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		ents, err := os.ReadDir(filepath.Join(root, "snapshots"))
		if err != nil {
			return err
		}
		for _, e := range ents {
			if _, ok := known[e.Name()]; ok || strings.HasPrefix(e.Name(), orphanPrefix) {
				continue
			}
			aside++
			to := fmt.Sprintf("%s%d-%d", orphanPrefix, time.Now().UnixNano(), aside)
			if err := os.Rename(filepath.Join(root, "snapshots", e.Name()), filepath.Join(root, "snapshots", to)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	if aside > 0 {
		s.markDirty()
	}
	sn, err := overlay.NewSnapshotter(root, overlay.WithMetaStore(ms), overlay.AsynchronousRemove, overlay.WithUpperdirLabel)
	if err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	s.claims = &claims{cleaningSnapshotter: &detaching{sn.(cleaningSnapshotter)}}
	return s.claims, nil
}

const orphanPrefix = "orphan-"

// repair looks for layers that were unpacked shortly before the machine stopped
// and may not have reached the disk. Their blobs did, so they are unpacked again,
// in place: containers may stand on them.
func (s *Service) repair(ctx context.Context) error {
	suspects := map[digest.Digest]snapshots.Info{}
	var lazies []snapshots.Info
	err := s.snaps.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			return nil
		}
		if i.Labels[lazyLabel] != "" {
			lazies = append(lazies, i)
			return nil
		}
		switch boot := i.Labels[bootLabel]; boot {
		case "":
		case s.boot:
			s.unsynced.add(digest.Digest(i.Name)) // the engine stopped, not the machine
		default:
			suspects[digest.Digest(i.Name)] = i
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot look for unfinished layers: %w", err)
	}
	s.wakeSync()
	defer s.takeOver(ctx, lazies)
	if len(suspects) == 0 {
		return nil
	}
	layers := map[digest.Digest]*stacked{}
	for _, r := range s.cat.all() {
		t, err := s.target(ctx, r.Target)
		if err != nil {
			s.log.Warn("cannot read an image", "image", r.Name, "cause", err)
			continue
		}
		for i := range t.variants {
			for _, l := range stack(t.variants[i].layers, t.variants[i].diffIDs) {
				layers[l.chain] = l
			}
		}
	}
	done := map[digest.Digest]bool{}
	var mend func(chain digest.Digest) error
	mend = func(chain digest.Digest) error {
		if _, bad := suspects[chain]; !bad || done[chain] {
			return nil
		}
		done[chain] = true
		l := layers[chain]
		if l == nil {
			return fault.New(fault.NotFound, "no image has it any more")
		}
		if l.parent != "" {
			if err := mend(l.parent); err != nil {
				return err
			}
		}
		return s.reextract(ctx, l)
	}
	for chain := range suspects {
		if err := mend(chain); err != nil {
			s.log.Error("cannot restore a layer that the machine's stop may have torn: pull its image again", "layer", chain, "cause", err)
			continue
		}
		s.unsynced.add(chain)
	}
	return s.flush(ctx)
}

// reextract unpacks a layer beside its directory and swaps the two.
func (s *Service) reextract(ctx context.Context, l *stacked) error {
	info, err := s.snaps.Stat(ctx, l.chain.String())
	if err != nil {
		return asFault(err)
	}
	dir := info.Labels[upperLabel]
	if dir == "" {
		return fmt.Errorf("it has no directory")
	}
	fresh := filepath.Join(filepath.Dir(dir), "fs.new")
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	for _, d := range []string{dir, fresh} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	defer os.RemoveAll(fresh)
	var lowers []string
	if l.parent != "" {
		c, err := s.chainOf(ctx, l.parent)
		if err != nil {
			return err
		}
		lowers = c.Dirs
	}
	var res unpack.Result
	if res, err = s.extract(ctx, l, fresh, append([]string{}, lowers...)); err != nil {
		return err
	}
	if res.DiffID != l.diffID {
		return fault.New(fault.Invalid, "its blob holds %s instead of %s", res.DiffID, l.diffID)
	}
	if err := s.finishLayer(fresh, lowers, res); err != nil {
		return err
	}
	err = unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// A file system without exchange: nothing is mounted yet at this time.
		if err = os.RemoveAll(dir); err == nil {
			err = os.Rename(fresh, dir)
		}
	}
	return err
}
