package image

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// readyCache remembers what Resolve answered; a change of any reference empties
// it.
type readyCache struct {
	mu  sync.RWMutex
	gen uint64
	m   map[readyKey]*readyEntry
	// old says when chains of former generations were last handed out.
	old map[string]int64
}

type readyKey struct{ ref, platform string }

type readyEntry struct {
	r    Resolved
	used atomic.Int64 // unix nanoseconds
}

const readyMax = 1024

func (c *readyCache) get(gen uint64, k readyKey) (Resolved, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.gen != gen {
		return Resolved{}, false
	}
	e, ok := c.m[k]
	if !ok {
		return Resolved{}, false
	}
	e.used.Store(time.Now().UnixNano())
	return e.r, true
}

// recent names the chains handed out within the grace period: a writable layer
// may be about to be made on them.
func (c *readyCache) recent() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	since := time.Now().Add(-grace).UnixNano()
	var ids []string
	for _, e := range c.m {
		if e.used.Load() >= since && e.r.Chain.ID != "" {
			ids = append(ids, e.r.Chain.ID)
		}
	}
	for id, used := range c.old {
		if used >= since {
			ids = append(ids, id)
		}
	}
	return ids
}

func (c *readyCache) put(gen uint64, k readyKey, r Resolved) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gen != gen || len(c.m) >= readyMax {
		since := time.Now().Add(-grace).UnixNano()
		maps.DeleteFunc(c.old, func(_ string, used int64) bool { return used < since })
		if c.old == nil {
			c.old = map[string]int64{}
		}
		for _, e := range c.m {
			if id, used := e.r.Chain.ID, e.used.Load(); id != "" && used >= since {
				c.old[id] = max(c.old[id], used)
			}
		}
		c.gen, c.m = gen, nil
	}
	if c.m == nil {
		c.m = map[readyKey]*readyEntry{}
	}
	e := &readyEntry{r: r}
	e.used.Store(time.Now().UnixNano())
	c.m[k] = e
}

// Resolve finds a local image and makes it ready to run. What it returns is
// shared with other callers and must not be changed.
func (s *Service) Resolve(ctx context.Context, ref, platform string) (Resolved, error) {
	gen := s.cat.generation()
	key := readyKey{ref, platform}
	if r, ok := s.ready.get(gen, key); ok {
		return r, nil
	}
	f, err := s.find(ctx, ref)
	if err != nil {
		return Resolved{}, err
	}
	v, err := s.pick(ctx, ref, f, platform)
	if err != nil {
		return Resolved{}, err
	}
	chain, size, err := s.prepare(ctx, v)
	if err != nil {
		return Resolved{}, err
	}
	r := Resolved{
		ID:       v.id,
		Ref:      ref,
		Manifest: v.manifest,
		Platform: v.platform,
		Config:   v.image.Config.ImageConfig,
		Created:  v.created(),
		Shell:    v.image.Config.Shell,
		OnBuild:  v.image.Config.OnBuild,
		Chain:    chain,
		Size:     size,
	}
	if f.name != "" {
		r.Ref = familiar(f.name)
	}
	if h := v.image.Config.Healthcheck; h != nil {
		r.Healthcheck = &Healthcheck{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries}
	}
	s.ready.put(gen, key, r)
	return r, nil
}

// familiar is the short form of a record's name.
func familiar(name string) string {
	if n, err := reference.ParseNormalizedNamed(name); err == nil {
		return reference.FamiliarString(n)
	}
	return name
}

// pick chooses the variant that a lookup means.
func (s *Service) pick(ctx context.Context, ref string, f found, platform string) (*variant, error) {
	if platform != "" {
		if _, err := platforms.Parse(platform); err != nil {
			return nil, fault.New(fault.Invalid, "cannot read platform %q: %w", platform, err)
		}
	}
	if f.variant != nil {
		if platform != "" && !platforms.Only(platforms.MustParse(platform)).Match(f.variant.platform) {
			return nil, errPlatform(ref, f.variant, platform)
		}
		return f.variant, nil
	}
	t, err := s.target(ctx, f.target)
	if err != nil {
		return nil, asFault(fmt.Errorf("cannot read image %s: %w", ref, err))
	}
	if v := t.best(platform); v != nil {
		return v, nil
	}
	if len(t.variants) > 0 {
		return nil, errPlatform(ref, t.best(""), platform)
	}
	return nil, errNoImage(ref)
}

func errPlatform(ref string, v *variant, want string) error {
	return fault.New(fault.NotFound, "image with reference %s was found but its platform (%s) does not match the specified platform (%s)", ref, platforms.Format(v.platform), want)
}

// prepare unpacks a variant if it is not, and returns its chain and the bytes it
// takes unpacked.
func (s *Service) prepare(ctx context.Context, v *variant) (snapshot.Chain, int64, error) {
	if len(v.diffIDs) == 0 {
		return snapshot.Chain{}, 0, nil
	}
	ctx = s.ctx(ctx)
	id := v.chainID()
	_, err := s.snaps.Stat(ctx, id.String())
	if errdefs.IsNotFound(err) {
		err = s.unpackLocal(ctx, v)
	}
	if err != nil {
		return snapshot.Chain{}, 0, asFault(fmt.Errorf("cannot prepare the image's layers: %w", err))
	}
	chain, err := s.chainOf(ctx, id)
	if err != nil {
		return snapshot.Chain{}, 0, err
	}
	size, err := s.chainSize(ctx, id)
	return chain, size, err
}

// unpackLocal unpacks a variant whose blobs are here.
func (s *Service) unpackLocal(ctx context.Context, v *variant) error {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := s.unpack(ctx, stack(v.layers, v.diffIDs), nil); err != nil {
		return err
	}
	return s.bind(ctx, v)
}

// bind makes the image's config hold its top snapshot, so that it lives as long
// as the image, and starts getting the layers onto the disk.
func (s *Service) bind(ctx context.Context, v *variant) error {
	if len(v.diffIDs) == 0 {
		return nil
	}
	info, err := s.content.Info(ctx, v.config.Digest)
	if err != nil {
		return asFault(fmt.Errorf("cannot read the image's config: %w", err))
	}
	chain := v.chainID().String()
	if info.Labels[gcSnapshot] != chain {
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		info.Labels[gcSnapshot] = chain
		if _, err := s.content.Update(ctx, info, "labels."+gcSnapshot); err != nil {
			return asFault(fmt.Errorf("cannot bind the image's layers: %w", err))
		}
	}
	s.wakeSync()
	return nil
}

// hold keeps a snapshot from collection for the length of the operation of ctx.
func (s *Service) hold(ctx context.Context, chain digest.Digest) error {
	id, ok := leases.FromContext(ctx)
	if !ok {
		return nil
	}
	err := s.leases.AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: chain.String(), Type: "snapshots/" + snapshotterName})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return asFault(fmt.Errorf("cannot hold layer %s: %w", chain, err))
	}
	return nil
}

// chainSize is the bytes of all layers of a chain.
func (s *Service) chainSize(ctx context.Context, id digest.Digest) (int64, error) {
	var sum int64
	for name := id.String(); name != ""; {
		n, parent, err := s.layerSize(ctx, name)
		if err != nil {
			return 0, err
		}
		sum += n
		name = parent
	}
	return sum, nil
}

func (s *Service) layerSize(ctx context.Context, name string) (size int64, parent string, err error) {
	info, err := s.snaps.Stat(ctx, name)
	if err != nil {
		return 0, "", asFault(fmt.Errorf("cannot find layer %s: %w", name, err))
	}
	if n, err := strconv.ParseInt(info.Labels[sizeLabel], 10, 64); err == nil {
		return n, info.Parent, nil
	}
	u, err := s.snaps.Usage(ctx, name)
	if err != nil {
		return 0, "", asFault(fmt.Errorf("cannot measure layer %s: %w", name, err))
	}
	return u.Size, info.Parent, nil
}

// IDOf tells which image a reference names now, "" where it names none. It reads
// what is in memory and does not look whether the image's content is whole.
func (s *Service) IDOf(ctx context.Context, ref, platform string) string {
	f, err := s.find(ctx, ref)
	if err != nil {
		return ""
	}
	v, err := s.pick(ctx, ref, f, platform)
	if err != nil {
		return ""
	}
	return v.id.String()
}
