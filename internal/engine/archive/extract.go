package archive

import (
	"archive/tar"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// ExtractOptions tell how a tar stream is unpacked.
type ExtractOptions struct {
	// NoOverwriteDirNonDir refuses to replace a directory by something else and
	// the other way round.
	NoOverwriteDirNonDir bool
	// Owner, if set, gives every entry to it instead of the stream's owner.
	Owner *[2]int
	// Map turns the container's owner into the one on disk.
	Map func(uid, gid int) (int, int, error)
	// Entry, if set, sees every entry first. It may change the header, or read the
	// entry itself and skip it.
	Entry func(h *tar.Header, r io.Reader) (skip bool, err error)
	// Top gives the destination the attributes of the entry that names it.
	Top bool
	// Sparse leaves holes where a file has zeros.
	Sparse bool
	// Faithful sets all attributes that Write keeps when it is faithful.
	Faithful bool
	// NoDevices refuses device nodes but for overlayfs' mark of a removed file.
	NoDevices bool
}

// Extract unpacks a tar stream into the directory at name. Links on the way to an
// entry are followed inside the root alone.
func (r Root) Extract(ctx context.Context, name string, src io.Reader, o ExtractOptions) error {
	fd, err := r.open(name, unix.O_PATH|unix.O_DIRECTORY, 0, true, 0)
	if err != nil {
		if errors.Is(err, unix.ENOTDIR) {
			return fault.New(fault.Invalid, "extraction point is not a directory: %s", name)
		}
		return notFound(name, err)
	}
	unix.Close(fd)
	x := &extractor{r: r, o: o, ctx: ctx, base: path.Clean("/" + name), buf: make([]byte, 128<<10)}
	tr := tar.NewReader(src)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return x.finish()
		}
		if err != nil {
			return fault.New(fault.Invalid, "cannot read the archive: %w", err)
		}
		if o.Entry != nil {
			skip, err := o.Entry(h, tr)
			if err != nil {
				return err
			}
			if skip {
				continue
			}
		}
		if err := x.entry(h, tr); err != nil {
			return kind(h.Name, err)
		}
	}
}

func kind(name string, err error) error {
	if fault.Of(err) != fault.Internal {
		return err
	}
	k := fault.Internal
	for e, f := range map[error]fault.Kind{
		unix.ENOSPC: fault.Exhausted, unix.EDQUOT: fault.Exhausted, unix.EROFS: fault.Forbidden, unix.EACCES: fault.Forbidden, unix.EPERM: fault.Forbidden,
		unix.ENOTDIR: fault.Invalid, unix.ELOOP: fault.Invalid, unix.ENAMETOOLONG: fault.Invalid, unix.EINVAL: fault.Invalid, unix.EISDIR: fault.Invalid,
		unix.ENOENT: fault.Invalid, unix.EEXIST: fault.Conflict, unix.EBUSY: fault.Conflict, unix.EXDEV: fault.Invalid,
	} {
		if errors.Is(err, e) {
			k = f
		}
	}
	return fault.New(k, "cannot extract %q: %w", name, err)
}

type extractor struct {
	r    Root
	o    ExtractOptions
	ctx  context.Context
	base string
	buf  []byte
	dirs []dirTime // set last: writing into a directory changes its time
}

type dirTime struct {
	name string
	at   time.Time
}

// place cleans an entry's name; ".." cannot leave the destination.
func (x *extractor) place(name string) (dir, base string, ok bool) {
	n := path.Clean("/" + name)
	if n == "/" {
		return "", "", false
	}
	full := path.Join(x.base, n)
	return path.Dir(full), path.Base(full), true
}

// parent opens the directory an entry goes to and makes missing ones.
func (x *extractor) parent(dir string) (int, error) {
	fd, err := x.r.open(dir, unix.O_PATH|unix.O_DIRECTORY, 0, true, 0)
	if !errors.Is(err, unix.ENOENT) || dir == "/" {
		return fd, err
	}
	up, err := x.parent(path.Dir(dir))
	if err != nil {
		return -1, err
	}
	defer unix.Close(up)
	if err := unix.Mkdirat(up, path.Base(dir), 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	if err := x.chown(up, path.Base(dir), 0, 0); err != nil {
		return -1, err
	}
	return x.r.open(dir, unix.O_PATH|unix.O_DIRECTORY, 0, true, 0)
}

func (x *extractor) chown(dir int, base string, uid, gid int) error {
	if x.o.Owner != nil {
		uid, gid = x.o.Owner[0], x.o.Owner[1]
	}
	if x.o.Map != nil {
		var err error
		if uid, gid, err = x.o.Map(uid, gid); err != nil {
			return err
		}
	}
	return unix.Fchownat(dir, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
}

func (x *extractor) entry(h *tar.Header, src io.Reader) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo, tar.TypeGNUSparse:
	default:
		return fault.New(fault.Invalid, "entries of type %q are not supported", h.Typeflag)
	}
	dir, base, ok := x.place(h.Name)
	if !ok {
		if x.o.Top && h.Typeflag == tar.TypeDir {
			return x.top(h)
		}
		return nil // the destination itself keeps what it is
	}
	if dev := h.Typeflag == tar.TypeBlock || h.Typeflag == tar.TypeChar && h.Devmajor|h.Devminor != 0; dev && x.o.NoDevices {
		return fault.New(fault.Forbidden, "the archive holds a device node (%s), which is not made unless asked for", strconv.Quote(h.Name))
	}
	d, err := x.parent(dir)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	isDir := h.Typeflag == tar.TypeDir
	exists, err := x.clear(d, base, isDir)
	if err != nil {
		return err
	}
	mode := uint32(h.Mode & 0o7777)
	switch h.Typeflag {
	case tar.TypeDir:
		if !exists {
			err = unix.Mkdirat(d, base, 0o700)
		}
	case tar.TypeReg, tar.TypeGNUSparse:
		err = x.file(d, base, src)
	case tar.TypeSymlink:
		err = unix.Symlinkat(h.Linkname, d, base)
	case tar.TypeLink:
		return x.link(d, base, h.Linkname)
	case tar.TypeFifo:
		err = unix.Mknodat(d, base, unix.S_IFIFO|0o600, 0)
	case tar.TypeChar, tar.TypeBlock:
		typ := uint32(unix.S_IFCHR)
		if h.Typeflag == tar.TypeBlock {
			typ = unix.S_IFBLK
		}
		err = unix.Mknodat(d, base, typ|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	}
	if err != nil {
		return err
	}
	return x.attributes(d, base, dir, h, mode)
}

// clear makes way for an entry; it reports a directory that stays.
func (x *extractor) clear(d int, base string, isDir bool) (exists bool, err error) {
	var st unix.Stat_t
	err = unix.Fstatat(d, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	have := st.Mode&unix.S_IFMT == unix.S_IFDIR
	switch {
	case have && isDir:
		return true, nil
	case have != isDir && x.o.NoOverwriteDirNonDir:
		if have {
			return false, fault.New(fault.Invalid, "cannot overwrite directory %q with non-directory", base)
		}
		return false, fault.New(fault.Invalid, "cannot overwrite non-directory %q with directory", base)
	case have:
		return false, removeAll(d, base, 0)
	}
	return false, unix.Unlinkat(d, base, 0)
}

// removeAll deletes a tree without following any link.
func removeAll(d int, base string, depth int) error {
	if depth > maxDepth {
		return fault.New(fault.Unsupported, "directories are nested more than %d deep", maxDepth)
	}
	fd, err := unix.Openat2(d, base, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV})
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	list, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range list {
		if e.IsDir() {
			err = removeAll(fd, e.Name(), depth+1)
		} else {
			err = unix.Unlinkat(fd, e.Name(), 0)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return unix.Unlinkat(d, base, unix.AT_REMOVEDIR)
}

func (x *extractor) file(d int, base string, src io.Reader) error {
	fd, err := unix.Openat(d, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	hole := false
	for {
		if err := x.ctx.Err(); err != nil {
			f.Close()
			return err
		}
		n, rerr := src.Read(x.buf)
		if n > 0 {
			if x.o.Sparse && zeros(x.buf[:n]) {
				_, err = f.Seek(int64(n), io.SeekCurrent)
				hole = true
			} else {
				_, err = f.Write(x.buf[:n])
				hole = false
			}
			if err != nil {
				f.Close()
				return err
			}
		}
		if errors.Is(rerr, io.EOF) {
			if hole {
				at, err := f.Seek(0, io.SeekCurrent)
				if err == nil {
					err = f.Truncate(at)
				}
				if err != nil {
					f.Close()
					return err
				}
			}
			return f.Close()
		}
		if rerr != nil {
			f.Close()
			return fault.New(fault.Invalid, "the archive is cut off: %w", rerr)
		}
	}
}

// zeros tells whether a block, large enough to be worth a hole, holds nothing.
func zeros(b []byte) bool {
	if len(b) < 4096 {
		return false
	}
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// link makes a hard link to an entry of the same archive.
func (x *extractor) link(d int, base, target string) error {
	tdir, tbase, ok := x.place(target)
	if !ok {
		return fault.New(fault.Invalid, "hard link to %q makes no sense", target)
	}
	td, err := x.r.open(tdir, unix.O_PATH|unix.O_DIRECTORY, 0, true, 0)
	if err != nil {
		return err
	}
	defer unix.Close(td)
	return unix.Linkat(td, tbase, d, base, 0)
}

// top gives the destination its entry's attributes.
func (x *extractor) top(h *tar.Header) error {
	d, err := x.r.open(x.base, unix.O_RDONLY|unix.O_DIRECTORY, 0, true, 0)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	if err := x.attributes(d, ".", x.base, h, uint32(h.Mode&0o7777)); err != nil {
		return err
	}
	x.dirs[len(x.dirs)-1].name = x.base
	return nil
}

func (x *extractor) attributes(d int, base, dir string, h *tar.Header, mode uint32) error {
	if err := x.chown(d, base, h.Uid, h.Gid); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeSymlink {
		return utimes(d, base, h.ModTime)
	}
	fd, err := unix.Openat2(d, base, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	p := "/proc/self/fd/" + strconv.Itoa(fd)
	// After the owner: chown clears the set-id bits and capabilities.
	if err := unix.Chmod(p, mode); err != nil {
		return err
	}
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrPrefix)
		if !ok || !wanted(name, x.o.Faithful) {
			continue
		}
		if err := unix.Setxattr(p, name, []byte(v), 0); err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return err
		}
	}
	if h.Typeflag == tar.TypeDir {
		x.dirs = append(x.dirs, dirTime{path.Join(dir, base), h.ModTime})
		return nil
	}
	return utimes(d, base, h.ModTime)
}

func utimes(d int, base string, at time.Time) error {
	if at.IsZero() {
		return nil
	}
	ts := unix.NsecToTimespec(at.UnixNano())
	return unix.UtimesNanoAt(d, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// finish sets the times of directories, the deepest first.
func (x *extractor) finish() error {
	for i := len(x.dirs) - 1; i >= 0; i-- {
		dt := x.dirs[i]
		dir, base := path.Dir(dt.name), path.Base(dt.name)
		if dt.name == x.base {
			dir, base = dt.name, "." // there is nothing above it that is ours
		}
		d, err := x.r.open(dir, unix.O_PATH|unix.O_DIRECTORY, 0, true, 0)
		if err != nil {
			continue
		}
		_ = utimes(d, base, dt.at)
		unix.Close(d)
	}
	return nil
}
