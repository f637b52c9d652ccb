// Package upload takes the tar of a build's context and offers it to BuildKit as
// a tree of files. Nothing of it becomes a file on disk: contents go into one
// nameless spool file, and names, links and modes stay in memory, so that no
// entry can lead anywhere.
package upload

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
	"github.com/tonistiigi/fsutil/types"
)

// Limits of one upload.
const (
	maxEntries = 2_000_000
	maxDepth   = 256
	maxPath    = 4096
	maxLink    = 4096
	maxText    = 256 << 20 // of all names and links together: they are kept in memory, and a few packed bytes can stand for many
	maxTail    = 64 << 20  // behind the tar's end
	// keepFree is how much of the disk an upload leaves alone.
	keepFree = 512 << 20
	// checkEvery is how many bytes are written between looks at the disk.
	checkEvery = 32 << 20
)

// Tree is an uploaded context. It implements fsutil.FS.
type Tree struct {
	spool       *os.File
	root        *node
	count, text int // entries, and bytes of their names and links
	size        int64
	// sum is of the files' names and contents, in the order that they came in.
	sum hash.Hash
}

type node struct {
	name     string
	path     string
	mode     fs.FileMode
	uid, gid int
	mtime    time.Time
	link     string
	off, len int64
	xattrs   map[string][]byte
	children map[string]*node // of a directory
}

// Read takes a tar, compressed or not. The spool file is made in dir and has no
// name there.
func Read(ctx context.Context, r io.Reader, dir string) (_ *Tree, err error) {
	t, err := Empty(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = t.Close()
		}
	}()
	plain, stop, err := decompress(r)
	if err != nil {
		return nil, err
	}
	defer stop()
	tr := tar.NewReader(plain)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			// To the end, not only the tar's: an HTTP server sees a client leave only
			// once the request is read.
			_, err := io.CopyN(io.Discard, r, maxTail)
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("cannot read the build context: %w", err)
			}
			return t, nil
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the build context: %w", err)
		}
		if err := t.add(ctx, h, tr); err != nil {
			return nil, fmt.Errorf("cannot use the build context: %w", err)
		}
	}
}

// Empty is a tree without entries.
func Empty(dir string) (*Tree, error) {
	f, err := nameless(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot make room for the build context: %w", err)
	}
	return &Tree{spool: f, sum: sha256.New(), root: &node{mode: fs.ModeDir | 0o755, children: map[string]*node{}}}, nil
}

// IsArchive tells by its first bytes whether a stream is a tar, compressed or not.
func IsArchive(head []byte) bool {
	for _, magic := range []string{"\x1f\x8b", "BZh", "\xfd7zXZ\x00", "\x28\xb5\x2f\xfd"} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	return len(head) >= 263 && bytes.Equal(head[257:262], []byte("ustar"))
}

// Close lets the contents go.
func (t *Tree) Close() error { return t.spool.Close() }

// Digest tells trees of different contents apart, which their files' sizes and times
// need not: a tar has times in whole seconds.
func (t *Tree) Digest() string { return hex.EncodeToString(t.sum.Sum(nil)) }

// Put adds or replaces a file in the top directory.
func (t *Tree) Put(name string, content []byte) error {
	return t.add(context.Background(), &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(0, 0)}, bytes.NewReader(content))
}

// Has tells whether there is something of that name.
func (t *Tree) Has(name string) bool { return t.find(name) != nil }

func (t *Tree) add(ctx context.Context, h *tar.Header, body io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	names, err := split(h.Name)
	if err != nil {
		return err
	}
	if t.count++; t.count > maxEntries {
		return fmt.Errorf("it has more than %d entries", maxEntries)
	}
	n := &node{mode: fs.FileMode(h.Mode).Perm(), uid: h.Uid, gid: h.Gid, mtime: h.ModTime}
	for bit, m := range map[int64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if h.Mode&bit != 0 {
			n.mode |= m
		}
	}
	if v, ok := h.PAXRecords["SCHILY.xattr.security.capability"]; ok && len(v) <= 64 {
		n.xattrs = map[string][]byte{"security.capability": []byte(v)}
	}
	switch h.Typeflag {
	case tar.TypeReg, '\x00':
		if sparse(h) {
			// A few bytes would stand for as many as the disk has.
			return fmt.Errorf("entry %q is sparse: pack it without --sparse", h.Name)
		}
		if n.off, n.len, err = t.store(ctx, h, body); err != nil {
			return err
		}
	case tar.TypeDir:
		n.mode |= fs.ModeDir
		n.children = map[string]*node{}
	case tar.TypeSymlink:
		if len(h.Linkname) > maxLink {
			return fmt.Errorf("the target of link %q is longer than %d bytes", h.Name, maxLink)
		}
		n.mode |= fs.ModeSymlink
		n.link = h.Linkname
	case tar.TypeLink:
		to := t.find(h.Linkname)
		if to == nil || to.mode.IsDir() {
			return fmt.Errorf("entry %q is a link to %q, which is no file before it", h.Name, h.Linkname)
		}
		n.mode, n.uid, n.gid, n.mtime, n.link, n.off, n.len, n.xattrs = to.mode, to.uid, to.gid, to.mtime, to.link, to.off, to.len, to.xattrs
	case tar.TypeFifo:
		n.mode |= fs.ModeNamedPipe
	case tar.TypeChar, tar.TypeBlock:
		return fmt.Errorf("entry %q is a device", h.Name)
	case tar.TypeGNUSparse:
		return fmt.Errorf("entry %q is sparse: pack it without --sparse", h.Name)
	default:
		return fmt.Errorf("entry %q is of unknown type %q", h.Name, h.Typeflag)
	}
	return t.put(names, n)
}

func sparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// split cleans a name and refuses one that leads out.
func split(name string) ([]string, error) {
	if len(name) > maxPath {
		return nil, fmt.Errorf("the name of an entry is longer than %d bytes", maxPath)
	}
	if strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("the name of an entry %q holds a zero byte", name)
	}
	var out []string
	for p := range strings.SplitSeq(name, "/") {
		switch p {
		case "", ".":
		case "..":
			return nil, fmt.Errorf("entry %q leads out of it", name)
		default:
			out = append(out, p)
		}
	}
	if len(out) > maxDepth {
		return nil, fmt.Errorf("entry %q is deeper than %d directories", name, maxDepth)
	}
	return out, nil
}

var errText = fmt.Errorf("its names and links take more than %d bytes", maxText)

// put hangs n into the tree. Directories that were not named are made; anything
// else in the way is replaced, as by unpacking a later entry over an earlier one.
func (t *Tree) put(names []string, n *node) error {
	if len(names) == 0 {
		return nil // the root itself
	}
	at := t.root
	for _, name := range names[:len(names)-1] {
		next := at.children[name]
		if next == nil || !next.mode.IsDir() {
			if next != nil {
				// A link here would make later entries land elsewhere when unpacked.
				return fmt.Errorf("entry %q is below something that is no directory", path.Join(names...))
			}
			if t.count++; t.count > maxEntries {
				return fmt.Errorf("it has more than %d entries", maxEntries)
			}
			next = &node{mode: fs.ModeDir | 0o755, mtime: n.mtime, name: name, path: path.Join(at.path, name), children: map[string]*node{}}
			if t.text += len(next.path); t.text > maxText {
				return errText
			}
			at.children[name] = next
		}
		at = next
	}
	n.name = names[len(names)-1]
	n.path = path.Join(at.path, n.name)
	if t.text += len(n.path) + len(n.link); t.text > maxText {
		return errText
	}
	if old := at.children[n.name]; old != nil && old.mode.IsDir() && n.mode.IsDir() {
		n.children = old.children
	}
	at.children[n.name] = n
	return nil
}

// store appends a file's content to the spool.
func (t *Tree) store(ctx context.Context, h *tar.Header, body io.Reader) (off, size int64, err error) {
	off = t.size
	if err := t.room(h.Size); err != nil {
		return 0, 0, err
	}
	fmt.Fprintf(t.sum, "%q %d\n", h.Name, h.Size)
	w := io.MultiWriter(io.NewOffsetWriter(t.spool, off), t.sum)
	for size < h.Size {
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		n, err := io.CopyN(w, body, min(checkEvery, h.Size-size))
		size += n
		t.size += n
		if err != nil {
			return 0, 0, fmt.Errorf("cannot store entry %q: %w", h.Name, err)
		}
		if size < h.Size {
			if err := t.room(h.Size - size); err != nil {
				return 0, 0, err
			}
		}
	}
	return off, size, nil
}

// room refuses what would fill the disk.
func (t *Tree) room(want int64) error {
	if want < checkEvery && t.size/checkEvery == (t.size+want)/checkEvery {
		return nil
	}
	free, err := freeSpace(t.spool)
	if err != nil {
		return err
	}
	if want > free-keepFree {
		return fmt.Errorf("it needs %d bytes more and the disk has %d free: %w", want, free, syscall.ENOSPC)
	}
	return nil
}

func (t *Tree) find(name string) *node {
	names, err := split(name)
	if err != nil {
		return nil
	}
	at := t.root
	for _, p := range names {
		if at = at.children[p]; at == nil {
			return nil
		}
	}
	return at
}

// Walk calls fn for what is at target and below, directories before their entries
// and those by name.
func (t *Tree) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	var err error
	if n := t.find(target); n == nil {
		err = fn(target, nil, &os.PathError{Op: "lstat", Path: target, Err: fs.ErrNotExist})
	} else {
		err = walk(ctx, n, fn)
	}
	if errors.Is(err, fs.SkipAll) || errors.Is(err, fs.SkipDir) {
		return nil
	}
	return err
}

func walk(ctx context.Context, n *node, fn fs.WalkDirFunc) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if n.path != "" {
		err := fn(n.path, entry{n}, nil)
		if errors.Is(err, fs.SkipDir) && n.mode.IsDir() {
			return nil
		}
		if err != nil {
			return err
		}
	}
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := walk(ctx, n.children[name], fn); err != nil {
			if errors.Is(err, fs.SkipDir) {
				return nil // the rest of this directory
			}
			return err
		}
	}
	return nil
}

// Open reads a file.
func (t *Tree) Open(name string) (io.ReadCloser, error) {
	n := t.find(name)
	if n == nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if !n.mode.IsRegular() {
		return nil, &os.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	return io.NopCloser(io.NewSectionReader(t.spool, n.off, n.len)), nil
}

// entry shows a node as fsutil wants it.
type entry struct{ n *node }

func (e entry) Name() string               { return e.n.name }
func (e entry) IsDir() bool                { return e.n.mode.IsDir() }
func (e entry) Type() fs.FileMode          { return e.n.mode.Type() }
func (e entry) Info() (fs.FileInfo, error) { return e, nil }
func (e entry) Size() int64                { return e.n.len }
func (e entry) Mode() fs.FileMode          { return e.n.mode }
func (e entry) ModTime() time.Time         { return e.n.mtime }

// Sys is the stat that is sent.
func (e entry) Sys() any {
	// Owners count as in an upload from a directory: everything is root's.
	return &types.Stat{Path: e.n.path, Mode: uint32(e.n.mode), Size: e.n.len, ModTime: e.n.mtime.UnixNano(), Linkname: e.n.link, Xattrs: e.n.xattrs}
}

// decompress finds out how a stream is compressed.
func decompress(r io.Reader) (_ io.Reader, stop func(), err error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("cannot read the build context: %w", err)
	}
	stop = func() {}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, fmt.Errorf("cannot read the build context: %w", err)
		}
		return z, stop, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(br), stop, nil
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		z, err := xz.NewReader(br, 128<<20)
		if err != nil {
			return nil, nil, fmt.Errorf("cannot read the build context: %w", err)
		}
		return z, stop, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, fmt.Errorf("cannot read the build context: %w", err)
		}
		return z, z.Close, nil
	}
	return br, stop, nil
}
