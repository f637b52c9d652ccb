// Package volume keeps named and anonymous volumes, our own and those of plugins,
// and reads what a container request says about mounts.
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
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
	"github.com/cloudos-io/cloudos/internal/plugin"
	"github.com/cloudos-io/cloudos/internal/quota"
)

const (
	// Driver is the name of our own driver.
	Driver = "local"
	// AnonymousLabel marks volumes that nobody named.
	AnonymousLabel = "com.docker.volume.anonymous"

	dataDir   = "_data"
	record    = "volume.json"
	trashDir  = ".trash"
	newPrefix = ".new-"
)

var nameRule = pattern.New(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

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
	// RunRoot holds who uses the volumes of plugins; BootID tells whether that is
	// of this boot. Without Plugins neither is needed.
	RunRoot, BootID string
	// Plugins, if not nil, are drivers besides our own.
	Plugins *plugin.Set
	Log     *slog.Logger
}

// Store holds volumes. All methods are safe for concurrent use.
type Store struct {
	root string
	dir  *os.File
	log  *slog.Logger
	wake chan struct{} // something is in the trash

	plugins  *plugin.Set
	runs     string // directory of uses of plugins' volumes
	projects *quota.IDs

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
	busy    bool // its content is being replaced
	// at is where a plugin has mounted it, while it is in use; left are uses that
	// an earlier engine noted and nobody has confirmed yet.
	at   string
	left map[string]bool
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
	s := &Store{root: cfg.Root, dir: dir, log: cfg.Log, wake: make(chan struct{}, 1), m: map[string]*vol{},
		plugins: cfg.Plugins, projects: quota.NewIDs(quota.Volumes)}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	err = s.load()
	if err == nil {
		err = s.loadUses(cfg.RunRoot, cfg.BootID)
	}
	if err != nil {
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
		if vdir, err := beneath(int(s.dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY); err == nil {
			// Content that was being restored or copied when an engine was killed.
			if err := s.clearStaging(vdir, name); err != nil {
				s.log.Warn("cannot clear unfinished content of a volume", "volume", name, "error", err)
			}
			vdir.Close()
		}
		v := newVol(rec, present)
		if rec.Project != 0 {
			s.projects.Taken(rec.Project)
		}
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
	if req.ClusterVolumeSpec != nil {
		return nil, fault.New(fault.Unsupported, "cluster volumes are not supported: use the local driver")
	}
	driver := req.Driver
	if driver == Driver {
		driver = ""
	}
	if req.Driver == "" && req.Name != "" {
		// One that a plugin has already is meant by its name alone.
		if err := s.adopt(ctx, req.Name); err != nil {
			return nil, err
		}
	}
	if driver == "" {
		if err := validOptions(req.DriverOpts); err != nil && !s.foreign(req.Name) {
			return nil, err
		}
	} else if _, err := s.find(ctx, driver); err != nil {
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
		Options: maps.Clone(req.DriverOpts), Ephemeral: o.Ephemeral, Driver: driver,
	}, creating)
	if o.For != "" {
		v.refs[o.For] = true
	}
	if had, err := s.claim(ctx, v, o.For, req.Driver != ""); err != nil || had != nil {
		return had, err
	}
	err := s.bring(ctx, &v.rec)
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

// bring makes a volume where it is kept: with us, or first with its plugin.
func (s *Store) bring(ctx context.Context, r *stored) error {
	if r.Driver != "" {
		if err := s.createRemote(ctx, r); err != nil {
			return err
		}
		err := s.make(*r)
		if err != nil {
			_ = s.removeRemote(context.WithoutCancel(ctx), *r, false)
		}
		return err
	}
	if r.Options["size"] == "" {
		return s.make(*r)
	}
	id, err := s.projects.Allot()
	if err != nil {
		return fault.New(fault.Exhausted, "cannot create volume %s: %w", r.Name, err)
	}
	r.Project = id
	if err = s.make(*r); err != nil {
		s.projects.Free(id)
	}
	return err
}

// claim puts a volume to be created in the index, unless there is one of the
// name: then it returns that, referred to. With same its driver must be the same.
func (s *Store) claim(ctx context.Context, v *vol, container string, same bool) (*volume.Volume, error) {
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
			if same && v.rec.Driver != old.rec.Driver {
				return nil, fault.New(fault.Conflict, "create %s: conflict: a volume of this name exists with driver %s: remove it first or choose another name", name, old.rec.driver())
			}
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
	d := &volume.Volume{
		Name: v.rec.Name, Driver: v.rec.driver(), Scope: "local",
		CreatedAt: v.rec.Created.Format(time.RFC3339),
		Labels:    maps.Clone(v.rec.Labels), Options: shown(v.rec.Options),
	}
	if v.rec.Driver == "" {
		d.Mountpoint = filepath.Join(s.root, v.rec.Name, dataDir)
	}
	return d
}

// shown are options without the passwords that network file systems take.
func shown(o map[string]string) map[string]string {
	o = maps.Clone(o)
	if data := o["o"]; strings.Contains(data, "pass") {
		opts := strings.Split(data, ",")
		for i, x := range opts {
			if k, _, ok := strings.Cut(x, "="); ok && (k == "password" || k == "pass" || k == "password2") {
				opts[i] = k + "=***"
			}
		}
		o["o"] = strings.Join(opts, ",")
	}
	return o
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
func (s *Store) Inspect(ctx context.Context, name string) (*volume.Volume, error) {
	v, err := s.get(name)
	if fault.Is(err, fault.NotFound) {
		if aerr := s.adopt(ctx, name); aerr != nil {
			return nil, aerr
		}
		v, err = s.get(name)
	}
	if err != nil {
		return nil, err
	}
	d := s.describe(v)
	if v.rec.Driver != "" {
		return d, s.inspectRemote(ctx, v.rec, d)
	}
	return d, nil
}

// Filters are Docker's: key to set of values.
type Filters = map[string]map[string]bool

// List describes the volumes that match, by name. Warnings name plugins that do
// not answer.
func (s *Store) List(ctx context.Context, f Filters) ([]volume.Volume, []string, error) {
	if err := checkFilters(f, "dangling", "driver", "label", "name"); err != nil {
		return nil, nil, err
	}
	dangling, err := truth(f, "dangling")
	if err != nil {
		return nil, nil, err
	}
	theirs, warnings := s.listRemote(ctx)
	s.mu.Lock()
	out := make([]volume.Volume, 0, len(s.m)+len(theirs))
	for _, v := range s.m {
		known, ok := theirs[v.rec.Name]
		if ok = ok && known.Driver == v.rec.Driver; ok {
			delete(theirs, v.rec.Name)
		}
		if v.state != present || !matches(v.rec, f) || dangling != nil && *dangling != (len(v.refs) == 0) {
			continue
		}
		d := s.describe(v)
		if ok {
			d.Mountpoint, d.Scope = known.Mountpoint, known.Scope
		}
		out = append(out, *d)
	}
	for name, v := range theirs {
		if s.m[name] == nil && matches(stored{Name: name, Driver: v.Driver}, f) && (dangling == nil || *dangling) {
			out = append(out, v)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(out, func(a, b volume.Volume) int { return strings.Compare(a.Name, b.Name) })
	return out, warnings, nil
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
	if fault.Is(err, fault.NotFound) {
		if aerr := s.adopt(ctx, name); aerr == nil {
			v, err = s.get(name)
		}
	}
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
	if v.busy {
		s.mu.Unlock()
		return errBusy(name)
	}
	if len(v.refs) > 0 {
		ids := slices.Sorted(maps.Keys(v.refs))
		s.mu.Unlock()
		return fault.New(fault.Conflict, "remove %s: volume is in use - %v", name, ids)
	}
	v.state, v.settled = removing, make(chan struct{})
	s.mu.Unlock()

	if v.rec.Driver != "" {
		s.dropLeft(context.WithoutCancel(ctx), v)
		err = s.removeRemote(ctx, v.rec, force)
	} else {
		err = s.unmount(v)
	}
	if err == nil {
		err = s.moveToTrash(name)
	}
	if err == nil && v.rec.Project != 0 {
		s.lift(v.rec.Project)
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
		return fault.New(fault.Of(err), "cannot remove volume %s: %w", name, err)
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
	if err := checkFilters(f, "all", "label", "label!", "until"); err != nil {
		return r, err
	}
	all, err := truth(f, "all")
	if err != nil {
		return r, err
	}
	until, err := before(f, time.Now())
	if err != nil {
		return r, err
	}
	s.mu.Lock()
	var names []string
	for name, v := range s.m {
		_, anonymous := v.rec.Labels[AnonymousLabel]
		if v.state == present && len(v.refs) == 0 && (anonymous || all != nil && *all) && matches(v.rec, f) &&
			(until.IsZero() || v.rec.Created.Before(until)) {
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
	if v.rec.mounts() || v.rec.Driver != "" {
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
