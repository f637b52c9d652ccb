package criapi

import (
	"context"
	"io"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	mimage "github.com/moby/moby/api/types/image"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/image"
)

// Engine is what the CRI needs of the engine. Ids may be unique prefixes. Errors
// carry fault kinds. Records must not be changed.
type Engine interface {
	PodContainerCheckpoint(ctx context.Context, id, location string) error
	PodRun(ctx context.Context, p *container.Pod) (string, error)
	PodStop(ctx context.Context, id string) error
	PodRemove(ctx context.Context, id string) error
	Pod(id string) (*container.Pod, error)
	Pods() []*container.Pod
	PodUpdate(ctx context.Context, id string, edge []byte) error

	PodContainerCreate(ctx context.Context, podID string, c engine.PodContainer) (string, error)
	ContainerStart(ctx context.Context, id string, o engine.StartOptions) error
	PodContainerStop(ctx context.Context, id string, timeout int64) error
	PodContainerRemove(ctx context.Context, id string) error
	PodContainer(id string) (*container.Record, error)
	PodContainers(podID string) []*container.Record
	PodContainerUpdate(ctx context.Context, id string, r mcontainer.Resources, hugepages map[string]uint64, unified map[string]string, edge []byte) error
	PodContainerReopenLog(ctx context.Context, id string) error
	PodContainerExec(ctx context.Context, id string, x engine.PodExec) (int, error)
	ContainerAttach(ctx context.Context, id string, r engine.AttachRequest) (engine.Attached, error)
	ContainerResize(ctx context.Context, id string, width, height uint16) error
	PodForward(ctx context.Context, id string, port uint16, stream io.ReadWriteCloser) error

	PodCounters(ctx context.Context, o engine.CounterOptions) []engine.PodCounters
	PodNetworkStatus(ctx context.Context) (map[string]string, error)
	PodNetworkConfigure(ctx context.Context, cidr string) error
	PodEvents(ctx context.Context, emit func(events.Message) error) error
	PodHost() engine.PodHost
	ImageFilesystem(ctx context.Context) (engine.FilesystemUse, error)

	// PodImagePulled notes that an image belongs to Kubernetes, PodImageRemoved that
	// it does not any more; PodImage tells whether one does.
	PodImagePulled(ctx context.Context, ref, id string) error
	PodImageRemoved(ctx context.Context, refOrID string) error
	PodImage(id string) bool
	ImageUsers(id string) map[string]bool
}

// Images is what it needs of the images.
type Images interface {
	Pull(ctx context.Context, o image.PullOptions) error
	List(ctx context.Context, filters map[string]map[string]bool, all, shared, manifests bool) ([]mimage.Summary, error)
	Inspect(ctx context.Context, ref, platform string, manifests bool) (mimage.InspectResponse, error)
	Remove(ctx context.Context, ref string, o image.RemoveOptions) ([]mimage.DeleteResponse, error)
}

// clock is when a reading was taken, for rates.
type reading struct {
	at  time.Time
	cpu uint64
	// rate is nanoseconds of processor time a second.
	rate  uint64
	rated bool
}
