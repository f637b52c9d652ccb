package archive

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Marks of an OCI layer for what it removes.
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

// Apply unpacks a layer over what is in the root: a writable layer's changes over
// its image.
func (r Root) Apply(ctx context.Context, src io.Reader) error {
	o := ExtractOptions{Top: true, Sparse: true, Faithful: true}
	o.Entry = func(h *tar.Header, _ io.Reader) (bool, error) {
		dir, base := path.Split(path.Clean("/" + h.Name))
		switch {
		case base == opaque:
			return true, r.empty(dir)
		case strings.HasPrefix(base, whiteout+whiteout):
			return true, nil // another tool's own
		case strings.HasPrefix(base, whiteout):
			gone := strings.TrimPrefix(base, whiteout)
			if gone == "" || gone == "." || gone == ".." {
				return true, fault.New(fault.Invalid, "cannot apply the layer: %q removes nothing", h.Name)
			}
			return true, r.remove(dir, gone)
		}
		return false, nil
	}
	return r.Extract(ctx, "/", src, o)
}

// remove deletes what is called base in a directory; nothing may be there.
func (r Root) remove(dir, base string) error {
	d, err := r.open(dir, unix.O_PATH|unix.O_DIRECTORY, 0, true, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return notFound(dir, err)
	}
	defer unix.Close(d)
	var st unix.Stat_t
	if err := unix.Fstatat(d, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return removeAll(d, base, 0)
	}
	return unix.Unlinkat(d, base, 0)
}

// empty deletes everything in a directory.
func (r Root) empty(dir string) error {
	d, err := r.open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0, true, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return notFound(dir, err)
	}
	f, err := reopen(d, unix.O_RDONLY|unix.O_DIRECTORY)
	unix.Close(d)
	if err != nil {
		return err
	}
	defer f.Close()
	list, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range list {
		if e.IsDir() {
			err = removeAll(int(f.Fd()), e.Name(), 0)
		} else {
			err = unix.Unlinkat(int(f.Fd()), e.Name(), 0)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}
