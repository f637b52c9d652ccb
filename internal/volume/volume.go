// Package volume keeps named and anonymous volumes of the local driver, and reads
// what a container request says about mounts.
//
// A *volume* is a directory NAME below the store's root holding its data (_data)
// and its record (volume.json). It appears by one rename and disappears by one
// rename, into a trash that is emptied off the caller's path, so that a volume
// exists whole or not at all whenever the engine is killed. A *reference* is a
// container that has the volume in its configuration: it keeps the volume from
// being removed. A *use* is a container that runs with it: the first use of a
// volume with driver options (type, o, device) mounts it, the last unmounts it. A
// *point* is one mount of a container's configuration.
//
// References and uses are told by the engine, which holds the containers' records,
// and told again after it restarts. Only the engine imports this package.
package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	// Driver is the name of the one driver there is.
	Driver = "local"
	// AnonymousLabel marks volumes that nobody named.
	AnonymousLabel = "com.docker.volume.anonymous"

	dataDir   = "_data"
	record    = "volume.json"
	trashDir  = ".trash"
	newPrefix = ".new-"
)

var nameRule = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

func validName(name string) error {
	switch {
	case len(name) < 2:
		return invalid("volume name is too short, names should be at least two alphanumeric characters")
	case len(name) > 255:
		return invalid("volume name is too long, names should be at most 255 characters")
	case !nameRule.MatchString(name):
		return invalid("%q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", name)
	}
	return nil
}

// Config of a store.
type Config struct {
	// Root is the directory of all volumes, made if missing.
	Root string
	Log  *slog.Logger
}

// Store holds volumes. All methods are safe for concurrent use.
type Store struct {
	root string
	dir  *os.File
	log  *slog.Logger
	wake chan struct{} // something is in the trash

	mu sync.Mutex
	m  map[string]*vol
}

// state of a volume. Only present ones are seen; who meets another state waits
// for vol.settled and looks again.
type state uint8

const (
	creating state = iota
	present
	removing
)

// vol is one volume. Its own lock orders mounting, copying and removing, which
// do I/O; the store's guards refs, state and settled. Where both are held, the
// volume's is taken first.
type vol struct {
	rec     stored
	refs    map[string]bool
	state   state
	settled chan struct{} // closed when creating or removing has ended

	mu      sync.Mutex
	uses    map[string]bool
	mounted bool
}

// New opens the store, reads all records and clears what was begun and not ended.
func New(cfg Config) (*Store, error) {
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open volumes: %w", err)
	}
	cfg.Root = root
	if err := os.MkdirAll(filepath.Join(cfg.Root, trashDir), 0o711); err != nil {
		return nil, fault.New(fault.Internal, "cannot open volumes: %w", err)
	}
	dir, err := os.Open(cfg.Root)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open volumes: %w", err)
	}
	s := &Store{root: cfg.Root, dir: dir, log: cfg.Log, wake: make(chan struct{}, 1), m: map[string]*vol{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.load(); err != nil {
		dir.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) load() error {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return fault.New(fault.Internal, "cannot read volumes: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if name == trashDir {
			s.notify()
			continue
		}
		if len(name) > len(newPrefix) && name[:len(newPrefix)] == newPrefix {
			// Its creation was never acknowledged.
			if err := s.discard(name); err != nil {
				s.log.Warn("cannot clear an unfinished volume", "name", name, "error", err)
			}
			continue
		}
		if !e.IsDir() || validName(name) != nil {
			continue
		}
		rec, err := s.readRecord(name)
		if err != nil {
			// The record may be lost after a power cut (an anonymous volume's is
			// not synced), the data is not: keep it under its name.
			s.log.Warn("cannot read the record of a volume, keeping its data", "volume", name, "error", err)
			rec = stored{Name: name}
			if len(name) == 64 {
				rec.Labels = map[string]string{AnonymousLabel: ""}
			}
			if i, err := e.Info(); err == nil {
				rec.Created = i.ModTime()
			}
		}
		v := newVol(rec, present)
		if rec.mounts() {
			v.mounted = s.isMounted(name)
		}
		s.m[name] = v
	}
	return nil
}

func newVol(r stored, st state) *vol {
	return &vol{rec: r, state: st, refs: map[string]bool{}, uses: map[string]bool{}, settled: make(chan struct{})}
}

// CreateOptions go with a create request.
type CreateOptions struct {
	// For is a container that refers to the volume from the start on.
	For string
	// Ephemeral: the record need not survive a power cut.
	Ephemeral bool
}

// Create makes a volume, or returns the one of that name if its options are the
// same. Without a name it makes an anonymous one. Call Sync before it is acknowledged.
func (s *Store) Create(ctx context.Context, req volume.CreateRequest, o CreateOptions) (*volume.Volume, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if req.Driver != "" && req.Driver != Driver {
		return nil, fault.New(fault.NotFound, "error looking up volume plugin %s: plugin %q not found", req.Driver, req.Driver)
	}
	if req.ClusterVolumeSpec != nil {
		return nil, fault.New(fault.Unsupported, "cluster volumes are not supported: use the local driver")
	}
	if err := validOptions(req.DriverOpts); err != nil {
		return nil, err
	}
	labels := maps.Clone(req.Labels)
	name := req.Name
	if name == "" {
		var b [32]byte
		_, _ = rand.Read(b[:])
		name = hex.EncodeToString(b[:])
		if labels == nil {
			labels = map[string]string{}
		}
		labels[AnonymousLabel] = ""
	} else if err := validName(name); err != nil {
		return nil, invalid("create %s: %w", name, err)
	}

	v := newVol(stored{
		Name: name, Created: time.Now().UTC(), Labels: labels,
		Options: maps.Clone(req.DriverOpts), Ephemeral: o.Ephemeral,
	}, creating)
	if o.For != "" {
		v.refs[o.For] = true
	}
	if had, err := s.claim(ctx, v, o.For); err != nil || had != nil {
		return had, err
	}
	err := s.make(v.rec)
	s.mu.Lock()
	if err != nil {
		delete(s.m, name)
	} else {
		v.state = present
	}
	close(v.settled)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return s.describe(v), nil
}

// claim puts a volume to be created in the index, unless there is one of the
// name: then it returns that, referred to.
func (s *Store) claim(ctx context.Context, v *vol, container string) (*volume.Volume, error) {
	name := v.rec.Name
	for {
		s.mu.Lock()
		old, ok := s.m[name]
		if !ok {
			s.m[name] = v
			s.mu.Unlock()
			return nil, nil
		}
		if old.state == present {
			defer s.mu.Unlock()
			if len(v.rec.Options) > 0 && !maps.Equal(v.rec.Options, old.rec.Options) {
				return nil, fault.New(fault.Conflict, "a volume named %s already exists with other options: remove it first or choose another name", name)
			}
			if container != "" {
				old.refs[container] = true
			}
			return s.describe(old), nil
		}
		settled := old.settled
		s.mu.Unlock()
		select {
		case <-settled:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// make writes the volume and gives it its name, all at once.
func (s *Store) make(r stored) error {
	tmp, err := s.prepare(r)
	if err != nil {
		return err
	}
	fd := int(s.dir.Fd())
	if err := unix.Renameat2(fd, tmp, fd, r.Name, unix.RENAME_NOREPLACE); err != nil {
		_ = s.discard(tmp)
		return fault.New(fault.Internal, "cannot create volume %s: %w", r.Name, err)
	}
	return nil
}

// Sync makes the names of created volumes durable. Create leaves it to its
// caller, so that a request which makes several waits for the disk once.
func (s *Store) Sync() error {
	if err := s.dir.Sync(); err != nil {
		return fault.New(fault.Internal, "cannot sync volumes: %w", err)
	}
	return nil
}

// describe needs s.mu or a volume that nobody else knows; the record never changes.
func (s *Store) describe(v *vol) *volume.Volume {
	return &volume.Volume{
		Name: v.rec.Name, Driver: Driver, Scope: "local",
		Mountpoint: filepath.Join(s.root, v.rec.Name, dataDir),
		CreatedAt:  v.rec.Created.Format(time.RFC3339),
		Labels:     maps.Clone(v.rec.Labels), Options: maps.Clone(v.rec.Options),
	}
}

func (s *Store) get(name string) (*vol, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.m[name]; ok && v.state == present {
		return v, nil
	}
	return nil, fault.New(fault.NotFound, "get %s: no such volume", name)
}

// Inspect describes a volume.
func (s *Store) Inspect(_ context.Context, name string) (*volume.Volume, error) {
	v, err := s.get(name)
	if err != nil {
		return nil, err
	}
	return s.describe(v), nil
}

// Filters are Docker's: key to set of values.
type Filters = map[string]map[string]bool

// List describes the volumes that match, by name.
func (s *Store) List(_ context.Context, f Filters) ([]volume.Volume, error) {
	if err := checkFilters(f, "dangling", "driver", "label", "name"); err != nil {
		return nil, err
	}
	dangling, err := truth(f, "dangling")
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	out := make([]volume.Volume, 0, len(s.m))
	for _, v := range s.m {
		if v.state != present || !matches(v.rec, f) || dangling != nil && *dangling != (len(v.refs) == 0) {
			continue
		}
		out = append(out, *s.describe(v))
	}
	s.mu.Unlock()
	slices.SortFunc(out, func(a, b volume.Volume) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return out, nil
}

// Reference notes that a container's configuration names the volume.
func (s *Store) Reference(name, containerID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.m[name]
	if !ok || v.state != present {
		return fault.New(fault.NotFound, "get %s: no such volume", name)
	}
	v.refs[containerID] = true
	return nil
}

// Unreference takes that back; unknown names are ignored.
func (s *Store) Unreference(name, containerID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.m[name]; ok {
		delete(v.refs, containerID)
	}
}

// References tells which containers refer to a volume.
func (s *Store) References(name string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.m[name]; ok {
		return slices.Sorted(maps.Keys(v.refs))
	}
	return nil
}

// Remove deletes a volume that no container refers to. With force, one that does
// not exist is no error. Its name is free and its data out of reach on return;
// the space comes back a little later.
func (s *Store) Remove(ctx context.Context, name string, force bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	v, err := s.get(name)
	if err != nil {
		if force {
			return nil
		}
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	s.mu.Lock()
	if v.state != present {
		s.mu.Unlock()
		if force {
			return nil
		}
		return fault.New(fault.NotFound, "get %s: no such volume", name)
	}
	if len(v.refs) > 0 {
		ids := slices.Sorted(maps.Keys(v.refs))
		s.mu.Unlock()
		return fault.New(fault.Conflict, "remove %s: volume is in use - %v", name, ids)
	}
	v.state, v.settled = removing, make(chan struct{})
	s.mu.Unlock()

	err = s.unmount(v)
	if err == nil {
		err = s.moveToTrash(name)
	}
	s.mu.Lock()
	if err != nil {
		// It stays what it was; who waited looks again.
		v.state = present
	} else {
		delete(s.m, name)
	}
	close(v.settled)
	s.mu.Unlock()
	if err != nil {
		return fault.New(fault.Internal, "cannot remove volume %s: %w", name, err)
	}
	if v.rec.Ephemeral {
		return nil
	}
	if err := s.dir.Sync(); err != nil {
		return fault.New(fault.Internal, "cannot remove volume %s: %w", name, err)
	}
	return nil
}

// Prune removes anonymous volumes that nothing refers to; with the filter
// all=true named ones too.
func (s *Store) Prune(ctx context.Context, f Filters) (volume.PruneReport, error) {
	r := volume.PruneReport{VolumesDeleted: []string{}}
	if err := checkFilters(f, "all", "label", "label!"); err != nil {
		return r, err
	}
	all, err := truth(f, "all")
	if err != nil {
		return r, err
	}
	s.mu.Lock()
	var names []string
	for name, v := range s.m {
		_, anonymous := v.rec.Labels[AnonymousLabel]
		if v.state == present && len(v.refs) == 0 && (anonymous || all != nil && *all) && matches(v.rec, f) {
			names = append(names, name)
		}
	}
	s.mu.Unlock()
	slices.Sort(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		size, _ := s.Usage(ctx, name)
		if err := s.Remove(ctx, name, false); err != nil {
			if fault.Is(err, fault.Conflict) || fault.Is(err, fault.NotFound) {
				continue
			}
			return r, err
		}
		r.VolumesDeleted = append(r.VolumesDeleted, name)
		r.SpaceReclaimed += uint64(size)
	}
	return r, nil
}

// Usage sums the sizes of a volume's files in bytes, each inode once. What is
// mounted from elsewhere (nfs, bind) counts as 0.
func (s *Store) Usage(ctx context.Context, name string) (int64, error) {
	v, err := s.get(name)
	if err != nil {
		return 0, err
	}
	if v.rec.mounts() {
		return 0, nil
	}
	d, err := s.openData(name)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	n, err := treeSize(ctx, d)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, fault.New(fault.Internal, "cannot measure volume %s: %w", name, err)
	}
	return n, nil
}
