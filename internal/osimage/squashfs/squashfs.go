// Package squashfs writes trees as squashfs 4.0 images, the read-only file system
// of the root: blocks of 128 KiB compressed with zstd, of 1 MiB with xz, or stored where an
// entry asks for it or compression gains nothing. All owners are root and all times are one,
// so that the same tree gives the same bytes. The format is described in
// Documentation/filesystems/squashfs.rst of the kernel. There are no fragments, no
// extended attributes and no export table: nothing here needs them.
package squashfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"

	"github.com/klauspost/compress/zstd"

	"github.com/cloudos-io/cloudos/internal/osimage/tree"
)

const (
	// Blocks of 128 KiB are a fair size to unpack for one page of them; those that are stored have the
	// most that the kernel takes, since each is a request to the disk, and so have those that are
	// to be as small as it goes.
	packedLog = 17
	storedLog = 20
	smallLog  = 20
	metaSize  = 8192

	superSize = 96
	magic     = 0x73717368
	xzID      = 4
	lz4ID     = 5
	zstdID    = 6
	invalid   = math.MaxUint64
	noFrag    = math.MaxUint32
	stored    = 1 << 24

	flagNoFragments = 0x0010
	flagNoXattrs    = 0x0200
	flagOptions     = 0x0400

	typeDir, typeFile, typeSymlink, typeChar, typeBigDir = 1, 2, 3, 5, 8
)

// Usage tells what entries take in the image, compressed, by path.
type Usage map[string]int64

// A packer compresses blocks: id is the kernel's number of the way, block returns nil where nothing
// is gained; code says that it is of a program. options follow the superblock as a metadata block where the way has any.
type packer struct {
	id       uint16
	options  []byte
	blockLog uint16 // of the size of a block
	block    func(b []byte, code bool) ([]byte, error)
}

// Pack compresses a block to an xz stream whose check is a CRC32 and whose window has that many bytes;
// code says that it is of a program. It is called from several goroutines.
type Pack func(block []byte, code bool, window int) ([]byte, error)

// lz4Options are the format's version and that it is of high compression: the kernel takes no LZ4 without.
var lz4Options = []byte{1, 0, 0, 0, 1, 0, 0, 0}

// Write writes the tree to w, which is at its start, padded to a multiple of 4096 bytes, as small as
// it becomes. seconds is the time of all entries, since 1970.
func Write(w io.WriteSeeker, t *tree.Tree, seconds uint32) (Usage, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(1<<packedLog),
		zstd.WithSingleSegment(true), zstd.WithEncoderCRC(false), zstd.WithEncoderConcurrency(4))
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	return write(w, t, seconds, packer{zstdID, nil, packedLog, func(b []byte, _ bool) ([]byte, error) { return gained(b, enc.EncodeAll(b, nil)), nil }})
}

// WriteSmall is Write with xz: a fifth smaller, and some five times the work to read.
func WriteSmall(w io.WriteSeeker, t *tree.Tree, seconds uint32, pack Pack) (Usage, error) {
	return write(w, t, seconds, packer{xzID, nil, smallLog, func(b []byte, code bool) ([]byte, error) {
		packed, err := pack(b, code, 1<<smallLog)
		return gained(b, packed), err
	}})
}

// WriteStored is Write without compression: each block is read as it is.
func WriteStored(w io.WriteSeeker, t *tree.Tree, seconds uint32) (Usage, error) {
	return write(w, t, seconds, packer{lz4ID, lz4Options, storedLog, func([]byte, bool) ([]byte, error) { return nil, nil }})
}

func gained(raw, packed []byte) []byte {
	if len(packed) >= len(raw) {
		return nil
	}
	return packed
}

func write(w io.WriteSeeker, t *tree.Tree, seconds uint32, pack packer) (Usage, error) {
	base, err := w.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, err
	}
	s := &writer{out: w, base: base, pack: pack, time: seconds, usage: Usage{}, refs: map[string]ref{}, children: map[string][]*tree.Entry{}, numbers: map[string]uint32{}}
	s.inodes.pack, s.dirs.pack = pack, pack
	if err := s.write(t); err != nil {
		return nil, fmt.Errorf("cannot write a squashfs: %w", err)
	}
	return s.usage, nil
}

type writer struct {
	out      io.WriteSeeker
	base     int64 // where it begins in out
	pack     packer
	at       int64
	time     uint32
	usage    Usage
	inodes   meta
	dirs     meta
	refs     map[string]ref
	children map[string][]*tree.Entry
	numbers  map[string]uint32
}

// ref is where an inode is: the start of its metadata block and the place in it.
type ref struct {
	block  uint32
	offset uint16
	kind   uint16
}

func (s *writer) emit(b []byte) error {
	n, err := s.out.Write(b)
	s.at += int64(n)
	return err
}

func (s *writer) write(t *tree.Tree) error {
	if err := s.emit(make([]byte, superSize)); err != nil {
		return err
	}
	flags := uint16(flagNoFragments | flagNoXattrs)
	if o := s.pack.options; o != nil {
		flags |= flagOptions
		if err := s.emit(append(binary.LittleEndian.AppendUint16(nil, uint16(len(o))|0x8000), o...)); err != nil {
			return err
		}
	}
	entries := t.Sorted()
	if len(entries) > math.MaxInt32 {
		return errors.New("too many entries")
	}
	for i, e := range entries {
		s.numbers[e.Path] = uint32(i + 1)
		if e.Path != "." {
			d := path.Dir(e.Path)
			s.children[d] = append(s.children[d], e)
		}
	}
	blocks, err := s.data(entries)
	if err != nil {
		return err
	}
	if err := s.inode(t.Get("."), blocks); err != nil {
		return err
	}
	root := s.refs["."]
	inodeStart := s.at
	if err := s.table(&s.inodes); err != nil {
		return err
	}
	dirStart := s.at
	if err := s.table(&s.dirs); err != nil {
		return err
	}
	// One id: 0. Its block, then the list of blocks, which ends the image.
	idBlock := s.at
	if err := s.emit([]byte{4, 0x80, 0, 0, 0, 0}); err != nil {
		return err
	}
	idTable := s.at
	if err := s.emit(binary.LittleEndian.AppendUint64(nil, uint64(idBlock))); err != nil {
		return err
	}
	used := s.at
	if pad := used % 4096; pad != 0 {
		if err := s.emit(make([]byte, 4096-pad)); err != nil {
			return err
		}
	}
	le := binary.LittleEndian
	var b []byte
	for _, v := range []uint32{magic, uint32(len(entries)), s.time, 1 << s.pack.blockLog, 0} {
		b = le.AppendUint32(b, v)
	}
	for _, v := range []uint16{s.pack.id, s.pack.blockLog, flags, 1, 4, 0} {
		b = le.AppendUint16(b, v)
	}
	for _, v := range []uint64{uint64(root.block)<<16 | uint64(root.offset), uint64(used), uint64(idTable), invalid,
		uint64(inodeStart), uint64(dirStart), invalid, invalid} {
		b = le.AppendUint64(b, v)
	}
	if _, err := s.out.Seek(s.base, io.SeekStart); err != nil {
		return err
	}
	if _, err := s.out.Write(b); err != nil {
		return err
	}
	_, err = s.out.Seek(0, io.SeekEnd)
	return err
}

type fileBlocks struct {
	start uint32
	sizes []uint32
}

// ahead is how many blocks are compressed at a time.
const ahead = 4

// A block is one on its way to the image.
type block struct {
	of          *tree.Entry
	raw, packed []byte
	err         error
	done        chan struct{}
}

// data writes the blocks of all files, in order.
func (s *writer) data(entries []*tree.Entry) (map[string]*fileBlocks, error) {
	files := map[string]*fileBlocks{}
	var queue []*block
	defer func() {
		for _, b := range queue {
			<-b.done
		}
	}()
	flush := func() error {
		b := queue[0]
		<-b.done
		queue = queue[1:]
		if b.err != nil {
			return fmt.Errorf("%s: %w", b.of.Path, b.err)
		}
		f := files[b.of.Path]
		if len(f.sizes) == 0 {
			if s.at > math.MaxUint32 {
				return errors.New("too big")
			}
			f.start = uint32(s.at)
		}
		packed, size := b.packed, uint32(len(b.packed))
		if packed == nil {
			packed, size = b.raw, uint32(len(b.raw))|stored
		}
		f.sizes = append(f.sizes, size)
		s.usage[b.of.Path] += int64(len(packed))
		return s.emit(packed)
	}
	for _, e := range entries {
		if !e.Mode.IsRegular() {
			continue
		}
		files[e.Path] = &fileBlocks{}
		err := s.read(e, func(raw []byte) error {
			b := &block{of: e, raw: raw, done: make(chan struct{})}
			queue = append(queue, b)
			go func() {
				defer close(b.done)
				if !e.Store {
					b.packed, b.err = s.pack.block(raw, e.Mode&0o111 != 0)
				}
			}()
			if len(queue) == ahead {
				return flush()
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	for len(queue) > 0 {
		if err := flush(); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// read hands a file's content on, block by block.
func (s *writer) read(e *tree.Entry, next func([]byte) error) error {
	if e.Size > math.MaxUint32 {
		return fmt.Errorf("%s: too big", e.Path)
	}
	r, err := e.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	for left := e.Size; left > 0; {
		raw := make([]byte, min(left, 1<<s.pack.blockLog))
		if _, err := io.ReadFull(r, raw); err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		left -= int64(len(raw))
		if err := next(raw); err != nil {
			return err
		}
	}
	if n, _ := r.Read(make([]byte, 1)); n > 0 {
		return fmt.Errorf("%s: it grew while it was read", e.Path)
	}
	return nil
}

// inode writes the inode of e after those of everything below it.
func (s *writer) inode(e *tree.Entry, blocks map[string]*fileBlocks) error {
	for _, c := range s.children[e.Path] {
		if err := s.inode(c, blocks); err != nil {
			return err
		}
	}
	le := binary.LittleEndian
	var kind uint16
	var body []byte
	switch {
	case e.Mode.IsDir():
		at, size := s.listing(e)
		nlink := uint32(2)
		for _, c := range s.children[e.Path] {
			if c.Mode.IsDir() {
				nlink++
			}
		}
		parent := uint32(len(s.numbers) + 1) // of the root: none
		if e.Path != "." {
			parent = s.numbers[path.Dir(e.Path)]
		}
		if size+3 <= math.MaxUint16 {
			kind = typeDir
			body = le.AppendUint32(body, at.block)
			body = le.AppendUint32(body, nlink)
			body = le.AppendUint16(body, uint16(size+3))
			body = le.AppendUint16(body, at.offset)
			body = le.AppendUint32(body, parent)
		} else {
			kind = typeBigDir
			for _, v := range []uint32{nlink, uint32(size + 3), at.block, parent} {
				body = le.AppendUint32(body, v)
			}
			body = le.AppendUint16(body, 0)
			body = le.AppendUint16(body, at.offset)
			body = le.AppendUint32(body, math.MaxUint32)
		}
	case e.Mode.IsRegular():
		kind = typeFile
		f := blocks[e.Path]
		for _, v := range append([]uint32{f.start, noFrag, 0, uint32(e.Size)}, f.sizes...) {
			body = le.AppendUint32(body, v)
		}
	case e.Mode&fs.ModeSymlink != 0:
		kind = typeSymlink
		body = le.AppendUint32(body, 1)
		body = le.AppendUint32(body, uint32(len(e.Link)))
		body = append(body, e.Link...)
	case e.Mode&fs.ModeCharDevice != 0:
		kind = typeChar
		body = le.AppendUint32(body, 1)
		body = le.AppendUint32(body, e.Minor&0xff|e.Major<<8|e.Minor&^0xff<<12)
	default:
		return fmt.Errorf("%s is of a kind that is not written", e.Path)
	}
	var head []byte
	head = le.AppendUint16(head, kind)
	head = le.AppendUint16(head, permissions(e.Mode))
	head = le.AppendUint32(head, 0) // owner and group: the first id
	head = le.AppendUint32(head, s.time)
	head = le.AppendUint32(head, s.numbers[e.Path])
	at := s.inodes.place()
	if kind == typeBigDir {
		kind = typeDir // as listings name it
	}
	s.refs[e.Path] = ref{at.block, at.offset, kind}
	s.inodes.Write(append(head, body...))
	return nil
}

func permissions(m fs.FileMode) uint16 {
	p := uint16(m.Perm())
	for bit, v := range map[fs.FileMode]uint16{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			p |= v
		}
	}
	return p
}

// listing writes a folder's entries and tells where, and how long they are.
func (s *writer) listing(e *tree.Entry) (ref, int) {
	le := binary.LittleEndian
	at := s.dirs.place()
	size := 0
	children := s.children[e.Path]
	for len(children) > 0 {
		first := s.refs[children[0].Path]
		number := s.numbers[children[0].Path]
		n := 0
		var run []byte
		for n < len(children) && n < 256 {
			c := children[n]
			r, delta := s.refs[c.Path], int64(s.numbers[c.Path])-int64(number)
			if r.block != first.block || delta > math.MaxInt16 {
				break
			}
			name := path.Base(c.Path)
			run = le.AppendUint16(run, r.offset)
			run = le.AppendUint16(run, uint16(int16(delta)))
			run = le.AppendUint16(run, r.kind)
			run = le.AppendUint16(run, uint16(len(name)-1))
			run = append(run, name...)
			n++
		}
		var head []byte
		head = le.AppendUint32(head, uint32(n-1))
		head = le.AppendUint32(head, first.block)
		head = le.AppendUint32(head, number)
		s.dirs.Write(head)
		s.dirs.Write(run)
		size += len(head) + len(run)
		children = children[n:]
	}
	return at, size
}

// meta is a table of metadata blocks of up to 8 KiB each.
type meta struct {
	pack packer
	done bytes.Buffer
	cur  []byte
	err  error
}

func (m *meta) place() ref {
	return ref{block: uint32(m.done.Len()), offset: uint16(len(m.cur))}
}

func (m *meta) Write(p []byte) {
	for len(p) > 0 {
		n := min(len(p), metaSize-len(m.cur))
		m.cur = append(m.cur, p[:n]...)
		p = p[n:]
		if len(m.cur) == metaSize {
			m.flush()
		}
	}
}

func (m *meta) flush() {
	packed, err := m.pack.block(m.cur, false)
	m.err = errors.Join(m.err, err)
	head := uint16(0)
	if packed == nil {
		packed, head = m.cur, 0x8000
	}
	m.done.Write(binary.LittleEndian.AppendUint16(nil, uint16(len(packed))|head))
	m.done.Write(packed)
	m.cur = m.cur[:0]
}

// table writes a whole table.
func (s *writer) table(m *meta) error {
	if len(m.cur) > 0 {
		m.flush()
	}
	if m.err != nil {
		return m.err
	}
	return s.emit(m.done.Bytes())
}
