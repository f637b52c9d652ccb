package engine

import (
	"bytes"
	"context"
	"errors"
	"math/rand"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
)

type sink struct {
	content.Writer
	got       bytes.Buffer
	writes    int
	failAfter int
	committed bool
}

func (s *sink) Write(p []byte) (int, error) {
	if s.writes++; s.failAfter > 0 && s.writes > s.failAfter {
		return 0, errors.New("full")
	}
	return s.got.Write(p)
}
func (s *sink) Commit(context.Context, int64, digest.Digest, ...content.Opt) error {
	s.committed = true
	return nil
}
func (s *sink) Digest() digest.Digest { return digest.FromBytes(s.got.Bytes()) }
func (s *sink) Status() (content.Status, error) {
	return content.Status{Offset: int64(s.got.Len())}, nil
}
func (s *sink) Truncate(int64) error { s.got.Reset(); return nil }
func (s *sink) Close() error         { return nil }

func TestAheadWriter(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	var want bytes.Buffer
	s := &sink{}
	w := &aheadWriter{Writer: s}
	for want.Len() < 5*pieceSize {
		p := make([]byte, r.Intn(300_000))
		r.Read(p)
		want.Write(p)
		if n, err := w.Write(p); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
		clear(p) // the caller's again
	}
	if st, err := w.Status(); err != nil || st.Offset != int64(want.Len()) {
		t.Errorf("status %+v, %v", st, err)
	}
	if _, err := w.Write([]byte("end")); err != nil {
		t.Fatal(err)
	}
	want.WriteString("end")
	if w.Digest() != digest.FromBytes(want.Bytes()) {
		t.Error("not what was written")
	}
	if err := w.Commit(t.Context(), 0, ""); err != nil || !s.committed {
		t.Error(err)
	}
	if s.writes > 9 {
		t.Errorf("%d writes", s.writes)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if _, err := w.Write([]byte("x")); err == nil {
		t.Error("written after Close")
	}
}

func TestAheadWriterFails(t *testing.T) {
	s := &sink{failAfter: 1}
	w := &aheadWriter{Writer: s}
	var err error
	for range 5 {
		if _, err = w.Write(make([]byte, pieceSize)); err != nil {
			break
		}
	}
	if err == nil {
		t.Error("the failure was kept quiet")
	}
	if err := w.Commit(t.Context(), 0, ""); err == nil || s.committed {
		t.Error("committed all the same")
	}
	// A failure of the last piece shows in Commit at the latest.
	s = &sink{failAfter: 1}
	w = &aheadWriter{Writer: s}
	_, _ = w.Write(make([]byte, pieceSize+1))
	if err := w.Commit(t.Context(), 0, ""); err == nil || s.committed {
		t.Error("the last piece is missing")
	}
}
