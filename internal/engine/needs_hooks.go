package engine

import (
	"context"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/container"
)

// PodHooks are told of pods and their containers, and may change containers
// before they start: NRI plugins (package nri). What they do not know (they have
// come later, or the engine has) they find out by themselves.
type PodHooks interface {
	// PodRun may refuse a pod whose namespaces and network stand. PodStop and
	// PodRemove only tell.
	PodRun(ctx context.Context, p *container.Pod) error
	PodStop(ctx context.Context, p *container.Pod)
	PodRemove(ctx context.Context, p *container.Pod)
	// ContainerCreate may change the spec of a container that is about to start,
	// refuse it, and ask for other limits of others.
	ContainerCreate(ctx context.Context, p *container.Pod, r *container.Record, spec *specs.Spec) ([]LimitChange, error)
	ContainerStarted(ctx context.Context, p *container.Pod, r *container.Record)
	// ContainerUpdate may change the limits that a container is to get.
	ContainerUpdate(ctx context.Context, p *container.Pod, r *container.Record, res *specs.LinuxResources) ([]LimitChange, error)
	ContainerStopped(ctx context.Context, p *container.Pod, r *container.Record) []LimitChange
	ContainerRemoved(ctx context.Context, p *container.Pod, r *container.Record)
}

// LimitChange is a change of the limits of a container that runs.
type LimitChange struct {
	ID        string
	Resources *specs.LinuxResources
	// Optional: it does not matter if it fails.
	Optional bool
}
