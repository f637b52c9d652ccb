package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

const stagingPrefix = ".copy-"

// CopyUp fills an empty volume with what the image has at path, as its first
// container sees it: owners, modes, times, extended attributes, hard links, holes
// and the directory's own attributes. root is the container's root file system
// (a directory or detached mount); path is resolved in it and cannot leave it. m
// is the mapping that root was mounted with: owners are mapped back, so that
// volumes hold the container's ids. A volume that holds anything is left alone, and
// so is one where the image has nothing. Call it before Use.
//
// The copy is made aside and takes the place of the empty directory in one step,
// so that a volume is never half filled. With sub, an empty directory of the volume
// is filled instead, in place; where there is none nothing is done.
func (s *Store) CopyUp(ctx context.Context, root *os.File, inside, name, sub string, m snapshot.IDMap) error {
	v, err := s.get(name)
	if err != nil {
		return err
	}
	fail := func(err error) error {
		if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		kind := fault.Internal
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			kind = fault.Exhausted
		}
		return fault.New(kind, "cannot fill volume %s from %s of the image: %w", name, inside, err)
	}
	// What is mounted from elsewhere is filled there, not below the mount.
	if elsewhere := v.rec.mounts() || v.rec.Driver != ""; elsewhere {
		id := "copy-" + randomName()
		if _, err := s.Use(ctx, name, id); err != nil {
			return err
		}
		defer func() { _ = s.Release(context.WithoutCancel(ctx), name, id) }()
	}
	data, err := s.Open(name)
	if err != nil {
		return err
	}
	defer data.Close()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.busy {
		return errBusy(name)
	}
	if sub != "" {
		top, err := beneath(int(data.Fd()), sub, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil // the start tells
		}
		defer top.Close()
		data = top
	}
	if names, err := data.Readdirnames(1); len(names) > 0 {
		return nil
	} else if err != nil && !errors.Is(err, io.EOF) {
		return fail(err)
	}

	src, err := openInRoot(root, inside)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	} else if err != nil {
		return fail(err)
	}
	defer src.Close()
	c := &copier{ctx: ctx, m: m, links: map[inode]string{}}

	// A mount cannot be replaced, and a directory that a running container has
	// mounted must not: there the copy goes in place.
	if sub != "" || v.rec.mounts() || v.rec.Driver != "" || len(v.uses) > 0 {
		c.top = int(data.Fd())
		return fail(c.dir(int(src.Fd()), int(data.Fd()), ""))
	}
	vdir, err := beneath(int(s.dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fail(err)
	}
	defer vdir.Close()
	if err := s.clearStaging(vdir, name); err != nil {
		return fail(err)
	}
	staging := stagingPrefix + randomName()
	if err := unix.Mkdirat(int(vdir.Fd()), staging, 0o700); err != nil {
		return fail(err)
	}
	undo := func(err error) error {
		_ = s.moveToTrash(name + "/" + staging)
		return fail(err)
	}
	dst, err := beneath(int(vdir.Fd()), staging, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return undo(err)
	}
	defer dst.Close()
	if v.rec.Project != 0 {
		if err := s.limit(dst, v.rec); err != nil {
			return undo(err)
		}
	}
	c.top = int(dst.Fd())
	if err := c.dir(int(src.Fd()), int(dst.Fd()), ""); err != nil {
		return undo(err)
	}
	if !v.rec.Ephemeral && c.files > 0 {
		// The rename must not reach the disk before what it puts in place.
		if err := unix.Syncfs(int(dst.Fd())); err != nil {
			return undo(err)
		}
	}
	if err := unix.Renameat(int(vdir.Fd()), staging, int(vdir.Fd()), dataDir); err != nil {
		return undo(err)
	}
	if !v.rec.Ephemeral {
		return fail(vdir.Sync())
	}
	return nil
}

// clearStaging throws away copies that were never finished.
func (s *Store) clearStaging(vdir *os.File, name string) error {
	names, err := vdir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasPrefix(n, stagingPrefix) {
			if err := s.moveToTrash(name + "/" + n); err != nil {
				return err
			}
		}
	}
	return nil
}

// openInRoot opens a directory as the container would see it.
func openInRoot(root *os.File, name string) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	rel := strings.TrimPrefix(path.Clean("/"+name), "/")
	if rel == "" {
		rel = "."
	}
	for range 64 {
		fd, err := unix.Openat2(int(root.Fd()), rel, &how)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "openat2", Path: name, Err: err}
		}
		return os.NewFile(uintptr(fd), name), nil
	}
	return nil, &os.PathError{Op: "openat2", Path: name, Err: unix.EAGAIN}
}

type inode struct{ dev, ino uint64 }

// copier copies a tree by descriptors; names are never joined to paths that the
// kernel would resolve through links.
type copier struct {
	ctx   context.Context
	m     snapshot.IDMap
	top   int // destination's top directory
	links map[inode]string
	files int
}

// dir copies the content of an open directory and then its attributes.
func (c *copier) dir(src, dst int, rel string) error {
	// A description of its own, for the caller's offset.
	fd, err := unix.Openat(src, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), rel)
	defer d.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	for {
		names, err := d.Readdirnames(1024)
		for _, n := range names {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			if err := c.entry(fd, dst, n, path.Join(rel, n)); err != nil {
				return &os.PathError{Op: "copy", Path: path.Join(rel, n), Err: err}
			}
		}
		if errors.Is(err, io.EOF) || err == nil && len(names) == 0 {
			break
		}
		if err != nil {
			return err
		}
	}
	return c.attributes(fd, dst, &st)
}

func (c *copier) entry(src, dst int, name, rel string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(src, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFSOCK {
		return nil // nobody listens on it
	}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		k := inode{uint64(st.Dev), st.Ino}
		if first, ok := c.links[k]; ok {
			return c.link(first, dst, name)
		}
		c.links[k] = rel
	}
	c.files++
	switch kind {
	case unix.S_IFDIR:
		from, err := open(src, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer unix.Close(from)
		if err := unix.Mkdirat(dst, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		to, err := open(dst, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer unix.Close(to)
		return c.dir(from, to, rel)
	case unix.S_IFREG:
		return c.file(src, dst, name, &st)
	case unix.S_IFLNK:
		return c.symlink(src, dst, name, &st)
	}
	if err := unix.Mknodat(dst, name, kind|0o600, int(st.Rdev)); err != nil {
		return err
	}
	if err := c.owner(dst, name, &st); err != nil {
		return err
	}
	// The node was just made by us and cannot be a link.
	if err := unix.Fchmodat(dst, name, st.Mode&0o7777, 0); err != nil {
		return err
	}
	return times(dst, name, &st)
}

// open opens an entry that must not be a link or on another mount.
func open(dir int, name string, flags int) (int, error) {
	if flags&unix.O_PATH == 0 {
		flags |= unix.O_NONBLOCK | unix.O_NOCTTY // it may have become something else
	}
	return unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
}

// link makes a further name of a file already copied at first, a path of
// directories that this copier made.
func (c *copier) link(first string, dst int, name string) error {
	parent, base := path.Split(first)
	if parent == "" {
		return unix.Linkat(c.top, base, dst, name, 0)
	}
	fd, err := open(c.top, path.Clean(parent), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Linkat(fd, base, dst, name, 0)
}

func (c *copier) symlink(src, dst int, name string, st *unix.Stat_t) error {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(src, name, buf)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(string(buf[:n]), dst, name); err != nil {
		return err
	}
	if err := c.owner(dst, name, st); err != nil {
		return err
	}
	return times(dst, name, st)
}

func (c *copier) file(src, dst int, name string, st *unix.Stat_t) error {
	from, err := open(src, name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := unix.Openat(dst, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	var now unix.Stat_t
	if err := unix.Fstat(from, &now); err != nil {
		return err
	}
	if now.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.ESTALE // it changed under our hands
	}
	if err := c.content(from, to, now.Size); err != nil {
		return err
	}
	return c.attributes(from, to, st)
}

// content shares blocks where the file system can, else copies what is no hole.
func (c *copier) content(from, to int, size int64) error {
	if size == 0 {
		return nil
	}
	if unix.IoctlFileClone(to, from) == nil {
		return nil
	}
	if err := unix.Ftruncate(to, size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		begin, err := unix.Seek(from, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // the rest is a hole
		}
		end := size
		if err != nil {
			begin = at
		} else if e, err := unix.Seek(from, begin, unix.SEEK_HOLE); err == nil {
			end = min(e, size)
		}
		if begin >= size {
			return nil
		}
		if err := copyRange(c.ctx, from, to, begin, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

func copyRange(ctx context.Context, from, to int, begin, end int64) error {
	const chunk = 64 << 20 // so that cancelling is noticed
	in, out := begin, begin
	var buf []byte
	for in < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		if buf == nil {
			n, err := unix.CopyFileRange(from, &in, to, &out, int(min(end-in, chunk)), 0)
			if n > 0 {
				continue
			}
			if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) {
				return err
			}
			// Not between these file systems; or none of it: read and write.
			buf = make([]byte, 256<<10)
		}
		n, err := unix.Pread(from, buf[:min(int64(len(buf)), end-in)], in)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return nil // it got shorter
		}
		for w := 0; w < n; {
			k, err := unix.Pwrite(to, buf[w:n], out)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			w += max(k, 0)
			out += int64(max(k, 0))
		}
		in += int64(n)
	}
	return nil
}

// attributes sets owner, mode, extended attributes and times, in the order in
// which none undoes another.
func (c *copier) attributes(from, to int, st *unix.Stat_t) error {
	uid, gid, err := c.ids(st)
	if err != nil {
		return err
	}
	if err := unix.Fchown(to, uid, gid); err != nil {
		return err
	}
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	if err := c.xattrs(from, to); err != nil {
		return err
	}
	// By descriptor, as there may be no name: the empty path is not for utimensat.
	ts := []unix.Timespec{st.Atim, st.Mtim}
	return unix.UtimesNanoAt(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(to), ts, 0)
}

func (c *copier) owner(dir int, name string, st *unix.Stat_t) error {
	uid, gid, err := c.ids(st)
	if err != nil {
		return err
	}
	return unix.Fchownat(dir, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
}

func times(dir int, name string, st *unix.Stat_t) error {
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// ids maps an owner as seen through root back to the container's.
func (c *copier) ids(st *unix.Stat_t) (uid, gid int, err error) {
	u, ok := back(c.m.UIDs, st.Uid)
	g, ok2 := back(c.m.GIDs, st.Gid)
	if !ok || !ok2 {
		return 0, 0, unix.EOVERFLOW
	}
	return int(u), int(g), nil
}

func back(r []snapshot.IDRange, host uint32) (uint32, bool) {
	if len(r) == 0 {
		return host, true
	}
	for _, m := range r {
		if host >= m.Host && uint64(host) < uint64(m.Host)+uint64(m.Size) {
			return m.Container + (host - m.Host), true
		}
	}
	return 0, false
}

func (c *copier) xattrs(from, to int) error {
	n, err := unix.Flistxattr(from, nil)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	list := make([]byte, n+256)
	if n, err = unix.Flistxattr(from, list); err != nil {
		return err
	}
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		switch {
		case name == "":
			continue
		case strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "user.overlay."),
			name == "security.selinux", name == "security.ima", name == "security.evm":
			continue // they say something about the place, not the file
		}
		k, err := unix.Fgetxattr(from, name, value)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return err
		}
		if name == "security.capability" {
			k = c.fileCaps(value, k)
		}
		if err := unix.Fsetxattr(to, name, value[:k], 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
	}
	return nil
}

// fileCaps takes back what reading through an idmapped mount does to a file's
// capabilities: the kernel gives them the root id of the mapping (version 3).
func (c *copier) fileCaps(value []byte, n int) int {
	const version, v2, v2Size, v3Size = 0xff000000, 0x02000000, 20, 24
	if n != v3Size || len(c.m.UIDs) == 0 {
		return n
	}
	if root, ok := back(c.m.UIDs, binary.LittleEndian.Uint32(value[v2Size:])); !ok || root != 0 {
		return n
	}
	magic := binary.LittleEndian.Uint32(value)
	binary.LittleEndian.PutUint32(value, magic&^version|v2)
	return v2Size
}
