package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/semaphore"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image/unpack"
)

// Namespace is the containerd namespace of all the engine's objects.
const Namespace = "servin"

// snapshotterName names the snapshotter in labels and leases.
const snapshotterName = "overlayfs"

// Config tells a Service where it works and what it may use.
type Config struct {
	// Root is a directory of the Service's own.
	Root   string
	Logger *slog.Logger
	// Registries tell how registries are reached.
	Registries Registries
	// MaxConcurrentDownloads and Uploads are per pull or push; 0 is 6 and 5.
	MaxConcurrentDownloads int
	MaxConcurrentUploads   int
	// Limits of one layer; zero is 256 GiB and ten million entries.
	Limits unpack.Limits
	// PinnedChains names the chains that writable layers stand on. Collection
	// leaves them alone. Nil is none.
	PinnedChains func() map[string]struct{}
	// LazyDir is a directory that a reboot may take, for the process that serves
	// lazily pulled layers; "" is no lazy pulls.
	LazyDir string
	// LazyPull makes every pull lazy where a layer's format allows.
	LazyPull bool
	// LazyIdle is how long nobody may have read from a registry before the rest
	// of a lazily pulled layer is fetched: 0 is two seconds, less is never.
	LazyIdle time.Duration
}

// Service keeps images. Its methods may be called from many goroutines.
type Service struct {
	cfg     Config
	log     *slog.Logger
	quiet   *log.Entry // for containerd's packages
	bolt    *bolt.DB
	db      *metadata.DB
	content content.Store
	snaps   snapshots.Snapshotter
	store   images.Store
	leases  leases.Manager
	layers  snapshots.Snapshotter // the overlay snapshotter below snaps
	claims  *claims               // the same

	dirty chan struct{}

	unpacks *semaphore.Weighted
	chains  keyedLock // unpacking, by chain id
	pulls   flights   // by reference and platform

	// mutate serialises changes of references, and collection with them.
	mutate sync.Mutex
	swept  bool         // the first collection looks harder; guarded by mutate
	graced atomic.Int64 // so many chains the last collection kept for who was given them lately
	cat    catalog
	ready  readyCache

	*reach
	userns bool
	lazy   lazyState

	boot     string
	unsynced unsynced

	subMu sync.Mutex
	subs  []func(Event)
}

// New opens the image store. Call Close when done, and Run for collection in the
// background.
func New(ctx context.Context, cfg Config) (s *Service, err error) {
	if cfg.MaxConcurrentDownloads <= 0 {
		cfg.MaxConcurrentDownloads = 6
	}
	if cfg.MaxConcurrentUploads <= 0 {
		cfg.MaxConcurrentUploads = 5
	}
	if cfg.Limits.Bytes <= 0 {
		cfg.Limits.Bytes = 256 << 30
	}
	if cfg.Limits.Entries <= 0 {
		cfg.Limits.Entries = 10_000_000
	}
	if cfg.Root, err = filepath.Abs(cfg.Root); err != nil {
		return nil, fmt.Errorf("cannot resolve the image directory: %w", err)
	}
	l := logrus.New()
	l.SetOutput(io.Discard)
	s = &Service{
		cfg:     cfg,
		log:     cfg.Logger,
		quiet:   logrus.NewEntry(l),
		dirty:   make(chan struct{}, 1),
		unpacks: semaphore.NewWeighted(int64(min(max(runtime.NumCPU(), 2), 4))),
		userns:  inUserNamespace(),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.reach = newReach(cfg.Registries)
	s.lazy.init(cfg, s.userns)
	s.unsynced.wake = make(chan struct{}, 1)
	if s.boot, err = bootID(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, fmt.Errorf("cannot create the image directory: %w", err)
	}
	defer func() {
		if err != nil {
			_ = s.Close()
		}
	}()
	// What containerd's packages say without a context is of no use to anybody.
	if err := log.SetLevel("error"); err != nil {
		return nil, err
	}
	ctx = s.ctx(ctx)
	cs, err := local.NewStore(filepath.Join(cfg.Root, "content"))
	if err != nil {
		return nil, fmt.Errorf("cannot open the content store: %w", err)
	}
	if s.layers, err = s.openLayers(ctx, filepath.Join(cfg.Root, "layers")); err != nil {
		return nil, fmt.Errorf("cannot open the layer store: %w", err)
	}
	s.bolt, err = bolt.Open(filepath.Join(cfg.Root, "metadata.db"), 0o600, &bolt.Options{Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType, NoStatistics: true})
	if err != nil {
		return nil, fmt.Errorf("cannot open the image database (is another engine using %s?): %w", cfg.Root, err)
	}
	// The lock on the database says that nobody else writes here.
	if err := dropTornIngests(filepath.Join(cfg.Root, "content", "ingest")); err != nil {
		return nil, err
	}
	s.db = metadata.NewDB(s.bolt, cs, map[string]snapshots.Snapshotter{snapshotterName: s.layers})
	if err := s.db.Init(ctx); err != nil {
		return nil, fmt.Errorf("cannot open the image database: %w", err)
	}
	s.content = s.db.ContentStore()
	s.snaps = s.db.Snapshotter(snapshotterName)
	s.store = metadata.NewImageStore(s.db)
	s.leases = metadata.NewLeaseManager(s.db)
	if err := s.dropStaleLeases(ctx); err != nil {
		return nil, err
	}
	list, err := s.store.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot list images: %w", err)
	}
	s.cat.load(list)
	if err := s.repair(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Close closes the databases. Nothing may be in progress.
func (s *Service) Close() error {
	var errs []error
	if s.reach != nil {
		s.transport.CloseIdleConnections()
	}
	if s.bolt != nil {
		errs = append(errs, s.bolt.Close())
	}
	if s.layers != nil {
		errs = append(errs, s.layers.Close())
	}
	return errors.Join(errs...)
}

// ctx prepares a context for containerd's packages.
func (s *Service) ctx(ctx context.Context) context.Context {
	return log.WithLogger(namespaces.WithNamespace(ctx, Namespace), s.quiet)
}

const leasePrefix = "servin-op-"

// begin starts an operation that adds content: what it makes is safe from
// collection until done is called.
func (s *Service) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	ctx = s.ctx(ctx)
	l, err := s.leases.Create(ctx, leases.WithID(fmt.Sprintf("%s%d-%d", leasePrefix, time.Now().UnixNano(), s.cat.serial.Add(1))))
	if err != nil {
		return nil, nil, asFault(fmt.Errorf("cannot take a lease: %w", err))
	}
	return leases.WithLease(ctx, l.ID), func() {
		if err := s.leases.Delete(context.WithoutCancel(ctx), l); err != nil {
			s.log.Warn("cannot give back a lease", "lease", l.ID, "cause", err)
		}
	}, nil
}

// dropStaleLeases gives back what operations of a killed engine held.
func (s *Service) dropStaleLeases(ctx context.Context) error {
	ls, err := s.leases.List(ctx)
	if err != nil {
		return fmt.Errorf("cannot list leases: %w", err)
	}
	for _, l := range ls {
		if strings.HasPrefix(l.ID, leasePrefix) {
			if err := s.leases.Delete(ctx, l); err != nil {
				return fmt.Errorf("cannot give back a lease: %w", err)
			}
			s.markDirty()
		}
	}
	return s.dropIngests(ctx)
}

// dropIngests lets go of what a killed engine was storing. Downloads stay: the
// next pull goes on with them.
func (s *Service) dropIngests(ctx context.Context) error {
	l, err := s.content.ListStatuses(ctx)
	if err != nil {
		return fmt.Errorf("cannot list what was being stored: %w", err)
	}
	for _, st := range l {
		if !strings.HasPrefix(st.Ref, "servin-stream-") && !strings.HasPrefix(st.Ref, "servin-blob-") && !strings.HasPrefix(st.Ref, "servin-hold-") {
			continue
		}
		if err := s.content.Abort(ctx, st.Ref); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("cannot let go of what was being stored: %w", err)
		}
	}
	return nil
}

// Subscribe has fn called for each event, in order for each image, from the
// goroutine that caused it.
func (s *Service) Subscribe(fn func(Event)) {
	s.subMu.Lock()
	defer s.subMu.Unlock()
	s.subs = append(s.subs, fn)
}

func (s *Service) emit(action string, id digest.Digest, ref string) {
	s.subMu.Lock()
	subs := s.subs
	s.subMu.Unlock()
	if len(subs) == 0 {
		return
	}
	var labels map[string]string
	if id != "" {
		if e, err := s.entryOf(context.Background(), id); err == nil && e.variant != nil {
			labels = e.variant.image.Config.Labels
		}
	}
	for _, fn := range subs {
		fn(Event{Action: action, ID: id.String(), Ref: ref, Labels: labels})
	}
}

// asFault gives an error of containerd's packages its kind here.
func asFault(err error) error {
	if err == nil || fault.Of(err) != fault.Internal {
		return err
	}
	switch {
	case errdefs.IsNotFound(err):
		return fault.As(fault.NotFound, err)
	case errdefs.IsInvalidArgument(err):
		return fault.As(fault.Invalid, err)
	case errdefs.IsAlreadyExists(err), errdefs.IsConflict(err):
		return fault.As(fault.Conflict, err)
	case errdefs.IsFailedPrecondition(err):
		return fault.As(fault.Invalid, err)
	case errdefs.IsUnauthorized(err):
		return fault.As(fault.Unauthorized, err)
	case errdefs.IsPermissionDenied(err):
		return fault.As(fault.Forbidden, err)
	case errdefs.IsUnavailable(err):
		return fault.As(fault.Unavailable, err)
	}
	return diskFault(err)
}

func inUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	f := strings.Fields(string(b))
	return len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295"
}

// UnpackMain is the entry of the process that unpacks layers. A program that
// makes a Service calls it first thing in main, and exits with code when the
// process is that one.
func UnpackMain() (code int, ours bool) {
	if len(os.Args) == 0 || os.Args[0] != unpack.Argv0 {
		return 0, false
	}
	return unpack.Main(os.Args), true
}
