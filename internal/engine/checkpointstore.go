package engine

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/checkpoint"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Directories of checkpoints: Root/checkpoints/CONTAINER/NAME. One that is being
// made is called ".new-NAME", one that consists of pre-dumps so far ".pre-NAME".
const (
	newPrefix = ".new-"
	prePrefix = ".pre-"
	runFile   = "run" // which run of the container a pre-dump is of
)

func (e *Engine) checkpointRoot() string { return filepath.Join(e.cfg.Root, "checkpoints") }

func (e *Engine) checkpointDir(id string) string { return filepath.Join(e.checkpointRoot(), id) }

// checkpointPlace is where a container's checkpoints lie: its own directory, or the
// one that a client of Docker's named.
func (e *Engine) checkpointPlace(id, dir string) (string, error) {
	if dir == "" {
		return e.checkpointDir(id), nil
	}
	if !filepath.IsAbs(dir) {
		return "", fault.New(fault.Invalid, "checkpoint directory %.128q is not absolute", dir)
	}
	return filepath.Clean(dir), nil
}

// sweepCheckpoints removes halves of checkpoints. Pre-dumps of a run that has ended
// go when they are used.
func (e *Engine) sweepCheckpoints(id string) {
	dir := e.checkpointDir(id)
	list, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, d := range list {
		if strings.HasPrefix(d.Name(), newPrefix) {
			_ = os.RemoveAll(filepath.Join(dir, d.Name()))
		}
	}
	_ = os.Remove(dir) // if it is empty
}

// openCheckpoint opens a whole checkpoint and reads its manifest.
func (e *Engine) openCheckpoint(id, name, dir string) (*os.File, *checkpoint.Manifest, error) {
	if err := checkpoint.CheckName(name); err != nil {
		return nil, nil, err
	}
	place, err := e.checkpointPlace(id, dir)
	if err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(filepath.Join(place, name), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil, fault.New(fault.NotFound, "checkpoint %s does not exist for container %s", name, short(id))
	}
	if err != nil {
		return nil, nil, fault.New(fault.Internal, "cannot open the checkpoint: %w", err)
	}
	m, err := checkpoint.Load(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, m, nil
}

// CheckpointList lists a container's checkpoints, by name.
func (e *Engine) CheckpointList(name, dir string) ([]api.Checkpoint, error) {
	u, err := e.lookup(name)
	if err != nil {
		return nil, err
	}
	place, err := e.checkpointPlace(u.id, dir)
	if err != nil {
		return nil, err
	}
	out := []api.Checkpoint{}
	list, err := os.ReadDir(place)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot list the checkpoints: %w", err)
	}
	for _, d := range list {
		if n, ok := strings.CutPrefix(d.Name(), prePrefix); ok && dir == "" {
			out = append(out, api.Checkpoint{Name: n, Size: sizeOf(filepath.Join(place, d.Name()))})
			continue
		}
		if checkpoint.CheckName(d.Name()) != nil || !d.IsDir() {
			continue
		}
		f, m, err := e.openCheckpoint(u.id, d.Name(), dir)
		if err != nil {
			continue // something else, or not whole
		}
		f.Close()
		c := api.Checkpoint{Name: d.Name(), Created: m.Created, Rounds: m.Rounds, Size: sizeOf(filepath.Join(place, d.Name()))}
		for _, v := range m.Volumes {
			c.Volumes = append(c.Volumes, v.Name)
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b api.Checkpoint) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// sizeOf is what a directory takes on the disk.
func sizeOf(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if i, err := d.Info(); err == nil {
			n += i.Size()
		}
		return nil
	})
	return n
}

// CheckpointRemove removes one, or the pre-dumps of that name.
func (e *Engine) CheckpointRemove(ctx context.Context, name, id, dir string) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	if err := checkpoint.CheckName(id); err != nil {
		return err
	}
	place, err := e.checkpointPlace(u.id, dir)
	if err != nil {
		return err
	}
	if dir != "" {
		if err := e.mayUsePlace(ctx, u.rec.Load(), place); err != nil {
			return err
		}
	}
	if err := u.acquire(ctx); err != nil { // it may be being made, or used
		return err
	}
	defer u.release()
	found := false
	for _, n := range []string{id, prePrefix + id} {
		at := filepath.Join(place, n)
		if n == id {
			f, _, err := e.openCheckpoint(u.id, id, dir)
			if err != nil {
				if fault.Is(err, fault.NotFound) || dir != "" {
					continue // not ours to remove
				}
			} else {
				f.Close()
			}
		}
		if _, err := os.Lstat(at); err != nil || dir != "" && n != id {
			continue
		}
		found = true
		// Out of sight at once.
		out := filepath.Join(place, newPrefix+id+"."+newID()[:12])
		if err := os.Rename(at, out); err != nil {
			return fault.New(fault.Internal, "cannot remove the checkpoint: %w", err)
		}
		if err := os.RemoveAll(out); err != nil {
			return fault.New(fault.Internal, "cannot remove the checkpoint: %w", err)
		}
	}
	if !found {
		return fault.New(fault.NotFound, "checkpoint %s does not exist for container %s", id, short(u.id))
	}
	return nil
}

// room is how much may be written below the root: not all that there is.
func (e *Engine) room() int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(e.cfg.Root, &st); err != nil {
		return 0
	}
	free := int64(st.Bavail) * st.Bsize
	return max(free-free/20, 1)
}
