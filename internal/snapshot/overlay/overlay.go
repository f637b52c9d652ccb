// Package overlay implements snapshot.Store with overlayfs. A layer is one
// directory that holds its upper and work directories and a record of the chain
// below it. Durable layers live under rw/, ephemeral ones under a directory
// named after the kernel's boot id, so that a power cut empties it. The engine's
// composition root makes the Store; everybody else uses the contract.
package overlay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/quota"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	"golang.org/x/sys/unix"
)

// Config tells where layers live.
type Config struct {
	// Root is a directory of the Store's own on a disk file system that
	// overlayfs accepts as upper layer.
	Root   string
	Logger *slog.Logger
}

// Store is a snapshot.Store on overlayfs.
type Store struct {
	log   *slog.Logger
	root  string
	rw    string // durable layers
	eph   string // ephemeral layers of this boot
	trash string
	// discarded is about how many layers lie in trash.
	discarded atomic.Int64
	empty     string // the lower directory of the empty chain
	spare     string // layers made in advance

	cap   capability
	users userNamespaces
	// projects are the ids that the sizes of layers are limited by.
	projects *quota.IDs
	serial   atomic.Uint64
	wake     chan struct{}
	spares   chan string

	mu     sync.Mutex
	layers map[string]*layer
}

var _ snapshot.Store = (*Store)(nil)

// layer is what the record file of a layer holds, and its directory.
type layer struct {
	Chain     snapshot.Chain
	Ephemeral bool   `json:",omitempty"`
	Limit     int64  `json:",omitempty"`
	Project   uint32 `json:",omitempty"`
	dir       string
}

const (
	recordName = "layer.json"
	upperName  = "upper"
	workName   = "work"
	sparesKept = 16
)

// New opens the store under cfg.Root, drops what an earlier boot left of
// ephemeral layers and what an interrupted Create left of any. Call Run to have
// discarded directories deleted.
func New(cfg Config) (*Store, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("cannot read the boot id: %w", err)
	}
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("cannot resolve the layer directory: %w", err)
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		log:      log,
		root:     root,
		rw:       filepath.Join(root, "rw"),
		eph:      filepath.Join(root, "ephemeral", strings.TrimSpace(string(boot))),
		trash:    filepath.Join(root, "trash"),
		empty:    filepath.Join(root, "empty"),
		spare:    filepath.Join(root, "spare"),
		wake:     make(chan struct{}, 1),
		spares:   make(chan string, sparesKept),
		layers:   map[string]*layer{},
		projects: quota.NewIDs(quota.Layers),
	}
	for _, d := range []string{s.rw, s.eph, s.trash} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("cannot create the layer directory: %w", err)
		}
	}
	if err := os.MkdirAll(s.empty, 0o755); err != nil {
		return nil, fmt.Errorf("cannot create the layer directory: %w", err)
	}
	s.cap = probe(s.empty)
	if err := s.sweep(); err != nil {
		return nil, err
	}
	return s, nil
}

// sweep discards the ephemeral layers of earlier boots, and reads the records of
// the rest. A directory without a readable record is an unfinished Create.
func (s *Store) sweep() error {
	// Run deletes them: a start does not wait for it.
	if err := s.discard(s.spare); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot clear prepared layers: %w", err)
	}
	if err := os.Mkdir(s.spare, 0o700); err != nil {
		return fmt.Errorf("cannot create the layer directory: %w", err)
	}
	boots, err := os.ReadDir(filepath.Dir(s.eph))
	if err != nil {
		return fmt.Errorf("cannot list ephemeral layers: %w", err)
	}
	for _, b := range boots {
		if b.Name() != filepath.Base(s.eph) {
			if err := s.discard(filepath.Join(filepath.Dir(s.eph), b.Name())); err != nil {
				return err
			}
		}
	}
	for _, base := range []string{s.rw, s.eph} {
		ents, err := os.ReadDir(base)
		if err != nil {
			return fmt.Errorf("cannot list layers: %w", err)
		}
		for _, e := range ents {
			dir := filepath.Join(base, e.Name())
			l, err := s.readRecord(dir)
			if err != nil {
				s.log.Warn("discard an unfinished layer", "id", e.Name(), "cause", err)
				if err := s.discard(dir); err != nil {
					return err
				}
				continue
			}
			s.layers[e.Name()] = l
			if l.Project != 0 {
				s.projects.Taken(l.Project)
			}
		}
	}
	return nil
}

func (s *Store) readRecord(dir string) (*layer, error) {
	b := make([]byte, 1<<16)
	n, err := unix.Lgetxattr(dir, s.cap.recordAttr(), b)
	if err == nil {
		b = b[:n]
	} else if b, err = os.ReadFile(filepath.Join(dir, recordName)); err != nil {
		return nil, err
	}
	l := &layer{dir: dir}
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("cannot read the layer record: %w", err)
	}
	return l, nil
}

// Create makes an empty writable layer. See snapshot.Store.
func (s *Store) Create(ctx context.Context, id string, chain snapshot.Chain, ephemeral bool, sizeLimit int64) (err error) {
	if !validID(id) {
		return fault.New(fault.Invalid, "cannot create a layer: %q is not a layer id", id)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	base := s.rw
	if ephemeral {
		base = s.eph
	}
	l := &layer{Chain: chain, Ephemeral: ephemeral, Limit: sizeLimit, dir: filepath.Join(base, id)}
	s.mu.Lock()
	if _, taken := s.layers[id]; taken {
		s.mu.Unlock()
		return fault.New(fault.Conflict, "cannot create layer %s: it exists", id)
	}
	s.layers[id] = nil // reserved; lookups treat it as absent
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		if err != nil {
			delete(s.layers, id)
		} else {
			s.layers[id] = l
		}
		s.mu.Unlock()
		if err != nil {
			if e := s.discard(l.dir); e != nil && !errors.Is(e, fs.ErrNotExist) {
				s.log.Warn("cannot discard a failed layer", "id", id, "cause", e)
			}
		}
	}()
	if err := s.skeleton(l.dir); err != nil {
		return createFault(id, err)
	}
	if err := copyRoot(filepath.Join(l.dir, upperName), chain); err != nil {
		return createFault(id, err)
	}
	if sizeLimit > 0 {
		if l.Project, err = s.setQuota(l.dir, sizeLimit); err != nil {
			return err
		}
	}
	if err := s.writeRecord(l); err != nil {
		return createFault(id, err)
	}
	return nil
}

// skeleton puts an empty layer at dir: one made in advance, or a new one.
func (s *Store) skeleton(dir string) error {
	select {
	case spare := <-s.spares:
		if err := unix.Rename(spare, dir); err == nil {
			s.kick()
			return nil
		}
	default:
		s.kick()
	}
	return makeSkeleton(dir)
}

func makeSkeleton(dir string) error {
	for _, d := range []struct {
		name string
		mode uint32
	}{{dir, 0o700}, {dir + "/" + upperName, 0o755}, {dir + "/" + workName, 0o711}} {
		if err := unix.Mkdir(d.name, d.mode); err != nil {
			return &fs.PathError{Op: "mkdir", Path: d.name, Err: err}
		}
	}
	return nil
}

// refill makes layers in advance, so that Create need not: making directories is
// most of what it costs.
func (s *Store) refill() {
	for len(s.spares) < cap(s.spares) {
		dir := filepath.Join(s.spare, fmt.Sprint(s.serial.Add(1)))
		if err := makeSkeleton(dir); err != nil {
			s.log.Warn("cannot prepare a layer", "cause", err)
			return
		}
		select {
		case s.spares <- dir:
		default:
			return
		}
	}
}

// copyRoot gives the upper directory the mode and owner of the chain's root,
// because the merged root shows the upper one's.
func copyRoot(upper string, chain snapshot.Chain) error {
	if len(chain.Dirs) == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Lstat(chain.Dirs[0], &st); err != nil {
		return fmt.Errorf("cannot read layer %s of the image: %w", chain.Dirs[0], err)
	}
	if st.Uid != 0 || st.Gid != 0 {
		if err := unix.Lchown(upper, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	if st.Mode&0o7777 != 0o755 {
		return unix.Chmod(upper, st.Mode&0o7777)
	}
	return nil
}

// writeRecord keeps the record as an attribute of the layer's directory: that is
// metadata, so one sync of the directory makes it last together with the
// directory's name, which the same inode's rename gave it. A record that is too
// long, or a file system without attributes, gets a file.
func (s *Store) writeRecord(l *layer) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	fd, err := unix.Open(l.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fsetxattr(fd, s.cap.recordAttr(), b, unix.XATTR_CREATE); err != nil {
		f, err := os.OpenFile(filepath.Join(l.dir, recordName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		if err == nil && !l.Ephemeral {
			err = f.Sync()
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	if l.Ephemeral {
		return nil
	}
	return unix.Fsync(fd)
}

func createFault(id string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.New(fault.Exhausted, "cannot create layer %s: %w (free some disk space, for instance with system prune)", id, err)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "cannot create layer %s: %w", id, err)
	}
	return fmt.Errorf("cannot create layer %s: %w", id, err)
}

func validID(id string) bool {
	if len(id) == 0 || len(id) > 128 || id[0] == '.' {
		return false
	}
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return true
}

func (s *Store) lookup(id string) (*layer, error) {
	s.mu.Lock()
	l := s.layers[id]
	s.mu.Unlock()
	if l == nil {
		return nil, fault.New(fault.NotFound, "no such layer: %s", id)
	}
	return l, nil
}

// Dirs tells the directories of a layer. See snapshot.Store.
func (s *Store) Dirs(id string) (lower []string, upper, work, merged string, err error) {
	l, err := s.lookup(id)
	if err != nil {
		return nil, "", "", "", err
	}
	return l.Chain.Dirs, filepath.Join(l.dir, upperName), filepath.Join(l.dir, workName), filepath.Join(l.dir, "merged"), nil
}

// List names every layer there is. See snapshot.Store.
func (s *Store) List(context.Context) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := make([]string, 0, len(s.layers))
	for id, l := range s.layers {
		if l != nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Chain is what a layer stands on. See snapshot.Store.
func (s *Store) Chain(id string) (snapshot.Chain, error) {
	l, err := s.lookup(id)
	if err != nil {
		return snapshot.Chain{}, err
	}
	return l.Chain, nil
}

// ChainIDs names every chain that a writable layer stands on, so that image
// collection keeps them.
func (s *Store) ChainIDs() map[string]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := map[string]struct{}{}
	for _, l := range s.layers {
		if l != nil && l.Chain.ID != "" {
			ids[l.Chain.ID] = struct{}{}
		}
	}
	return ids
}

// Remove deletes a layer. See snapshot.Store.
func (s *Store) Remove(_ context.Context, id string) error {
	s.mu.Lock()
	l := s.layers[id]
	delete(s.layers, id)
	s.mu.Unlock()
	if l == nil {
		return nil
	}
	if l.Project != 0 {
		s.dropQuota(l.dir, l.Project)
	}
	if err := s.discard(l.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.mu.Lock()
		s.layers[id] = l
		s.mu.Unlock()
		return fmt.Errorf("cannot remove layer %s: %w", id, err)
	}
	return nil
}
