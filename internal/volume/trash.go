package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func (s *Store) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// moveToTrash takes a volume's name away in one step.
func (s *Store) moveToTrash(name string) error {
	fd := int(s.dir.Fd())
	err := unix.Renameat2(fd, name, fd, trashDir+"/"+randomName(), unix.RENAME_NOREPLACE)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	s.notify()
	return nil
}

// discard gets rid of what has no name of a volume.
func (s *Store) discard(name string) error { return s.moveToTrash(name) }

// Run empties the trash until ctx is done.
func (s *Store) Run(ctx context.Context) error {
	retry := time.NewTicker(10 * time.Minute)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-retry.C:
		}
		if err := s.EmptyTrash(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot delete the data of a removed volume, will try again", "error", err)
		}
	}
}

// EmptyTrash deletes the data of removed volumes.
func (s *Store) EmptyTrash(ctx context.Context) error {
	trash, err := beneath(int(s.dir.Fd()), trashDir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fault.New(fault.Internal, "cannot empty the trash: %w", err)
	}
	defer trash.Close()
	var failed error
	tried := map[string]bool{}
	for {
		if _, err := trash.Seek(0, io.SeekStart); err != nil {
			return fault.New(fault.Internal, "cannot empty the trash: %w", err)
		}
		names, err := trash.Readdirnames(-1)
		if err != nil {
			return fault.New(fault.Internal, "cannot empty the trash: %w", err)
		}
		// Deep parts come back to the top, so look again until nothing is new.
		news := false
		for _, n := range names {
			if tried[n] {
				continue
			}
			tried[n], news = true, true
			r := remover{top: int(trash.Fd())}
			if err := r.remove(ctx, r.top, n, 0); err != nil {
				failed = errors.Join(failed, err)
			}
		}
		if !news || ctx.Err() != nil {
			return failed
		}
	}
}

// Close ends the store; it unmounts nothing.
func (s *Store) Close() error { return s.dir.Close() }

// maxDepth is how many directories a walk holds open. Containers can nest
// directories without end in a volume; descriptors are not.
const maxDepth = 128

// remover deletes trees. It follows no link and enters no mount: another file
// system mounted below stops it there.
type remover struct{ top int }

func (r remover) remove(ctx context.Context, dir int, name string, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return &os.PathError{Op: "unlinkat", Path: name, Err: err}
	}
	rmErr := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
	switch {
	case rmErr == nil, errors.Is(rmErr, unix.ENOENT):
		return nil
	case errors.Is(rmErr, unix.ENOTDIR):
		return &os.PathError{Op: "unlinkat", Path: name, Err: err}
	}
	if depth >= maxDepth {
		return unix.Renameat2(dir, name, r.top, randomName(), unix.RENAME_NOREPLACE)
	}
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return &os.PathError{Op: "openat2", Path: name, Err: err}
	}
	sub := os.NewFile(uintptr(fd), name)
	defer sub.Close()
	// Twice: reading while deleting can skip entries on some file systems.
	for range 2 {
		for {
			names, err := sub.Readdirnames(1024)
			for _, n := range names {
				if err := r.remove(ctx, fd, n, depth+1); err != nil {
					return err
				}
			}
			if err != nil || len(names) == 0 {
				break
			}
		}
		err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if _, err := sub.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	return &os.PathError{Op: "rmdir", Path: name, Err: err}
}

func randomName() string {
	var id [8]byte
	_, _ = rand.Read(id[:])
	return hex.EncodeToString(id[:])
}

// treeSize sums up the sizes of what is no directory below d, each inode once
// and on this file system only. What nests deeper than maxDepth is not counted.
func treeSize(ctx context.Context, d *os.File) (int64, error) {
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	var total int64
	var walk func(d *os.File, depth int) error
	walk = func(d *os.File, depth int) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		for {
			names, err := d.Readdirnames(1024)
			for _, n := range names {
				var st unix.Stat_t
				if unix.Fstatat(int(d.Fd()), n, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
					continue
				}
				if st.Mode&unix.S_IFMT == unix.S_IFDIR {
					if depth >= maxDepth {
						continue
					}
					fd, err := unix.Openat2(int(d.Fd()), n, &unix.OpenHow{
						Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
						Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
					})
					if err != nil {
						continue
					}
					sub := os.NewFile(uintptr(fd), n)
					err = walk(sub, depth+1)
					sub.Close()
					if err != nil {
						return err
					}
					continue
				}
				if st.Nlink > 1 {
					k := inode{uint64(st.Dev), st.Ino}
					if seen[k] {
						continue
					}
					seen[k] = true
				}
				total += st.Size
			}
			if err != nil || len(names) == 0 {
				return nil
			}
		}
	}
	return total, walk(d, 0)
}
