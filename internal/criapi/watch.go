package criapi

import (
	"context"
	"slices"

	"github.com/moby/moby/api/types/events"
	"google.golang.org/grpc"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/engine"
)

// eventType is what the CRI calls what happened, if it has a word for it.
func eventType(a events.Action) (v1.ContainerEventType, bool) {
	switch a {
	case events.ActionCreate:
		return v1.ContainerEventType_CONTAINER_CREATED_EVENT, true
	case events.ActionStart:
		return v1.ContainerEventType_CONTAINER_STARTED_EVENT, true
	case events.ActionDie:
		return v1.ContainerEventType_CONTAINER_STOPPED_EVENT, true
	case events.ActionDestroy:
		return v1.ContainerEventType_CONTAINER_DELETED_EVENT, true
	}
	return 0, false
}

// GetContainerEvents implements the CRI.
func (s *Server) GetContainerEvents(_ *v1.GetEventsRequest, out grpc.ServerStreamingServer[v1.ContainerEventResponse]) error {
	return s.cfg.Engine.PodEvents(out.Context(), func(m events.Message) error {
		t, ok := eventType(m.Action)
		if m.Type == engine.PodEventType && m.Action == events.ActionStop {
			t, ok = v1.ContainerEventType_CONTAINER_STOPPED_EVENT, true
		}
		if !ok {
			return nil
		}
		e := &v1.ContainerEventResponse{ContainerId: m.Actor.ID, ContainerEventType: t, CreatedAt: m.TimeNano}
		podID := m.Actor.Attributes[engine.AttrPod]
		if p, err := s.cfg.Engine.Pod(podID); err == nil {
			e.PodSandboxStatus = s.podStatus(p)
			for _, r := range s.cfg.Engine.PodContainers(p.ID) {
				e.ContainersStatuses = append(e.ContainersStatuses, s.containerStatus(r))
			}
		}
		return out.Send(e)
	})
}

// chunk is how many items a message of a streamed list holds.
const chunk = 100

// inChunks sends a list in messages that stay small.
func inChunks[T any](ctx context.Context, all []T, send func([]T) error) error {
	for part := range slices.Chunk(all, chunk) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := send(part); err != nil {
			return err
		}
	}
	return nil
}

// StreamPodSandboxes implements the CRI.
func (s *Server) StreamPodSandboxes(req *v1.StreamPodSandboxesRequest, out grpc.ServerStreamingServer[v1.StreamPodSandboxesResponse]) error {
	return inChunks(out.Context(), s.listPods(req.GetFilter()), func(l []*v1.PodSandbox) error {
		return out.Send(&v1.StreamPodSandboxesResponse{PodSandboxes: l})
	})
}

// StreamContainers implements the CRI.
func (s *Server) StreamContainers(req *v1.StreamContainersRequest, out grpc.ServerStreamingServer[v1.StreamContainersResponse]) error {
	return inChunks(out.Context(), s.listContainers(req.GetFilter()), func(l []*v1.Container) error {
		return out.Send(&v1.StreamContainersResponse{Containers: l})
	})
}

// StreamContainerStats implements the CRI.
func (s *Server) StreamContainerStats(req *v1.StreamContainerStatsRequest, out grpc.ServerStreamingServer[v1.StreamContainerStatsResponse]) error {
	return inChunks(out.Context(), s.listStats(out.Context(), req.GetFilter()), func(l []*v1.ContainerStats) error {
		return out.Send(&v1.StreamContainerStatsResponse{ContainerStats: l})
	})
}

// StreamPodSandboxStats implements the CRI.
func (s *Server) StreamPodSandboxStats(req *v1.StreamPodSandboxStatsRequest, out grpc.ServerStreamingServer[v1.StreamPodSandboxStatsResponse]) error {
	return inChunks(out.Context(), s.listPodStats(out.Context(), req.GetFilter()), func(l []*v1.PodSandboxStats) error {
		return out.Send(&v1.StreamPodSandboxStatsResponse{PodSandboxStats: l})
	})
}

// StreamPodSandboxMetrics implements the CRI.
func (s *Server) StreamPodSandboxMetrics(_ *v1.StreamPodSandboxMetricsRequest, out grpc.ServerStreamingServer[v1.StreamPodSandboxMetricsResponse]) error {
	return inChunks(out.Context(), s.metrics(out.Context()), func(l []*v1.PodSandboxMetrics) error {
		return out.Send(&v1.StreamPodSandboxMetricsResponse{PodSandboxMetrics: l})
	})
}

// StreamImages implements the CRI.
func (s *Server) StreamImages(req *v1.StreamImagesRequest, out grpc.ServerStreamingServer[v1.StreamImagesResponse]) error {
	all, err := s.listImages(out.Context(), req.GetFilter())
	if err != nil {
		return err
	}
	return inChunks(out.Context(), all, func(l []*v1.Image) error { return out.Send(&v1.StreamImagesResponse{Images: l}) })
}
