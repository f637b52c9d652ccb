// Package dockerapi is the HTTP edge of the engine: the Docker Engine API and
// our own routes under /servin/. A handler decodes, calls one method of its
// backend and encodes; versions, streams and error bodies are dealt with here
// and nowhere else.
package dockerapi

import (
	"context"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine"
)

// Filters are Docker's filters parameter: key to set of values.
type Filters = engine.Filters

// Containers is implemented by the engine. Names are names, ids or unique id prefixes.
type Containers interface {
	ContainerCreate(ctx context.Context, req CreateRequest) (container.CreateResponse, error)
	ContainerStart(ctx context.Context, name string, o StartOptions) error
	// ContainerRun is create, attach, wait and start in one, for POST /servin/run.
	ContainerRun(ctx context.Context, req CreateRequest, attach AttachRequest) (RunningContainer, error)
	ContainerStop(ctx context.Context, name, signal string, timeout *int) error
	ContainerRestart(ctx context.Context, name, signal string, timeout *int) error
	ContainerKill(ctx context.Context, name, signal string) error
	ContainerPause(ctx context.Context, name string) error
	ContainerUnpause(ctx context.Context, name string) error
	ContainerRename(ctx context.Context, name, newName string) error
	ContainerUpdate(ctx context.Context, name string, req container.UpdateConfig) (container.UpdateResponse, error)
	// ContainerWait returns a channel that yields once, when the condition holds.
	ContainerWait(ctx context.Context, name string, cond container.WaitCondition) (<-chan container.WaitResponse, error)
	ContainerRemove(ctx context.Context, name string, force, volumes, link bool) error
	ContainerList(ctx context.Context, o ListOptions) ([]container.Summary, error)
	ContainerInspect(ctx context.Context, name string, size bool) (container.InspectResponse, error)
	ContainerTop(ctx context.Context, name, psArgs string) (container.TopResponse, error)
	// ContainerStats calls emit for each reading; once if !stream.
	ContainerStats(ctx context.Context, name string, stream, oneShot bool, emit func(*container.StatsResponse) error) error
	ContainerChanges(ctx context.Context, name string) ([]container.FilesystemChange, error)
	ContainerExport(ctx context.Context, name string, w io.Writer) error
	ContainerCommit(ctx context.Context, o CommitOptions) (string, error)
	ContainerPrune(ctx context.Context, f Filters) (container.PruneReport, error)
	ContainerResize(ctx context.Context, name string, width, height uint16) error
	ContainerAttach(ctx context.Context, name string, req AttachRequest) (Attached, error)
	// ContainerLogs calls emit for each record in order; it returns when the log
	// (or with Follow, the container) ends.
	ContainerLogs(ctx context.Context, name string, o LogOptions, emit func(LogRecord) error) error
	// IsTerminal tells how attach and logs streams of the container are framed.
	IsTerminal(ctx context.Context, name string) (bool, error)
	ContainerStatPath(ctx context.Context, name, path string) (container.PathStat, error)
	ContainerGetArchive(ctx context.Context, name, path string, w func(container.PathStat) (io.Writer, error)) error
	ContainerPutArchive(ctx context.Context, name, path string, noOverwriteDirNonDir, copyUIDGID bool, r io.Reader) error

	// ContainerExec is the creation of an exec and its start, for
	// POST /servin/containers/{id}/exec. A refusal of the start comes with the id.
	ContainerExec(ctx context.Context, name string, req container.ExecCreateRequest) (RunningContainer, error)
	ExecCreate(ctx context.Context, name string, req container.ExecCreateRequest) (id string, err error)
	// ExecStart runs it; Attached is zero when detach is set.
	ExecStart(ctx context.Context, id string, req container.ExecStartRequest) (Attached, error)
	ExecInspect(ctx context.Context, id string) (container.ExecInspectResponse, error)
	ExecResize(ctx context.Context, id string, width, height uint16) error
}

// The engine's request and result types; see package engine.
type (
	CreateRequest    = engine.CreateRequest
	StartOptions     = engine.StartOptions
	ListOptions      = engine.ListOptions
	CommitOptions    = engine.CommitOptions
	AttachRequest    = engine.AttachRequest
	Attached         = engine.Attached
	RunningContainer = engine.RunningContainer
	LogOptions       = engine.LogOptions
	LogRecord        = engine.LogRecord
)

// Volumes is implemented by the engine.
type Volumes interface {
	VolumeCreate(ctx context.Context, req volume.CreateRequest) (*volume.Volume, error)
	VolumeList(ctx context.Context, f Filters) (volume.ListResponse, error)
	VolumeInspect(ctx context.Context, name string) (*volume.Volume, error)
	VolumeRemove(ctx context.Context, name string, force bool) error
	VolumePrune(ctx context.Context, f Filters) (volume.PruneReport, error)
}

// Networks is implemented by the engine.
type Networks interface {
	NetworkCreate(ctx context.Context, req network.CreateRequest) (network.CreateResponse, error)
	NetworkList(ctx context.Context, f Filters) ([]network.Summary, error)
	NetworkInspect(ctx context.Context, name string) (network.Inspect, error)
	NetworkRemove(ctx context.Context, name string) error
	NetworkConnect(ctx context.Context, name string, req network.ConnectRequest) error
	NetworkDisconnect(ctx context.Context, name string, req network.DisconnectRequest) error
	NetworkPrune(ctx context.Context, f Filters) (network.PruneReport, error)
}

// System is implemented by the engine.
type System interface {
	Info(ctx context.Context) (*system.Info, error)
	Version(ctx context.Context) (system.VersionResponse, error)
	DiskUsage(ctx context.Context, types []string, verbose bool) (system.DiskUsage, error)
	// Events replays from since (if set) and follows until until or ctx ends.
	Events(ctx context.Context, since, until time.Time, f Filters, emit func(events.Message) error) error
	Doctor(ctx context.Context) ([]api.Finding, error)
	Fix(ctx context.Context, req api.FixRequest) (api.FixReport, error)
	// Prune removes what nothing uses.
	Prune(ctx context.Context, o api.PruneRequest) (api.PruneReport, error)
	// Shutdown stops the daemon; with containers it ends them too and removes
	// every trace but the files under the root.
	Shutdown(ctx context.Context, containers bool) error
	// RemovalInUse tells which containers use an image id (for image removal).
	ImageInUse(id string) map[string]bool
	// MayActAsHost refuses callers whom a policy denies what makes them root of the host.
	MayActAsHost(ctx context.Context) error
	// PoolDrained waits for the teardown backlog (bench and tests).
	PoolDrained(ctx context.Context, full bool) error
	Metrics(ctx context.Context, w io.Writer) error
}
