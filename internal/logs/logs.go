// Package logs reads the logs that container monitors write: Docker's json-file
// format and the k8s-file format, with their rotated siblings (path.1 is the
// newest of those). It follows a log through rotations and truncations, woken
// by inotify, and finds the last N records from the end without reading the
// rest. A record cut off by a crash is skipped, what follows it is not.
//
// The engine imports it; the monitor is the only writer.
package logs

import (
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Record is one record of a log.
type Record struct {
	Time   time.Time
	Stream string // "stdout" or "stderr"
	// Line is valid until emit returns. It ends in a newline unless the process
	// wrote none or the line was too long for one record.
	Line []byte
}

// Options tell which records to read.
type Options struct {
	Stdout, Stderr bool
	Since, Until   time.Time // zero is no bound; both inclusive
	Tail           int       // of those that match, the last so many; negative is all
	// Ended, if set, makes Read follow the log until it is closed.
	Ended <-chan struct{}
}

// Log is the log of one container.
type Log struct {
	path   string
	decode decoder
	watch  *Watcher
}

// Open names a log. Format is "json-file" or "k8s-file". The watcher may be
// shared by all logs.
func Open(path, format string, w *Watcher) (*Log, error) {
	l := &Log{path: path, watch: w}
	switch format {
	case "json-file":
		l.decode = decodeJSON
	case "k8s-file":
		l.decode = decodeK8s
	default:
		return nil, errors.New("cannot read logs of the " + strconv.Quote(format) + " driver")
	}
	return l, nil
}

var errUntil = errors.New("past the last record asked for")

// Read calls emit for each record in order. It returns nil at the end of the
// log, emit's error, or that of ctx.
func (l *Log) Read(ctx context.Context, o Options, emit func(Record) error) error {
	files, err := l.openAll()
	if err != nil {
		return err
	}
	defer func() { closeAll(files) }()
	start, off := 0, int64(0)
	switch {
	case o.Tail == 0 && o.Ended == nil:
		return nil
	case o.Tail == 0 && len(files) > 0:
		start = len(files) - 1
		if off, err = lastBoundary(files[start]); err != nil {
			return err
		}
	case o.Tail > 0:
		if start, off, err = l.tail(files, o); err != nil {
			return err
		}
	}
	closeAll(files[:start])
	files = files[start:]
	sc := scanner{}
	following := false
	visit := func(line []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		rec, ok := l.decode(line)
		if !ok || !o.wants(rec) {
			// What is there already is read whole: a clock that was set back
			// leaves wanted records behind newer ones.
			if ok && following && !o.Until.IsZero() && rec.Time.After(o.Until) {
				return errUntil
			}
			return nil
		}
		return emit(rec)
	}
	for i, f := range files {
		sc.reset(f, off)
		off = 0
		if err := sc.lines(visit); err != nil {
			return past(err)
		}
		if i < len(files)-1 {
			f.Close()
		}
	}
	if len(files) > 0 {
		files = files[len(files)-1:]
	}
	if o.Ended == nil {
		return nil
	}
	var last *os.File
	if len(files) > 0 {
		last, files = files[0], nil
	}
	following = true
	return past(l.follow(ctx, &sc, last, o, visit))
}

func past(err error) error {
	if errors.Is(err, errUntil) {
		return nil
	}
	return err
}

func (o Options) wants(r Record) bool {
	switch {
	case r.Stream == "stdout" && !o.Stdout, r.Stream == "stderr" && !o.Stderr:
		return false
	case !o.Since.IsZero() && r.Time.Before(o.Since), !o.Until.IsZero() && r.Time.After(o.Until):
		return false
	}
	return true
}

// openAll opens the log's files, oldest first; none is no error. A rotation
// while it looks shows as one file met twice.
func (l *Log) openAll() ([]*os.File, error) {
	for range 100 {
		files, again, err := l.tryOpenAll()
		if err != nil || !again {
			return files, err
		}
		closeAll(files)
	}
	return nil, errors.New("cannot read log: it is rotated faster than it can be opened")
}

func (l *Log) tryOpenAll() (files []*os.File, again bool, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var infos []os.FileInfo
	for n := 0; ; n++ {
		path := l.path
		if n > 0 {
			path += "." + strconv.Itoa(n)
		}
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			// Between two steps of a rotation one name is free, the next is not;
			// a writer that was killed there leaves it so.
			if _, err := os.Stat(l.path + "." + strconv.Itoa(n+1)); n == 0 || err == nil {
				continue
			}
			break
		}
		if err != nil {
			return files, false, err
		}
		files = append(files, f)
		fi, err := f.Stat()
		if err != nil {
			return files, false, err
		}
		for _, o := range infos {
			if os.SameFile(o, fi) {
				return files, true, nil
			}
		}
		infos = append(infos, fi)
	}
	for i, j := 0, len(files)-1; i < j; i, j = i+1, j-1 {
		files[i], files[j] = files[j], files[i]
	}
	return files, false, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// follow goes on behind what sc has read of f until o.Ended is closed and all
// that was written before has been visited. It closes f, which may be nil.
func (l *Log) follow(ctx context.Context, sc *scanner, f *os.File, o Options, visit func([]byte) error) error {
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	var until <-chan time.Time
	if !o.Until.IsZero() {
		t := time.NewTimer(time.Until(o.Until))
		defer t.Stop()
		until = t.C
	}
	n := l.watch.notifier()
	defer n.close()
	final := false
	for {
		// Watch first, look second: what is written in between wakes us.
		n.watch(l.path, f != nil)
		progress := false
		if f != nil {
			switch cut, err := sc.truncated(); {
			case err != nil:
				return err
			case cut:
				sc.reset(f, 0)
				progress = true
			}
			if err := sc.lines(visit); err != nil {
				return err
			}
		}
		next, err := l.newer(f)
		if err != nil {
			return err
		}
		for i, nf := range next {
			// The writer no longer touches f: its rest is final.
			if f != nil {
				if err := sc.lines(visit); err != nil {
					closeAll(next[i:])
					return err
				}
				f.Close()
			}
			f = nf
			sc.reset(f, 0)
			if err := sc.lines(visit); err != nil {
				closeAll(next[i+1:])
				return err
			}
			progress = true
		}
		if progress {
			continue
		}
		if final {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-o.Ended:
			final = true // once more around, then the log is complete
		case <-until:
			final = true
		case <-n.wake():
		}
	}
}

// newer opens what came after f: nothing unless the log was rotated.
func (l *Log) newer(f *os.File) ([]*os.File, error) {
	if f == nil {
		return l.openAll()
	}
	have, err := f.Stat()
	if err != nil {
		return nil, err
	}
	now, err := os.Stat(l.path)
	if err == nil && os.SameFile(have, now) {
		return nil, nil
	}
	// Without a current file others may still have come between: a writer that
	// was killed in a rotation leaves it so.
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for range 100 {
		files, err := l.openAll()
		if err != nil {
			return nil, err
		}
		for i, o := range files {
			if fi, err := o.Stat(); err == nil && os.SameFile(have, fi) {
				closeAll(files[:i+1])
				return files[i+1:], nil
			}
		}
		if removed(f) {
			return files, nil // go on with the oldest there is
		}
		closeAll(files) // it was being renamed: look again
	}
	return nil, errors.New("cannot read log: it is rotated faster than it can be opened")
}

// removed tells whether a log's file is gone from its directory: whatever name
// it has meanwhile, only then has it no link.
func removed(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) != nil || st.Nlink == 0
}

// scanner reads whole lines of a growing file.
type scanner struct {
	f    *os.File
	off  int64 // of the next byte to read
	buf  []byte
	have int // bytes of an unfinished line in buf
	skip bool
}

// maxLine bounds one record in memory; monitors write records of 16 KiB
// (escaped: six times that), so a longer one is not theirs.
const maxLine = 1 << 20

func (s *scanner) reset(f *os.File, off int64) {
	s.f, s.off, s.have, s.skip = f, off, 0, false
	if s.buf == nil {
		s.buf = make([]byte, 32<<10)
	}
}

// lines visits every complete line from where it stopped the last time.
func (s *scanner) lines(visit func([]byte) error) error {
	for {
		if s.have == len(s.buf) {
			if len(s.buf) >= maxLine {
				s.have, s.skip = 0, true
			} else {
				s.buf = append(s.buf, make([]byte, len(s.buf))...)
			}
		}
		n, err := s.f.ReadAt(s.buf[s.have:], s.off)
		s.off += int64(n)
		data := s.buf[:s.have+n]
		from, begin := s.have, 0
		for {
			nl := indexByte(data[from:], '\n')
			if nl < 0 {
				break
			}
			end := from + nl
			if !s.skip {
				if verr := visit(data[begin:end]); verr != nil {
					return verr
				}
			}
			s.skip = false
			begin, from = end+1, end+1
		}
		s.have = copy(s.buf, data[begin:])
		if err == io.EOF || err == nil && n == 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// truncated reports that the file is shorter than what was read of it.
func (s *scanner) truncated() (bool, error) {
	fi, err := s.f.Stat()
	return err == nil && fi.Size() < s.off, err
}
