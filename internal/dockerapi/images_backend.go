package dockerapi

import (
	"context"
	"io"

	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/image"
)

// Images is what the image routes need; package image's Service satisfies it.
type Images interface {
	Pull(ctx context.Context, o image.PullOptions) error
	Push(ctx context.Context, o image.PushOptions) error
	List(ctx context.Context, filters map[string]map[string]bool, all, shared, manifests bool) ([]mimage.Summary, error)
	Inspect(ctx context.Context, ref, platform string, manifests bool) (mimage.InspectResponse, error)
	History(ctx context.Context, ref, platform string) ([]mimage.HistoryResponseItem, error)
	Tag(ctx context.Context, ref, target string) error
	Remove(ctx context.Context, ref string, o image.RemoveOptions) ([]mimage.DeleteResponse, error)
	Prune(ctx context.Context, filters map[string]map[string]bool, inUse func(digest.Digest) map[string]bool) (mimage.PruneReport, error)
	Save(ctx context.Context, refs []string, platforms []ocispec.Platform, w io.Writer) error
	Load(ctx context.Context, r io.Reader, platforms []ocispec.Platform, progress func(image.Progress)) (loaded []string, err error)
	Import(ctx context.Context, r io.Reader, ref, message, platform string, changes []string) (digest.Digest, error)
	Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (registry.DistributionInspect, error)
	Login(ctx context.Context, auth registry.AuthConfig) (registry.AuthResponse, error)
}

// Searcher is the optional ability behind GET /images/search.
type Searcher interface {
	Search(ctx context.Context, term string, limit int, f Filters, auth *registry.AuthConfig) ([]registry.SearchResult, error)
}

// Parents is the optional ability to tell the image that another was committed
// from; answers up to 1.51 have it.
type Parents interface {
	Parent(ctx context.Context, id string) string
}

// PlatformRemover is the optional ability behind DELETE /images/{name}?platforms=.
type PlatformRemover interface {
	RemovePlatforms(ctx context.Context, ref string, only []ocispec.Platform, o image.RemoveOptions) ([]mimage.DeleteResponse, error)
}

// Attester is the optional ability behind GET /images/{name}/attestations.
type Attester interface {
	Attestations(ctx context.Context, ref, platform string, predicateTypes []string, statements bool) ([]mimage.AttestationStatement, error)
}
