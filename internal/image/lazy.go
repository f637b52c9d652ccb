package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image/lazy"
)

// lazyLabel marks a layer whose directory is empty and has a mount on it; its
// value is a lazyRecord.
const lazyLabel = "io.servin.lazy"

// lazyRecord is what is kept of a lazily pulled layer. No credentials: a process
// that serves layers is given them over its socket.
type lazyRecord struct {
	Blob      lazy.Blob
	Ref       string
	MediaType string
	DiffID    digest.Digest
}

// lazyAccess is what the process needs to reach a blob.
type lazyAccess struct {
	Registries Registries
	Ref        string
	Auth       *registry.AuthConfig `json:",omitempty"`
}

// lazyLayer is a layer on its way that may be mounted.
type lazyLayer struct {
	lazyRecord
	bytes   int64
	implied []string
	// mount says that the layer is prepared, or mounted already; it is written
	// before the layer is ready.
	mount bool
	// whole fetches the layer in the ordinary way.
	whole func(context.Context, ocispec.Descriptor) error
}

// LazyMain is the entry of the process that serves lazily pulled layers, to be
// called like UnpackMain.
func LazyMain() (code int, ours bool) {
	if len(os.Args) == 0 || os.Args[0] != lazy.Argv0 {
		return 0, false
	}
	return lazy.Main(os.Args, dialBlob), true
}

// dialBlob makes the source of a blob in the process that serves layers.
func dialBlob(access json.RawMessage, b lazy.Blob) (lazy.Source, error) {
	var a lazyAccess
	if err := json.Unmarshal(access, &a); err != nil {
		return nil, fault.New(fault.Invalid, "cannot read how to reach the registry: %w", err)
	}
	named, err := reference.ParseNormalizedNamed(a.Ref)
	if err != nil {
		return nil, errBadRef(a.Ref, err)
	}
	hosts, err := newReach(a.Registries).hosts(a.Auth)(reference.Domain(named))
	if err != nil {
		return nil, err
	}
	return &blobSource{named: named, hosts: hosts, digest: b.Digest}, nil
}

// blobSource reads ranges of a blob, from mirrors first.
type blobSource struct {
	named  reference.Named
	hosts  []docker.RegistryHost
	digest digest.Digest
}

// Range opens a part of the blob.
func (b *blobSource) Range(ctx context.Context, off, length int64) (io.ReadCloser, error) {
	ctx = docker.WithScope(ctx, "repository:"+reference.Path(b.named)+":pull")
	var errs []error
	for _, h := range b.hosts {
		path := h.Path + "/" + reference.Path(b.named) + "/blobs/" + b.digest.String()
		rng := fmt.Sprintf("bytes=%d-%d", off, off+length-1)
		resp, err := askFor(ctx, h, http.MethodGet, path, http.Header{"Range": {rng}, "Accept-Encoding": {"identity"}})
		if err != nil {
			errs = append(errs, err)
			continue
		}
		switch resp.StatusCode {
		case http.StatusPartialContent:
			return resp.Body, nil
		case http.StatusOK:
			// No ranges here: skip to the part if that is not far.
			if off <= 1<<20 {
				if _, err = io.CopyN(io.Discard, resp.Body, off); err == nil {
					return resp.Body, nil
				}
			} else {
				err = fault.New(fault.Unsupported, "%s does not serve ranges of layers", h.Host)
			}
		case http.StatusUnauthorized, http.StatusForbidden:
			err = fault.New(fault.Unauthorized, "%s refuses to serve the layer: pull the image again with --lazy to renew the login", h.Host)
		default:
			err = fault.As(fault.Unavailable, remoteerrors.NewUnexpectedStatusErr(resp))
			if resp.StatusCode == http.StatusNotFound {
				err = fault.New(fault.NotFound, "%s no longer has the layer", h.Host)
			}
		}
		resp.Body.Close()
		errs = append(errs, err)
	}
	// The registry itself comes last, and its kind of error rules.
	err := errs[len(errs)-1]
	var ue *url.Error
	if errors.As(err, &ue) {
		return nil, fault.As(fault.Unavailable, err)
	}
	return nil, err
}

// lazily decides whether a pull is lazy, and says why not if it was asked for.
func (s *Service) lazily(o PullOptions, progress func(Progress)) bool {
	if !o.Lazy && !s.cfg.LazyPull {
		return false
	}
	why := "this engine has no directory for it"
	if s.lazy.client != nil {
		err := lazy.Available()
		if err == nil {
			return true
		}
		why = "FUSE cannot be used: " + err.Error()
	}
	s.log.Warn("cannot pull lazily, pull whole layers", "image", o.Ref, "cause", why)
	progress(Progress{Action: "Warning: cannot pull lazily (" + why + "); pulling whole layers"})
	return false
}

// lazyLayer tells whether a layer may be mounted.
func (p *puller) lazyLayer(l *stacked) *lazyLayer {
	if !p.lazy {
		return nil
	}
	b, ok := lazy.Describe(l.desc.Digest, l.desc.Size, l.desc.MediaType, l.desc.Annotations)
	if !ok {
		return nil
	}
	return &lazyLayer{whole: p.blob, lazyRecord: lazyRecord{Blob: b, Ref: p.named.String(), MediaType: l.desc.MediaType, DiffID: l.diffID}}
}

func (p *puller) access() lazyAccess {
	return lazyAccess{Registries: p.s.registries, Ref: p.named.String(), Auth: p.auth}
}

// prepareLazy fetches a layer's table. False says to fetch the layer instead.
func (p *puller) prepareLazy(ctx context.Context, l *stacked, z *lazyLayer) bool {
	s := p.s
	if _, err := s.content.Info(ctx, l.desc.Digest); err == nil {
		return false
	}
	if ok, err := s.hasSnapshot(ctx, l.chain); err == nil && ok {
		if err := s.lazy.client.Access(ctx, z.Blob, p.access()); err == nil {
			p.progress(Progress{ID: short(l.desc.Digest), Action: "Already exists"})
			z.mount = true
			return true
		}
	}
	got, err := s.lazy.client.Prepare(ctx, z.Blob, s.lazyState(z.Blob.Digest), p.access())
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("cannot pull a layer lazily, pull it whole", "layer", l.desc.Digest, "cause", err)
			p.progress(Progress{ID: short(l.desc.Digest), Action: "Not lazily: " + err.Error()})
		}
		return false
	}
	p.fetched.Store(true)
	z.bytes, z.implied, z.mount = got.Bytes, got.Implied, true
	p.progress(Progress{ID: short(l.desc.Digest), Action: "Table of contents verified"})
	return true
}

func (s *Service) lazyState(d digest.Digest) string {
	return filepath.Join(s.cfg.Root, "lazy", d.Algorithm().String()+"-"+d.Encoded())
}

// commitLazy makes a snapshot with an empty directory and mounts the layer on it.
// The chain is locked.
func (s *Service) commitLazy(ctx context.Context, l *stacked, below <-chan struct{}) error {
	if below != nil {
		select {
		case <-below:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	z := l.lazy
	record, err := json.Marshal(z.lazyRecord)
	if err != nil {
		return err
	}
	attrs, err := s.impliedAttrs(ctx, l.parent, z.implied)
	if err != nil {
		return err
	}
	key := fmt.Sprintf("%s%s-%d-%d", unpackedKey, l.chain.Encoded(), time.Now().UnixNano(), s.cat.serial.Add(1))
	if _, err := s.snaps.Prepare(ctx, key, ""); err != nil {
		return asFault(err)
	}
	opts := []snapshots.Opt{snapshots.WithLabels(map[string]string{lazyLabel: string(record), sizeLabel: strconv.FormatInt(z.bytes, 10)})}
	if l.parent != "" {
		opts = append(opts, snapshots.WithParent(l.parent.String()))
	}
	if err := s.snaps.Commit(ctx, l.chain.String(), key, opts...); err != nil {
		_ = s.snaps.Remove(context.WithoutCancel(ctx), key)
		return asFault(err)
	}
	dir, err := s.upper(ctx, l.chain.String())
	if err == nil {
		err = s.lazy.client.Mount(ctx, z.Blob, l.chain.String(), dir, attrs)
	}
	if err != nil {
		if e := s.snaps.Remove(context.WithoutCancel(ctx), l.chain.String()); e != nil {
			s.log.Warn("cannot remove a layer that could not be mounted", "layer", l.chain, "cause", e)
		}
		s.markDirty()
		return err
	}
	s.lazy.kick()
	return nil
}

func (s *Service) upper(ctx context.Context, chain string) (string, error) {
	info, err := s.snaps.Stat(ctx, chain)
	if err != nil {
		return "", asFault(err)
	}
	if info.Labels[upperLabel] == "" {
		return "", fmt.Errorf("layer %s has no directory", chain)
	}
	return info.Labels[upperLabel], nil
}

// impliedAttrs reads what directories that a layer leaves out take after.
func (s *Service) impliedAttrs(ctx context.Context, parent digest.Digest, names []string) (map[string]lazy.Attr, error) {
	if parent == "" || len(names) == 0 {
		return nil, nil
	}
	chain, err := s.chainOf(ctx, parent)
	if err != nil {
		return nil, err
	}
	attrs := map[string]lazy.Attr{}
	for _, d := range chain.Dirs {
		root, err := os.Open(d)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if _, done := attrs[name]; done {
				continue
			}
			fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
				Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
			if err != nil {
				continue
			}
			var st unix.Stat_t
			err = unix.Fstat(fd, &st)
			unix.Close(fd)
			if err == nil {
				attrs[name] = lazy.Attr{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Time: time.Unix(st.Mtim.Sec, st.Mtim.Nsec)}
			}
		}
		root.Close()
	}
	return attrs, nil
}

// settleLazy makes a lazily pulled layer an ordinary one if its blob is in the
// content store: that is unpacked below the mount, and then the mount goes.
// Containers that use the mount keep it; the next ones find the directory. The
// chain is locked.
func (s *Service) settleLazy(ctx context.Context, chain digest.Digest) error {
	info, err := s.snaps.Stat(ctx, chain.String())
	if err != nil {
		return asFault(err)
	}
	if info.Labels[lazyLabel] == "" {
		return nil
	}
	var r lazyRecord
	if err := json.Unmarshal([]byte(info.Labels[lazyLabel]), &r); err != nil {
		return fmt.Errorf("cannot read the record of layer %s: %w", chain, err)
	}
	if _, err := s.content.Info(ctx, r.Blob.Digest); errdefs.IsNotFound(err) {
		return nil // who wants the layer alone need not wait for its blob
	}
	dir := info.Labels[upperLabel]
	// A clone of the file system without what is mounted on it.
	fd, err := unix.OpenTree(unix.AT_FDCWD, filepath.Dir(dir), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: filepath.Dir(dir), Err: err}
	}
	defer unix.Close(fd)
	hidden := fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(dir))
	if err := emptyDir(hidden); err != nil {
		return fmt.Errorf("cannot unpack layer %s: %w", r.Blob.Digest, err)
	}
	l := &stacked{desc: ocispec.Descriptor{MediaType: r.MediaType, Digest: r.Blob.Digest, Size: r.Blob.Size}, diffID: r.DiffID, chain: chain}
	var lowers []string
	if info.Parent != "" {
		below, err := s.chainOf(ctx, digest.Digest(info.Parent))
		if err != nil {
			return err
		}
		lowers = below.Dirs
	}
	res, err := s.extract(ctx, l, hidden, append([]string{}, lowers...))
	if err != nil {
		return err
	}
	if res.DiffID != r.DiffID {
		return fault.New(fault.Invalid, "layer %s holds %s, but the image's config says %s", r.Blob.Digest, res.DiffID, r.DiffID)
	}
	if err := s.finishLayer(hidden, lowers, res); err != nil {
		return fmt.Errorf("cannot unpack layer %s: %w", r.Blob.Digest, err)
	}
	// Once the label is gone nobody would mount the layer again, and a mount that
	// a killed engine leaves here is taken away by the next.
	_, err = s.snaps.Update(ctx, snapshots.Info{Name: chain.String(), Labels: map[string]string{lazyLabel: "", bootLabel: s.boot, sizeLabel: strconv.FormatInt(res.Size, 10)}},
		"labels."+lazyLabel, "labels."+bootLabel, "labels."+sizeLabel)
	if err != nil {
		return asFault(err)
	}
	s.unsynced.add(chain)
	s.wakeSync()
	if err := lazy.Detach(dir); err != nil {
		return err
	}
	s.log.Info("a lazily pulled layer is complete", "layer", r.Blob.Digest)
	s.markDirty()
	return nil
}

// importLazy stores a complete sparse file as the blob that it is.
func (s *Service) importLazy(ctx context.Context, r lazyRecord) error {
	desc := ocispec.Descriptor{MediaType: r.MediaType, Digest: r.Blob.Digest, Size: r.Blob.Size}
	if _, err := s.content.Info(ctx, desc.Digest); err == nil {
		return s.holdBlob(ctx, desc)
	}
	f, err := os.Open(filepath.Join(s.lazyState(desc.Digest), "blob"))
	if err != nil {
		return err
	}
	defer f.Close()
	ref := "lazy-" + desc.Digest.String()
	w, err := s.content.Writer(ctx, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return s.holdBlob(ctx, desc)
	}
	if err != nil {
		return asFault(err)
	}
	defer w.Close()
	if err = w.Truncate(0); err == nil {
		_, err = io.CopyBuffer(struct{ io.Writer }{w}, ctxReader{ctx, f}, make([]byte, 256<<10))
	}
	if err != nil {
		return diskFault(fmt.Errorf("cannot store layer %s: %w", desc.Digest, err))
	}
	if got := w.Digest(); got != desc.Digest {
		_ = w.Close()
		_ = s.content.Abort(context.WithoutCancel(ctx), ref)
		return fault.New(fault.Invalid, "the layer is %s instead of %s", got, desc.Digest)
	}
	var labels map[string]string
	if named, err := reference.ParseNormalizedNamed(r.Ref); err == nil {
		labels = map[string]string{sourceLabel(named): reference.Path(named)}
	}
	err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(labels))
	if errdefs.IsAlreadyExists(err) {
		return s.holdBlob(ctx, desc)
	}
	return asFault(err)
}

// removeState deletes the directory of a blob that no layer is lazy with.
func removeState(dir string) error {
	if err := os.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
