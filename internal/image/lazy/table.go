package lazy

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Bounds of what a table may hold.
const (
	maxTablePacked = 64 << 20
	maxTable       = 256 << 20
	maxEntries     = 2_000_000
	maxChunk       = 64 << 20
	maxXattrs      = 64 << 10
	maxDepth       = 1024

	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	tableName      = "stargz.index.json"
	footerSize     = 51
)

// entry is one line of a table; both formats' fields.
type entry struct {
	Name        string            `json:"name"`
	Type        string            `json:"type"`
	Size        int64             `json:"size"`
	ModTime     string            `json:"modtime"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"`
	UID         int64             `json:"uid"`
	GID         int64             `json:"gid"`
	Offset      int64             `json:"offset"`
	InnerOffset int64             `json:"innerOffset"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string][]byte `json:"xattrs"`
	Digest      string            `json:"digest"`
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
	ChunkType   string            `json:"chunkType"`
}

// chunk is a piece of a file.
type chunk struct {
	off, size int64 // in the file
	at, end   int64 // in the blob: where its stream begins, and where at most it ends
	inner     int64 // bytes of the stream before the chunk
	digest    digest.Digest
	zeros     bool
}

// node is a file of the layer. Its number is its index in the tree plus one.
type node struct {
	ino           uint64
	mode          uint32 // with type
	uid, gid      uint32
	nlink         uint32
	rdev          uint32
	size          int64
	mtime         time.Time
	target        string // of a symbolic link
	xattrs        map[string][]byte
	chunks        []chunk
	names         []string // of a directory, sorted; children goes with it
	children      map[string]*node
	parent        *node
	implied       bool
	contentDigest string
}

func (n *node) dir() bool { return n.mode&unix.S_IFMT == unix.S_IFDIR }

// tree is a layer's files as overlayfs wants a lower layer.
type tree struct {
	nodes []*node // the root first
	bytes int64   // of all files
	// implied names directories that the layer leaves out on the way to others.
	implied []string
}

func errTable(format string, args ...any) error {
	return fault.New(fault.Invalid, "cannot use the layer's table of contents: "+format, args...)
}

// footerTable reads where the table of an eStargz blob is from the blob's end.
func footerTable(foot []byte, size int64) (off, length int64, err error) {
	if len(foot) < footerSize {
		return 0, 0, errTable("the blob is too short")
	}
	foot = foot[len(foot)-footerSize:]
	zr, err := gzip.NewReader(bytes.NewReader(foot))
	if err != nil {
		return 0, 0, errTable("the footer is damaged: %w", err)
	}
	x := zr.Extra
	if len(x) != 26 || x[0] != 'S' || x[1] != 'G' || binary.LittleEndian.Uint16(x[2:]) != 22 || string(x[20:]) != "STARGZ" {
		return 0, 0, errTable("the blob has no eStargz footer")
	}
	off, err = strconv.ParseInt(string(x[4:20]), 16, 64)
	length = size - footerSize - off
	if err != nil || off <= 0 || length <= 0 || length > maxTablePacked {
		return 0, 0, errTable("the footer points to a wrong place")
	}
	return off, length, nil
}

// openTable unpacks and proves a table.
func openTable(b Blob, packed []byte) ([]byte, error) {
	switch b.Kind {
	case ZstdChunked:
		if got := b.Table.Algorithm().FromBytes(packed); got != b.Table {
			// The eStargz library's own writer signs the same bytes.
			return nil, errTable("it is %s, but the manifest says %s", got, b.Table)
		}
		zr, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxTable), zstd.WithDecoderMaxWindow(64<<20))
		if err != nil {
			return nil, err
		}
		defer zr.Close()
		return readBounded(zr)
	case EStargz:
		zr, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			return nil, errTable("%w", err)
		}
		tr := tar.NewReader(io.LimitReader(zr, maxTable+(1<<20)))
		h, err := tr.Next()
		if err != nil {
			return nil, errTable("%w", err)
		}
		if h.Name != tableName {
			return nil, errTable("it is called %q", h.Name)
		}
		raw, err := readBounded(tr)
		if err != nil {
			return nil, err
		}
		if got := b.Table.Algorithm().FromBytes(raw); got != b.Table {
			return nil, errTable("it is %s, but the manifest says %s", got, b.Table)
		}
		return raw, nil
	}
	return nil, errTable("unknown format %q", b.Kind)
}

func readBounded(r io.Reader) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxTable+1))
	if err != nil {
		return nil, errTable("%w", err)
	}
	if len(raw) > maxTable {
		return nil, errTable("it is larger than %d bytes", maxTable)
	}
	return raw, nil
}

// builder makes a tree of a table.
type builder struct {
	t      *tree
	limit  int64 // where file data ends in the blob
	opaque string
	byName map[string]*node
	count  int
}

// parseTable reads a table. dataEnd is where the blob's file data ends at most.
func parseTable(raw []byte, dataEnd int64, userns bool) (*tree, error) {
	b := &builder{t: &tree{}, limit: dataEnd, opaque: "trusted.overlay.opaque", byName: map[string]*node{}}
	if userns {
		b.opaque = "user.overlay.opaque"
	}
	root := b.node(unix.S_IFDIR | 0o755)
	root.implied = true
	root.parent = root
	root.nlink = 2
	b.byName["."] = root
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := b.document(dec); err != nil {
		return nil, err
	}
	return b.t, b.finish()
}

// document walks the JSON so that no more than one entry is held beside the tree.
func (b *builder) document(dec *json.Decoder) error {
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return errTable("it is no JSON object")
	}
	var file *node
	var whites []entry
	for dec.More() {
		k, err := dec.Token()
		if err != nil {
			return errTable("%w", err)
		}
		if k != "entries" {
			var skip json.RawMessage
			if err := dec.Decode(&skip); err != nil {
				return errTable("%w", err)
			}
			continue
		}
		if t, err := dec.Token(); err != nil || t != json.Delim('[') {
			return errTable("it has no list of entries")
		}
		for dec.More() {
			var e entry
			if err := dec.Decode(&e); err != nil {
				return errTable("%w", err)
			}
			if b.count++; b.count > maxEntries {
				return errTable("it has more than %d entries", maxEntries)
			}
			if e.Type == "chunk" {
				if file == nil {
					return errTable("a chunk of no file")
				}
				if err := b.chunk(file, &e); err != nil {
					return err
				}
				continue
			}
			file = nil
			name, err := clean(e.Name)
			if err != nil {
				return err
			}
			e.Name = name
			if strings.HasPrefix(path.Base(name), whiteout) {
				whites = append(whites, e)
				continue
			}
			if file, err = b.add(&e); err != nil {
				return err
			}
		}
		if _, err := dec.Token(); err != nil {
			return errTable("%w", err)
		}
	}
	// As overlayfs has them: after everything that the layer has itself.
	for i := range whites {
		if err := b.white(whites[i].Name); err != nil {
			return err
		}
	}
	return nil
}

func clean(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 || len(name) > unix.PathMax {
		return "", errTable("a name is wrong")
	}
	c := path.Clean("./" + strings.TrimLeft(name, "/"))
	if c == ".." || strings.HasPrefix(c, "../") {
		return "", errTable("the name %q leads out of the layer", name)
	}
	if strings.Count(c, "/") > maxDepth {
		return "", errTable("the name %q is too deep", name)
	}
	for part := range strings.SplitSeq(c, "/") {
		if len(part) > unix.NAME_MAX {
			return "", errTable("the name %q is too long", name)
		}
	}
	return c, nil
}

func (b *builder) node(mode uint32) *node {
	n := &node{ino: uint64(len(b.t.nodes) + 1), mode: mode}
	b.t.nodes = append(b.t.nodes, n)
	return n
}

// dirAt finds a directory or makes it, with those on the way.
func (b *builder) dirAt(name string) (*node, error) {
	if n := b.byName[name]; n != nil {
		if !n.dir() {
			// What the tar says after a link depends on what the link leads to.
			return nil, fault.New(fault.Unsupported, "the layer has entries below %q, which is no directory", name)
		}
		return n, nil
	}
	parent, err := b.dirAt(path.Dir(name))
	if err != nil {
		return nil, err
	}
	n := b.node(unix.S_IFDIR | 0o755)
	n.implied, n.nlink = true, 2
	b.link(parent, path.Base(name), name, n)
	return n, nil
}

func (b *builder) link(parent *node, base, name string, n *node) {
	if parent.children == nil {
		parent.children = map[string]*node{}
	}
	parent.children[base] = n
	if n.dir() {
		n.parent = parent
		parent.nlink++
	}
	b.byName[name] = n
}

var kinds = map[string]uint32{"dir": unix.S_IFDIR, "reg": unix.S_IFREG, "symlink": unix.S_IFLNK,
	"char": unix.S_IFCHR, "block": unix.S_IFBLK, "fifo": unix.S_IFIFO}

// add puts an entry into the tree and returns it if chunks may follow.
func (b *builder) add(e *entry) (*node, error) {
	if e.Name == "." && e.Type != "dir" {
		return nil, errTable("the root must be a directory")
	}
	old := b.byName[e.Name]
	if e.Type == "hardlink" {
		to, err := clean(e.LinkName)
		if err != nil {
			return nil, err
		}
		n := b.byName[to]
		if n == nil {
			return nil, fault.New(fault.Unsupported, "the layer's link %q leads to a file of a layer below", e.Name)
		}
		if n.dir() || old != nil {
			return nil, errTable("the link %q is wrong", e.Name)
		}
		parent, err := b.dirAt(path.Dir(e.Name))
		if err != nil {
			return nil, err
		}
		b.link(parent, path.Base(e.Name), e.Name, n)
		n.nlink++
		return nil, nil
	}
	kind, ok := kinds[e.Type]
	if !ok {
		return nil, errTable("%q is of type %q", e.Name, e.Type)
	}
	mode := kind | uint32(e.Mode)&0o7777
	n := old
	switch {
	case old != nil && !(old.dir() && kind == unix.S_IFDIR):
		// A file described twice: which one rules is the tar's order's to say.
		return nil, fault.New(fault.Unsupported, "the layer has %q twice", e.Name)
	case old != nil:
		n.mode, n.implied = mode, false
	default:
		parent, err := b.dirAt(path.Dir(e.Name))
		if err != nil {
			return nil, err
		}
		n = b.node(mode)
		n.nlink = 1
		if n.dir() {
			n.nlink = 2
		}
		b.link(parent, path.Base(e.Name), e.Name, n)
	}
	if err := b.attributes(n, e); err != nil {
		return nil, err
	}
	if kind != unix.S_IFREG {
		return nil, nil
	}
	n.size, n.contentDigest = e.Size, e.Digest
	if e.Size < 0 || b.t.bytes+e.Size < b.t.bytes {
		return nil, errTable("the size of %q is wrong", e.Name)
	}
	b.t.bytes += e.Size
	if e.Size == 0 {
		return n, nil
	}
	return n, b.chunk(n, e)
}

func (b *builder) attributes(n *node, e *entry) error {
	if e.UID < 0 || e.GID < 0 || e.UID > 1<<32-2 || e.GID > 1<<32-2 {
		return errTable("the owner of %q is wrong", e.Name)
	}
	n.uid, n.gid = uint32(e.UID), uint32(e.GID)
	if e.ModTime != "" {
		t, err := time.Parse(time.RFC3339Nano, e.ModTime)
		if err != nil {
			return errTable("the time of %q is wrong", e.Name)
		}
		n.mtime = t
	}
	switch n.mode & unix.S_IFMT {
	case unix.S_IFLNK:
		if e.LinkName == "" || len(e.LinkName) >= unix.PathMax || strings.IndexByte(e.LinkName, 0) >= 0 {
			return errTable("the link %q is wrong", e.Name)
		}
		n.target, n.size, n.mode = e.LinkName, int64(len(e.LinkName)), unix.S_IFLNK|0o777
	case unix.S_IFCHR, unix.S_IFBLK:
		if e.DevMajor < 0 || e.DevMajor > 0xfff || e.DevMinor < 0 || e.DevMinor > 0xfffff {
			return errTable("the device %q is wrong", e.Name)
		}
		n.rdev = uint32(e.DevMinor&0xff | e.DevMajor<<8 | (e.DevMinor&^0xff)<<12)
		if n.rdev == 0 && n.mode&unix.S_IFMT == unix.S_IFCHR {
			return errTable("%q pretends to be a whiteout", e.Name)
		}
	}
	sum := 0
	for k, v := range e.Xattrs {
		if sum += len(k) + len(v) + 1; sum > maxXattrs || len(k) > 255 || len(v) > maxXattrs || k == "" || strings.IndexByte(k, 0) >= 0 {
			return errTable("the attributes of %q are wrong", e.Name)
		}
		// Marks of overlayfs are not for an image to make.
		if strings.HasPrefix(k, "trusted.") || strings.HasPrefix(k, "user.overlay.") {
			delete(e.Xattrs, k)
		}
	}
	if len(e.Xattrs) > 0 {
		n.xattrs = e.Xattrs
	}
	return nil
}

// chunk adds a piece to a file. Ends in the blob are known when all are read.
func (b *builder) chunk(n *node, e *entry) error {
	c := chunk{off: e.ChunkOffset, size: e.ChunkSize, at: e.Offset, inner: e.InnerOffset, digest: digest.Digest(e.ChunkDigest), zeros: e.ChunkType == "zeros"}
	if c.size == 0 {
		c.size = n.size - c.off
	}
	var next int64
	if k := len(n.chunks); k > 0 {
		next = n.chunks[k-1].off + n.chunks[k-1].size
	}
	if c.off != next || c.size <= 0 || c.size > n.size-c.off {
		return errTable("the chunks of a file do not join")
	}
	if !c.zeros {
		if c.size > maxChunk || c.inner < 0 || c.inner > maxChunk {
			return fault.New(fault.Unsupported, "the layer has chunks of more than %d bytes", maxChunk)
		}
		if c.at <= 0 && len(b.t.nodes) > 2 || c.at < 0 || c.at >= b.limit {
			return errTable("a chunk is outside of the blob")
		}
	}
	n.chunks = append(n.chunks, c)
	return nil
}

// white hides what lower layers have under a name, or in a whole directory.
func (b *builder) white(name string) error {
	dir, base := path.Dir(name), path.Base(name)
	parent, err := b.dirAt(dir)
	if err != nil {
		return err
	}
	if base == whiteoutOpaque {
		b.makeOpaque(parent)
		return nil
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	hidden := base[len(whiteout):]
	if hidden == "" || hidden == "." || hidden == ".." {
		return errTable("a whiteout must name something")
	}
	full := path.Join(dir, hidden)
	if n := b.byName[full]; n != nil {
		if n.dir() {
			b.makeOpaque(n)
		}
		return nil
	}
	n := b.node(unix.S_IFCHR)
	n.nlink = 1
	b.link(parent, hidden, full, n)
	return nil
}

func (b *builder) makeOpaque(n *node) {
	if n.xattrs == nil {
		n.xattrs = map[string][]byte{}
	}
	n.xattrs[b.opaque] = []byte("y")
}

// finish sorts, finds where chunks end, and demands a digest for each.
func (b *builder) finish() error {
	var starts []int64
	for _, n := range b.t.nodes {
		for i := range n.chunks {
			if !n.chunks[i].zeros {
				starts = append(starts, n.chunks[i].at)
			}
		}
	}
	slices.Sort(starts)
	starts = slices.Compact(starts)
	for _, n := range b.t.nodes {
		n.names = make([]string, 0, len(n.children))
		for name := range n.children {
			n.names = append(n.names, name)
		}
		slices.SortFunc(n.names, cmp.Compare[string])
		var sum int64
		for i := range n.chunks {
			c := &n.chunks[i]
			sum += c.size
			if c.zeros {
				continue
			}
			if c.digest == "" && len(n.chunks) == 1 {
				c.digest = digest.Digest(n.contentDigest)
			}
			if err := c.digest.Validate(); err != nil {
				return fault.New(fault.Unsupported, "the layer's table has no digest for each chunk")
			}
			k, _ := slices.BinarySearch(starts, c.at+1)
			if c.end = b.limit; k < len(starts) {
				c.end = starts[k]
			}
		}
		n.contentDigest = ""
		if n.mode&unix.S_IFMT == unix.S_IFREG && sum != n.size {
			return errTable("the chunks of a file make %d of %d bytes", sum, n.size)
		}
	}
	for name, n := range b.byName {
		if n.implied && name != "." {
			b.t.implied = append(b.t.implied, name)
		}
	}
	slices.Sort(b.t.implied)
	b.byName = nil
	if len(b.t.nodes) == 0 {
		return errors.New("no root")
	}
	return nil
}

// find looks a path up without following links.
func (t *tree) find(name string) *node {
	n := t.nodes[0]
	if name == "." {
		return n
	}
	for part := range strings.SplitSeq(name, "/") {
		if n = n.children[part]; n == nil {
			return nil
		}
	}
	return n
}

func (c *chunk) String() string { return fmt.Sprintf("%d bytes at %d", c.size, c.at) }
