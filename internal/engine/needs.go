package engine

import (
	"context"
	"io"
	"os"

	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/network"
	mimage "github.com/moby/moby/api/types/image"
	mnetwork "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Images is what the engine and its API need of package image. Errors carry
// fault kinds. Filters are Docker's: key to set of values.
type Images interface {
	// Resolve finds a local image by name, digest, id or unique id prefix and
	// makes it ready to run: unpacked for the platform ("" the host's).
	Resolve(ctx context.Context, ref, platform string) (image.Resolved, error)
	Pull(ctx context.Context, o image.PullOptions) error
	Push(ctx context.Context, o image.PushOptions) error
	List(ctx context.Context, filters map[string]map[string]bool, all, shared, manifests bool) ([]mimage.Summary, error)
	Inspect(ctx context.Context, ref, platform string, manifests bool) (mimage.InspectResponse, error)
	History(ctx context.Context, ref, platform string) ([]mimage.HistoryResponseItem, error)
	Tag(ctx context.Context, ref, target string) error
	Remove(ctx context.Context, ref string, o image.RemoveOptions) ([]mimage.DeleteResponse, error)
	Prune(ctx context.Context, filters map[string]map[string]bool, inUse func(digest.Digest) map[string]bool) (mimage.PruneReport, error)
	// Save writes a tar that both `docker load` and OCI layout readers accept.
	Save(ctx context.Context, refs []string, platforms []ocispec.Platform, w io.Writer) error
	Load(ctx context.Context, r io.Reader, platforms []ocispec.Platform, progress func(image.Progress)) (loaded []string, err error)
	// Import makes an image of one layer from a root file system tar.
	Import(ctx context.Context, r io.Reader, ref, message, platform string, changes []string) (digest.Digest, error)
	// Commit makes an image of a parent and a layer tar.
	Commit(ctx context.Context, req image.CommitRequest, layer io.Reader) (digest.Digest, error)
	Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (registry.DistributionInspect, error)
	Login(ctx context.Context, auth registry.AuthConfig) (registry.AuthResponse, error)
	Usage(ctx context.Context) (layersSize int64, err error)
	Subscribe(fn func(image.Event))
}

// Networks is what the engine and its API need of package network.
type Networks interface {
	Create(ctx context.Context, req mnetwork.CreateRequest) (mnetwork.CreateResponse, error)
	Remove(ctx context.Context, nameOrID string) error
	List(ctx context.Context, filters map[string]map[string]bool) ([]mnetwork.Inspect, error)
	Inspect(ctx context.Context, nameOrID string) (mnetwork.Inspect, error)
	Prune(ctx context.Context, filters map[string]map[string]bool) (mnetwork.PruneReport, error)

	Attach(ctx context.Context, req network.AttachRequest) (network.Attachment, error)
	// Detach undoes one Attach (docker network disconnect); the namespace may be gone.
	Detach(ctx context.Context, containerID, networkNameOrID string) error
	// Release undoes all of a container's attachments; cheap, and batched off the exit path.
	Release(ctx context.Context, containerID string) error
	// Rename follows a container's new name in DNS.
	Rename(ctx context.Context, containerID, name string) error
	// SetHealthy tells whether DNS and balancing should offer the container.
	SetHealthy(containerID string, healthy bool)

	// PrepareLink makes a link of the default bridge's kind in a parked
	// sandbox's namespace; DropLink removes one that was never used.
	PrepareLink(ctx context.Context, netns *os.File) (*network.Link, error)
	DropLink(ctx context.Context, l *network.Link) error

	// Restore takes back what a former daemon had set up for live containers
	// and removes what belongs to none.
	Restore(ctx context.Context, live []network.Live) error
	// Doctor looks at the host's firewall and forwarding.
	Doctor(ctx context.Context) []network.Finding
	// AllowForward carries out the actions of Doctor's findings that the user
	// agreed to, and tells which it did.
	AllowForward(ctx context.Context, actions []string) (done []string, err error)
	// Run serves names, watches the ruleset and does deferred teardown.
	Run(ctx context.Context) error
	// Destroy removes every link, rule and address of this engine (shutdown).
	Destroy(ctx context.Context) error
}
