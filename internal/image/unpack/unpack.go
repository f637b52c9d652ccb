// Package unpack turns the stream of an image layer into a directory that
// overlayfs can stack: whiteouts become overlayfs's own, opaque directories are
// reported to the caller, nothing outside the directory is ever touched. It
// comes in two halves: Apply does the work, Run has it done by a child process
// that is chrooted into the directory with a handful of capabilities (Main is
// that child's entry). Package image imports it.
package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Limits bound what one layer may do to the host.
type Limits struct {
	Bytes   int64 // logical size of all its files, and of the stream
	Entries int64
}

// Result tells what Apply made and what its caller has yet to do.
type Result struct {
	DiffID digest.Digest // of the uncompressed stream
	Size   int64         // bytes of regular files
	// Implied are directories that the layer used without describing them; they
	// take their attributes from the layers below.
	Implied []string
	// Opaque are directories that hide what the layers below have there.
	// Marking them needs a capability that the child has not.
	Opaque []string
	// NeedsLower says that a hard link points to a file of a layer below: nothing
	// useful was made, and Apply must run again with the lower directories.
	NeedsLower bool
}

const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	maxNoted       = 100_000
	maxDirsPending = 2_000_000
)

// applier is one application of a layer.
type applier struct {
	root   int // descriptor of the target
	lowers []int
	limits Limits
	res    Result
	userns bool // device nodes cannot be made

	// The directory that the last entries went to.
	parent     int
	parentPath string

	dirTimes []dirTime
	implied  map[string]struct{}
	opaque   map[string]struct{}
	buf      []byte
}

type dirTime struct {
	path string
	ts   [2]unix.Timespec
}

// Apply extracts the uncompressed or compressed layer r into the directory that
// root is a descriptor of. Lowers are the directories below, topmost first; they
// may be left out at first (see Result.NeedsLower).
func Apply(ctx context.Context, root int, lowers []int, r io.Reader, limits Limits, userns bool) (Result, error) {
	s, err := newStream(r, limits.Bytes)
	if err != nil {
		return Result{}, err
	}
	defer s.Close()
	a := &applier{root: root, lowers: lowers, limits: limits, userns: userns, parent: -1, buf: make([]byte, 256<<10),
		implied: map[string]struct{}{}, opaque: map[string]struct{}{}}
	defer a.closeParent()
	tr := tar.NewReader(s)
	for n := int64(0); ; n++ {
		if err := ctx.Err(); err != nil {
			return Result{}, err
		}
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return Result{}, streamFault(s, err)
		}
		if n >= limits.Entries {
			return Result{}, fault.New(fault.Invalid, "the layer has more than %d entries", limits.Entries)
		}
		if err := a.entry(h, tr); err != nil {
			if s.err() != nil {
				return Result{}, streamFault(s, err)
			}
			return Result{}, fmt.Errorf("cannot extract %q: %w", h.Name, err)
		}
		if a.res.NeedsLower {
			return a.res, nil
		}
	}
	// Bytes after the archive's end belong to the digest.
	if _, err := io.Copy(io.Discard, s); err != nil {
		return Result{}, streamFault(s, err)
	}
	a.closeParent()
	if err := a.finish(); err != nil {
		return Result{}, err
	}
	a.res.DiffID = s.digest()
	return a.res, nil
}

func streamFault(s *stream, err error) error {
	if e := s.err(); e != nil {
		err = e
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return err
	}
	if fault.Of(err) != fault.Internal {
		return err
	}
	return fault.New(fault.Invalid, "cannot read the layer: %w", err)
}

// entry extracts one entry.
func (a *applier) entry(h *tar.Header, r io.Reader) error {
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeGNUSparse:
		h.Typeflag = tar.TypeReg
	case tar.TypeReg, tar.TypeDir, tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return fault.New(fault.Invalid, "entry type %q is not one of a layer", h.Typeflag)
	}
	if h.Size < 0 || a.res.Size+h.Size < a.res.Size || a.res.Size+h.Size > a.limits.Bytes {
		return fault.New(fault.Invalid, "the layer is larger than %d bytes", a.limits.Bytes)
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return fault.New(fault.Invalid, "the root must be a directory")
		}
		return a.meta(a.root, ".", ".", h, true)
	}
	dir, base := path.Dir(name), path.Base(name)
	if err := a.enter(dir); err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteout) {
		return a.whiteout(dir, base)
	}
	return a.make(name, base, h, r)
}

// cleanName makes an entry's name relative and refuses what climbs out.
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", fault.New(fault.Invalid, "the name holds a zero byte")
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", fault.New(fault.Invalid, "the name leads out of the layer")
	}
	if strings.TrimLeft(name, "/") == "" {
		return ".", nil
	}
	return clean, nil
}

// resolve opens a path in the root as the container would: links stay inside.
func resolve(root int, p string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(root, p, &unix.OpenHow{
			Flags:   flags | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: p, Err: err}
		}
		return fd, nil
	}
}

func (a *applier) closeParent() {
	if a.parent >= 0 {
		unix.Close(a.parent)
	}
	a.parent = -1
}

// enter makes dir the current directory, with all that leads to it.
func (a *applier) enter(dir string) error {
	if a.parent >= 0 && a.parentPath == dir {
		return nil
	}
	fd, err := resolve(a.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		if err := a.imply(dir); err != nil {
			return err
		}
		fd, err = resolve(a.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	}
	if err != nil {
		return err
	}
	a.closeParent()
	a.parent, a.parentPath = fd, dir
	return nil
}

// imply makes the missing directories on the way to dir. What is in the way and
// no directory gives way, as it would had the directory been described.
func (a *applier) imply(dir string) error {
	at := "."
	for part := range strings.SplitSeq(dir, "/") {
		parent, err := resolve(a.root, at, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		next := path.Join(at, part)
		err = func() error {
			defer unix.Close(parent)
			fd, err := resolve(a.root, next, unix.O_PATH|unix.O_DIRECTORY)
			if err == nil {
				return unix.Close(fd)
			}
			wasWhiteout, err := a.clear(parent, part)
			if err != nil {
				return err
			}
			if err := unix.Mkdirat(parent, part, 0o755); err != nil {
				return &fs.PathError{Op: "mkdir", Path: next, Err: err}
			}
			if wasWhiteout {
				a.opaque[next] = struct{}{}
				return nil
			}
			a.implied[next] = struct{}{}
			if len(a.implied) > maxNoted {
				return fault.New(fault.Invalid, "the layer leaves out more than %d directories", maxNoted)
			}
			return nil
		}()
		if err != nil {
			return err
		}
		at = next
	}
	return nil
}

// whiteout hides what lower layers have under a name, or in a whole directory.
func (a *applier) whiteout(dir, base string) error {
	if base == whiteoutOpaque {
		a.opaque[dir] = struct{}{}
		if len(a.opaque) > maxNoted {
			return fault.New(fault.Invalid, "the layer has more than %d opaque directories", maxNoted)
		}
		return nil
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil // bookkeeping of aufs
	}
	name := base[len(whiteout):]
	if name == "" || name == "." || name == ".." {
		return fault.New(fault.Invalid, "a whiteout must name something")
	}
	err := unix.Mknodat(a.parent, name, unix.S_IFCHR, 0)
	if errors.Is(err, unix.EEXIST) {
		// The layer also has something new there: it stays, alone if a directory.
		var st unix.Stat_t
		if err := unix.Fstatat(a.parent, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			a.opaque[path.Join(dir, name)] = struct{}{}
		}
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "mknod", Path: name, Err: err}
	}
	return nil
}

// clear removes what is under a name and tells whether it was a whiteout.
func (a *applier) clear(at int, base string) (wasWhiteout bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		return false, &fs.PathError{Op: "stat", Path: base, Err: err}
	}
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0, removeAll(at, base, &st)
}

func removeAll(at int, base string, st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if err := unix.Unlinkat(at, base, 0); err != nil {
			return &fs.PathError{Op: "unlink", Path: base, Err: err}
		}
		return nil
	}
	fd, err := unix.Openat(at, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: base, Err: err}
	}
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, n := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, n, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &fs.PathError{Op: "stat", Path: n, Err: err}
		}
		if err := removeAll(fd, n, &st); err != nil {
			return err
		}
	}
	if err := unix.Unlinkat(at, base, unix.AT_REMOVEDIR); err != nil {
		return &fs.PathError{Op: "rmdir", Path: base, Err: err}
	}
	return nil
}

func readNames(fd int) ([]string, error) {
	buf := make([]byte, 32<<10)
	var names []string
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// finish sets directory times, which later entries had disturbed, innermost
// first, and hands over what is left to do.
func (a *applier) finish() error {
	for _, d := range slices.Backward(a.dirTimes) {
		fd, err := unix.Openat2(a.root, d.path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
		if err != nil {
			continue // replaced by a later entry
		}
		err = utimes(fd, "", d.ts, unix.AT_EMPTY_PATH)
		unix.Close(fd)
		if err != nil {
			return &fs.PathError{Op: "set times", Path: d.path, Err: err}
		}
	}
	for p := range a.implied {
		a.res.Implied = append(a.res.Implied, p)
	}
	for p := range a.opaque {
		a.res.Opaque = append(a.res.Opaque, p)
	}
	slices.Sort(a.res.Implied)
	slices.Sort(a.res.Opaque)
	return nil
}
