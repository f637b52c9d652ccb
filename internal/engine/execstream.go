package engine

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudos-io/cloudos/internal/runtime"
)

// execStreams are the ends of an exec's streams. A client may leave them at any
// moment, by its detach keys or because it died, while the process goes on: its
// terminal is not hung up and its pipes do not break, but what it still writes
// is dropped.
type execStreams struct {
	proc     runtime.Exec
	streams  runtime.Streams
	out, err *leftReader
	once     sync.Once
}

func newExecStreams(proc runtime.Exec) *execStreams {
	s := &execStreams{proc: proc, streams: proc.Streams()}
	wrap := func(r io.Reader) *leftReader {
		if r == nil {
			return nil
		}
		return &leftReader{r: r, proc: proc}
	}
	s.out, s.err = wrap(s.streams.Stdout), wrap(s.streams.Stderr)
	return s
}

// leave ends the client's part. Where the process goes on, the streams stay
// open and are read until they end, or until done.
func (s *execStreams) leave(done context.Context, spawn func(func())) error {
	var err error
	s.once.Do(func() {
		select {
		case <-s.proc.Exited():
			err = s.streams.Close()
			return
		default:
		}
		if s.streams.Stdin != nil {
			_ = s.streams.Stdin.Close() // a terminal's stays open
		}
		var readers []*leftReader
		for _, r := range []*leftReader{s.out, s.err} {
			if r == nil {
				continue
			}
			if !r.leave() { // its reader cannot be told to go: only closing does it
				err = s.streams.Close()
				return
			}
			readers = append(readers, r)
		}
		spawn(func() {
			stop := context.AfterFunc(done, func() { _ = s.streams.Close() })
			defer stop()
			var wg sync.WaitGroup
			for _, r := range readers {
				wg.Go(r.drain)
			}
			wg.Wait()
			_ = s.streams.Close()
		})
	})
	return err
}

// leftReader reads an output of an exec for a client that may leave.
type leftReader struct {
	r    io.Reader
	proc runtime.Exec
	mu   sync.Mutex // held while reading
	left atomic.Bool
}

type deadliner interface{ SetReadDeadline(time.Time) error }

// Read ends no sooner than the process has ended, for clients then ask for the
// exit code; or when the client has left.
func (l *leftReader) Read(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left.Load() {
		return 0, io.EOF
	}
	n, err := l.r.Read(p)
	switch {
	case n > 0 || err == nil:
		return n, err
	case l.left.Load() && errors.Is(err, os.ErrDeadlineExceeded):
		return 0, io.EOF
	case err == io.EOF:
		t := time.NewTimer(2 * time.Second) // a monitor that died tells no end
		defer t.Stop()
		select {
		case <-l.proc.Exited():
		case <-t.C:
		}
	}
	return n, err
}

// leave makes the client's reading end.
func (l *leftReader) leave() bool {
	d, ok := l.r.(deadliner)
	if !ok {
		return false
	}
	l.left.Store(true)
	return d.SetReadDeadline(time.Unix(1, 0)) == nil
}

// drain drops what still comes, once the client reads no more.
func (l *leftReader) drain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.r.(deadliner).SetReadDeadline(time.Time{}) == nil {
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{l.r})
	}
}
