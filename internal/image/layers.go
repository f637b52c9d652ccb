package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image/unpack"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

const (
	upperLabel = "containerd.io/snapshot/overlay.upperdir"
	// bootLabel holds the boot id of a layer that is not yet known to be on disk.
	bootLabel = "io.servin.unsynced"
	// sizeLabel holds the bytes of a layer's files, as Docker counts them.
	sizeLabel   = "io.servin.size"
	gcSnapshot  = "containerd.io/gc.ref.snapshot." + snapshotterName
	unpackedKey = "servin-unpack-"
)

// stacked is one layer on its way to becoming a snapshot.
type stacked struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	chain  digest.Digest
	parent digest.Digest
	// ready is closed when the blob is in the content store; nil if it is.
	ready <-chan struct{}
	// lazy is set for a layer that may be mounted instead of unpacked.
	lazy *lazyLayer
	// committed is closed when the snapshot exists.
	committed chan struct{}
}

// stack pairs layers with their chain ids, lowest first.
func stack(layers []ocispec.Descriptor, diffIDs []digest.Digest) []*stacked {
	chains := identity.ChainIDs(slices.Clone(diffIDs))
	out := make([]*stacked, len(layers))
	for i := range layers {
		out[i] = &stacked{desc: layers[i], diffID: diffIDs[i], chain: chains[i], committed: make(chan struct{})}
		if i > 0 {
			out[i].parent = chains[i-1]
		}
	}
	return out
}

// unpack makes snapshots of all layers. Each is extracted by itself, as soon as
// its blob is there, and put on its parent when that exists.
func (s *Service) unpack(ctx context.Context, layers []*stacked, progress func(Progress)) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, l := range layers {
		var below <-chan struct{}
		if i > 0 {
			below = layers[i-1].committed
		}
		g.Go(func() error {
			if err := s.unpackLayer(ctx, l, below, progress); err != nil {
				return err
			}
			close(l.committed)
			return nil
		})
	}
	return g.Wait()
}

func (s *Service) unpackLayer(ctx context.Context, l *stacked, below <-chan struct{}, progress func(Progress)) error {
	if l.ready != nil {
		select {
		case <-l.ready:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	unlock, err := s.chains.lock(ctx, l.chain.String())
	if err != nil {
		return err
	}
	defer unlock()
	if ok, err := s.hasSnapshot(ctx, l.chain); err != nil || ok {
		if ok && (l.lazy == nil || !l.lazy.mount) {
			err = s.settleLazy(ctx, l.chain) // its blob is here: it need not be lazy
		}
		if ok && err == nil && progress != nil {
			progress(Progress{ID: short(l.desc.Digest), Action: "Pull complete"})
		}
		return err
	}
	if l.lazy != nil && l.lazy.mount {
		err := s.commitLazy(ctx, l, below)
		if err == nil {
			if progress != nil {
				progress(Progress{ID: short(l.desc.Digest), Action: "Pull complete"})
			}
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.log.Warn("cannot mount a layer lazily, pull it whole", "layer", l.desc.Digest, "cause", err)
		if err := l.lazy.whole(ctx, l.desc); err != nil {
			return err
		}
	}
	if progress != nil {
		progress(Progress{ID: short(l.desc.Digest), Action: "Extracting", Current: 0, Total: l.desc.Size})
	}
	// Unlike any that a killed engine left.
	key := fmt.Sprintf("%s%s-%d-%d", unpackedKey, l.chain.Encoded(), time.Now().UnixNano(), s.cat.serial.Add(1))
	mounts, err := s.snaps.Prepare(ctx, key, "")
	if err != nil {
		return asFault(fmt.Errorf("cannot prepare layer %s: %w", short(l.desc.Digest), err))
	}
	done := false
	defer func() {
		if !done {
			if err := s.snaps.Remove(context.WithoutCancel(ctx), key); err != nil && !errdefs.IsNotFound(err) {
				s.log.Warn("cannot remove a half-unpacked layer", "layer", l.desc.Digest, "cause", err)
			}
			s.markDirty()
		}
	}()
	if len(mounts) != 1 {
		return fmt.Errorf("cannot unpack layer %s: the snapshot has %d mounts", short(l.desc.Digest), len(mounts))
	}
	dir := mounts[0].Source
	res, err := s.extract(ctx, l, dir, nil)
	if err != nil {
		return err
	}
	if below != nil {
		select {
		case <-below:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	var lowers []string
	if l.parent != "" && (res.NeedsLower || len(res.Implied) > 0) {
		chain, err := s.chainOf(ctx, l.parent)
		if err != nil {
			return err
		}
		lowers = chain.Dirs
	}
	if res.NeedsLower {
		if err := emptyDir(dir); err != nil {
			return fmt.Errorf("cannot unpack layer %s again: %w", short(l.desc.Digest), err)
		}
		if res, err = s.extract(ctx, l, dir, append([]string{}, lowers...)); err != nil {
			return err
		}
	}
	if res.DiffID != l.diffID {
		return fault.New(fault.Invalid, "layer %s holds %s, but the image's config says %s", l.desc.Digest, res.DiffID, l.diffID)
	}
	if err := s.finishLayer(dir, lowers, res); err != nil {
		return fmt.Errorf("cannot unpack layer %s: %w", short(l.desc.Digest), err)
	}
	opts := []snapshots.Opt{snapshots.WithLabels(map[string]string{bootLabel: s.boot, sizeLabel: strconv.FormatInt(res.Size, 10)})}
	if l.parent != "" {
		opts = append(opts, snapshots.WithParent(l.parent.String()))
	}
	if err := s.snaps.Commit(ctx, l.chain.String(), key, opts...); err != nil {
		if errdefs.IsAlreadyExists(err) {
			return nil
		}
		return asFault(fmt.Errorf("cannot commit layer %s: %w", short(l.desc.Digest), err))
	}
	done = true
	s.unsynced.add(l.chain)
	if progress != nil {
		progress(Progress{ID: short(l.desc.Digest), Action: "Pull complete"})
	}
	return nil
}

// extract runs the unpacking process on the layer's blob.
func (s *Service) extract(ctx context.Context, l *stacked, dir string, lowers []string) (unpack.Result, error) {
	if err := s.unpacks.Acquire(ctx, 1); err != nil {
		return unpack.Result{}, err
	}
	defer s.unpacks.Release(1)
	blob, err := s.openBlob(ctx, l.desc)
	if err != nil {
		return unpack.Result{}, err
	}
	defer blob.Close()
	target, err := os.Open(dir)
	if err != nil {
		return unpack.Result{}, fmt.Errorf("cannot open the layer's directory: %w", err)
	}
	defer target.Close()
	res, err := unpack.Run(ctx, unpack.Job{Layer: blob, Target: target, Lowers: lowers, Limits: s.cfg.Limits, UserNS: s.userns})
	if err != nil {
		return res, fault.As(fault.Of(err), fmt.Errorf("cannot unpack layer %s: %w", short(l.desc.Digest), err))
	}
	return res, nil
}

// openBlob opens a blob for reading, as a file where the store keeps files.
func (s *Service) openBlob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	// Access is the metadata store's to grant.
	if _, err := s.content.Info(ctx, desc.Digest); err != nil {
		return nil, asFault(fmt.Errorf("cannot open layer %s: %w", desc.Digest, err))
	}
	f, err := os.Open(filepath.Join(s.cfg.Root, "content", "blobs", desc.Digest.Algorithm().String(), desc.Digest.Encoded()))
	if err == nil {
		return f, nil
	}
	ra, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return nil, asFault(fmt.Errorf("cannot open layer %s: %w", desc.Digest, err))
	}
	return struct {
		io.Reader
		io.Closer
	}{content.NewReader(ra), ra}, nil
}

func (s *Service) hasSnapshot(ctx context.Context, chain digest.Digest) (bool, error) {
	for held := false; ; held = true {
		info, err := s.snaps.Stat(ctx, chain.String())
		if errdefs.IsNotFound(err) {
			return false, nil
		}
		if err != nil {
			return false, asFault(fmt.Errorf("cannot look for layer %s: %w", chain, err))
		}
		if info.Kind != snapshots.KindCommitted {
			return false, fault.New(fault.Conflict, "layer %s is being written", chain)
		}
		if held {
			return true, nil
		}
		// It may be about to be collected: hold it, then look again.
		if err := s.hold(ctx, chain); err != nil {
			return false, err
		}
	}
}

// finishLayer does what the unpacking process may not: mark opaque directories,
// and give implied ones the attributes of what is below.
func (s *Service) finishLayer(dir string, lowers []string, res unpack.Result) error {
	if len(res.Opaque) == 0 && (len(res.Implied) == 0 || len(lowers) == 0) {
		return nil
	}
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	in := func(root int, p string, resolve uint64) (int, error) {
		return unix.Openat2(root, p, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS})
	}
	attr := "trusted.overlay.opaque"
	if s.userns {
		attr = "user.overlay.opaque"
	}
	for _, p := range res.Opaque {
		fd, err := in(int(root.Fd()), p, unix.RESOLVE_IN_ROOT)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue // replaced by a later entry
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: p, Err: err}
		}
		err = unix.Fsetxattr(fd, attr, []byte("y"), 0)
		unix.Close(fd)
		if err != nil {
			return &os.PathError{Op: "mark opaque", Path: p, Err: err}
		}
	}
	if len(lowers) == 0 {
		return nil
	}
	var below []*os.File
	for _, d := range lowers {
		f, err := os.Open(d)
		if err != nil {
			return err
		}
		defer f.Close()
		below = append(below, f)
	}
	for _, p := range res.Implied {
		for _, b := range below {
			from, err := in(int(b.Fd()), p, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				break // something else is there, which this directory hides
			}
			to, err := in(int(root.Fd()), p, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
			if err == nil {
				err = copyAttributes(to, from)
				unix.Close(to)
			}
			unix.Close(from)
			if err != nil {
				return &os.PathError{Op: "copy attributes", Path: p, Err: err}
			}
			break
		}
	}
	return nil
}

func copyAttributes(to, from int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	val := make([]byte, 4096)
	for _, name := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
		if n, err := unix.Fgetxattr(from, name, val); err == nil && n > 0 {
			if err := unix.Fsetxattr(to, name, val[:n], 0); err != nil {
				return err
			}
		}
	}
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", to), []unix.Timespec{st.Atim, st.Mtim}, 0)
}

func emptyDir(dir string) error {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range ents {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// chainOf lists the directories of a chain of snapshots.
func (s *Service) chainOf(ctx context.Context, id digest.Digest) (snapshot.Chain, error) {
	c := snapshot.Chain{ID: id.String()}
	for name := id.String(); name != ""; {
		info, err := s.snaps.Stat(ctx, name)
		if err != nil {
			return c, asFault(fmt.Errorf("cannot find layer %s: %w", name, err))
		}
		dir := info.Labels[upperLabel]
		if dir == "" {
			return c, fmt.Errorf("cannot find layer %s: it has no directory", name)
		}
		c.Dirs = append(c.Dirs, dir)
		name = info.Parent
	}
	return c, nil
}

func short(d digest.Digest) string {
	h := d.Encoded()
	if len(h) > 12 {
		h = h[:12]
	}
	return h
}

// bootID tells boots apart.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil && !errors.Is(err, syscall.ENOSYS) {
		return err
	}
	return nil
}
