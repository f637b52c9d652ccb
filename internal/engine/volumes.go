package engine

import (
	"context"
	"maps"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/internal/container"
	vol "github.com/cloudos-io/cloudos/internal/volume"
)

// VolumeService is the use cases about volumes.
type VolumeService struct{ e *Engine }

// VolumeService returns the use cases about volumes.
func (e *Engine) VolumeService() *VolumeService { return &VolumeService{e} }

func (s *VolumeService) event(a events.Action, name string, attrs map[string]string) {
	m := maps.Clone(attrs)
	if m == nil {
		m = map[string]string{}
	}
	if m["driver"] == "" {
		m["driver"] = vol.Driver
	}
	s.e.emit(events.VolumeEventType, a, name, m)
}

// VolumeCreate makes a volume, or returns the one of that name.
func (s *VolumeService) VolumeCreate(ctx context.Context, req volume.CreateRequest) (*volume.Volume, error) {
	if s.e.policed() {
		if err := s.e.mayMakeVolume(ctx, req); err != nil {
			return nil, err
		}
	}
	_, err := s.e.cfg.Volumes.Inspect(ctx, req.Name)
	existed := req.Name != "" && err == nil
	v, err := s.e.cfg.Volumes.Create(ctx, req, vol.CreateOptions{})
	if err != nil {
		return nil, err
	}
	if err := s.e.cfg.Volumes.Sync(); err != nil {
		return nil, err
	}
	if !existed {
		s.event(events.ActionCreate, v.Name, map[string]string{"driver": v.Driver})
	}
	return v, nil
}

// VolumeList lists the volumes that match.
func (s *VolumeService) VolumeList(ctx context.Context, f Filters) (volume.ListResponse, error) {
	l, warnings, err := s.e.cfg.Volumes.List(ctx, f)
	if warnings == nil {
		warnings = []string{}
	}
	return volume.ListResponse{Volumes: l, Warnings: warnings}, err
}

// VolumeInspect describes a volume.
func (s *VolumeService) VolumeInspect(ctx context.Context, name string) (*volume.Volume, error) {
	return s.e.cfg.Volumes.Inspect(ctx, name)
}

// VolumeRemove removes a volume once what is left of containers that used it is
// cleared.
func (s *VolumeService) VolumeRemove(ctx context.Context, name string, force bool) error {
	if err := s.e.waitTearing(ctx, func(r *container.Record) bool { return hasVolume(r, name) }); err != nil {
		return err
	}
	if err := s.e.cfg.Volumes.Remove(ctx, name, force); err != nil {
		return err
	}
	s.event(events.ActionDestroy, name, nil)
	return nil
}

// VolumePrune removes volumes that no container refers to.
func (s *VolumeService) VolumePrune(ctx context.Context, f Filters) (volume.PruneReport, error) {
	if err := s.e.waitTearing(ctx, func(r *container.Record) bool { return len(r.Mounts) > 0 }); err != nil {
		return volume.PruneReport{}, err
	}
	rep, err := s.e.cfg.Volumes.Prune(ctx, f)
	if err == nil {
		s.e.publishPrune(events.VolumeEventType, rep.SpaceReclaimed)
	}
	return rep, err
}

// size measures a volume, at most for a while.
func (s *VolumeService) size(ctx context.Context, name string) int64 {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	n, err := s.e.cfg.Volumes.Usage(ctx, name)
	if err != nil {
		return -1
	}
	return n
}
