package overlay

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// Diff streams the layer as an OCI layer. See snapshot.Store.
func (s *Store) Diff(ctx context.Context, id string, w io.Writer) error {
	l, err := s.lookup(id)
	if err != nil {
		return err
	}
	upper, err := openDir(unix.AT_FDCWD, filepath.Join(l.dir, upperName))
	if err != nil {
		return fmt.Errorf("cannot read layer %s: %w", id, err)
	}
	defer unix.Close(upper)
	buf := bufio.NewWriterSize(w, 1<<16)
	p := packer{prefix: s.cap.xattrPrefix(), tw: tar.NewWriter(buf), links: map[uint64]string{}}
	if err := p.dir(ctx, upper, ""); err != nil {
		return fmt.Errorf("cannot archive layer %s: %w", id, err)
	}
	if err := p.tw.Close(); err != nil {
		return fmt.Errorf("cannot archive layer %s: %w", id, err)
	}
	if err := buf.Flush(); err != nil {
		return fmt.Errorf("cannot archive layer %s: %w", id, err)
	}
	return nil
}

// packer writes a tree as tar, overlayfs's marks as OCI whiteouts.
type packer struct {
	prefix string
	tw     *tar.Writer
	links  map[uint64]string
}

func (p *packer) dir(ctx context.Context, at int, base string) error {
	ents, err := names(at)
	if err != nil {
		return err
	}
	for _, name := range ents {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.entry(ctx, at, name, path.Join(base, name)); err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) entry(ctx context.Context, at int, name, full string) error {
	// An O_PATH descriptor pins the object, whatever the container does to the name.
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return &os.PathError{Op: "open", Path: full, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: full, Err: err}
	}
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	h := &tar.Header{
		Name:    full,
		Mode:    int64(st.Mode & 0o7777),
		Uid:     int(st.Uid),
		Gid:     int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()),
		Format:  tar.FormatPAX,
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFSOCK:
		return nil // tar has no sockets
	case unix.S_IFCHR:
		if st.Rdev == 0 {
			h.Name = path.Join(path.Dir(full), whiteoutPrefix+name)
			h.Typeflag, h.Mode = tar.TypeReg, 0
			return p.tw.WriteHeader(h)
		}
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, "", buf)
		if err != nil {
			return &os.PathError{Op: "readlink", Path: full, Err: err}
		}
		h.Linkname = string(buf[:n])
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	default:
		h.Typeflag = tar.TypeReg
		h.Size = st.Size
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	if h.Typeflag != tar.TypeDir && st.Nlink > 1 {
		if first, ok := p.links[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return p.tw.WriteHeader(h)
		}
		p.links[st.Ino] = full
	}
	isOpaque := false
	if h.PAXRecords, isOpaque, err = p.xattrs(self, h.Typeflag); err != nil {
		return &os.PathError{Op: "read attributes", Path: full, Err: err}
	}
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return p.content(self, full, st.Size)
	case tar.TypeDir:
		if isOpaque {
			wh := *h
			wh.Name, wh.Typeflag, wh.PAXRecords = path.Join(full, whiteoutOpaque), tar.TypeReg, nil
			if err := p.tw.WriteHeader(&wh); err != nil {
				return err
			}
		}
		d, err := unix.Open(self, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: full, Err: err}
		}
		defer unix.Close(d)
		return p.dir(ctx, d, full)
	}
	return nil
}

func (p *packer) content(self, full string, size int64) error {
	f, err := os.Open(self)
	if err != nil {
		return &os.PathError{Op: "open", Path: full, Err: errors.Unwrap(err)}
	}
	defer f.Close()
	n, err := io.CopyN(p.tw, f, size)
	if errors.Is(err, io.EOF) {
		return fault.New(fault.Conflict, "%s shrank from %d to %d bytes while it was read (pause the container first)", full, size, n)
	}
	return err
}

// xattrs reads the attributes that a layer carries, and whether the directory is
// opaque. Symbolic links and special files have none that matter.
func (p *packer) xattrs(self string, typ byte) (map[string]string, bool, error) {
	if typ != tar.TypeReg && typ != tar.TypeDir {
		return nil, false, nil
	}
	buf := make([]byte, 1024)
	n, err := unix.Listxattr(self, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 1<<16)
		n, err = unix.Listxattr(self, buf)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || (err == nil && n == 0) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	out := map[string]string{}
	isOpaque := false
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, p.prefix) {
			isOpaque = isOpaque || name == p.prefix+"opaque"
			continue
		}
		if name == "security.selinux" || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		val := make([]byte, 1<<16)
		vn, err := unix.Getxattr(self, name, val)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, false, err
		}
		out["SCHILY.xattr."+name] = string(val[:vn])
	}
	if len(out) == 0 {
		out = nil
	}
	return out, isOpaque, nil
}
