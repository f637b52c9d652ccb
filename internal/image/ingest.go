package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// dropTornIngests removes downloads that nothing can name any more: a process
// that was killed while it made or removed one leaves its directory without the
// reference, and the store passes over those for good; or without a byte, before
// the database knew of it.
func dropTornIngests(dir string) error {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot look for interrupted downloads: %w", err)
	}
	for _, e := range list {
		path := filepath.Join(dir, e.Name())
		ref, noRef := os.Stat(filepath.Join(path, "ref"))
		data, noData := os.Stat(filepath.Join(path, "data"))
		if noRef == nil && noData == nil && ref.Size() > 0 && data.Size() > 0 {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("cannot remove an interrupted download: %w", err)
		}
	}
	return nil
}
