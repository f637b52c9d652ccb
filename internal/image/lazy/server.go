package lazy

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Names in the run directory. The number is the protocol's.
const (
	socketName = "lazy-1.sock"
	lockName   = "lazy-1.lock"
	logName    = "lazy.log"
	maxRequest = 64 << 20
	maxLog     = 1 << 20
	// linger is how long the process stays without a layer.
	linger = 3 * time.Second
	// A prepared blob that nobody mounts is let go after this.
	unmounted = 5 * time.Minute
)

// request is one line to the process, response its answer.
type request struct {
	Op     string
	Blob   Blob            `json:",omitzero"`
	State  string          `json:",omitempty"` // prepare: the blob's directory
	Access json.RawMessage `json:",omitempty"` // prepare, access: for Dial
	UserNS bool            `json:",omitempty"`
	Idle   time.Duration   `json:",omitempty"`
	ID     string          `json:",omitempty"` // mount: the layer's chain id
	Dir    string          `json:",omitempty"`
	Attrs  map[string]Attr `json:",omitempty"`
	Gen    uint64          `json:",omitempty"` // wait
}

type response struct {
	Kind     fault.Kind `json:",omitempty"`
	Error    string     `json:",omitempty"`
	Prepared *Prepared  `json:",omitempty"`
	Status   *Status    `json:",omitempty"`
}

// Prepared tells what a table says.
type Prepared struct {
	Bytes   int64    // of all files
	Implied []string // directories left out, to take after those of layers below
}

// Attr is what an implied directory takes after.
type Attr struct {
	Mode     uint32
	UID, GID uint32
	Time     time.Time
}

// Status is what the process serves.
type Status struct {
	Gen    uint64 // changes with every change
	Mounts []MountStatus
	Blobs  []BlobStatus
}

// MountStatus is one layer.
type MountStatus struct {
	ID, Dir string
	Digest  digest.Digest
}

// BlobStatus is one blob.
type BlobStatus struct {
	Digest   digest.Digest
	Size     int64
	Fetched  int64 // bytes got from the registry by this process
	Missing  int64 // bytes, in whole blocks
	Complete bool
	// Trouble is the last failure, "" when the last fetch went well.
	Trouble string `json:",omitempty"`
}

// server is the process.
type server struct {
	dir    string
	dial   Dial
	log    *slog.Logger
	cache  chunkCache
	turn   chan struct{}
	ctx    context.Context // of the process
	mu     sync.Mutex
	gen    uint64
	change chan struct{}
	blobs  map[digest.Digest]*loaded
	mounts map[string]*mounted
	conns  int
	idle   time.Time
}

type loaded struct {
	*blob
	table  []byte // packed, as on disk
	cancel context.CancelFunc
	ready  chan struct{}
	tree   *tree // of the first mount to come
	userns bool
	state  string
	mounts int
	since  time.Time
}

type mounted struct {
	id, dir string
	b       *loaded
}

// Main is the process: args are its name and the run directory. The caller ends
// the program with the code.
func Main(args []string, dial Dial) int {
	if len(args) != 2 {
		return 2
	}
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP, unix.SIGINT)
	debug.SetGCPercent(50)
	syscall.Umask(0o077)
	dir := args[1]
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 1
	}
	defer lock.Close()
	if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return 0 // another one serves
	}
	logPath := filepath.Join(dir, logName)
	if st, err := os.Stat(logPath); err == nil && st.Size() > maxLog {
		_ = os.Rename(logPath, logPath+".1")
	}
	out, err := os.OpenFile(logPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 1
	}
	defer out.Close()
	log := slog.New(slog.NewJSONHandler(out, nil))
	sock := filepath.Join(dir, socketName)
	if err := os.Remove(sock); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Error("cannot clear the socket", "cause", err)
		return 1
	}
	ln, err := net.Listen("unix", sock)
	if err != nil {
		log.Error("cannot listen", "cause", err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := &server{dir: dir, dial: dial, log: log, turn: make(chan struct{}, 1), ctx: ctx, change: make(chan struct{}),
		blobs: map[digest.Digest]*loaded{}, mounts: map[string]*mounted{}, idle: time.Now()}
	go s.sweep(ln)
	for {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return 0
			}
			time.Sleep(10 * time.Millisecond)
			continue
		}
		s.mu.Lock()
		s.conns++
		s.mu.Unlock()
		go func() {
			s.talk(ctx, c.(*net.UnixConn))
			s.mu.Lock()
			s.conns--
			s.mu.Unlock()
		}()
	}
}

// sweep lets go of what is not mounted, and ends the process when nothing is.
func (s *server) sweep(ln net.Listener) {
	for range time.Tick(500 * time.Millisecond) {
		s.mu.Lock()
		for d, b := range s.blobs {
			if b.mounts == 0 && b.ready == nil && time.Since(b.since) > unmounted {
				s.release(d, b)
			}
		}
		end := len(s.blobs) == 0 && s.conns == 0 && time.Since(s.idle) > linger
		if end {
			ln.Close() // which removes the socket; who comes now starts another
		}
		s.mu.Unlock()
		if end {
			return
		}
	}
}

// release closes a blob; s.mu is held.
func (s *server) release(d digest.Digest, b *loaded) {
	b.cancel()
	delete(s.blobs, d)
	s.cache.drop(b.blob)
	b.f.Close()
	s.idle = time.Now()
	s.changedLocked()
}

func (s *server) changed() {
	s.mu.Lock()
	s.changedLocked()
	s.mu.Unlock()
}

func (s *server) changedLocked() {
	s.gen++
	close(s.change)
	s.change = make(chan struct{})
}

// talk answers the requests of one connection.
func (s *server) talk(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	if !ownUser(c) {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in := bufio.NewReader(io.LimitReader(c, maxRequest))
	line, err := in.ReadBytes('\n')
	if err != nil {
		return
	}
	go func() { // the caller went away
		_, _ = in.ReadByte()
		cancel()
	}()
	var r request
	var out response
	if err = json.Unmarshal(line, &r); err == nil {
		out, err = s.handle(ctx, &r)
	}
	if err != nil {
		out = response{Kind: fault.Of(err), Error: err.Error()}
		if r.Op != "wait" {
			s.log.Warn("cannot do what the engine asks for", "what", r.Op, "layer", r.Blob.Digest, "cause", err)
		}
	}
	_ = json.NewEncoder(c).Encode(out)
}

func ownUser(c *net.UnixConn) bool {
	rc, err := c.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	_ = rc.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && int(cred.Uid) == os.Geteuid()
	})
	return ok
}

func (s *server) handle(ctx context.Context, r *request) (response, error) {
	switch r.Op {
	case "prepare":
		defer s.touch()
		p, err := s.prepare(ctx, r)
		return response{Prepared: p}, err
	case "mount":
		return response{}, s.mount(r)
	case "access":
		src, err := s.dial(r.Access, r.Blob)
		if err != nil {
			return response{}, err
		}
		return response{}, s.with(r.Blob.Digest, func(b *loaded) {
			b.src = src
			b.hurryLocked(false)
		})
	case "hurry":
		return response{}, s.with(r.Blob.Digest, func(b *loaded) { b.hurryLocked(true) })
	case "spoil":
		err := s.with(r.Blob.Digest, func(*loaded) {})
		if err == nil {
			s.mu.Lock()
			b := s.blobs[r.Blob.Digest]
			s.mu.Unlock()
			if b != nil {
				s.cache.drop(b.blob)
				b.forget(0, b.Size)
				s.changed()
			}
		}
		return response{}, err
	case "status":
		return response{Status: s.status()}, nil
	case "wait":
		for {
			s.mu.Lock()
			gen, change := s.gen, s.change
			s.mu.Unlock()
			if gen != r.Gen {
				return response{Status: s.status()}, nil
			}
			select {
			case <-change:
			case <-ctx.Done():
				return response{}, ctx.Err()
			}
		}
	}
	return response{}, fault.New(fault.Invalid, "unknown request %q", r.Op)
}

func (s *server) touch() {
	s.mu.Lock()
	s.idle = time.Now()
	s.mu.Unlock()
}

func (s *server) with(d digest.Digest, do func(*loaded)) error {
	s.mu.Lock()
	b := s.blobs[d]
	ok := b != nil && b.ready == nil
	s.mu.Unlock()
	if !ok {
		return fault.New(fault.NotFound, "layer %s is not served", d)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	do(b)
	return nil
}

func (s *server) status() *Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &Status{Gen: s.gen}
	for _, m := range s.mounts {
		st.Mounts = append(st.Mounts, MountStatus{ID: m.id, Dir: m.dir, Digest: m.b.Digest})
	}
	for d, b := range s.blobs {
		if b.ready != nil {
			continue
		}
		b.mu.Lock()
		st.Blobs = append(st.Blobs, BlobStatus{Digest: d, Size: b.Size, Fetched: b.fetched, Missing: b.missing * blockSize, Complete: b.missing == 0, Trouble: cmp.Or(b.wrong, b.unreachable)})
		b.mu.Unlock()
	}
	slices.SortFunc(st.Blobs, func(a, b BlobStatus) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return st
}

// prepare opens a blob and its table, which is fetched if it is not in the
// blob's directory.
func (s *server) prepare(ctx context.Context, r *request) (*Prepared, error) {
	if err := r.Blob.Digest.Validate(); err != nil || r.Blob.Size <= 0 || !filepath.IsAbs(r.State) {
		return nil, fault.New(fault.Invalid, "the layer is described wrongly")
	}
	for {
		s.mu.Lock()
		b := s.blobs[r.Blob.Digest]
		if b == nil {
			b = &loaded{ready: make(chan struct{}), state: r.State, userns: r.UserNS}
			s.blobs[r.Blob.Digest] = b
			s.mu.Unlock()
			err := s.load(ctx, b, r)
			s.mu.Lock()
			close(b.ready)
			b.ready, b.since = nil, time.Now()
			if err != nil {
				delete(s.blobs, r.Blob.Digest)
				s.idle = time.Now()
			}
			s.changedLocked()
			s.mu.Unlock()
			if err != nil {
				return nil, err
			}
			return &Prepared{Bytes: b.tree.bytes, Implied: b.tree.implied}, nil
		}
		wait := b.ready
		b.since = time.Now()
		s.mu.Unlock()
		if wait == nil {
			if len(r.Access) > 0 {
				if src, err := s.dial(r.Access, r.Blob); err == nil {
					b.mu.Lock()
					b.src = src
					b.mu.Unlock()
				}
			}
			t, err := b.parse()
			if err != nil {
				return nil, err
			}
			return &Prepared{Bytes: t.bytes, Implied: t.implied}, nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *server) load(ctx context.Context, l *loaded, r *request) error {
	src, err := s.dial(r.Access, r.Blob)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(r.State, 0o700); err != nil {
		return err
	}
	b, err := openBlob(filepath.Join(r.State, "blob"), r.Blob, src, s.log, s.changed)
	if err != nil {
		return err
	}
	path := filepath.Join(r.State, "table")
	if l.table, err = os.ReadFile(path); err == nil {
		if _, err = openTable(r.Blob, l.table); err != nil {
			l.table = nil // torn by a power cut
		}
	}
	if l.table == nil {
		if l.table, err = b.fetchTable(ctx); err == nil {
			_, err = openTable(r.Blob, l.table)
		}
		if err == nil {
			err = durable.WriteFile(path, l.table, 0o600, durable.Content)
		}
	}
	l.blob = b
	if err == nil {
		l.tree, err = l.parse()
	}
	if err != nil {
		l.blob = nil
		b.f.Close()
		return err
	}
	l.table = nil // it is on the disk
	fctx, cancel := context.WithCancel(s.ctx)
	l.cancel = cancel
	go b.fill(fctx, r.Idle, s.turn)
	return nil
}

// fetchTable gets the packed table through the sparse file.
func (b *blob) fetchTable(ctx context.Context) ([]byte, error) {
	off, length := b.Offset, b.Length
	if b.Kind == EStargz {
		if b.Size <= footerSize {
			return nil, errTable("the blob is too short")
		}
		foot := make([]byte, footerSize)
		if err := b.ensure(ctx, b.Size-footerSize, b.Size); err != nil {
			return nil, err
		}
		if _, err := b.f.ReadAt(foot, b.Size-footerSize); err != nil {
			return nil, err
		}
		var err error
		if off, length, err = footerTable(foot, b.Size); err != nil {
			b.forget(b.Size-footerSize, b.Size)
			return nil, err
		}
	}
	if err := b.ensure(ctx, off, off+length); err != nil {
		return nil, err
	}
	p := make([]byte, length)
	if _, err := b.f.ReadAt(p, off); err != nil {
		return nil, err
	}
	if _, err := openTable(b.Blob, p); err != nil {
		b.forget(off, off+length)
		return nil, err
	}
	return p, nil
}

func (l *loaded) parse() (*tree, error) {
	packed := l.table
	if packed == nil {
		var err error
		if packed, err = os.ReadFile(filepath.Join(l.state, "table")); err != nil {
			return nil, err
		}
	}
	raw, err := openTable(l.Blob, packed)
	if err != nil {
		return nil, err
	}
	end := l.Size
	if l.Offset > 0 {
		end = l.Offset
	} else if l.Kind == EStargz {
		end = l.Size - footerSize - int64(len(packed))
	}
	return parseTable(raw, end, l.userns)
}

// mount serves a prepared blob at a directory.
func (s *server) mount(r *request) error {
	s.mu.Lock()
	b := s.blobs[r.Blob.Digest]
	if b == nil || b.ready != nil {
		s.mu.Unlock()
		return fault.New(fault.NotFound, "layer %s is not prepared", r.Blob.Digest)
	}
	if m := s.mounts[r.ID]; m != nil && m.dir == r.Dir && isMounted(m.dir) {
		s.mu.Unlock()
		return nil
	}
	b.mounts++
	t := b.tree
	b.tree = nil
	m := &mounted{id: r.ID, dir: r.Dir, b: b}
	s.mounts[r.ID] = m
	s.mu.Unlock()
	gone := func() {
		s.mu.Lock()
		if s.mounts[r.ID] == m {
			delete(s.mounts, r.ID)
		}
		if b.mounts--; b.mounts == 0 {
			s.release(r.Blob.Digest, b)
			debug.FreeOSMemory()
		}
		s.changedLocked()
		s.mu.Unlock()
	}
	err := func() error {
		if t == nil {
			var err error
			if t, err = b.parse(); err != nil {
				return err
			}
		}
		for name, a := range r.Attrs {
			if n := t.find(name); n != nil && n.implied {
				n.mode, n.uid, n.gid, n.mtime = unix.S_IFDIR|a.Mode&0o7777, a.UID, a.GID, a.Time
			}
		}
		return serve(r.Dir, &files{t: t, b: b.blob, cache: &s.cache, log: s.log}, gone)
	}()
	if err != nil {
		gone()
		return fmt.Errorf("cannot mount layer %s: %w", r.Blob.Digest, err)
	}
	s.changed()
	debug.FreeOSMemory() // the table's text
	return nil
}
