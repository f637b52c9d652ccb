package volume

import (
	"errors"
	"os"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/quota"
)

// limit gives a new data directory to the volume's project and bounds that.
func (s *Store) limit(data *os.File, r stored) error {
	return s.limitTo(data, r.Project, r.Options["size"])
}

func (s *Store) limitTo(data *os.File, project uint32, size string) error {
	n, err := units.RAMInBytes(size)
	if err != nil {
		return invalid("size %q: write it as 10G", size)
	}
	if err = quota.Limit(data, project, n); err == nil {
		err = quota.Assign(data, project)
	}
	if errors.Is(err, quota.ErrUnsupported) {
		return fault.New(fault.Unsupported, "its size cannot be limited: %w; for one in memory use --opt type=tmpfs --opt device=tmpfs --opt o=size=%s", err, size)
	}
	return err
}

// lift ends the bound of a project whose directory is gone.
func (s *Store) lift(project uint32) {
	if err := quota.Limit(s.dir, project, 0); err != nil {
		s.log.Warn("cannot lift the size limit of a removed volume", "project", project, "cause", err)
	}
	s.projects.Free(project)
}
