package volume

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strconv"

	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// protected are directories of the host whose owners and labels are the host's
// own affair: changing them for a container would break the host.
var protected = []string{
	"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/media", "/mnt", "/opt", "/proc",
	"/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/local", "/usr/sbin", "/usr/share",
	"/var", "/var/cache", "/var/lib", "/var/log", "/var/run", "/var/spool", "/var/tmp",
}

// ownDepth bounds the descriptors that walking a tree takes.
const ownDepth = 256

// isProtected tells whether a directory is a protected one under another name: CloudOS's /etc is
// a link into its root.
func isProtected(f *os.File) bool {
	is, err := f.Stat()
	return err != nil || slices.ContainsFunc(protected, func(path string) bool {
		there, err := os.Stat(path)
		return err == nil && os.SameFile(is, there)
	})
}

// OpenSource opens what is to be given to a container, for Chown and Relabel. The
// mount must be made of the same descriptor, so that what was changed is what is
// mounted.
func OpenSource(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if at, err := os.Readlink(self(fd)); err != nil || slices.Contains(protected, at) || isProtected(f) {
		f.Close()
		return nil, fault.New(fault.Invalid, "cannot change owners or labels of %s for a container: it is a directory of the host's system", path)
	}
	return f, nil
}

// Chown gives a tree to uid and gid. Links in it are given away, never followed,
// and other file systems mounted in it are left alone. What belongs to them
// already is not touched.
func Chown(ctx context.Context, root *os.File, uid, gid uint32) error {
	err := walk(ctx, int(root.Fd()), func(fd int, st *unix.Stat_t) error {
		if st.Uid == uid && st.Gid == gid {
			return nil
		}
		return unix.Fchownat(fd, "", int(uid), int(gid), unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	})
	return walkError(err, "give "+root.Name()+" to user "+strconv.FormatUint(uint64(uid), 10))
}

// Relabel sets the SELinux label of a tree, the root's last. With shared the label
// has no categories, so that every container may use it, and a root that has the
// label already means that the tree does.
func Relabel(ctx context.Context, root *os.File, label string, shared bool) error {
	if label == "" {
		return nil
	}
	if shared {
		c, err := selinux.NewContext(label)
		if err != nil {
			return fault.New(fault.Internal, "cannot read SELinux label %q: %w", label, err)
		}
		c["level"] = "s0"
		label = c.Get()
		if have, err := selinux.FileLabel(self(int(root.Fd()))); err == nil && have == label {
			return nil
		}
	}
	err := walk(ctx, int(root.Fd()), func(fd int, _ *unix.Stat_t) error {
		err := unix.Setxattr(self(fd), "security.selinux", append([]byte(label), 0), 0)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a file system that has one label for all it holds
		}
		return err
	})
	return walkError(err, "relabel "+root.Name()+" as "+label)
}

func walkError(err error, what string) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ELOOP):
		return fault.New(fault.Invalid, "cannot %s: %w", what, err)
	}
	return fault.New(fault.Internal, "cannot %s: %w", what, err)
}

func self(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// walk calls fn for everything beneath fd and then for fd itself. It goes from
// descriptor to descriptor: who renames or links things meanwhile cannot lead it
// out of the tree. What vanishes meanwhile is passed over.
func walk(ctx context.Context, fd int, fn func(fd int, st *unix.Stat_t) error) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	return descend(ctx, fd, &st, 0, fn)
}

func descend(ctx context.Context, fd int, st *unix.Stat_t, depth int, fn func(int, *unix.Stat_t) error) error {
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if depth > ownDepth {
			return unix.ELOOP
		}
		if err := children(ctx, fd, depth, fn); err != nil {
			return err
		}
	}
	return fn(fd, st)
}

func children(ctx context.Context, fd, depth int, fn func(int, *unix.Stat_t) error) error {
	dfd, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(dfd), "directory")
	defer dir.Close()
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		names, err := dir.Readdirnames(256)
		for _, name := range names {
			if err := child(ctx, dfd, name, &how, depth, fn); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func child(ctx context.Context, dfd int, name string, how *unix.OpenHow, depth int, fn func(int, *unix.Stat_t) error) error {
	fd, err := unix.Openat2(dfd, name, how)
	for i := 0; i < 64 && (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)); i++ {
		fd, err = unix.Openat2(dfd, name, how)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EXDEV) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	return descend(ctx, fd, &st, depth+1, fn)
}
