package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

var errNone = fault.New(fault.NotFound, "this engine keeps no audit log: switch it on with 'audit: {enabled: true}' in its configuration")

// Enabled tells whether there is a log.
func (l *Log) Enabled() bool { return l != nil }

// Read emits the lines since a time (zero for all), as they are in the files; with
// follow it goes on until ctx ends.
func (l *Log) Read(ctx context.Context, since time.Time, follow bool, emit func(line []byte) error) error {
	if l == nil {
		return errNone
	}
	fail := func(err error) error { return fault.New(fault.Internal, "cannot read the audit log: %w", err) }
	names, err := l.files()
	if err != nil {
		return fail(err)
	}
	if !since.IsZero() {
		// A file whose successor begins before since holds nothing that is wanted.
		for len(names) > 1 {
			if at, ok := l.beginsAt(names[1]); !ok || at.After(since) {
				break
			}
			names = names[1:]
		}
	}
	sink := emit
	if !since.IsZero() {
		on := false
		sink = func(line []byte) error {
			if !on {
				r, err := api.OpenAudit(line)
				if on = err != nil || !r.Time.Before(since); !on {
					return nil
				}
			}
			return emit(line)
		}
	}
	for len(names) > 0 {
		name := names[0]
		wait := func() (bool, error) {
			l.mu.Lock()
			n := l.notify
			l.mu.Unlock()
			later, err := l.after(name)
			if err != nil || later != "" || !follow {
				return false, err
			}
			select {
			case <-n:
			case <-time.After(time.Second): // should a wake-up have been missed
			case <-l.done:
				return false, nil
			case <-ctx.Done():
				return false, ctx.Err()
			}
			return true, nil
		}
		if err := l.readFile(ctx, name, wait, sink); err != nil {
			if ctx.Err() != nil {
				if follow {
					return nil
				}
				return ctx.Err()
			}
			if errors.Is(err, os.ErrNotExist) { // dropped by a rotation
				err = nil
			} else {
				return err
			}
		}
		next, err := l.after(name)
		if err != nil {
			return fail(err)
		}
		if next == "" {
			return nil
		}
		names = []string{next}
	}
	return nil
}

// after is the file that follows name, "" if it is the last.
func (l *Log) after(name string) (string, error) {
	names, err := l.files()
	if err != nil {
		return "", err
	}
	i, _ := slices.BinarySearch(names, name+"\x00")
	if i < len(names) {
		return names[i], nil
	}
	return "", nil
}

func (l *Log) beginsAt(name string) (time.Time, bool) {
	f, err := os.Open(filepath.Join(l.c.Dir, name))
	if err != nil {
		return time.Time{}, false
	}
	defer f.Close()
	line, _ := bufio.NewReaderSize(f, 4<<10).ReadBytes('\n')
	r, err := api.OpenAudit(line)
	return r.Time, err == nil
}

// readFile emits the whole lines of a file. At its end, wait tells whether to look
// again; after a "no" the rest is read once more, since the file may have grown
// before it had a successor.
func (l *Log) readFile(ctx context.Context, name string, wait func() (bool, error), emit func([]byte) error) error {
	f, err := os.Open(filepath.Join(l.c.Dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	var rest []byte
	buf := make([]byte, 64<<10)
	final, patience := false, 20
	for {
		n, err := f.Read(buf)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		rest = append(rest, buf[:n]...)
		for {
			i := bytes.IndexByte(rest, '\n')
			if i < 0 {
				break
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := emit(rest[:i+1]); err != nil {
				return err
			}
			rest = rest[i+1:]
		}
		if len(rest) > 16<<20 { // not ours
			return emit(append(rest, '\n'))
		}
		if n > 0 {
			continue
		}
		if final {
			if len(rest) == 0 {
				return nil
			}
			if patience--; patience > 0 { // the writer may be at it
				time.Sleep(5 * time.Millisecond)
				continue
			}
			return emit(append(rest, '\n')) // its lines are whole: somebody else's
		}
		again, err := wait()
		if err != nil {
			return err
		}
		final = !again
	}
}

// Verify checks the whole log against itself and the head that its writer noted.
func (l *Log) Verify(ctx context.Context) (api.AuditReport, error) {
	if l == nil {
		return api.AuditReport{}, errNone
	}
	// Everything that was asked for is written before the head is read.
	x := &line{flush: true, done: make(chan struct{})}
	if l.enqueue(x) {
		select {
		case <-x.done:
		case <-ctx.Done():
			return api.AuditReport{}, ctx.Err()
		}
	}
	var v api.AuditVerifier
	if h, ok := l.readHead(); ok {
		v.Expect(h)
	} else {
		v.Report.Problems = append(v.Report.Problems, "the note of the log's head is missing or was changed")
	}
	if err := l.Read(ctx, time.Time{}, false, func(line []byte) error { v.Line(line); return nil }); err != nil {
		return v.Report, err
	}
	return v.End(), nil
}
