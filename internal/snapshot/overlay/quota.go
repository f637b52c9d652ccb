package overlay

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/quota"
)

// setQuota limits upper and work of the layer in dir to limit bytes together and
// gives the project that they count for.
func (s *Store) setQuota(dir string, limit int64) (uint32, error) {
	id, err := s.projects.Allot()
	if err != nil {
		return 0, fault.New(fault.Unavailable, "cannot limit the size of a container's layer: %w", err)
	}
	if err = limitLayer(dir, id, limit); err == nil {
		return id, nil
	}
	s.projects.Free(id)
	if errors.Is(err, quota.ErrUnsupported) {
		return 0, fault.New(fault.Unsupported, "cannot limit the size of a container's layer: %w", err)
	}
	return 0, err
}

func limitLayer(dir string, id uint32, limit int64) error {
	for _, name := range []string{upperName, workName} {
		if err := withDir(filepath.Join(dir, name), func(f *os.File) error { return quota.Assign(f, id) }); err != nil {
			return err
		}
	}
	return withDir(dir, func(f *os.File) error { return quota.Limit(f, id, limit) })
}

func (s *Store) dropQuota(dir string, id uint32) {
	_ = withDir(dir, func(f *os.File) error { return quota.Limit(f, id, 0) })
	s.projects.Free(id)
}

func withDir(dir string, do func(*os.File) error) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return do(f)
}
