// Package archive moves trees of files between a container's root and tar
// streams. Every name is resolved with openat2 as if the container's root were
// the root of the file system, on descriptors, so that no link in a hostile tree
// leads out of it. Package engine imports it for copy and export.
package archive

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Root is a directory that names are resolved in.
type Root struct{ dir *os.File }

// In makes a Root of an open directory (O_PATH suffices); it stays the caller's.
func In(dir *os.File) Root { return Root{dir} }

// open resolves name inside the root. With follow false a link at its end is
// opened itself (which needs O_PATH).
func (r Root) open(name string, flags int, mode uint32, follow bool, resolve uint64) (int, error) {
	n := strings.TrimLeft(name, "/")
	if n == "" {
		n = "."
	}
	if !follow {
		flags |= unix.O_NOFOLLOW
	}
	if flags&unix.O_PATH == 0 {
		flags |= unix.O_NOCTTY // openat2 refuses it beside O_PATH
	}
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Mode: uint64(mode), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolve}
	for range 128 {
		fd, err := unix.Openat2(int(r.dir.Fd()), n, &how)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue // something on the way was renamed meanwhile
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: "/" + strings.TrimPrefix(n, "./"), Err: err}
		}
		return fd, nil
	}
	return -1, &os.PathError{Op: "open", Path: "/" + n, Err: unix.EAGAIN}
}

// Stat describes what name is.
type Stat struct {
	Name       string
	Size       int64
	Mode       fs.FileMode
	ModTime    time.Time
	LinkTarget string
}

// Lookup describes what lies at name; a link at its end is described itself
// unless name ends in a slash or "/.".
func (r Root) Lookup(name string) (Stat, error) {
	follow := wantsDir(name)
	fd, err := r.open(name, unix.O_PATH, 0, follow, 0)
	if err != nil {
		return Stat{}, notFound(name, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Stat{}, err
	}
	s := Stat{Name: baseName(name), Size: st.Size, Mode: fileMode(st.Mode), ModTime: time.Unix(st.Mtim.Unix())}
	if wantsDir(name) && !s.Mode.IsDir() {
		return s, fault.New(fault.Invalid, "%s: not a directory", name)
	}
	if s.Mode&fs.ModeSymlink != 0 {
		// The client follows it: tell where it leads inside the root.
		s.LinkTarget, err = r.resolved(name, fd)
	}
	return s, err
}

// resolved is the path inside the root that a link leads to in the end, or the
// link's own text where that does not exist.
func (r Root) resolved(name string, link int) (string, error) {
	text, err := readlink(link)
	if err != nil {
		return "", err
	}
	if !path.IsAbs(text) {
		text = path.Join(path.Dir(path.Clean("/"+name)), text)
	}
	return path.Clean(text), nil
}

func wantsDir(name string) bool {
	return strings.HasSuffix(name, "/") || strings.HasSuffix(name, "/.") || name == "." || name == ""
}

func baseName(name string) string {
	if n := path.Base(path.Clean("/" + name)); n != "/" {
		return n
	}
	return "/"
}

func notFound(name string, err error) error {
	switch {
	case errors.Is(err, unix.ENOTDIR):
		return fault.New(fault.Invalid, "%s: not a directory", name)
	case errors.Is(err, unix.ENOENT):
		return fault.As(fault.NotFound, &NoFileError{Name: name, err: err})
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENXIO):
		return fault.As(fault.Invalid, err)
	}
	return err
}

// NoFileError is the error of a name that leads nowhere.
type NoFileError struct {
	Name string
	err  error
}

func (e *NoFileError) Error() string { return "Could not find the file " + e.Name + " in container" }
func (e *NoFileError) Unwrap() error { return e.err }

// fileMode turns a kernel mode into Go's.
func fileMode(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	switch m & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		mode |= fs.ModeDevice
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	}
	for bit, to := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if m&bit != 0 {
			mode |= to
		}
	}
	return mode
}

// WriteOptions tell how a tree is written to a tar stream.
type WriteOptions struct {
	// As is the name of the top entry; "." leaves it out, with its content at the
	// top. "./" and "/" are names too, and begin all others: clients that rename
	// the top look for them.
	As string
	// OneFileSystem leaves out what is mounted below.
	OneFileSystem bool
	// Unmap turns the owner on disk into the container's.
	Unmap func(uid, gid uint32) (int, int)
	// Faithful keeps what means something on hosts of the same kind alone: access
	// lists and trusted attributes. For backups.
	Faithful bool
}

// Write streams the tree at name as a tar.
func (r Root) Write(ctx context.Context, name string, w io.Writer, o WriteOptions) error {
	tw := tar.NewWriter(w)
	if err := r.Add(ctx, name, tw, o); err != nil {
		return err
	}
	return tw.Close()
}

// Add writes the tree at name into a tar that has other entries too.
func (r Root) Add(ctx context.Context, name string, tw *tar.Writer, o WriteOptions) error {
	fd, err := r.open(name, unix.O_PATH, 0, wantsDir(name), 0)
	if err != nil {
		return notFound(name, err)
	}
	defer unix.Close(fd)
	t := &writer{ctx: ctx, tw: tw, o: o, links: map[inode]string{}, buf: make([]byte, 128<<10)}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	t.dev = st.Dev
	as := o.As
	switch as {
	case "./":
		as = "."
	case "/":
		as = ""
	}
	return t.entry(fd, as, 0)
}

type inode struct{ dev, ino uint64 }

type writer struct {
	ctx   context.Context
	tw    *tar.Writer
	o     WriteOptions
	dev   uint64
	links map[inode]string // of files with several names
	buf   []byte
}

// maxDepth bounds recursion: each level holds descriptors.
const maxDepth = 2000

// entry writes what the O_PATH descriptor refers to, and what lies below.
func (t *writer) entry(fd int, as string, depth int) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	h, skip, err := t.header(fd, as, &st)
	if err != nil || skip {
		return err
	}
	if h.Typeflag == tar.TypeReg && st.Nlink > 1 {
		k := inode{st.Dev, st.Ino}
		if first, ok := t.links[k]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return t.tw.WriteHeader(h)
		}
		t.links[k] = as
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return t.file(fd, h)
	case tar.TypeDir:
		if as != "." || t.o.As != "." || depth > 0 {
			if err := t.tw.WriteHeader(h); err != nil {
				return err
			}
		}
		return t.children(fd, as, st.Dev, depth)
	}
	return t.tw.WriteHeader(h)
}

func (t *writer) header(fd int, as string, st *unix.Stat_t) (*tar.Header, bool, error) {
	h := &tar.Header{
		Name: as, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(st.Mtim.Unix()), Format: tar.FormatPAX,
	}
	if t.o.Unmap != nil {
		h.Uid, h.Gid = t.o.Unmap(st.Uid, st.Gid)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		l, err := readlink(fd)
		if err != nil {
			return nil, false, err
		}
		h.Linkname = l
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default: // sockets mean nothing elsewhere
		return nil, true, nil
	}
	if h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeDir {
		h.PAXRecords = xattrs(fd, t.o.Faithful)
	}
	return h, false, nil
}

// file writes a regular file; what is appended meanwhile is left out, what is
// cut off is filled with zeros, so that the stream stays whole.
func (t *writer) file(fd int, h *tar.Header) error {
	f, err := reopen(fd, unix.O_RDONLY)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) {
			return nil
		}
		return err
	}
	defer f.Close()
	if err := t.tw.WriteHeader(h); err != nil {
		return err
	}
	for left := h.Size; left > 0; {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(t.buf[:min(left, int64(len(t.buf)))])
		if n == 0 && err != nil {
			if !errors.Is(err, io.EOF) {
				return err
			}
			n = int(min(left, int64(len(t.buf))))
			clear(t.buf[:n])
		}
		if _, err := t.tw.Write(t.buf[:n]); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

func (t *writer) children(fd int, as string, dev uint64, depth int) error {
	if depth >= maxDepth {
		return fault.New(fault.Unsupported, "cannot archive %s: directories are nested more than %d deep", as, maxDepth)
	}
	d, err := reopen(fd, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, n := range names {
		c, err := unix.Openat2(int(d.Fd()), n, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
		if errors.Is(err, unix.ENOENT) {
			continue // removed meanwhile
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: path.Join(as, n), Err: err}
		}
		err = nil
		var st unix.Stat_t
		if t.o.OneFileSystem {
			if err = unix.Fstat(c, &st); err == nil && st.Dev != t.dev {
				unix.Close(c)
				continue
			}
		}
		if err == nil {
			child := as + "/" + n
			if as == "." && t.o.As == "." {
				child = n
			}
			err = t.entry(c, child, depth+1)
		}
		unix.Close(c)
		if err != nil {
			return err
		}
	}
	return nil
}

// reopen opens what an O_PATH descriptor refers to, without looking at a name
// again. Special files are never opened.
func reopen(fd, flags int) (*os.File, error) {
	return os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
}

func readlink(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Err: err}
	}
	return string(buf[:n]), nil
}

const xattrPrefix = "SCHILY.xattr."

// wanted tells whether an attribute travels.
func wanted(name string, faithful bool) bool {
	switch {
	case name == "security.capability", strings.HasPrefix(name, "user."):
		return true
	case strings.HasPrefix(name, "trusted."):
		return faithful
	}
	return faithful && (name == "system.posix_acl_access" || name == "system.posix_acl_default")
}

// xattrs reads the attributes that make sense elsewhere.
func xattrs(fd int, faithful bool) map[string]string {
	p := "/proc/self/fd/" + strconv.Itoa(fd)
	n, err := unix.Listxattr(p, nil)
	if err != nil || n <= 0 {
		return nil
	}
	buf := make([]byte, n)
	if n, err = unix.Listxattr(p, buf); err != nil || n > len(buf) {
		return nil
	}
	var out map[string]string
	for k := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if !wanted(k, faithful) {
			continue
		}
		v := make([]byte, 64<<10)
		m, err := unix.Getxattr(p, k, v)
		if err != nil {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[xattrPrefix+k] = string(v[:m])
	}
	return out
}
