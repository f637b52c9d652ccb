package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// differ compares one upper directory with the chain below. It goes by
// descriptors and never follows a link, so that a running container cannot lead
// it out of the layer.
type differ struct {
	prefix string // of overlayfs's attributes
	lowers []int  // root descriptors, topmost first
	out    []container.FilesystemChange
}

// Changes lists what differs from the chain. See snapshot.Store.
func (s *Store) Changes(ctx context.Context, id string) ([]container.FilesystemChange, error) {
	l, err := s.lookup(id)
	if err != nil {
		return nil, err
	}
	d := differ{prefix: s.cap.xattrPrefix()}
	defer func() {
		for _, fd := range d.lowers {
			unix.Close(fd)
		}
	}()
	for _, dir := range l.Chain.Dirs {
		fd, err := openDir(unix.AT_FDCWD, dir)
		if err != nil {
			return nil, fmt.Errorf("cannot read the image's layer %s: %w", dir, err)
		}
		d.lowers = append(d.lowers, fd)
	}
	upper, err := openDir(unix.AT_FDCWD, filepath.Join(l.dir, upperName))
	if err != nil {
		return nil, fmt.Errorf("cannot read layer %s: %w", id, err)
	}
	defer unix.Close(upper)
	if _, err := d.dir(ctx, upper, "/", d.lowers); err != nil {
		return nil, fmt.Errorf("cannot compare layer %s: %w", id, err)
	}
	slices.SortFunc(d.out, func(a, b container.FilesystemChange) int { return strings.Compare(a.Path, b.Path) })
	return d.out, nil
}

func openDir(at int, name string) (int, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

func names(fd int) ([]string, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(dup), "")
	defer f.Close()
	if _, err := f.Seek(0, 0); err != nil {
		return nil, err
	}
	ns, err := f.Readdirnames(-1)
	slices.Sort(ns)
	return ns, err
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

func isDir(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFDIR }

func opaque(fd int, prefix string) bool {
	var b [4]byte
	n, err := unix.Fgetxattr(fd, prefix+"opaque", b[:])
	return err == nil && n >= 1 && b[0] == 'y'
}

// dir compares one directory of upper with the merged directories below it and
// reports whether anything inside differs. The caller closes what it gave.
func (d *differ) dir(ctx context.Context, upper int, path string, lowers []int) (changed bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	ents, err := names(upper)
	if err != nil {
		return false, err
	}
	hidden := opaque(upper, d.prefix)
	for _, name := range ents {
		var st unix.Stat_t
		if err := unix.Fstatat(upper, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if errors.Is(err, unix.ENOENT) {
				continue // a running container removed it meanwhile
			}
			return false, err
		}
		below, low, err := d.below(lowers, name)
		if err != nil {
			return false, err
		}
		p := filepath.Join(path, name)
		switch {
		case isWhiteout(&st):
			if below {
				d.add(container.ChangeDelete, p)
				changed = true
			}
		case !isDir(&st):
			kind := container.ChangeAdd
			if below {
				kind = container.ChangeModify
			}
			d.add(kind, p)
			changed = true
		default:
			c, err := d.child(ctx, upper, name, p, lowers, &st, below, &low)
			if err != nil {
				return false, err
			}
			changed = changed || c
		}
	}
	if hidden {
		gone, err := d.vanished(lowers, ents)
		if err != nil {
			return false, err
		}
		for _, name := range gone {
			d.add(container.ChangeDelete, filepath.Join(path, name))
			changed = true
		}
	}
	return changed, nil
}

// child compares a directory entry of upper.
func (d *differ) child(ctx context.Context, upper int, name, p string, lowers []int, st *unix.Stat_t, below bool, low *unix.Stat_t) (bool, error) {
	fd, err := openDir(upper, name)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			return false, nil
		}
		return false, err
	}
	defer unix.Close(fd)
	var merged []int
	if below && isDir(low) {
		if merged, err = d.open(lowers, name); err != nil {
			return false, err
		}
		defer func() {
			for _, m := range merged {
				unix.Close(m)
			}
		}()
	}
	mark := len(d.out)
	inside, err := d.dir(ctx, fd, p, merged)
	if err != nil {
		return false, err
	}
	same := below && isDir(low) && low.Mode == st.Mode && low.Uid == st.Uid && low.Gid == st.Gid && low.Mtim == st.Mtim
	switch {
	case !below:
		d.out = slices.Insert(d.out, mark, container.FilesystemChange{Kind: container.ChangeAdd, Path: p})
	case inside || !same:
		d.out = slices.Insert(d.out, mark, container.FilesystemChange{Kind: container.ChangeModify, Path: p})
	default:
		return false, nil
	}
	return true, nil
}

func (d *differ) add(k container.ChangeType, p string) {
	d.out = append(d.out, container.FilesystemChange{Kind: k, Path: p})
}

// below finds name in the merged directories: the topmost that has it decides.
func (d *differ) below(lowers []int, name string) (bool, unix.Stat_t, error) {
	var st unix.Stat_t
	for _, fd := range lowers {
		err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return false, st, err
		}
		return !isWhiteout(&st), st, nil
	}
	return false, st, nil
}

// open opens the directories that merge under name, topmost first.
func (d *differ) open(lowers []int, name string) ([]int, error) {
	var out []int
	for _, at := range lowers {
		fd, err := openDir(at, name)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			break // a file, link or whiteout ends the merge
		}
		if err != nil {
			for _, o := range out {
				unix.Close(o)
			}
			return nil, err
		}
		out = append(out, fd)
		if opaque(fd, d.prefix) {
			break
		}
	}
	return out, nil
}

// vanished names what the merged directories show and an opaque upper one does
// not have.
func (d *differ) vanished(lowers []int, have []string) ([]string, error) {
	seen := map[string]bool{}
	for _, h := range have {
		seen[h] = true
	}
	var gone []string
	for _, fd := range lowers {
		ns, err := names(fd)
		if err != nil {
			return nil, err
		}
		for _, n := range ns {
			if seen[n] {
				continue
			}
			seen[n] = true
			var st unix.Stat_t
			if err := unix.Fstatat(fd, n, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && !isWhiteout(&st) {
				gone = append(gone, n)
			}
		}
	}
	slices.Sort(gone)
	return gone, nil
}

// Usage is the bytes the layer's files take. See snapshot.Store.
func (s *Store) Usage(ctx context.Context, id string) (int64, error) {
	l, err := s.lookup(id)
	if err != nil {
		return 0, err
	}
	fd, err := openDir(unix.AT_FDCWD, filepath.Join(l.dir, upperName))
	if err != nil {
		return 0, fmt.Errorf("cannot read layer %s: %w", id, err)
	}
	defer unix.Close(fd)
	n, err := usage(ctx, fd, map[uint64]struct{}{})
	if err != nil {
		return 0, fmt.Errorf("cannot measure layer %s: %w", id, err)
	}
	return n, nil
}

// usage sums regular files, hard links once, holes not at all.
func usage(ctx context.Context, dir int, seen map[uint64]struct{}) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	ents, err := names(dir)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, name := range ents {
		var st unix.Stat_t
		if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			continue // removed meanwhile
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			fd, err := openDir(dir, name)
			if err != nil {
				continue
			}
			n, err := usage(ctx, fd, seen)
			unix.Close(fd)
			if err != nil {
				return 0, err
			}
			sum += n
		case unix.S_IFREG:
			if st.Nlink > 1 {
				if _, dup := seen[st.Ino]; dup {
					continue
				}
				seen[st.Ino] = struct{}{}
			}
			sum += min(st.Size, st.Blocks*512)
		}
	}
	return sum, nil
}
