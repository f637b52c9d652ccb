// Package idmap gives containers their own ranges of host ids (--userns=auto) and
// reads the subordinate ids of users.
//
// A *range* is 65,536 ids, used for users and groups alike, that no other
// container and no entry of /etc/subuid, /etc/subgid, /etc/passwd or /etc/group
// has. It belongs to a container until that is removed: its processes and its
// layers rely on nobody else having it. The record of a range is one symbolic
// link in a directory of ours, named by its first id and pointing to the
// container's: made and removed by one system call each, so there is no state in
// which it is torn. The engine imports this package.
package idmap

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

const (
	// Size of every range: 16 bits, what an image may use.
	Size = 1 << 16
	// Ranges are taken from where neither systemd (its containers end at 0x6fffffff,
	// its foreign ids begin at 0x7ffe0000) nor distributions hand out ids, and below
	// 2³¹, which is the end of the world for some programs: 4,094 of them.
	first uint32 = 0x70000000
	last  uint32 = 0x7ffe0000 // exclusive
)

// Config of an allocator. The files are the host's unless set.
type Config struct {
	// Dir holds the records, made if missing.
	Dir                           string
	SubUID, SubGID, Passwd, Group string
	// UIDMap and GIDMap are /proc/self/uid_map and gid_map: what ids the engine has.
	UIDMap, GIDMap string
}

func (c Config) withDefaults() Config {
	for _, d := range []struct {
		field *string
		value string
	}{
		{&c.SubUID, "/etc/subuid"}, {&c.SubGID, "/etc/subgid"}, {&c.Passwd, "/etc/passwd"}, {&c.Group, "/etc/group"},
		{&c.UIDMap, "/proc/self/uid_map"}, {&c.GIDMap, "/proc/self/gid_map"},
	} {
		if *d.field == "" {
			*d.field = d.value
		}
	}
	return c
}

// Allocator hands out ranges. It is safe for concurrent use.
type Allocator struct {
	cfg Config
	dir *os.File

	mu    sync.Mutex
	owner map[uint32]string // range's first id to container
	by    map[string]*grant
}

// grant is a container's range; ready is closed when its record is made or has failed.
type grant struct {
	start uint32
	ready chan struct{}
	err   error
}

// New opens the records.
func New(cfg Config) (*Allocator, error) {
	cfg = cfg.withDefaults()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fault.New(fault.Internal, "cannot open id ranges: %w", err)
	}
	dir, err := os.Open(cfg.Dir)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open id ranges: %w", err)
	}
	a := &Allocator{cfg: cfg, dir: dir, owner: map[uint32]string{}, by: map[string]*grant{}}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		dir.Close()
		return nil, fault.New(fault.Internal, "cannot read id ranges: %w", err)
	}
	slices.Sort(names)
	done := make(chan struct{})
	close(done)
	for _, n := range names {
		start, err := strconv.ParseUint(n, 10, 32)
		if err != nil {
			continue
		}
		id, err := os.Readlink(filepath.Join(cfg.Dir, n))
		if err != nil || a.by[id] != nil {
			// Not ours, or a second range of a container: it stays taken.
			a.owner[uint32(start)] = "?"
			continue
		}
		a.owner[uint32(start)] = id
		a.by[id] = &grant{start: uint32(start), ready: done}
	}
	return a, nil
}

func mapping(start uint32) snapshot.IDMap {
	r := []snapshot.IDRange{{Container: 0, Host: start, Size: Size}}
	return snapshot.IDMap{UIDs: r, GIDs: slices.Clone(r)}
}

// Allocate gives the container a range, the same one each time. The record is
// durable on return unless ephemeral.
func (a *Allocator) Allocate(ctx context.Context, containerID string, ephemeral bool) (snapshot.IDMap, error) {
	if containerID == "" || strings.ContainsAny(containerID, "/\x00") || len(containerID) > 255 {
		return snapshot.IDMap{}, fault.New(fault.Invalid, "cannot allot ids: %q is no container id", containerID)
	}
	for {
		a.mu.Lock()
		g := a.by[containerID]
		a.mu.Unlock()
		if g == nil {
			break
		}
		select {
		case <-g.ready:
		case <-ctx.Done():
			return snapshot.IDMap{}, ctx.Err()
		}
		if g.err == nil {
			return mapping(g.start), nil
		}
		if a.drop(containerID, g) {
			break
		}
	}
	taken, err := a.cfg.taken()
	if err != nil {
		return snapshot.IDMap{}, err
	}
	a.mu.Lock()
	if a.by[containerID] != nil {
		a.mu.Unlock()
		return a.Allocate(ctx, containerID, ephemeral)
	}
	start, ok := a.free(taken)
	if !ok {
		n := len(a.owner)
		a.mu.Unlock()
		if n == 0 {
			return snapshot.IDMap{}, fault.New(fault.Unsupported, "cannot allot ids for a user namespace: no range of %d ids from %d on is free or mapped here; shorten entries of %s and %s, or run without --userns=auto", Size, first, a.cfg.SubUID, a.cfg.SubGID)
		}
		return snapshot.IDMap{}, fault.New(fault.Exhausted, "cannot allot ids for a user namespace: all ranges are taken by %d containers; remove some", n)
	}
	g := &grant{start: start, ready: make(chan struct{})}
	a.owner[start], a.by[containerID] = containerID, g
	a.mu.Unlock()

	err = unix.Symlinkat(containerID, int(a.dir.Fd()), strconv.FormatUint(uint64(start), 10))
	if err == nil && !ephemeral {
		err = a.dir.Sync()
	}
	if err != nil {
		g.err = fault.New(fault.Internal, "cannot record ids of container %s: %w", containerID, err)
		a.drop(containerID, g)
		if !errors.Is(err, unix.EEXIST) {
			_ = a.unlink(start)
		}
		close(g.ready)
		return snapshot.IDMap{}, g.err
	}
	close(g.ready)
	return mapping(start), nil
}

// drop forgets a grant that failed.
func (a *Allocator) drop(id string, g *grant) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.by[id] != g {
		return a.by[id] == nil
	}
	delete(a.by, id)
	delete(a.owner, g.start)
	return true
}

func (a *Allocator) unlink(start uint32) error {
	err := unix.Unlinkat(int(a.dir.Fd()), strconv.FormatUint(uint64(start), 10), 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// free finds the first range that nobody has; a.mu is held.
func (a *Allocator) free(taken []span) (uint32, bool) {
next:
	for start := uint64(first); start+Size <= uint64(last); start += Size {
		if _, ok := a.owner[uint32(start)]; ok {
			continue
		}
		for _, t := range taken {
			if start < t.end && t.start < start+Size {
				continue next
			}
		}
		return uint32(start), true
	}
	return 0, false
}

// Lookup returns the range that a container has.
func (a *Allocator) Lookup(containerID string) (snapshot.IDMap, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	g := a.by[containerID]
	if g == nil {
		return snapshot.IDMap{}, false
	}
	return mapping(g.start), true
}

// Release gives a container's range back, once nothing of the container is left.
// It is idempotent. The record is gone for this boot; should a power cut bring it
// back, Retain clears it.
func (a *Allocator) Release(containerID string) error {
	a.mu.Lock()
	g := a.by[containerID]
	a.mu.Unlock()
	if g == nil {
		return nil
	}
	<-g.ready
	if g.err != nil {
		return nil
	}
	// The record goes first: a range without record could be given away twice.
	if err := a.unlink(g.start); err != nil {
		return fault.New(fault.Internal, "cannot release ids of container %s: %w", containerID, err)
	}
	a.drop(containerID, g)
	return nil
}

// Retain releases the ranges of all containers but those that exist, at start-up.
func (a *Allocator) Retain(exists func(containerID string) bool) error {
	a.mu.Lock()
	var gone []string
	for id := range a.by {
		if !exists(id) {
			gone = append(gone, id)
		}
	}
	a.mu.Unlock()
	var failed error
	for _, id := range gone {
		failed = errors.Join(failed, a.Release(id))
	}
	return failed
}

// Close closes the directory of records.
func (a *Allocator) Close() error { return a.dir.Close() }

// span is a half-open interval of ids.
type span struct{ start, end uint64 }

// taken lists what must not be given to a container.
func (c Config) taken() ([]span, error) {
	var out []span
	for _, path := range []string{c.SubUID, c.SubGID} {
		ids, err := readSubIDs(path)
		if err != nil {
			return nil, err
		}
		for _, s := range ids {
			if s.Count > 0 && s.SubID >= 0 {
				out = append(out, span{uint64(s.SubID), uint64(s.SubID) + uint64(s.Count)})
			}
		}
	}
	users, err := user.ParsePasswdFile(c.Passwd)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Internal, "cannot read users: %w", err)
	}
	for _, u := range users {
		out = append(out, span{uint64(u.Uid), uint64(u.Uid) + 1})
	}
	groups, err := user.ParseGroupFile(c.Group)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Internal, "cannot read groups: %w", err)
	}
	for _, g := range groups {
		out = append(out, span{uint64(g.Gid), uint64(g.Gid) + 1})
	}
	for _, path := range []string{c.UIDMap, c.GIDMap} {
		lacking, err := unmapped(path)
		if err != nil {
			return nil, err
		}
		out = append(out, lacking...)
	}
	return out, nil
}

// unmapped lists the ids that this process's user namespace does not have.
func unmapped(path string) ([]span, error) {
	maps, err := user.ParseIDMapFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read the id mapping: %w", err)
	}
	slices.SortFunc(maps, func(a, b user.IDMap) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	var out []span
	at := uint64(0)
	for _, m := range maps {
		if s := uint64(m.ID); s > at {
			out = append(out, span{at, s})
		}
		at = max(at, uint64(m.ID)+uint64(m.Count))
	}
	return append(out, span{at, 1 << 33}), nil
}

func readSubIDs(path string) ([]user.SubID, error) {
	ids, err := user.ParseSubIDFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read subordinate ids: %w", err)
	}
	return ids, nil
}

// Subordinate is the mapping of an unprivileged user: root of a container is the
// user, the ids from 1 on are the subordinate ones that the host gave, by name or
// number. fault.Unsupported: the host gave none.
func Subordinate(cfg Config, name string, uid, gid uint32) (snapshot.IDMap, error) {
	cfg = cfg.withDefaults()
	build := func(path string, own uint32) ([]snapshot.IDRange, error) {
		ids, err := readSubIDs(path)
		if err != nil {
			return nil, err
		}
		out := []snapshot.IDRange{{Container: 0, Host: own, Size: 1}}
		next := uint64(1)
		for _, s := range ids {
			if s.Name != name && s.Name != strconv.FormatUint(uint64(uid), 10) {
				continue
			}
			if s.SubID < 0 || s.Count <= 0 || s.SubID > 1<<32-2 || next >= 1<<32-1 {
				continue
			}
			size := min(uint64(s.Count), 1<<32-1-uint64(s.SubID), 1<<32-1-next)
			// A kernel refuses mappings that overlap, such as a range given twice.
			if slices.ContainsFunc(out, func(o snapshot.IDRange) bool {
				return uint64(s.SubID) < uint64(o.Host)+uint64(o.Size) && uint64(o.Host) < uint64(s.SubID)+size
			}) {
				continue
			}
			out = append(out, snapshot.IDRange{Container: uint32(next), Host: uint32(s.SubID), Size: uint32(size)})
			next += size
		}
		if len(out) == 1 {
			return nil, fault.New(fault.Unsupported, "cannot map ids: %s gives user %s none; give some with: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s", path, name, name)
		}
		return out, nil
	}
	uids, err := build(cfg.SubUID, uid)
	if err != nil {
		return snapshot.IDMap{}, err
	}
	gids, err := build(cfg.SubGID, gid)
	if err != nil {
		return snapshot.IDMap{}, err
	}
	return snapshot.IDMap{UIDs: uids, GIDs: gids}, nil
}
