package unpack

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"sync"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// stream decompresses on a goroutine of its own, a few buffers ahead of the
// reader, and digests what is read.
type stream struct {
	full   chan []byte // decompressed, in order
	free   chan []byte
	quit   chan struct{}
	done   sync.WaitGroup
	cur    []byte // unread part of whole
	whole  []byte
	hash   hash.Hash
	failed error // set before full is closed
	broken error // failed, once the reader got there
}

const (
	streamBuffers = 4
	streamBuffer  = 256 << 10
	zstdWindow    = 128 << 20
)

func newStream(r io.Reader, limit int64) (*stream, error) {
	s := &stream{full: make(chan []byte, streamBuffers), free: make(chan []byte, streamBuffers), quit: make(chan struct{}), hash: sha256.New()}
	dec, stop, err := Decompress(r)
	if err != nil {
		return nil, err
	}
	for range streamBuffers {
		s.free <- make([]byte, streamBuffer)
	}
	s.done.Add(1)
	go func() {
		defer s.done.Done()
		defer stop()
		defer close(s.full)
		var total int64
		for {
			var b []byte
			select {
			case b = <-s.free:
			case <-s.quit:
				return
			}
			n, err := fill(dec, b[:streamBuffer])
			total += int64(n)
			// A tar has at least a block more than its files for each of them.
			if total > limit+limit/8+1<<30 {
				s.failed = fault.New(fault.Invalid, "the layer is larger than %d bytes", limit)
				return
			}
			if n > 0 {
				s.full <- b[:n]
			}
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				s.failed = err
				return
			}
		}
	}()
	return s, nil
}

// fill is io.ReadFull that leaves the reader's error as it is.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

func (s *stream) Read(p []byte) (int, error) {
	if len(s.cur) == 0 {
		if s.whole != nil {
			s.free <- s.whole[:streamBuffer]
			s.whole = nil
		}
		b, ok := <-s.full
		if !ok {
			if s.broken = s.failed; s.broken != nil {
				return 0, s.broken
			}
			return 0, io.EOF
		}
		s.hash.Write(b)
		s.whole, s.cur = b, b
	}
	n := copy(p, s.cur)
	s.cur = s.cur[n:]
	return n, nil
}

// err is what broke the stream, nil if the reader met nothing so far.
func (s *stream) err() error { return s.broken }

func (s *stream) digest() digest.Digest { return digest.NewDigest(digest.SHA256, s.hash) }

func (s *stream) Close() {
	close(s.quit)
	s.done.Wait()
}

// Decompress detects gzip and zstd by their first bytes. Stop frees what the
// decompressor holds; it does not close r.
func Decompress(r io.Reader) (dec io.Reader, stop func(), err error) {
	br := bufio.NewReaderSize(r, 256<<10)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case len(magic) >= 3 && magic[0] == 0x1f && magic[1] == 0x8b && magic[2] == 8:
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, fault.New(fault.Invalid, "cannot read the gzip stream: %w", err)
		}
		return z, func() { _ = z.Close() }, nil
	case len(magic) == 4 && (magic[0] == 0x28 || magic[0]&0xf0 == 0x50 && magic[3] == 0x18) && (magic[1] == 0xb5 && magic[2] == 0x2f && magic[3] == 0xfd || magic[1] == 0x2a && magic[2] == 0x4d):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, nil, fault.New(fault.Invalid, "cannot read the zstd stream: %w", err)
		}
		return z, z.Close, nil
	}
	return br, func() {}, nil
}
