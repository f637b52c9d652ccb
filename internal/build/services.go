package build

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/network"
)

// maxMessage bounds a message between the two programs.
const maxMessage = 16 << 20

// services is what one builder is served.
type services struct {
	cfg Config
	log *slog.Logger
	pid int

	callers *callers

	mu   sync.Mutex
	nets map[string]struct{} // attached
}

func (s *services) server() *grpc.Server {
	quiet := silent()
	gs := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			ctx, err := inNamespace(ctx)
			if err != nil {
				return nil, err
			}
			return h(log.WithLogger(ctx, quiet), req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			ctx, err := inNamespace(ss.Context())
			if err != nil {
				return err
			}
			return h(srv, inContext{ss, log.WithLogger(ctx, quiet)})
		}),
	)
	st := s.cfg.Images.BuilderStores()
	contentapi.RegisterContentServer(gs, contentserver.New(st.Content))
	snapshotsapi.RegisterSnapshotsServer(gs, snapshotservice.FromSnapshotter(st.Snapshots))
	leasesapi.RegisterLeasesServer(gs, leaseServer{m: st.Leases})
	imagesapi.RegisterImagesServer(gs, imageServer{s: st.Images})
	contract.Register(gs, s)
	return gs
}

// silent is what containerd's packages log to: errors go to the builder.
func silent() *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}

type inContext struct {
	grpc.ServerStream
	ctx context.Context
}

func (s inContext) Context() context.Context { return s.ctx }

// inNamespace lets a builder work in the engine's namespace alone.
func inNamespace(ctx context.Context) (context.Context, error) {
	ns, ok := namespaces.Namespace(ctx)
	if !ok {
		ns = image.Namespace
	}
	if ns != image.Namespace {
		return nil, status.Errorf(codes.PermissionDenied, "namespace %q is not for builders", ns)
	}
	return namespaces.WithNamespace(ctx, ns), nil
}

// Settings answers what the builder needs to know.
func (s *services) Settings(ctx context.Context) (contract.Settings, error) {
	set := s.cfg.Settings
	if s.cfg.Networks == nil {
		return set, nil
	}
	set.Bridge = true
	if n, err := s.cfg.Networks.Inspect(ctx, "bridge"); err == nil {
		for _, c := range n.IPAM.Config {
			if c.Gateway.Is4() || set.Gateway == "" && c.Gateway.IsValid() {
				set.Gateway = c.Gateway.String()
			}
		}
	}
	return set, nil
}

// Layer unpacks a layer, unless its chain is there already.
func (s *services) Layer(ctx context.Context, r contract.LayerRequest) error {
	return s.cfg.Images.BuilderLayer(ctx, r.Blob, digest.Digest(r.DiffID), digest.Digest(r.Chain), digest.Digest(r.Parent))
}

// Alias gives a snapshot a second name.
func (s *services) Alias(ctx context.Context, r contract.AliasRequest) error {
	return s.cfg.Images.Alias(ctx, r.From, r.To, r.Parent)
}

// Adopt makes a built image ready to run from the builder's own snapshots. Where
// that cannot be, its layers are unpacked.
func (s *services) Adopt(ctx context.Context, r contract.AdoptRequest) error {
	if ok, err := s.cfg.Images.Bound(ctx, r.Image); err != nil {
		return err
	} else if ok {
		return s.cfg.Images.Built(ctx, r.Image)
	}
	for _, layers := range r.Results {
		var chains, snaps []string
		for _, l := range layers {
			chains, snaps = append(chains, l.Chain), append(snaps, l.Snapshot)
		}
		if err := s.cfg.Images.Adopt(ctx, chains, snaps); err != nil {
			s.log.Debug("layers that were built are unpacked again", "cause", err)
		}
	}
	if err := s.cfg.Images.Ready(ctx, r.Image); err != nil {
		return err
	}
	return s.cfg.Images.Built(ctx, r.Image)
}

// Chains names the layer chains that images have.
func (s *services) Chains(ctx context.Context) ([]string, error) {
	return s.cfg.Images.ImageChains(ctx)
}

// Collect removes what nothing refers to.
func (s *services) Collect(ctx context.Context) error { return s.cfg.Images.Collect(ctx) }

// Attach connects a step's network namespace to the default bridge.
func (s *services) Attach(ctx context.Context, r contract.AttachRequest) (contract.AttachResponse, error) {
	if s.cfg.Networks == nil {
		return contract.AttachResponse{}, fault.New(fault.Unsupported, "there is no network for build steps")
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", s.pid, r.FD))
	if err != nil {
		return contract.AttachResponse{}, fmt.Errorf("cannot open the step's network: %w", err)
	}
	defer ns.Close()
	s.mu.Lock()
	s.nets[r.ID] = struct{}{}
	s.mu.Unlock()
	at, err := s.cfg.Networks.Attach(ctx, network.AttachRequest{ContainerID: r.ID, ContainerName: r.ID, Hostname: r.Hostname, Network: "bridge", NetNS: ns, Ephemeral: true})
	if err != nil {
		_ = s.Release(context.WithoutCancel(ctx), contract.ReleaseRequest{ID: r.ID})
		return contract.AttachResponse{}, err
	}
	return contract.AttachResponse{Nameservers: at.DNS}, nil
}

// Release gives a step's network back.
func (s *services) Release(ctx context.Context, r contract.ReleaseRequest) error {
	s.mu.Lock()
	_, ok := s.nets[r.ID]
	delete(s.nets, r.ID)
	s.mu.Unlock()
	if !ok {
		return nil
	}
	return s.cfg.Networks.Release(ctx, r.ID)
}

// release gives back the networks of a builder that is gone.
func (s *services) release() {
	s.mu.Lock()
	ids := s.nets
	s.nets = map[string]struct{}{}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for id := range ids {
		if err := s.cfg.Networks.Release(ctx, id); err != nil {
			s.log.Warn("cannot give back the network of a build step", "step", id, "cause", err)
		}
	}
}

// sweepCgroups removes the empty cgroups below a parent, and it, in every
// hierarchy.
func sweepCgroups(parent string) {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	roots := []string{"/sys/fs/cgroup"}
	for _, d := range dirs {
		roots = append(roots, filepath.Dir(d))
	}
	for _, r := range roots {
		removeGroups(filepath.Join(r, filepath.Clean("/"+parent)))
	}
}

func removeGroups(dir string) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range ents {
		if e.IsDir() {
			removeGroups(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir) // busy ones stay
}
