package lazy

import (
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// forever is how long the kernel may believe what we said: nothing changes.
const forever = 365 * 24 * time.Hour

// files answers the kernel's requests on one layer. A node's number is that of
// the table's order, so nothing is counted and nothing forgotten.
type files struct {
	fuse.RawFileSystem
	t     *tree
	b     *blob
	cache *chunkCache
	log   *slog.Logger
	said  atomic.Int64 // when a failed read was logged last, unix seconds
}

// serve mounts a tree at dir. It returns when the mount is there; serving ends
// when the kernel has no use of it any more, and done is called then.
func serve(dir string, f *files, done func()) error {
	f.RawFileSystem = fuse.NewDefaultRawFileSystem()
	srv, err := fuse.NewServer(f, dir, &fuse.MountOptions{
		AllowOther: true, Options: []string{"default_permissions"}, FsName: "servin-lazy", Name: "servin",
		DirectMountStrict: true, DirectMountFlags: unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOATIME,
		MaxBackground: 64, MaxWrite: 256 << 10, MaxReadAhead: 1 << 20, EnableSymlinkCaching: true, EnableAcl: true,
		ExplicitDataCacheControl: true, IDMappedMount: true, DisableSplice: true,
		// A file here is compressed on disk, and overlayfs may want the depth.
		DisabledCapabilities:    fuse.CAP_PASSTHROUGH,
		MaxInflightRequestBytes: 16 << 20,
	})
	if err != nil {
		return err
	}
	go func() {
		srv.Serve()
		done()
	}()
	return nil
}

func (f *files) String() string { return "servin-lazy" }

func (f *files) node(ino uint64) *node {
	if ino == 0 || ino > uint64(len(f.t.nodes)) {
		return nil
	}
	return f.t.nodes[ino-1]
}

func (n *node) attr(a *fuse.Attr) {
	*a = fuse.Attr{Ino: n.ino, Size: uint64(n.size), Blocks: uint64(n.size+511) / 512, Mode: n.mode, Nlink: n.nlink,
		Owner: fuse.Owner{Uid: n.uid, Gid: n.gid}, Rdev: n.rdev, Blksize: 4096}
	if !n.mtime.IsZero() {
		sec, ns := uint64(n.mtime.Unix()), uint32(n.mtime.Nanosecond())
		a.Atime, a.Mtime, a.Ctime, a.Atimensec, a.Mtimensec, a.Ctimensec = sec, sec, sec, ns, ns, ns
	}
}

func (n *node) entry(out *fuse.EntryOut) {
	out.NodeId, out.Generation = n.ino, 1
	n.attr(&out.Attr)
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
}

// Lookup finds a name. That it is not there may be remembered, too.
func (f *files) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	n := f.node(h.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	switch name {
	case ".":
		n.entry(out)
		return fuse.OK
	case "..":
		n.parent.entry(out)
		return fuse.OK
	}
	if c := n.children[name]; c != nil {
		c.entry(out)
		return fuse.OK
	}
	out.NodeId = 0
	out.SetEntryTimeout(forever)
	return fuse.OK
}

// GetAttr describes a node.
func (f *files) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := f.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	n.attr(&out.Attr)
	out.SetTimeout(forever)
	return fuse.OK
}

// Readlink reads a symbolic link.
func (f *files) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	n := f.node(h.NodeId)
	if n == nil || n.mode&unix.S_IFMT != unix.S_IFLNK {
		return nil, fuse.EINVAL
	}
	return []byte(n.target), fuse.OK
}

// GetXAttr reads an attribute.
func (f *files) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	n := f.node(h.NodeId)
	if n == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	v, ok := n.xattrs[attr]
	switch {
	case !ok:
		return 0, fuse.ENOATTR
	case len(dest) == 0:
		return uint32(len(v)), fuse.OK
	case len(dest) < len(v):
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dest, v)), fuse.OK
}

// ListXAttr names the attributes.
func (f *files) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n := f.node(h.NodeId)
	if n == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	keys := make([]string, 0, len(n.xattrs))
	for k := range n.xattrs {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var b []byte
	for _, k := range keys {
		b = append(append(b, k...), 0)
	}
	switch {
	case len(dest) == 0:
		return uint32(len(b)), fuse.OK
	case len(dest) < len(b):
		return uint32(len(b)), fuse.ERANGE
	}
	return uint32(copy(dest, b)), fuse.OK
}

// Open lets the kernel keep what it read.
func (f *files) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Flags&unix.O_ACCMODE != unix.O_RDONLY {
		return fuse.EROFS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// Read fetches what is not here.
func (f *files) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n := f.node(in.NodeId)
	if n == nil || n.mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fuse.EINVAL
	}
	off := int64(in.Offset)
	if off < 0 || off >= n.size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	want := min(int64(len(buf)), n.size-off)
	i, _ := slices.BinarySearchFunc(n.chunks, off, func(c chunk, off int64) int {
		switch {
		case c.off+c.size <= off:
			return -1
		case c.off > off:
			return 1
		}
		return 0
	})
	got := int64(0)
	for ; got < want; i++ {
		c := &n.chunks[i]
		if c.zeros {
			k := min(want-got, c.off+c.size-off-got)
			clear(buf[got : got+k])
			got += k
			continue
		}
		p, err := f.chunk(cancel, c)
		if err != nil {
			if err == context.Canceled {
				return nil, fuse.EINTR
			}
			// One line in ten seconds: a program may try again and again.
			if now := time.Now().Unix(); now-f.said.Load() >= 10 {
				f.said.Store(now)
				f.log.Error("a read of a lazily pulled layer failed", "layer", f.b.Digest, "cause", err)
			}
			return nil, fuse.EIO
		}
		got += int64(copy(buf[got:want], p[off+got-c.off:]))
	}
	return fuse.ReadResultData(buf[:got]), fuse.OK
}

// chunk waits for a chunk unless the reader is interrupted.
func (f *files) chunk(cancel <-chan struct{}, c *chunk) ([]byte, error) {
	type result struct {
		p   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		p, err := f.cache.get(context.Background(), f.b, c)
		done <- result{p, err}
	}()
	select {
	case r := <-done:
		return r.p, r.err
	case <-cancel:
		return nil, context.Canceled
	}
}

// OpenDir lets the kernel keep a directory's list.
func (f *files) OpenDir(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_CACHE_DIR
	return fuse.OK
}

// each calls add for the entries of a directory from off on, until it refuses.
func (f *files) each(in *fuse.ReadIn, add func(name string, n *node, off uint64) bool) fuse.Status {
	n := f.node(in.NodeId)
	if n == nil || !n.dir() {
		return fuse.ENOTDIR
	}
	for i := in.Offset; i < uint64(len(n.names))+2; i++ {
		name, c := ".", n
		switch {
		case i == 1:
			name, c = "..", n.parent
		case i > 1:
			name = n.names[i-2]
			c = n.children[name]
		}
		if !add(name, c, i+1) {
			break
		}
	}
	return fuse.OK
}

// ReadDir lists a directory.
func (f *files) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.each(in, func(name string, n *node, off uint64) bool {
		return out.AddDirEntry(fuse.DirEntry{Name: name, Mode: n.mode, Ino: n.ino, Off: off})
	})
}

// ReadDirPlus lists a directory with attributes.
func (f *files) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.each(in, func(name string, n *node, off uint64) bool {
		e := out.AddDirLookupEntry(fuse.DirEntry{Name: name, Mode: n.mode, Ino: n.ino, Off: off})
		if e != nil && off > 2 {
			n.entry(e)
		}
		return e != nil
	})
}

// StatFs describes a full, read-only file system.
func (f *files) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Blocks: uint64(f.t.bytes+4095) / 4096, Files: uint64(len(f.t.nodes)), Bsize: 4096, Frsize: 4096, NameLen: unix.NAME_MAX}
	return fuse.OK
}

// Release has nothing to do.
func (f *files) Release(<-chan struct{}, *fuse.ReleaseIn) {}

// ReleaseDir has nothing to do.
func (f *files) ReleaseDir(*fuse.ReleaseIn) {}
