// Package server is servin-buildd: BuildKit with the engine's store below it, and
// the part of Docker's API that concerns builds in front.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/pkg/gc"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/cache/remotecache"
	inlinecache "github.com/moby/buildkit/cache/remotecache/inline"
	localcache "github.com/moby/buildkit/cache/remotecache/local"
	registrycache "github.com/moby/buildkit/cache/remotecache/registry"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/executor/oci"
	"github.com/moby/buildkit/executor/resources"
	"github.com/moby/buildkit/executor/runcexecutor"
	"github.com/moby/buildkit/frontend"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/gateway"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/db/boltutil"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/network"
	"github.com/moby/buildkit/version"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	wlabel "github.com/moby/buildkit/worker/label"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"

	"github.com/cloudos-io/cloudos/buildd/internal/classic"
	"github.com/cloudos-io/cloudos/buildd/internal/engine"
	"github.com/cloudos-io/cloudos/buildd/internal/history"
	"github.com/cloudos-io/cloudos/buildd/internal/netns"
	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/image"
)

// Server is a builder.
type Server struct {
	set      contract.Settings
	log      *slog.Logger
	sessions *session.Manager
	control  *control.Controller
	worker   *engine.Worker
	grpc     *grpc.Server
	hijacked *queue
	classic  *classic.Builder
	callers  *engine.Callers
	engine   *engine.Engine
	history  *history.Store
}

// New puts a builder together.
func New(ctx context.Context, e *engine.Engine, set contract.Settings, log *slog.Logger) (*Server, error) {
	s := &Server{set: set, log: log, hijacked: newQueue(), callers: &e.Callers, engine: e}
	var err error
	if s.sessions, err = session.NewManager(); err != nil {
		return nil, err
	}
	if s.history, err = history.Open(set.Root, contract.HistoryNamespace); err != nil {
		return nil, err
	}
	base, md, err := newWorker(ctx, e, set)
	if err != nil {
		return nil, err
	}
	s.worker = e.NewWorker(base, md)
	wc := &worker.Controller{}
	if err := wc.Add(s.worker); err != nil {
		return nil, err
	}
	gw, err := gateway.NewGatewayFrontend(wc.Infos(), nil)
	if err != nil {
		return nil, err
	}
	cache, err := bboltcachestorage.NewStore(filepath.Join(set.Root, "cache.db"))
	if err != nil {
		return nil, fmt.Errorf("cannot open the cache's index: %w", err)
	}
	records, err := boltutil.SafeOpen(filepath.Join(set.Root, "history.db"), 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType, NoSync: true})
	if err != nil {
		return nil, fmt.Errorf("cannot open the builds' history: %w", err)
	}
	hosts := set.Registries.Endpoints()
	entries := int64(50)
	s.control, err = control.NewController(control.Opt{
		SessionManager:   s.sessions,
		WorkerController: wc,
		Frontends: map[string]frontend.Frontend{
			"dockerfile.v0": forwarder.NewGatewayForwarder(wc.Infos(), dockerfile.Build),
			"gateway.v0":    gw,
		},
		ResolveCacheExporterFuncs: map[string]remotecache.ResolveCacheExporterFunc{
			"inline":   inlinecache.ResolveCacheExporterFunc(),
			"local":    localcache.ResolveCacheExporterFunc(s.sessions),
			"registry": registrycache.ResolveCacheExporterFunc(s.sessions, hosts),
		},
		ResolveCacheImporterFuncs: map[string]remotecache.ResolveCacheImporterFunc{
			"local":    localcache.ResolveCacheImporterFunc(s.sessions),
			"registry": registrycache.ResolveCacheImporterFunc(s.sessions, base.ContentStore(), hosts),
		},
		CacheManager: solver.NewCacheManager(ctx, "local", cache, worker.NewCacheResultStorage(wc)),
		Entitlements: []string{string(entitlements.EntitlementNetworkHost), string(entitlements.EntitlementSecurityInsecure)},
		HistoryDB:    records,
		CacheStore:   cache,
		LeaseManager: leaseutil.WithNamespace(s.history.Leases(e.Leases), image.Namespace),
		ContentStore: containerdsnapshot.NewContentStore(s.history.Content(e.Content), image.Namespace),
		// A record goes when it is too old and too many: the number alone is to count.
		HistoryConfig:  &config.HistoryConfig{MaxAge: config.Duration{Duration: time.Minute}, MaxEntries: &entries},
		GarbageCollect: s.history.Collect,
		GracefulStop:   ctx.Done(),
	})
	if err != nil {
		return nil, err
	}
	s.grpc = grpc.NewServer(
		grpc.StatsHandler(otelgrpc.NewServerHandler()),
		grpc.ChainUnaryInterceptor(grpcerrors.UnaryServerInterceptor, hostGateway(set.Gateway), confine),
		grpc.ChainStreamInterceptor(grpcerrors.StreamServerInterceptor, ownSessions(&e.Callers)),
		grpc.MaxRecvMsgSize(maxMessage),
	)
	s.control.Register(s.grpc)
	s.classic = classic.New(classic.Config{
		Control: s.control, Sessions: s.sessions, Dial: s.hijacked.dial, Images: e.Images, Content: base.ContentStore(),
		Callers: &e.Callers, Scratch: filepath.Join(set.Root, "scratch"), Logger: log,
	})
	return s, nil
}

const maxMessage = 16 << 20

func newWorker(ctx context.Context, e *engine.Engine, set contract.Settings) (*base.Worker, *metadata.Store, error) {
	exec := filepath.Join(set.Root, "steps")
	// What steps of an earlier builder left: they ended with it, and so did their mounts.
	if err := os.RemoveAll(exec); err != nil {
		return nil, nil, fmt.Errorf("cannot clean up after earlier steps: %w", err)
	}
	bridge, err := netns.New(e.Client, filepath.Join(set.RunRoot, "build", "netns"))
	if err != nil {
		return nil, nil, err
	}
	nets := map[pb.NetMode]network.Provider{
		pb.NetMode_UNSET: bridge,
		pb.NetMode_HOST:  network.NewHostProvider(),
		pb.NetMode_NONE:  network.NewNoneProvider(),
	}
	mode := "bridge"
	if !set.Bridge {
		nets[pb.NetMode_UNSET], mode = network.NewHostProvider(), "host"
	}
	monitor, err := resources.NewMonitor()
	if err != nil {
		return nil, nil, err
	}
	var dns *oci.DNSConfig
	if len(set.Nameservers)+len(set.Search)+len(set.Options) > 0 {
		dns = &oci.DNSConfig{Nameservers: set.Nameservers, SearchDomains: set.Search, Options: set.Options}
	}
	exe, err := runcexecutor.New(runcexecutor.Opt{
		Root: exec, CommandCandidates: set.Runtimes, Rootless: set.Rootless, ProcessMode: oci.ProcessSandbox,
		DNS: dns, ApparmorProfile: set.AppArmor, DefaultCgroupParent: set.CgroupParent, ResourceMonitor: monitor,
	}, nets)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot run build steps (an OCI runtime is needed, one of %v): %w", set.Runtimes, err)
	}
	md, err := metadata.NewStore(filepath.Join(set.Root, "metadata_v2.db"))
	if err != nil {
		return nil, nil, fmt.Errorf("cannot open the cache's records: %w", err)
	}
	if db, ok := md.DB().(*bolt.DB); ok {
		db.NoSync = true // see settle
	}
	id, err := base.ID(set.Root)
	if err != nil {
		return nil, nil, err
	}
	store := containerdsnapshot.NewContentStore(e.Content, image.Namespace)
	sn, applier := e.Layers(apply.NewFileSystemApplier(store))
	hostname, _ := os.Hostname()
	w, err := base.NewWorker(ctx, base.WorkerOpt{
		ID: id, Root: set.Root,
		Labels: map[string]string{
			wlabel.Executor: "oci", wlabel.Snapshotter: contract.Snapshotter, wlabel.Hostname: hostname,
			wlabel.Network: mode, wlabel.OCIProcessMode: oci.ProcessSandbox.String(),
		},
		Platforms:        []ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())},
		GCPolicy:         policy(set.Budget, set.MinFree),
		BuildkitVersion:  client.BuildkitVersion{Package: version.Package, Version: version.Version, Revision: version.Revision},
		NetworkProviders: nets,
		Executor:         exe,
		Snapshotter:      containerdsnapshot.NewSnapshotter(contract.Snapshotter, sn, image.Namespace, nil),
		ContentStore:     store,
		Applier:          applier,
		Differ:           walking.NewWalkingDiff(store),
		ImageStore:       e.Images,
		RegistryHosts:    set.Registries.Endpoints(),
		LeaseManager:     leaseutil.WithNamespace(e.Leases, image.Namespace),
		GarbageCollect: func(ctx context.Context) (gc.Stats, error) {
			return nil, e.Collect(ctx)
		},
		MetadataStore:   md,
		MountPoolRoot:   filepath.Join(set.Root, "mounts"),
		ResourceMonitor: monitor,
	})
	return w, md, err
}

// policy keeps the cache within its budget: what is made again most easily goes
// first.
func policy(budget, minFree int64) []client.PruneInfo {
	return []client.PruneInfo{
		{Filter: []string{"type==source.local,type==exec.cachemount,type==source.git.checkout"}, KeepDuration: 48 * time.Hour, MaxUsedSpace: min(512e6, budget)},
		{KeepDuration: 60 * 24 * time.Hour, MaxUsedSpace: budget, MinFreeSpace: minFree},
		{MaxUsedSpace: budget, MinFreeSpace: minFree},
		{All: true, MaxUsedSpace: budget, MinFreeSpace: minFree},
	}
}

// Serve answers requests of the engine's, and the one of each client's connection that
// it hands over, until ctx ends, then writes down what the cache takes.
func (s *Server) Serve(ctx context.Context, engine, handed net.Listener) error {
	go func() { _ = s.grpc.Serve(s.hijacked) }()
	srv, clients := s.server(s.routes()), s.server(s.upgrades())
	// What a client sends behind its request was judged by nobody.
	clients.SetKeepAlivesEnabled(false)
	ended := make(chan error, 2)
	go func() { ended <- srv.Serve(engine) }()
	go func() { ended <- clients.Serve(handed) }()
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
	}
	_ = srv.Close()
	_ = clients.Close()
	s.grpc.Stop()
	s.collect()
	if e := s.writeUsage(context.Background()); e != nil {
		s.log.Warn("cannot write down what the cache takes", "cause", e)
	}
	if e := s.control.Close(); e != nil {
		s.log.Warn("cannot close the cache", "cause", e)
	}
	if e := s.history.Close(); e != nil {
		s.log.Warn("cannot close the builds' records", "cause", e)
	}
	s.engine.Wait()
	if err == nil || errors.Is(err, http.ErrServerClosed) {
		if e := settle(s.set.Root); e != nil {
			s.log.Warn("the build cache may be thrown away when the machine stops", "cause", e)
			return err
		}
		_ = os.Remove(filepath.Join(s.set.Root, "boot"))
	}
	return err
}

func (s *Server) server(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 30 * time.Second, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
}

// settle brings the cache's records to the disk. While a builder runs they need not
// be there: if the machine stops then, the mark that a builder ran has the next one
// begin without a cache.
func settle(root string) error {
	dbs, err := filepath.Glob(filepath.Join(root, "*.db"))
	if err != nil {
		return err
	}
	for _, p := range dbs {
		f, err := os.Open(p)
		if err != nil {
			return fmt.Errorf("cannot bring the cache's records to the disk: %w", err)
		}
		err = f.Sync()
		_ = f.Close()
		if err != nil {
			return fmt.Errorf("cannot bring the cache's records to the disk: %w", err)
		}
	}
	return nil
}

// queue is a listener for connections that were hijacked.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
}

func newQueue() *queue { return &queue{make(chan net.Conn), make(chan struct{})} }

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	select {
	case <-q.done:
	default:
		close(q.done)
	}
	return nil
}

func (q *queue) Addr() net.Addr { return &net.UnixAddr{Net: "unix"} }

func (q *queue) put(c net.Conn) error {
	select {
	case q.conns <- c:
		return nil
	case <-q.done:
		return net.ErrClosed
	}
}

// dial connects to the server in the same process.
func (q *queue) dial(context.Context, string) (net.Conn, error) {
	a, b := net.Pipe()
	return a, q.put(b)
}
