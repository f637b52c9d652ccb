package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// What a builder of images gets of the store: containerd's own contracts, so that
// its cache lives in the same content store and beside the same layers, and a way
// to have one layer under two names.

// buildLabel marks leases that a builder made.
const buildLabel = "io.servin.build"

// Endpoints tells how registries are reached, without credentials.
func (r Registries) Endpoints() docker.RegistryHosts { return newReach(r).hosts(nil) }

// BuilderStores are the store's parts for a builder.
type BuilderStores struct {
	Content   content.Store
	Snapshots snapshots.Snapshotter
	Leases    leases.Manager
	Images    images.Store
}

// BuilderStores returns them. Contexts must carry a namespace.
func (s *Service) BuilderStores() BuilderStores {
	return BuilderStores{Content: s.content, Snapshots: s.snaps, Leases: builderLeases{s}, Images: builderImages{s}}
}

// builderLeases marks a builder's leases as such, and has what they held
// collected when they go.
type builderLeases struct{ s *Service }

func (b builderLeases) Create(ctx context.Context, opts ...leases.Opt) (leases.Lease, error) {
	return b.s.leases.Create(ctx, append(slices.Clone(opts), leases.WithLabel(buildLabel, "true"))...)
}

func (b builderLeases) Delete(ctx context.Context, l leases.Lease, opts ...leases.DeleteOpt) error {
	var o leases.DeleteOptions
	for _, f := range opts {
		if err := f(ctx, &o); err != nil {
			return err
		}
	}
	if err := b.s.leases.Delete(ctx, l); err != nil {
		return err
	}
	if o.Synchronous {
		return b.s.Collect(ctx)
	}
	b.s.markDirty()
	return nil
}

// List shows a builder its own leases alone.
func (b builderLeases) List(ctx context.Context, filters ...string) ([]leases.Lease, error) {
	list, err := b.s.leases.List(ctx, filters...)
	return slices.DeleteFunc(list, func(l leases.Lease) bool { return l.Labels[buildLabel] == "" }), err
}

func (b builderLeases) AddResource(ctx context.Context, l leases.Lease, r leases.Resource) error {
	return b.s.leases.AddResource(ctx, l, r)
}

func (b builderLeases) DeleteResource(ctx context.Context, l leases.Lease, r leases.Resource) error {
	err := b.s.leases.DeleteResource(ctx, l, r)
	b.s.markDirty()
	return err
}

func (b builderLeases) ListResources(ctx context.Context, l leases.Lease) ([]leases.Resource, error) {
	return b.s.leases.ListResources(ctx, l)
}

// builderImages are the images under their references.
type builderImages struct{ s *Service }

// Get finds an image by reference, or, where the name is that of no image but
// could be an id, by the start of that.
func (b builderImages) Get(ctx context.Context, name string) (images.Image, error) {
	f, err := b.s.find(ctx, name)
	if fault.Is(err, fault.NotFound) {
		if id, ok := strings.CutPrefix(strings.TrimSuffix(name, ":latest"), "docker.io/library/"); ok && isHex(id) {
			f, err = b.s.find(ctx, id)
		}
	}
	if err != nil {
		if fault.Is(err, fault.NotFound) {
			return images.Image{}, fmt.Errorf("%s: %w", name, errdefs.ErrNotFound)
		}
		return images.Image{}, err
	}
	i, ok := b.s.cat.get(f.name)
	if !ok {
		i = images.Image{Name: name, Target: f.target}
		if f.variant != nil {
			i.Target = f.variant.manifest
		}
	}
	// A pull may have brought less than the target names.
	return i, nil
}

func (b builderImages) List(context.Context, ...string) ([]images.Image, error) {
	return b.s.cat.all(), nil
}

func (b builderImages) Create(ctx context.Context, i images.Image) (images.Image, error) {
	name := i.Name
	if isDangling(name) {
		if d := strings.TrimPrefix(name, danglingName); d != i.Target.Digest.String() {
			return images.Image{}, fmt.Errorf("%s names another image: %w", name, errdefs.ErrInvalidArgument)
		}
		if b.s.referredTo(i.Target.Digest) {
			return i, nil
		}
	} else {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return images.Image{}, fmt.Errorf("%w: %w", errBadRef(name, err), errdefs.ErrInvalidArgument)
		}
		name = b.s.recordName(named)
	}
	if err := b.s.refer(b.s.ctx(ctx), i.Target, nil, name); err != nil {
		return images.Image{}, err
	}
	got, _ := b.s.cat.get(name)
	if t, err := b.s.target(ctx, i.Target); err == nil && !isDangling(name) {
		if v := t.best(""); v != nil {
			b.s.emit("tag", v.id, familiar(name))
		}
	}
	return got, nil
}

// Update points a name elsewhere; there is no difference to Create, which keeps
// the image that had the name as an untagged one.
func (b builderImages) Update(ctx context.Context, i images.Image, _ ...string) (images.Image, error) {
	return b.Create(ctx, i)
}

func (b builderImages) Delete(context.Context, string, ...images.DeleteOpt) error {
	return fmt.Errorf("a builder removes no images: %w", errdefs.ErrPermissionDenied)
}

// BuilderLayer unpacks a blob as a chain, if it is not there. The parent must be.
func (s *Service) BuilderLayer(ctx context.Context, desc ocispec.Descriptor, diffID, chain, parent digest.Digest) error {
	for _, d := range []digest.Digest{desc.Digest, diffID, chain} {
		if err := d.Validate(); err != nil {
			return fault.New(fault.Invalid, "cannot unpack a layer: %w", err)
		}
	}
	l := &stacked{desc: desc, diffID: diffID, chain: chain, parent: parent, committed: make(chan struct{})}
	if err := s.unpackLayer(s.ctx(ctx), l, nil, nil); err != nil {
		return err
	}
	s.wakeSync()
	return nil
}

// HasChain tells whether a chain is unpacked.
func (s *Service) HasChain(ctx context.Context, chain digest.Digest) (bool, error) {
	return s.hasSnapshot(s.ctx(ctx), chain)
}

// Alias makes the committed snapshot from known as to as well, on parent, which
// must name what from stands on. Both are the same directory; it goes when both
// names are gone.
func (s *Service) Alias(ctx context.Context, from, to, parent string) error {
	ctx = s.ctx(ctx)
	info, err := s.snaps.Stat(ctx, from)
	if err != nil {
		return asFault(err)
	}
	dir := info.Labels[upperLabel]
	if info.Kind != snapshots.KindCommitted || dir == "" {
		return fault.New(fault.Invalid, "cannot name snapshot %s twice: it is not complete", from)
	}
	if !s.claims.set(to, dir) {
		return fault.New(fault.Conflict, "snapshot %s is being named", to)
	}
	defer s.claims.unset(to)
	// The first name stays as long as the second: what is known of the layer
	// (that it is lazy, that it is not yet on disk) hangs on it.
	labels := map[string]string{snapshots.LabelSnapshotRef: to, gcSnapshot: from}
	if v := info.Labels[sizeLabel]; v != "" {
		labels[sizeLabel] = v
	}
	key := fmt.Sprintf("servin-alias-%d-%d", time.Now().UnixNano(), s.cat.serial.Add(1))
	_, err = s.snaps.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
	switch {
	case errdefs.IsAlreadyExists(err):
		return nil
	case err == nil:
		_ = s.snaps.Remove(ctx, key)
		return fault.New(fault.Conflict, "cannot name snapshot %s twice: it changed meanwhile", from)
	}
	return asFault(fmt.Errorf("cannot name snapshot %s twice: %w", from, err))
}

// Adopt makes chains of what a builder committed, each on the one before.
func (s *Service) Adopt(ctx context.Context, chains, snaps []string) error {
	ctx = s.ctx(ctx)
	parent := ""
	for i, chain := range chains {
		if err := digest.Digest(chain).Validate(); err != nil {
			return fault.New(fault.Invalid, "cannot adopt a layer: %w", err)
		}
		have, err := s.hasSnapshot(ctx, digest.Digest(chain))
		if err != nil {
			return err
		}
		if !have {
			if err := s.Alias(ctx, snaps[i], chain, parent); err != nil {
				return err
			}
			// A builder's layers may not be on the disk yet.
			_, err := s.snaps.Update(ctx, snapshots.Info{Name: chain, Labels: map[string]string{bootLabel: s.boot}}, "labels."+bootLabel)
			if err != nil {
				return asFault(err)
			}
			s.unsynced.add(digest.Digest(chain))
		}
		parent = chain
	}
	s.wakeSync()
	return nil
}

// Bound tells whether an image is ready to run and holds its layers itself.
func (s *Service) Bound(ctx context.Context, ref string) (bool, error) {
	f, err := s.find(ctx, ref)
	if err != nil {
		return false, err
	}
	v, err := s.pick(ctx, ref, f, "")
	if err != nil || len(v.diffIDs) == 0 {
		return err == nil, err
	}
	ctx = s.ctx(ctx)
	info, err := s.content.Info(ctx, v.config.Digest)
	if err != nil {
		return false, asFault(err)
	}
	chain := v.chainID().String()
	if info.Labels[gcSnapshot] != chain {
		return false, nil
	}
	_, err = s.snaps.Stat(ctx, chain)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, asFault(err)
}

// best looks up the variant of an image that suits this host best.
func (s *Service) best(ctx context.Context, ref string) (*variant, error) {
	f, err := s.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	return s.pick(ctx, ref, f, "")
}

// Ready makes the variant of an image that suits this host best ready to run.
func (s *Service) Ready(ctx context.Context, ref string) error {
	v, err := s.best(ctx, ref)
	if err != nil {
		return err
	}
	if _, _, err := s.prepare(ctx, v); err != nil {
		return err
	}
	return s.bind(s.ctx(ctx), v)
}

// Built tells that an image was built, be it one that was here before.
func (s *Service) Built(ctx context.Context, ref string) error {
	v, err := s.best(ctx, ref)
	if err != nil {
		return err
	}
	s.emit("create", v.id, v.id.String())
	return nil
}

// ImageChains names all chains, of every length, that images have.
func (s *Service) ImageChains(ctx context.Context) ([]string, error) {
	es, err := s.entries(ctx)
	if err != nil {
		return nil, err
	}
	seen := map[string]struct{}{}
	for _, e := range es {
		for i := range e.target.variants {
			for _, c := range identity.ChainIDs(slices.Clone(e.target.variants[i].diffIDs)) {
				seen[c.String()] = struct{}{}
			}
		}
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

// SweepBuilder gives back all of a builder's leases, for when its own records are
// gone.
func (s *Service) SweepBuilder(ctx context.Context, spaces ...string) error {
	var errs []error
	var gone bool
	for _, ns := range spaces {
		nctx := namespaces.WithNamespace(s.ctx(ctx), ns)
		list, err := s.leases.List(nctx)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, l := range list {
			if l.Labels[buildLabel] != "" {
				errs = append(errs, s.leases.Delete(nctx, l))
				gone = true
			}
		}
	}
	if gone {
		s.markDirty()
	}
	return errors.Join(errs...)
}

// claims is the snapshotter below the metadata, with a way to have one of its
// snapshots under a second name: containerd's metadata takes a snapshot over if
// the snapshotter says that the one asked for by reference exists already.
type claims struct {
	cleaningSnapshotter
	mu   sync.Mutex
	want map[string]string // name wanted to directory
}

func (c *claims) set(name, dir string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, busy := c.want[name]; busy {
		return false
	}
	if c.want == nil {
		c.want = map[string]string{}
	}
	c.want[name] = dir
	return true
}

func (c *claims) unset(name string) {
	c.mu.Lock()
	delete(c.want, name)
	c.mu.Unlock()
}

func (c *claims) wanted() map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.want)
}

// Prepare makes an active snapshot, or says that the one wanted exists.
func (c *claims) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var i snapshots.Info
	for _, o := range opts {
		if err := o(&i); err != nil {
			return nil, err
		}
	}
	if ref := i.Labels[snapshots.LabelSnapshotRef]; ref != "" {
		if _, ok := c.wanted()[ref]; ok {
			return nil, errdefs.ErrAlreadyExists
		}
	}
	return c.cleaningSnapshotter.Prepare(ctx, key, parent, opts...)
}

// Walk shows snapshots that are wanted under a name as having it.
func (c *claims) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	want := c.wanted()
	if len(want) == 0 || len(filters) != 1 || !strings.Contains(filters[0], snapshots.LabelSnapshotRef) {
		return c.cleaningSnapshotter.Walk(ctx, fn, filters...)
	}
	return c.cleaningSnapshotter.Walk(ctx, func(ctx context.Context, i snapshots.Info) error {
		for name, dir := range want {
			if i.Labels[upperLabel] == dir && strings.Contains(filters[0], name) {
				i.Labels[snapshots.LabelSnapshotRef] = name
				return fn(ctx, i)
			}
		}
		return nil
	})
}
