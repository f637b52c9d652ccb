package logs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"syscall"
	"time"
)

// Cursor is a place in a log that outlives rotations and restarts of whoever
// reads: behind the last record taken. The zero Cursor is the log's beginning.
type Cursor struct {
	ino  uint64
	off  int64
	line uint32 // length of the record before off, and its sum: inodes are used again
	sum  uint32
	at   int64 // that record's time, nanoseconds
}

// cursorSize is the length of an encoded Cursor.
const cursorSize = 40

// Time is that of the last record taken; zero before the first.
func (c Cursor) Time() time.Time {
	if c.at == 0 {
		return time.Time{}
	}
	return time.Unix(0, c.at).UTC()
}

// Encode gives the bytes to store: always as many, with a check sum.
func (c Cursor) Encode() []byte {
	b := make([]byte, 0, cursorSize)
	b = binary.LittleEndian.AppendUint32(b, 1) // version
	b = binary.LittleEndian.AppendUint64(b, c.ino)
	b = binary.LittleEndian.AppendUint64(b, uint64(c.off))
	b = binary.LittleEndian.AppendUint32(b, c.line)
	b = binary.LittleEndian.AppendUint32(b, c.sum)
	b = binary.LittleEndian.AppendUint64(b, uint64(c.at))
	return binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
}

// DecodeCursor reads what Encode wrote.
func DecodeCursor(b []byte) (Cursor, error) {
	if len(b) != cursorSize || binary.LittleEndian.Uint32(b) != 1 || binary.LittleEndian.Uint32(b[36:]) != crc32.ChecksumIEEE(b[:36]) {
		return Cursor{}, errors.New("cannot use a damaged log cursor")
	}
	c := Cursor{
		ino: binary.LittleEndian.Uint64(b[4:]), off: int64(binary.LittleEndian.Uint64(b[12:])),
		line: binary.LittleEndian.Uint32(b[20:]), sum: binary.LittleEndian.Uint32(b[24:]), at: int64(binary.LittleEndian.Uint64(b[28:])),
	}
	if c.off < 0 || int64(c.line) > c.off || c.line > maxLine {
		return Cursor{}, errors.New("cannot use a damaged log cursor")
	}
	return c, nil
}

// Tail takes records from a cursor on, in batches. One goroutine uses it.
type Tail struct {
	log  *Log
	f    *os.File
	cur  Cursor // behind what Next returned last
	read int64  // offset in f of buf[0]
	buf  []byte
	have int
	skip bool // within a line that is too long
	n    *notifier
	// Lost is called when files were removed by rotation before they were read:
	// records from the time of the cursor to that of the next one may be missing.
	Lost func(after time.Time)
}

// From begins at a cursor. If what it points to is gone, it begins at the oldest
// record there is and Lost is called.
func (l *Log) From(c Cursor, lost func(after time.Time)) (*Tail, error) {
	files, err := l.openAll()
	if err != nil {
		return nil, err
	}
	t := &Tail{log: l, Lost: lost, cur: c, buf: make([]byte, 16<<10), n: l.watch.notifier()}
	if c == (Cursor{}) {
		if len(files) > 0 {
			t.use(files[0], 0)
			closeAll(files[1:])
		}
		return t, nil
	}
	for i, f := range files {
		if t.holds(f, c) {
			closeAll(files[:i])
			closeAll(files[i+1:])
			t.use(f, c.off)
			return t, nil
		}
	}
	if len(files) > 0 {
		t.use(files[0], 0)
		closeAll(files[1:])
	}
	t.Lost(c.Time())
	return t, nil
}

func inode(f *os.File) uint64 {
	if fi, err := f.Stat(); err == nil {
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			return st.Ino
		}
	}
	return 0
}

// holds tells whether the cursor's record is where it says.
func (t *Tail) holds(f *os.File, c Cursor) bool {
	if inode(f) != c.ino {
		return false
	}
	b := make([]byte, c.line)
	_, err := f.ReadAt(b, c.off-int64(c.line))
	return err == nil && crc32.ChecksumIEEE(b) == c.sum
}

func (t *Tail) use(f *os.File, off int64) {
	if t.f != nil {
		t.f.Close()
	}
	t.f, t.read, t.have, t.skip = f, off, 0, false
	t.cur.ino, t.cur.off = inode(f), off
	t.n.watch(t.log.path, true)
	if off == 0 {
		t.cur.line, t.cur.sum = 0, 0
	}
}

// Next returns the records that are there, at most max of them or about a
// quarter of a megabyte; none means that all was taken. They are valid for good.
func (t *Tail) Next(max int) ([]Record, error) {
	var out []Record
	size := 0
	// Watch first, look second: what is written in between wakes Wait.
	t.n.watch(t.log.path, t.f != nil)
	for len(out) < max && size < 256<<10 {
		if t.f != nil {
			more, err := t.fill(&out, &size, max)
			if err != nil {
				return out, err
			}
			if more {
				continue
			}
		}
		next, err := t.log.newer(t.f)
		if err != nil || len(next) == 0 {
			return out, err
		}
		// The writer no longer touches the file: what came to it meanwhile is its rest.
		if t.f != nil {
			before := len(out)
			if more, err := t.fill(&out, &size, max); err != nil || more || len(out) > before {
				closeAll(next)
				if err != nil {
					return out, err
				}
				continue
			}
			// Then others that came behind it may be gone, too.
			if removed(t.f) {
				t.Lost(t.cur.Time())
			}
		}
		closeAll(next[1:])
		t.use(next[0], 0)
	}
	return out, nil
}

// fill takes complete lines from the file; more tells that there may be others.
func (t *Tail) fill(out *[]Record, size *int, max int) (more bool, err error) {
	for {
		data := t.buf[:t.have]
		for len(*out) < max && *size < 256<<10 {
			nl := bytes.IndexByte(data, '\n')
			if nl < 0 {
				break
			}
			line := data[:nl]
			t.read += int64(nl) + 1
			t.cur.off = t.read
			t.cur.line, t.cur.sum = uint32(nl)+1, crc32.ChecksumIEEE(data[:nl+1])
			data = data[nl+1:]
			if t.skip { // its beginning is no longer there: the cursor has nothing to check
				t.skip = false
				t.cur.line, t.cur.sum = 0, 0
				continue
			}
			if r, ok := t.log.decode(line); ok {
				r.Line = bytes.Clone(r.Line)
				t.cur.at = r.Time.UnixNano()
				*size += len(r.Line) + 64
				*out = append(*out, r)
			}
		}
		t.have = copy(t.buf, data)
		if len(*out) >= max || *size >= 256<<10 {
			return true, nil
		}
		if t.have == len(t.buf) {
			if len(t.buf) < maxLine {
				t.buf = append(t.buf, make([]byte, len(t.buf))...)
			} else {
				t.read += int64(t.have)
				t.have, t.skip = 0, true
			}
		}
		n, err := t.f.ReadAt(t.buf[t.have:], t.read+int64(t.have))
		t.have += n
		if n == 0 {
			if err != nil && !errors.Is(err, io.EOF) {
				return false, err
			}
			return false, nil
		}
	}
}

// Cursor is behind the last record that Next returned.
func (t *Tail) Cursor() Cursor { return t.cur }

// Wait returns true when there may be more than Next has seen, and false when
// ended or ctx is.
func (t *Tail) Wait(ctx context.Context, ended <-chan struct{}) bool {
	select {
	case <-t.n.wake():
		return true
	case <-ended:
		return false
	case <-ctx.Done():
		return false
	}
}

// Behind is about how many bytes of the log come after a cursor.
func (l *Log) Behind(c Cursor) int64 {
	files, err := l.openAll()
	if err != nil {
		return 0
	}
	defer closeAll(files)
	var n int64
	for i := len(files) - 1; i >= 0; i-- {
		fi, err := files[i].Stat()
		if err != nil {
			continue
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Ino == c.ino {
			return n + max(fi.Size()-c.off, 0)
		}
		n += fi.Size()
	}
	return n
}

// Close frees what the tail holds.
func (t *Tail) Close() {
	t.n.close()
	if t.f != nil {
		t.f.Close()
	}
}
