package build

import (
	"context"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// leaseServer serves a lease manager.
type leaseServer struct {
	leasesapi.UnimplementedLeasesServer
	m leases.Manager
}

func (s leaseServer) Create(ctx context.Context, r *leasesapi.CreateRequest) (*leasesapi.CreateResponse, error) {
	opts := []leases.Opt{leases.WithLabels(r.Labels), leases.WithRandomID()}
	if r.ID != "" {
		opts = append(opts, leases.WithID(r.ID))
	}
	l, err := s.m.Create(ctx, opts...)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &leasesapi.CreateResponse{Lease: leaseProto(l)}, nil
}

func (s leaseServer) Delete(ctx context.Context, r *leasesapi.DeleteRequest) (*emptypb.Empty, error) {
	var opts []leases.DeleteOpt
	if r.Sync {
		opts = append(opts, leases.SynchronousDelete)
	}
	return &emptypb.Empty{}, errgrpc.ToGRPC(s.m.Delete(ctx, leases.Lease{ID: r.ID}, opts...))
}

func (s leaseServer) List(ctx context.Context, r *leasesapi.ListRequest) (*leasesapi.ListResponse, error) {
	list, err := s.m.List(ctx, r.Filters...)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	out := &leasesapi.ListResponse{}
	for _, l := range list {
		out.Leases = append(out.Leases, leaseProto(l))
	}
	return out, nil
}

func (s leaseServer) AddResource(ctx context.Context, r *leasesapi.AddResourceRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, errgrpc.ToGRPC(s.m.AddResource(ctx, leases.Lease{ID: r.ID}, leases.Resource{ID: r.GetResource().GetID(), Type: r.GetResource().GetType()}))
}

func (s leaseServer) DeleteResource(ctx context.Context, r *leasesapi.DeleteResourceRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, errgrpc.ToGRPC(s.m.DeleteResource(ctx, leases.Lease{ID: r.ID}, leases.Resource{ID: r.GetResource().GetID(), Type: r.GetResource().GetType()}))
}

func (s leaseServer) ListResources(ctx context.Context, r *leasesapi.ListResourcesRequest) (*leasesapi.ListResourcesResponse, error) {
	list, err := s.m.ListResources(ctx, leases.Lease{ID: r.ID})
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	out := &leasesapi.ListResourcesResponse{}
	for _, x := range list {
		out.Resources = append(out.Resources, &leasesapi.Resource{ID: x.ID, Type: x.Type})
	}
	return out, nil
}

func leaseProto(l leases.Lease) *leasesapi.Lease {
	return &leasesapi.Lease{ID: l.ID, Labels: l.Labels, CreatedAt: protobuf.ToTimestamp(l.CreatedAt)}
}

// imageServer serves an image store.
type imageServer struct {
	imagesapi.UnimplementedImagesServer
	s images.Store
}

func (s imageServer) Get(ctx context.Context, r *imagesapi.GetImageRequest) (*imagesapi.GetImageResponse, error) {
	i, err := s.s.Get(ctx, r.Name)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &imagesapi.GetImageResponse{Image: imageProto(i)}, nil
}

func (s imageServer) List(ctx context.Context, r *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	list, err := s.s.List(ctx, r.Filters...)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	out := &imagesapi.ListImagesResponse{}
	for _, i := range list {
		out.Images = append(out.Images, imageProto(i))
	}
	return out, nil
}

func (s imageServer) Create(ctx context.Context, r *imagesapi.CreateImageRequest) (*imagesapi.CreateImageResponse, error) {
	i, err := s.s.Create(ctx, imageOf(r.Image))
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &imagesapi.CreateImageResponse{Image: imageProto(i)}, nil
}

func (s imageServer) Update(ctx context.Context, r *imagesapi.UpdateImageRequest) (*imagesapi.UpdateImageResponse, error) {
	i, err := s.s.Update(ctx, imageOf(r.Image), r.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &imagesapi.UpdateImageResponse{Image: imageProto(i)}, nil
}

func imageProto(i images.Image) *imagesapi.Image {
	return &imagesapi.Image{Name: i.Name, Labels: i.Labels, Target: oci.DescriptorToProto(i.Target),
		CreatedAt: protobuf.ToTimestamp(i.CreatedAt), UpdatedAt: protobuf.ToTimestamp(i.UpdatedAt)}
}

func imageOf(p *imagesapi.Image) images.Image {
	return images.Image{Name: p.GetName(), Labels: p.GetLabels(), Target: oci.DescriptorFromProto(p.GetTarget())}
}
