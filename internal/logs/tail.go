package logs

import (
	"bytes"
	"os"
)

func indexByte(b []byte, c byte) int { return bytes.IndexByte(b, c) }

// tail finds the place of the first of the last o.Tail matching records.
func (l *Log) tail(files []*os.File, o Options) (file int, off int64, err error) {
	left := o.Tail
	all := o.Stdout && o.Stderr && o.Since.IsZero() && o.Until.IsZero()
	for i := len(files) - 1; i >= 0; i-- {
		off := int64(0)
		err := backwards(files[i], func(at int64, line []byte) bool {
			if !all {
				rec, ok := l.decode(line)
				// No bound ends the search: clocks are set back too, so older
				// records may stand behind newer ones.
				if !ok || !o.wants(rec) {
					return true
				}
			}
			off = at
			left--
			return left > 0
		})
		if err != nil || left == 0 {
			return i, off, err
		}
	}
	return 0, 0, nil
}

// backwards visits the complete lines of f from the last to the first, with
// their offsets, until visit returns false.
func backwards(f *os.File, visit func(at int64, line []byte) bool) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	const block = 32 << 10
	var rest []byte // of the line whose end was seen, or a torn last line
	torn := true
	for end := fi.Size(); end > 0; {
		begin := max(end-block, 0)
		buf := make([]byte, end-begin, end-begin+int64(len(rest)))
		if n, err := f.ReadAt(buf, begin); int64(n) < end-begin {
			return err // truncated meanwhile
		}
		buf = append(buf, rest...)
		for {
			nl := bytes.LastIndexByte(buf, '\n')
			if nl < 0 {
				break
			}
			if !torn && !visit(begin+int64(nl)+1, buf[nl+1:]) {
				return nil
			}
			torn = false
			buf = buf[:nl]
		}
		if len(buf) > maxLine {
			buf = buf[:0]
		}
		rest, end = buf, begin
	}
	if !torn && len(rest) > 0 {
		visit(0, rest)
	}
	return nil
}

// lastBoundary is the offset behind the last complete line.
func lastBoundary(f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 4096)
	for end := fi.Size(); end > 0; {
		begin := max(end-int64(len(buf)), 0)
		n, _ := f.ReadAt(buf[:end-begin], begin)
		if nl := bytes.LastIndexByte(buf[:n], '\n'); nl >= 0 {
			return begin + int64(nl) + 1, nil
		}
		end = begin
	}
	return 0, nil
}
