package lazy

import (
	"bytes"
	"compress/gzip"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	blockSize = 64 << 10
	// fillRange is how much the background fetches with one request.
	fillRange = 4 << 20
	// tries of one range before a read fails.
	tries      = 5
	retryDelay = 200 * time.Millisecond
	// stalled ends a request that brings nothing.
	stalled = 20 * time.Second
)

// blob is the sparse file of one layer.
type blob struct {
	Blob
	log    *slog.Logger
	f      *os.File
	change func() // tells that the state changed

	mu      sync.Mutex
	src     Source
	have    []uint64 // a bit for each block
	missing int64    // blocks
	fetched int64    // bytes got from the registry
	// flying blocks are being fetched; the channel closes when that is over.
	flying  map[int64]chan struct{}
	reading int // foreground fetches
	last    time.Time
	// What the last fetch and the last proof failed with, if they did.
	unreachable, wrong string
	wake               chan struct{} // closed and renewed to hurry the background
	hurry              bool
}

// openBlob opens the sparse file at path and finds out what it holds: blocks
// without holes. Whether what they hold is right is proved when it is read.
func openBlob(path string, b Blob, src Source, log *slog.Logger, change func()) (*blob, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	x := &blob{Blob: b, src: src, f: f, log: log, change: change, flying: map[int64]chan struct{}{}, wake: make(chan struct{}), last: time.Now()}
	x.missing = (b.Size + blockSize - 1) / blockSize
	x.have = make([]uint64, (x.missing+63)/64)
	st, err := f.Stat()
	if err == nil && st.Size() != b.Size {
		err = errors.Join(f.Truncate(0), f.Truncate(b.Size))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	for off := int64(0); off < b.Size; {
		from, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err != nil {
			break // no more data, or a file system that cannot tell: fetch it
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			break
		}
		for i := (from + blockSize - 1) / blockSize; i*blockSize < to; i++ {
			if min((i+1)*blockSize, b.Size) <= to {
				x.mark(i)
			}
		}
		off = to
	}
	return x, nil
}

func (b *blob) has(i int64) bool { return b.have[i/64]&(1<<(i%64)) != 0 }

func (b *blob) mark(i int64) {
	if !b.has(i) {
		b.have[i/64] |= 1 << (i % 64)
		b.missing--
	}
}

func (b *blob) clear(i int64) {
	if b.has(i) {
		b.have[i/64] &^= 1 << (i % 64)
		b.missing++
	}
}

// forget drops blocks that turned out to be wrong.
func (b *blob) forget(from, to int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := from / blockSize; i*blockSize < min(to, b.Size); i++ {
		b.clear(i)
	}
	b.hurryLocked(false)
}

func (b *blob) hurried() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.hurry
}

func (b *blob) hurryLocked(now bool) {
	b.hurry = b.hurry || now
	close(b.wake)
	b.wake = make(chan struct{})
}

// ensure has the bytes from..to in the file when it returns.
func (b *blob) ensure(ctx context.Context, from, to int64) error {
	to = min(to, b.Size)
	for {
		b.mu.Lock()
		var wait chan struct{}
		first := int64(-1)
		var end int64
		for i := from / blockSize; i*blockSize < to; i++ {
			if b.has(i) {
				if first >= 0 {
					break
				}
				continue
			}
			if c := b.flying[i]; c != nil {
				if first < 0 {
					wait = c
				}
				break
			}
			if first < 0 {
				first = i
			}
			if end = i + 1; (end-first)*blockSize >= fillRange {
				break
			}
		}
		if first < 0 {
			b.mu.Unlock()
			if wait == nil {
				return nil
			}
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		done := make(chan struct{})
		for i := first; i < end; i++ {
			b.flying[i] = done
		}
		b.mu.Unlock()
		err := b.fetch(ctx, first, end)
		b.mu.Lock()
		for i := first; i < end; i++ {
			delete(b.flying, i)
		}
		was := b.unreachable
		switch {
		case err == nil:
			b.unreachable = ""
		case ctx.Err() == nil:
			b.unreachable = err.Error()
		}
		told := b.missing == 0 || was != b.unreachable
		b.mu.Unlock()
		close(done)
		if told {
			b.change()
		}
		if err != nil {
			return err
		}
	}
}

// fetch gets blocks first..end, going on where a broken connection stopped.
func (b *blob) fetch(ctx context.Context, first, end int64) error {
	for try := 1; ; try++ {
		got, err := b.fetchOnce(ctx, first, end)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if got > 0 {
			first, try = first+got, 0
			continue
		}
		k := fault.Of(err)
		if try >= tries || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || k != fault.Internal && k != fault.Unavailable {
			return fmt.Errorf("cannot fetch bytes %d to %d of layer %s: %w", first*blockSize, min(end*blockSize, b.Size), b.Digest, err)
		}
		select {
		case <-time.After(retryDelay << (try - 1)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (b *blob) fetchOnce(ctx context.Context, first, end int64) (blocks int64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watchdog := time.AfterFunc(stalled, cancel)
	defer watchdog.Stop()
	b.mu.Lock()
	src := b.src
	b.mu.Unlock()
	off := first * blockSize
	rc, err := src.Range(ctx, off, min(end*blockSize, b.Size)-off)
	if err != nil {
		return 0, err
	}
	defer rc.Close()
	buf := make([]byte, blockSize)
	for i := first; i < end; i++ {
		p := buf[:min(blockSize, b.Size-i*blockSize)]
		if _, err := io.ReadFull(rc, p); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return blocks, err
		}
		watchdog.Reset(stalled)
		if _, err := b.f.WriteAt(p, i*blockSize); err != nil {
			return blocks, err
		}
		b.mu.Lock()
		b.mark(i)
		b.fetched += int64(len(p))
		b.mu.Unlock()
		blocks++
	}
	return blocks, nil
}

// fill fetches the rest, but only while nobody has read from the registry for
// idle, or with a negative idle only when hurried; turn lets one blob fill at a
// time.
func (b *blob) fill(ctx context.Context, idle time.Duration, turn chan struct{}) {
	delay := 5 * time.Second
	for ctx.Err() == nil {
		b.mu.Lock()
		wake, rest := b.wake, time.Until(b.last.Add(idle))
		ready := b.missing > 0 && b.reading == 0 && (b.hurry || idle >= 0 && rest <= 0)
		next := int64(-1)
		for i := int64(0); ready && i*blockSize < b.Size; i++ {
			if !b.has(i) && b.flying[i] == nil {
				next = i
				break
			}
		}
		done := b.missing == 0
		b.mu.Unlock()
		if next < 0 {
			pause := max(rest, 100*time.Millisecond)
			if done || idle < 0 && !b.hurried() {
				pause = time.Hour
			}
			select {
			case <-time.After(pause):
			case <-wake:
			case <-ctx.Done():
			}
			continue
		}
		select {
		case turn <- struct{}{}:
		case <-ctx.Done():
			return
		}
		err := b.ensure(ctx, next*blockSize, min(next*blockSize+fillRange, b.Size))
		<-turn
		if err == nil {
			delay = 5 * time.Second
			continue
		}
		if ctx.Err() == nil {
			b.log.Warn("cannot fetch the rest of a layer, will try again", "layer", b.Digest, "cause", err, "in", delay)
		}
		select {
		case <-time.After(delay):
		case <-wake:
		case <-ctx.Done():
		}
		delay = min(2*delay, time.Minute)
	}
}

// read decompresses and proves a chunk.
func (b *blob) read(ctx context.Context, c *chunk) ([]byte, error) {
	if c.zeros {
		return make([]byte, c.size), nil
	}
	b.mu.Lock()
	b.reading++
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.reading--
		b.last = time.Now()
		b.mu.Unlock()
	}()
	for try := 1; ; try++ {
		if err := b.ensure(ctx, c.at, c.end); err != nil {
			return nil, err
		}
		p, err := b.unpack(c)
		if err == nil {
			got := c.digest.Algorithm().FromBytes(p)
			if got == c.digest {
				b.tell("")
				return p, nil
			}
			err = fmt.Errorf("it is %s instead of %s", got, c.digest)
		}
		// What a torn write or a registry got wrong is fetched anew, once.
		b.forget(c.at, c.end)
		if try == 2 {
			err = fault.New(fault.Invalid, "the chunk of %s of layer %s is wrong: %w", c, b.Digest, err)
			b.tell(err.Error())
			return nil, err
		}
	}
}

// tell notes what is wrong with a chunk, "" for a right one.
func (b *blob) tell(wrong string) {
	b.mu.Lock()
	was := b.wrong
	b.wrong = wrong
	b.mu.Unlock()
	if was != wrong {
		b.change()
	}
}

func (b *blob) unpack(c *chunk) ([]byte, error) {
	sr := io.NewSectionReader(b.f, c.at, c.end-c.at)
	var r io.Reader
	switch b.Kind {
	case EStargz:
		zr, err := gzip.NewReader(sr)
		if err != nil {
			return nil, err
		}
		defer zr.Close()
		r = zr
	default:
		zr, err := zstd.NewReader(sr, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(64<<20))
		if err != nil {
			return nil, err
		}
		defer zr.Close()
		r = zr
	}
	if _, err := io.CopyN(io.Discard, r, c.inner); err != nil {
		return nil, err
	}
	// A size is only what the table says: memory comes as the data does.
	var p bytes.Buffer
	p.Grow(int(min(c.size, 4<<20)))
	if _, err := io.CopyN(&p, r, c.size); err != nil {
		return nil, err
	}
	return p.Bytes(), nil
}

// chunkCache keeps the chunks read last: the kernel reads a chunk in pieces.
type chunkCache struct {
	mu    sync.Mutex
	order list.List // *cached, newest first
	m     map[cacheKey]*list.Element
	size  int64
}

type cacheKey struct {
	b         *blob
	at, inner int64
}

type cached struct {
	key  cacheKey
	data []byte
	err  error
	done chan struct{}
}

const cacheBytes = 12 << 20

func (cc *chunkCache) get(ctx context.Context, b *blob, c *chunk) ([]byte, error) {
	key := cacheKey{b, c.at, c.inner}
	cc.mu.Lock()
	if cc.m == nil {
		cc.m = map[cacheKey]*list.Element{}
	}
	if el := cc.m[key]; el != nil {
		x := el.Value.(*cached)
		cc.order.MoveToFront(el)
		cc.mu.Unlock()
		select {
		case <-x.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return x.data, x.err
	}
	x := &cached{key: key, done: make(chan struct{})}
	el := cc.order.PushFront(x)
	cc.m[key] = el
	cc.mu.Unlock()
	// Others may wait for the same, so one reader's interrupt does not end it.
	x.data, x.err = b.read(context.WithoutCancel(ctx), c)
	cc.mu.Lock()
	if x.err != nil {
		cc.order.Remove(el)
		delete(cc.m, key)
	} else {
		cc.size += int64(len(x.data))
		for e := cc.order.Back(); e != nil && cc.size > cacheBytes; {
			prev := e.Prev()
			if o := e.Value.(*cached); o != x && o.data != nil {
				cc.size -= int64(len(o.data))
				cc.order.Remove(e)
				delete(cc.m, o.key)
			}
			e = prev
		}
	}
	cc.mu.Unlock()
	close(x.done)
	return x.data, x.err
}

// drop lets go of a blob's chunks.
func (cc *chunkCache) drop(b *blob) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	for e := cc.order.Front(); e != nil; {
		next := e.Next()
		if o := e.Value.(*cached); o.key.b == b && o.data != nil {
			cc.size -= int64(len(o.data))
			cc.order.Remove(e)
			delete(cc.m, o.key)
		}
		e = next
	}
}
