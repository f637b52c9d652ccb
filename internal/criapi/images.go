package criapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/distribution/reference"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

// fullNames spells familiar names out: busybox:1 is docker.io/library/busybox:1.
func fullNames(names []string) []string {
	out := make([]string, 0, len(names))
	for _, n := range names {
		if named, err := reference.ParseNormalizedNamed(n); err == nil {
			n = named.String()
		}
		out = append(out, n)
	}
	return out
}

// imageUser is who an image's process runs as.
type imageUser struct {
	uid  *v1.Int64Value
	name string
}

// userCache keeps what lists would have to inspect every image for. Ids are of
// content, so that nothing goes stale.
type userCache struct {
	mu sync.Mutex
	m  map[string]imageUser
}

func userOf(config string) imageUser {
	user, _, _ := strings.Cut(config, ":")
	if n, err := strconv.ParseInt(user, 10, 64); err == nil && n >= 0 {
		return imageUser{uid: &v1.Int64Value{Value: n}}
	}
	return imageUser{name: user}
}

func (s *Server) user(ctx context.Context, id string) imageUser {
	s.users.mu.Lock()
	u, ok := s.users.m[id]
	s.users.mu.Unlock()
	if ok {
		return u
	}
	img, err := s.cfg.Images.Inspect(ctx, id, "", false)
	if err != nil {
		return imageUser{}
	}
	if img.Config != nil {
		u = userOf(img.Config.User)
	}
	s.users.mu.Lock()
	if len(s.users.m) > 4096 {
		clear(s.users.m)
	}
	s.users.m[id] = u
	s.users.mu.Unlock()
	return u
}

func (s *Server) image(ctx context.Context, id string, tags, digests []string, size int64) *v1.Image {
	u := s.user(ctx, id)
	if size <= 0 {
		size = 1 // clients take zero for an image that is not there
	}
	return &v1.Image{
		Id: id, RepoTags: fullNames(tags), RepoDigests: fullNames(digests), Size: uint64(size), Uid: u.uid, Username: u.name,
		Spec: &v1.ImageSpec{Image: id}, Pinned: !s.cfg.Engine.PodImage(id),
	}
}

// listImages are those that a filter lets through.
func (s *Server) listImages(ctx context.Context, f *v1.ImageFilter) ([]*v1.Image, error) {
	if name := f.GetImage().GetImage(); name != "" {
		img, err := s.inspect(ctx, name)
		if err != nil || img == nil {
			return nil, err
		}
		return []*v1.Image{s.image(ctx, img.ID, img.RepoTags, img.RepoDigests, img.Size)}, nil
	}
	all, err := s.cfg.Images.List(ctx, nil, true, false, false)
	if err != nil {
		return nil, err
	}
	out := make([]*v1.Image, 0, len(all))
	for _, i := range all {
		out = append(out, s.image(ctx, i.ID, i.RepoTags, i.RepoDigests, i.Size))
	}
	return out, nil
}

// ListImages implements the CRI.
func (s *Server) ListImages(ctx context.Context, req *v1.ListImagesRequest) (*v1.ListImagesResponse, error) {
	l, err := s.listImages(ctx, req.GetFilter())
	if err != nil {
		return nil, err
	}
	return &v1.ListImagesResponse{Images: l}, nil
}

// inspect finds an image; one that is not there is nil, and so is a name that
// cannot be one's.
func (s *Server) inspect(ctx context.Context, name string) (*mimage.InspectResponse, error) {
	img, err := s.cfg.Images.Inspect(ctx, name, "", false)
	switch {
	case fault.Is(err, fault.NotFound):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &img, nil
}

// ImageStatus implements the CRI.
func (s *Server) ImageStatus(ctx context.Context, req *v1.ImageStatusRequest) (*v1.ImageStatusResponse, error) {
	name := req.GetImage().GetImage()
	if name == "" {
		return nil, invalid("cannot look for an image: its name must be given")
	}
	img, err := s.inspect(ctx, name)
	if err != nil || img == nil {
		return &v1.ImageStatusResponse{}, err
	}
	resp := &v1.ImageStatusResponse{Image: s.image(ctx, img.ID, img.RepoTags, img.RepoDigests, img.Size)}
	if req.GetVerbose() {
		b, err := json.Marshal(map[string]any{"chainID": chain(img), "imageSpec": map[string]any{
			"created": img.Created, "architecture": img.Architecture, "os": img.Os, "config": img.Config, "rootfs": img.RootFS,
		}})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(b)}
	}
	return resp, nil
}

// chain is the id of an image's layers taken together.
func chain(img *mimage.InspectResponse) string {
	var id string
	for i, l := range img.RootFS.Layers {
		if i == 0 {
			id = l
			continue
		}
		id = digest.FromString(id + " " + l).String()
	}
	return id
}

// PullImage implements the CRI.
func (s *Server) PullImage(ctx context.Context, req *v1.PullImageRequest) (*v1.PullImageResponse, error) {
	name := req.GetImage().GetImage()
	if name == "" {
		return nil, invalid("cannot pull an image: its name must be given")
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, invalid("cannot pull %q: %w", name, err)
	}
	named = reference.TagNameOnly(named)
	auth, err := pullAuth(req.GetAuth(), reference.Domain(named))
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Images.Pull(ctx, image.PullOptions{Ref: named.String(), Auth: auth}); err != nil {
		if fault.Is(err, fault.Unavailable) {
			// How the kubelet tells this cause from others.
			return nil, status.Errorf(codes.Unavailable, "RegistryUnavailable: %v", err)
		}
		return nil, err
	}
	img, err := s.cfg.Images.Inspect(ctx, named.String(), "", false)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Engine.PodImagePulled(ctx, named.String(), img.ID); err != nil {
		return nil, fmt.Errorf("cannot note the image: %w", err)
	}
	return &v1.PullImageResponse{ImageRef: img.ID}, nil
}

// pullAuth decodes a client's; those for another host are not sent to this one.
func pullAuth(a *v1.AuthConfig, host string) (*registry.AuthConfig, error) {
	if a == nil {
		return nil, nil
	}
	out := &registry.AuthConfig{
		Username: a.GetUsername(), Password: a.GetPassword(), ServerAddress: a.GetServerAddress(), IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
	if s := a.GetServerAddress(); s != "" {
		s = strings.TrimPrefix(strings.TrimPrefix(s, "https://"), "http://")
		s, _, _ = strings.Cut(s, "/")
		if s != host && !(isHub(s) && isHub(host)) {
			return nil, nil
		}
	}
	if out.Username == "" && a.GetAuth() != "" {
		b, err := base64.StdEncoding.DecodeString(a.GetAuth())
		if err != nil {
			return nil, invalid("cannot read the credentials: they are not base64")
		}
		user, password, ok := strings.Cut(string(b), ":")
		if !ok {
			return nil, invalid("cannot read the credentials: user:password is wanted")
		}
		out.Username, out.Password = user, strings.Trim(password, "\x00")
	}
	if out.Username == "" && out.IdentityToken == "" && out.RegistryToken == "" {
		return nil, nil
	}
	return out, nil
}

func isHub(host string) bool {
	return host == "docker.io" || host == "index.docker.io" || host == "registry-1.docker.io"
}

// RemoveImage implements the CRI: an id takes all names of the image with it.
func (s *Server) RemoveImage(ctx context.Context, req *v1.RemoveImageRequest) (*v1.RemoveImageResponse, error) {
	name := req.GetImage().GetImage()
	if name == "" {
		return nil, invalid("cannot remove an image: its name must be given")
	}
	ref := name
	if named, err := reference.ParseNormalizedNamed(name); err == nil {
		ref = reference.TagNameOnly(named).String()
	}
	if img, err := s.inspect(ctx, name); err != nil {
		return nil, err
	} else if img != nil && (img.ID == name || strings.TrimPrefix(img.ID, "sha256:") == name) {
		ref, name = img.ID, img.ID
	}
	_, err := s.cfg.Images.Remove(ctx, name, image.RemoveOptions{Force: true, InUse: func(id digest.Digest) map[string]bool { return s.cfg.Engine.ImageUsers(id.String()) }})
	if err != nil && !fault.Is(err, fault.NotFound) {
		return nil, err
	}
	return &v1.RemoveImageResponse{}, s.cfg.Engine.PodImageRemoved(ctx, ref)
}

// ImageFsInfo implements the CRI. Layers of images and of containers lie together.
func (s *Server) ImageFsInfo(ctx context.Context, _ *v1.ImageFsInfoRequest) (*v1.ImageFsInfoResponse, error) {
	u, err := s.cfg.Engine.ImageFilesystem(ctx)
	if err != nil {
		return nil, err
	}
	f := func() []*v1.FilesystemUsage {
		return []*v1.FilesystemUsage{{
			Timestamp: now(), FsId: &v1.FilesystemIdentifier{Mountpoint: u.Path},
			UsedBytes: &v1.UInt64Value{Value: u.Used}, InodesUsed: &v1.UInt64Value{Value: u.Inodes - u.IFree},
		}}
	}
	return &v1.ImageFsInfoResponse{ImageFilesystems: f(), ContainerFilesystems: f()}, nil
}
