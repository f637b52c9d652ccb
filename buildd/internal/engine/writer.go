package engine

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
)

// pieceSize is how much of a blob goes in one message. A write over the socket
// waits for its answer, so that small ones would cost a turn each.
const pieceSize = 512 << 10

// ahead is the engine's content store with writers that send in large pieces while
// the next is being compressed.
type ahead struct{ content.Store }

// Writer opens a blob for writing.
func (a ahead) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := a.Store.Writer(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return &aheadWriter{Writer: w}, nil
}

// aheadWriter has at most one piece on its way. It is used by one goroutine, as
// any content.Writer.
type aheadWriter struct {
	content.Writer
	buf, spare []byte
	sent       chan error // the piece on its way; nil when there is none
	err        error
}

var errWriterClosed = errors.New("the blob's writer is closed")

func (w *aheadWriter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 && w.err == nil {
		if w.buf == nil {
			w.buf, w.spare = w.spare, nil
			if w.buf == nil {
				w.buf = make([]byte, 0, pieceSize)
			}
		}
		m := min(len(p), cap(w.buf)-len(w.buf))
		w.buf = append(w.buf, p[:m]...)
		p = p[m:]
		if len(w.buf) == cap(w.buf) {
			w.send()
		}
	}
	if w.err != nil {
		return n - len(p), w.err
	}
	return n, nil
}

// wait takes in what became of the piece on its way.
func (w *aheadWriter) wait() {
	if w.sent != nil {
		if err := <-w.sent; err != nil && w.err == nil {
			w.err = err
		}
		w.sent = nil
	}
}

// send puts the buffer on its way, after the piece before it.
func (w *aheadWriter) send() {
	w.wait()
	if len(w.buf) == 0 || w.err != nil {
		return
	}
	piece := w.buf
	w.buf = nil
	w.sent = make(chan error, 1)
	done := w.sent
	go func() {
		_, err := w.Writer.Write(piece)
		done <- err
	}()
	// The other buffer serves meanwhile.
	if w.spare == nil {
		w.spare = make([]byte, 0, pieceSize)
	}
	w.buf, w.spare = w.spare, piece[:0]
}

// flush sees everything written.
func (w *aheadWriter) flush() error {
	w.send()
	w.wait()
	return w.err
}

func (w *aheadWriter) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	if err := w.flush(); err != nil {
		return err
	}
	return w.Writer.Commit(ctx, size, expected, opts...)
}

func (w *aheadWriter) Status() (content.Status, error) {
	if err := w.flush(); err != nil {
		return content.Status{}, err
	}
	return w.Writer.Status()
}

func (w *aheadWriter) Digest() digest.Digest {
	_ = w.flush()
	return w.Writer.Digest()
}

func (w *aheadWriter) Truncate(size int64) error {
	if err := w.flush(); err != nil {
		return err
	}
	return w.Writer.Truncate(size)
}

func (w *aheadWriter) Close() error {
	w.wait() // before the stream goes
	w.buf = nil
	if w.err == nil {
		w.err = errWriterClosed
	}
	return w.Writer.Close()
}
