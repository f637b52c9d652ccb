package unpack

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"
	"unsafe"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// make creates what an entry describes under base in the current directory.
func (a *applier) make(name, base string, h *tar.Header, r io.Reader) error {
	var st unix.Stat_t
	err := unix.Fstatat(a.parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "stat", Path: base, Err: err}
	}
	exists := err == nil
	if exists && h.Typeflag == tar.TypeDir && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		delete(a.implied, name)
		return a.meta(a.parent, base, name, h, true)
	}
	if exists && h.Typeflag == tar.TypeLink && path.Clean(strings.TrimLeft(h.Linkname, "/")) == name {
		return nil // a link to itself
	}
	if exists {
		wasWhiteout, err := a.clear(a.parent, base)
		if err != nil {
			return err
		}
		if wasWhiteout && h.Typeflag == tar.TypeDir {
			a.opaque[name] = struct{}{}
		}
	}
	mode := uint32(h.Mode & 0o7777)
	switch h.Typeflag {
	case tar.TypeDir:
		if err := unix.Mkdirat(a.parent, base, mode&0o777); err != nil {
			return &fs.PathError{Op: "mkdir", Path: name, Err: err}
		}
		delete(a.implied, name)
		return a.meta(a.parent, base, name, h, false)
	case tar.TypeReg:
		return a.file(base, h, r)
	case tar.TypeLink:
		return a.link(name, base, h)
	case tar.TypeSymlink:
		if strings.IndexByte(h.Linkname, 0) >= 0 || h.Linkname == "" {
			return fault.New(fault.Invalid, "a link needs a target")
		}
		if err := unix.Symlinkat(h.Linkname, a.parent, base); err != nil {
			return &fs.PathError{Op: "symlink", Path: name, Err: err}
		}
		return a.meta(a.parent, base, name, h, false)
	}
	typ := uint32(unix.S_IFIFO)
	var dev uint64
	if h.Typeflag != tar.TypeFifo {
		if a.userns {
			return nil
		}
		typ = unix.S_IFCHR
		if h.Typeflag == tar.TypeBlock {
			typ = unix.S_IFBLK
		}
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20 {
			return fault.New(fault.Invalid, "device %d:%d does not exist", h.Devmajor, h.Devminor)
		}
		dev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	}
	if err := unix.Mknodat(a.parent, base, typ|mode&0o777, int(dev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: name, Err: err}
	}
	return a.meta(a.parent, base, name, h, false)
}

// file writes a regular file; runs of zeros become holes.
func (a *applier) file(base string, h *tar.Header, r io.Reader) error {
	mode := uint32(h.Mode & 0o777)
	fd, err := unix.Openat(a.parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return &fs.PathError{Op: "create", Path: base, Err: err}
	}
	defer unix.Close(fd)
	if err := a.copy(fd, r, h.Size); err != nil {
		return err
	}
	a.res.Size += h.Size
	owned := h.Uid != 0 || h.Gid != 0
	if owned {
		if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
			return ownFault(h, err)
		}
	}
	for k, v := range h.PAXRecords {
		if name, ok := wanted(k); ok {
			if err := unix.Fsetxattr(fd, name, []byte(v), 0); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
				return xattrFault(name, err)
			}
		}
	}
	if h.Mode&0o7000 != 0 {
		if err := unix.Fchmod(fd, uint32(h.Mode&0o7777)); err != nil {
			return &fs.PathError{Op: "chmod", Path: base, Err: err}
		}
	}
	return utimes(fd, "", times(h), unix.AT_EMPTY_PATH)
}

const hole = 64 << 10

func (a *applier) copy(fd int, r io.Reader, size int64) error {
	var off int64
	sparse := false
	for off < size {
		n := int(min(size-off, int64(len(a.buf))))
		n, err := io.ReadFull(r, a.buf[:n])
		if err != nil {
			return fault.New(fault.Invalid, "its content ends early: %w", err)
		}
		for b := a.buf[:n]; len(b) > 0; {
			c := b[:min(len(b), hole)]
			if len(c) == hole && zero(c) {
				sparse = true
			} else if err := pwrite(fd, c, off); err != nil {
				return err
			} else {
				sparse = false
			}
			off += int64(len(c))
			b = b[len(c):]
		}
	}
	if sparse {
		if err := unix.Ftruncate(fd, size); err != nil {
			return err
		}
	}
	return nil
}

var zeros [hole]byte

func zero(b []byte) bool { return b[0] == 0 && bytes.Equal(b, zeros[:len(b)]) }

func pwrite(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return fault.New(fault.Exhausted, "%w (free some disk space, for instance with system prune)", err)
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// link makes a hard link to an earlier file, or copies one up from below.
func (a *applier) link(name, base string, h *tar.Header) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return err
	}
	if target == "." {
		return fault.New(fault.Invalid, "a hard link to the root")
	}
	err = a.linkTo(target, base)
	if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	if a.lowers == nil {
		a.res.NeedsLower = true
		return nil
	}
	if err := a.copyUp(target); err != nil {
		return err
	}
	if err := a.enter(path.Dir(name)); err != nil {
		return err
	}
	return a.linkTo(target, base)
}

func (a *applier) linkTo(target, base string) error {
	dir, err := resolve(a.root, path.Dir(target), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	var st unix.Stat_t
	if err := unix.Fstatat(dir, path.Base(target), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "stat", Path: target, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
		return fault.New(fault.Invalid, "a hard link to a removed file")
	}
	if err := unix.Linkat(dir, path.Base(target), a.parent, base, 0); err != nil {
		return &fs.PathError{Op: "link", Path: target, Err: err}
	}
	return nil
}

// copyUp copies the topmost lower file called target into this layer.
func (a *applier) copyUp(target string) error {
	for _, low := range a.lowers {
		fd, err := resolve(low, target, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return fault.New(fault.Invalid, "a hard link to %q, which is no file in the layers below", target)
		}
		if err := a.enter(path.Dir(target)); err != nil {
			return err
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), Size: st.Size,
			ModTime: time.Unix(st.Mtim.Unix()), PAXRecords: map[string]string{}}
		val := make([]byte, 1024)
		if n, err := unix.Fgetxattr(fd, "security.capability", val); err == nil {
			h.PAXRecords[paxXattr+"security.capability"] = string(val[:n])
		}
		return a.file(path.Base(target), h, fdReader(fd))
	}
	return fault.New(fault.Invalid, "a hard link to %q, which no layer has", target)
}

type fdReader int

func (fd fdReader) Read(p []byte) (int, error) {
	n, err := unix.Read(int(fd), p)
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return max(n, 0), err
}

// meta sets owner, attributes, mode and times of what is no regular file.
func (a *applier) meta(at int, base, name string, h *tar.Header, existed bool) error {
	if existed || h.Uid != 0 || h.Gid != 0 {
		if err := unix.Fchownat(at, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return ownFault(h, err)
		}
	}
	isDir := h.Typeflag == tar.TypeDir
	if isDir {
		if err := a.dirMeta(at, base, h, existed); err != nil {
			return err
		}
	} else if h.Typeflag != tar.TypeSymlink && h.Mode&0o7000 != 0 {
		if err := unix.Fchmodat(at, base, uint32(h.Mode&0o7777), 0); err != nil {
			return &fs.PathError{Op: "chmod", Path: name, Err: err}
		}
	}
	ts := times(h)
	if isDir {
		if len(a.dirTimes) >= maxDirsPending {
			return fault.New(fault.Invalid, "the layer has more than %d directories", maxDirsPending)
		}
		a.dirTimes = append(a.dirTimes, dirTime{name, ts})
		return nil
	}
	return utimes(at, base, ts, unix.AT_SYMLINK_NOFOLLOW)
}

func (a *applier) dirMeta(at int, base string, h *tar.Header, existed bool) error {
	var attrs bool
	for k := range h.PAXRecords {
		_, ok := wanted(k)
		attrs = attrs || ok
	}
	if !attrs && !existed && h.Mode&0o7000 == 0 {
		return nil
	}
	fd, err := unix.Openat(at, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: base, Err: err}
	}
	defer unix.Close(fd)
	for k, v := range h.PAXRecords {
		if name, ok := wanted(k); ok {
			if err := unix.Fsetxattr(fd, name, []byte(v), 0); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
				return xattrFault(name, err)
			}
		}
	}
	return unix.Fchmod(fd, uint32(h.Mode&0o7777))
}

const paxXattr = "SCHILY.xattr."

// wanted tells which extended attributes of a layer are kept: what a file means
// to its users, not what the host's kernel or overlayfs would act upon.
func wanted(record string) (string, bool) {
	name, ok := strings.CutPrefix(record, paxXattr)
	if !ok || strings.IndexByte(name, 0) >= 0 {
		return "", false
	}
	switch {
	case name == "security.capability", name == "system.posix_acl_access", name == "system.posix_acl_default":
		return name, true
	case strings.HasPrefix(name, "user.overlay."):
		return "", false
	}
	return name, strings.HasPrefix(name, "user.")
}

func xattrFault(name string, err error) error {
	return fault.New(fault.Invalid, "cannot set attribute %s: %w", name, err)
}

func ownFault(h *tar.Header, err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		return fault.New(fault.Unsupported, "cannot give it to user %d, group %d: %w (rootless, add more ids in /etc/subuid and /etc/subgid)", h.Uid, h.Gid, err)
	}
	return fmt.Errorf("cannot set its owner: %w", err)
}

func times(h *tar.Header) [2]unix.Timespec {
	at, mt := h.AccessTime, h.ModTime
	// Outside what every file system holds: the epoch.
	if mt.Unix() < 0 || mt.Unix() > 1<<33 {
		mt = time.Unix(0, 0)
	}
	if at.Before(mt) || at.Unix() > 1<<33 {
		at = mt
	}
	return [2]unix.Timespec{
		{Sec: at.Unix(), Nsec: int64(at.Nanosecond())},
		{Sec: mt.Unix(), Nsec: int64(mt.Nanosecond())},
	}
}

// utimes sets times of a name or, with an empty one and AT_EMPTY_PATH, of the
// descriptor itself, be it opened with O_PATH or not.
func utimes(at int, name string, ts [2]unix.Timespec, flags int) error {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if _, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(at), uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&ts)), uintptr(flags), 0, 0); e != 0 {
		return e
	}
	return nil
}
