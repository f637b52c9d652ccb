// Package engine is the builder's view of the engine's store: containerd's
// contracts over the socket to servind, a snapshotter that has image layers
// without unpacking them twice, and the exporter that makes a built image of what
// is in the store already.
package engine

import (
	"context"
	"fmt"
	"os"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/images"
	leaseproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"net"
	"sync"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

const maxMessage = 16 << 20

// Engine is the engine's store.
type Engine struct {
	contract.Client
	Content   content.Store
	Snapshots snapshots.Snapshotter
	Leases    *leisurely
	Images    images.Store
	Callers   Callers
	// Gone is closed when the engine is.
	Gone <-chan struct{}
}

// Dial takes over the inherited socket.
func Dial() (*Engine, error) {
	f := os.NewFile(contract.FDEngine, "engine")
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("cannot use the socket to the engine: %w", err)
	}
	gone := make(chan struct{})
	watched := &watchedConn{Conn: conn, gone: gone}
	first := make(chan net.Conn, 1)
	first <- watched
	cc, err := grpc.NewClient("passthrough:///engine",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-first:
				return c, nil
			default:
				return nil, net.ErrClosed // there is one engine, once
			}
		}),
		grpc.WithIdleTimeout(0),
	)
	if err != nil {
		return nil, err
	}
	return &Engine{
		Client:    contract.Client{Conn: cc},
		Content:   ahead{&recent{Store: contentproxy.NewContentStore(contentapi.NewContentClient(cc))}},
		Snapshots: snapshotproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(cc), contract.Snapshotter),
		Leases:    newLeisurely(leaseproxy.NewLeaseManager(leasesapi.NewLeasesClient(cc))),
		Images:    imageStore{imagesapi.NewImagesClient(cc)},
		Gone:      gone,
	}, nil
}

// Wait waits for what is done in the background.
func (e *Engine) Wait() { e.Leases.wg.Wait() }

// watchedConn tells when the other end is gone.
type watchedConn struct {
	net.Conn
	gone chan struct{}
	once sync.Once
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.once.Do(func() { close(c.gone) })
	}
	return n, err
}

// imageStore is the engine's images.
type imageStore struct{ c imagesapi.ImagesClient }

func (s imageStore) Get(ctx context.Context, name string) (images.Image, error) {
	r, err := s.c.Get(ctx, &imagesapi.GetImageRequest{Name: name})
	if err != nil {
		return images.Image{}, errgrpc.ToNative(err)
	}
	return imageOf(r.Image), nil
}

// List shows nothing: BuildKit asks in order to find out which records images
// share, and takes those without a blob for their parents'. See Worker.Prune.
func (s imageStore) List(context.Context, ...string) ([]images.Image, error) { return nil, nil }

func (s imageStore) Create(ctx context.Context, i images.Image) (images.Image, error) {
	r, err := s.c.Create(ctx, &imagesapi.CreateImageRequest{Image: imageProto(i)})
	if err != nil {
		return images.Image{}, errgrpc.ToNative(err)
	}
	return imageOf(r.Image), nil
}

func (s imageStore) Update(ctx context.Context, i images.Image, paths ...string) (images.Image, error) {
	req := &imagesapi.UpdateImageRequest{Image: imageProto(i)}
	if len(paths) > 0 {
		req.UpdateMask = &fieldmaskpb.FieldMask{Paths: paths}
	}
	r, err := s.c.Update(ctx, req)
	if err != nil {
		return images.Image{}, errgrpc.ToNative(err)
	}
	return imageOf(r.Image), nil
}

func (s imageStore) Delete(context.Context, string, ...images.DeleteOpt) error {
	return errdefs.ErrPermissionDenied
}

func imageProto(i images.Image) *imagesapi.Image {
	return &imagesapi.Image{Name: i.Name, Labels: i.Labels, Target: oci.DescriptorToProto(i.Target)}
}

func imageOf(p *imagesapi.Image) images.Image {
	return images.Image{Name: p.Name, Labels: p.Labels, Target: oci.DescriptorFromProto(p.Target),
		CreatedAt: protobuf.FromTimestamp(p.CreatedAt), UpdatedAt: protobuf.FromTimestamp(p.UpdatedAt)}
}
