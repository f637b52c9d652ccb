package overlay

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// discard moves dir out of sight; Run deletes it. The rename needs no sync: a
// layer that comes back after a power cut is listed and removed again by the
// engine.
func (s *Store) discard(dir string) error {
	to := filepath.Join(s.trash, fmt.Sprintf("%d-%d-%s", time.Now().UnixNano(), s.serial.Add(1), filepath.Base(dir)))
	if err := os.Rename(dir, to); err != nil {
		return err
	}
	if s.discarded.Add(1) > maxDiscarded {
		// Run, at its low priority, does not keep up: whoever makes the work does it.
		s.discarded.Add(-1)
		return removeTree(to)
	}
	s.kick()
	return nil
}

// maxDiscarded bounds the layers that wait for their deletion, so that a machine
// busy for hours does not run out of inodes.
const maxDiscarded = 1024

// kick tells Run that there is something to do.
func (s *Store) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run deletes discarded layers, also those of earlier runs, and makes new ones
// in advance, until ctx ends. It works on one thread of lowest CPU and disk priority.
func (s *Store) Run(ctx context.Context) error {
	// The thread is not unlocked, so that it ends with its lowered priority.
	runtime.LockOSThread()
	const idleClass = 3 << 13
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 19)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, 1, 0, idleClass)
	for {
		s.refill()
		if err := fault.Outwait(ctx, func() error { return s.emptyTrash(ctx) }); err != nil {
			s.log.Warn("cannot delete discarded layers", "cause", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		}
		// Let a burst of removals gather, off the path of what follows them.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Drain deletes everything discarded so far.
func (s *Store) Drain(ctx context.Context) error { return s.emptyTrash(ctx) }

func (s *Store) emptyTrash(ctx context.Context) error {
	d, err := os.Open(s.trash)
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return err
	}
	s.discarded.Store(int64(len(names)))
	var failed error
	for _, n := range names {
		if ctx.Err() != nil {
			return nil
		}
		s.refill()
		if err := removeTree(filepath.Join(s.trash, n)); err != nil && failed == nil {
			failed = err
		}
		s.discarded.Add(-1)
	}
	return failed
}

// Flags of FS_IOC_GETFLAGS.
const (
	immutable  = 0x10
	appendOnly = 0x20
)

// removeTree is os.RemoveAll, which walks by descriptors and follows no link,
// with one more try after dropping immutable flags that a privileged container
// may have set.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || (!d.IsDir() && !d.Type().IsRegular()) {
			return nil
		}
		fd, err := unix.Open(p, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil
		}
		defer unix.Close(fd)
		if v, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS); err == nil && v&(immutable|appendOnly) != 0 {
			_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(v&^(immutable|appendOnly)))
		}
		return nil
	})
	return os.RemoveAll(dir)
}
