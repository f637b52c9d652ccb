// Package history keeps what BuildKit records of each build (its log, trace and
// results' descriptions) in the builder's own folder: the engine's store has no use
// for it, and a few transactions of another process's database are saved per build.
package history

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/moby/buildkit/util/db"
	"github.com/moby/buildkit/util/db/boltutil"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// sweepAfter is after how many leases that were given back their blobs are removed.
const sweepAfter = 64

// Store is where it is kept, and the way to the engine's for everything else.
type Store struct {
	namespace string
	bolt      db.DB
	meta      *metadata.DB
	leases    leases.Manager

	mu    sync.Mutex
	given int // leases, since the last sweep
	wg    sync.WaitGroup
}

// Open opens the store below root, for what is in the namespace. Like the other
// records of the builder's its own reach the disk when the builder ends. A damaged one
// is set aside: without it there is still much to build.
func Open(root, namespace string) (*Store, error) {
	dir := filepath.Join(root, "records")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot open the builds' records: %w", err)
	}
	blobs, err := local.NewStore(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot open the builds' records: %w", err)
	}
	b, err := boltutil.SafeOpen(filepath.Join(root, "records.db"), 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType, NoStatistics: true, NoSync: true})
	if err != nil {
		return nil, fmt.Errorf("cannot open the builds' records: %w", err)
	}
	meta := metadata.NewDB(b, blobs, nil)
	if err := meta.Init(context.Background()); err != nil {
		_ = b.Close()
		return nil, fmt.Errorf("cannot open the builds' records: %w", err)
	}
	return &Store{namespace: namespace, bolt: b, meta: meta, leases: metadata.NewLeaseManager(meta)}, nil
}

// Close removes what no record needs and closes the store.
func (s *Store) Close() error {
	s.wg.Wait()
	err := s.Collect(context.Background())
	if e := s.bolt.Close(); err == nil {
		err = e
	}
	return err
}

// Collect removes what no record needs.
func (s *Store) Collect(ctx context.Context) error {
	if _, err := s.meta.GarbageCollect(ctx); err != nil {
		return fmt.Errorf("cannot remove old records of builds: %w", err)
	}
	return nil
}

// gave counts a lease that was given back.
func (s *Store) gave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.given++; s.given >= sweepAfter {
		s.given = 0
		s.wg.Go(func() { _ = s.Collect(context.Background()) }) // the next one tries again
	}
}

func (s *Store) own(ctx context.Context) bool {
	ns, _ := namespaces.Namespace(ctx)
	return ns == s.namespace
}

// Content is the engine's content store but for the namespace.
func (s *Store) Content(engine content.Store) content.Store {
	return contents{s, engine, s.meta.ContentStore()}
}

type contents struct {
	s            *Store
	engine, mine content.Store
}

func (c contents) of(ctx context.Context) content.Store {
	if c.s.own(ctx) {
		return c.mine
	}
	return c.engine
}

func (c contents) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	return c.of(ctx).Info(ctx, d)
}

func (c contents) Update(ctx context.Context, i content.Info, fields ...string) (content.Info, error) {
	return c.of(ctx).Update(ctx, i, fields...)
}

func (c contents) Walk(ctx context.Context, fn content.WalkFunc, filters ...string) error {
	return c.of(ctx).Walk(ctx, fn, filters...)
}

func (c contents) Delete(ctx context.Context, d digest.Digest) error {
	return c.of(ctx).Delete(ctx, d)
}

func (c contents) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	return c.of(ctx).ReaderAt(ctx, d)
}

func (c contents) Status(ctx context.Context, ref string) (content.Status, error) {
	return c.of(ctx).Status(ctx, ref)
}

func (c contents) ListStatuses(ctx context.Context, filters ...string) ([]content.Status, error) {
	return c.of(ctx).ListStatuses(ctx, filters...)
}

func (c contents) Abort(ctx context.Context, ref string) error {
	return c.of(ctx).Abort(ctx, ref)
}

func (c contents) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	return c.of(ctx).Writer(ctx, opts...)
}

// Leases is the engine's lease manager but for the namespace.
func (s *Store) Leases(engine leases.Manager) leases.Manager { return manager{s, engine} }

type manager struct {
	s      *Store
	engine leases.Manager
}

func (m manager) of(ctx context.Context) leases.Manager {
	if m.s.own(ctx) {
		return m.s.leases
	}
	return m.engine
}

func (m manager) Create(ctx context.Context, opts ...leases.Opt) (leases.Lease, error) {
	return m.of(ctx).Create(ctx, opts...)
}

func (m manager) Delete(ctx context.Context, l leases.Lease, opts ...leases.DeleteOpt) error {
	err := m.of(ctx).Delete(ctx, l, opts...)
	if err == nil && m.s.own(ctx) {
		m.s.gave()
	}
	return err
}

func (m manager) List(ctx context.Context, filters ...string) ([]leases.Lease, error) {
	return m.of(ctx).List(ctx, filters...)
}

func (m manager) AddResource(ctx context.Context, l leases.Lease, r leases.Resource) error {
	return m.of(ctx).AddResource(ctx, l, r)
}

func (m manager) DeleteResource(ctx context.Context, l leases.Lease, r leases.Resource) error {
	return m.of(ctx).DeleteResource(ctx, l, r)
}

func (m manager) ListResources(ctx context.Context, l leases.Lease) ([]leases.Resource, error) {
	return m.of(ctx).ListResources(ctx, l)
}
