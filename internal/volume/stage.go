package volume

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Staging is new content for a volume, made aside. It takes the place of what the
// volume holds in one step, or never: an engine that is killed leaves either the
// old content or the new one, whole.
type Staging struct {
	// Dir is the directory to fill.
	Dir *os.File

	s       *Store
	v       *vol   // an existing volume, busy until the end
	rec     stored // of a new one
	tmp     string // name below the root
	project uint32
	done    bool
}

// Stage begins new content for a volume. A volume that does not exist is made by
// Commit as req says; one that does must be kept here, used by no running
// container and, without replace, empty.
func (s *Store) Stage(ctx context.Context, req volume.CreateRequest, replace bool) (*Staging, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	name := req.Name
	if err := validName(name); err != nil {
		return nil, err
	}
	if req.Driver != "" && req.Driver != Driver {
		return nil, fault.New(fault.Unsupported, "cannot restore volume %s: content is restored into volumes of driver %s alone", name, Driver)
	}
	v, err := s.get(name)
	if err == nil {
		return s.stageOver(v, replace)
	}
	if err := s.adopt(ctx, name); err != nil {
		return nil, err
	}
	if v, err := s.get(name); err == nil {
		return s.stageOver(v, replace)
	}
	if err := validOptions(req.DriverOpts); err != nil {
		return nil, err
	}
	g := &Staging{s: s, rec: stored{Name: name, Created: time.Now().UTC(), Labels: req.Labels, Options: req.DriverOpts}}
	if g.rec.mounts() {
		return nil, fault.New(fault.Unsupported, "cannot restore volume %s: its data is mounted from elsewhere (type, device)", name)
	}
	if g.rec.Options["size"] != "" {
		if g.rec.Project, err = s.projects.Allot(); err != nil {
			return nil, fault.New(fault.Exhausted, "cannot make volume %s: %w", name, err)
		}
		g.project = g.rec.Project
	}
	if g.tmp, err = s.prepare(g.rec); err != nil {
		g.Abort()
		return nil, err
	}
	if g.Dir, err = s.openData(g.tmp); err != nil {
		g.Abort()
		return nil, err
	}
	return g, nil
}

// stageOver begins content that is to replace a volume's.
func (s *Store) stageOver(v *vol, replace bool) (_ *Staging, err error) {
	name := v.rec.Name
	if v.rec.mounts() || v.rec.Driver != "" {
		return nil, fault.New(fault.Unsupported, "cannot replace the content of volume %s in one step: its data is mounted from elsewhere; restore into another volume and copy", name)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	s.mu.Lock()
	gone := v.state != present
	s.mu.Unlock()
	if gone {
		return nil, fault.New(fault.NotFound, "get %s: no such volume", name)
	}
	if v.busy {
		return nil, errBusy(name)
	}
	v.busy = true
	g := &Staging{s: s, v: v}
	defer func() {
		if err != nil {
			g.abort()
			v.busy = false
		}
	}()
	if len(v.uses) > 0 {
		return nil, fault.New(fault.Conflict, "cannot replace the content of volume %s: a running container uses it; stop that first", name)
	}
	data, err := s.openData(name)
	if err != nil {
		return nil, err
	}
	names, err := data.Readdirnames(1)
	data.Close()
	if len(names) > 0 && !replace {
		return nil, fault.New(fault.Conflict, "cannot restore volume %s: it holds data already; say that it is to be replaced, or choose another name", name)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Internal, "cannot read volume %s: %w", name, err)
	}
	vdir, err := beneath(int(s.dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open volume %s: %w", name, err)
	}
	defer vdir.Close()
	if err := s.clearStaging(vdir, name); err != nil {
		return nil, fault.New(fault.Internal, "cannot clear what was left in volume %s: %w", name, err)
	}
	tmp := stagingPrefix + randomName()
	if err := unix.Mkdirat(int(vdir.Fd()), tmp, 0o755); err != nil {
		return nil, fault.New(fault.Of(err), "cannot make new content for volume %s: %w", name, err)
	}
	g.tmp = name + "/" + tmp
	if err := unix.Fchmodat(int(vdir.Fd()), tmp, 0o755, 0); err != nil {
		return nil, fault.New(fault.Of(err), "cannot make new content for volume %s: %w", name, err)
	}
	if g.Dir, err = beneath(int(s.dir.Fd()), g.tmp, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
		return nil, fault.New(fault.Internal, "cannot make new content for volume %s: %w", name, err)
	}
	if v.rec.Project != 0 {
		if err := s.limit(g.Dir, v.rec); err != nil {
			return nil, fault.New(fault.Of(err), "cannot make new content for volume %s: %w", name, err)
		}
	}
	return g, nil
}

// Commit puts the content in place and makes it durable.
func (g *Staging) Commit(ctx context.Context) (*volume.Volume, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, fd := g.s, int(g.s.dir.Fd())
	// The rename must not reach the disk before what it puts in place.
	if err := unix.Syncfs(int(g.Dir.Fd())); err != nil {
		return nil, fault.New(fault.Of(err), "cannot write the content of volume %s to the disk: %w", g.name(), err)
	}
	if g.v != nil {
		g.v.mu.Lock()
		defer g.v.mu.Unlock()
		// In one step, so that there is no moment without content.
		if err := unix.Renameat2(fd, g.tmp, fd, g.name()+"/"+dataDir, unix.RENAME_EXCHANGE); err != nil {
			return nil, fault.New(fault.Internal, "cannot replace the content of volume %s: %w", g.name(), err)
		}
		vdir, err := beneath(fd, g.name(), unix.O_RDONLY|unix.O_DIRECTORY)
		if err == nil {
			err = vdir.Sync()
			vdir.Close()
		}
		if err != nil {
			return nil, fault.New(fault.Internal, "cannot replace the content of volume %s: %w", g.name(), err)
		}
		d := s.describe(g.v)
		g.abort() // what is aside now is the old content
		g.v.busy = false
		return d, nil
	}
	v := newVol(g.rec, creating)
	if had, err := s.claim(ctx, v, "", false); err != nil {
		return nil, err
	} else if had != nil {
		return nil, fault.New(fault.Conflict, "cannot restore volume %s: a volume of that name was made meanwhile", g.rec.Name)
	}
	err := unix.Renameat2(fd, g.tmp, fd, g.rec.Name, unix.RENAME_NOREPLACE)
	if err == nil {
		err = s.dir.Sync()
	}
	s.mu.Lock()
	if err != nil {
		delete(s.m, g.rec.Name)
	} else {
		v.state = present
	}
	close(v.settled)
	s.mu.Unlock()
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot make volume %s: %w", g.rec.Name, err)
	}
	g.done, g.project = true, 0
	g.Dir.Close()
	return s.describe(v), nil
}

func (g *Staging) name() string {
	if g.v != nil {
		return g.v.rec.Name
	}
	return g.rec.Name
}

// Abort throws the staged content away, unless it was committed. It may be called
// in any case.
func (g *Staging) Abort() {
	if g.done {
		return
	}
	if g.v != nil {
		g.v.mu.Lock()
		defer g.v.mu.Unlock()
		g.v.busy = false
	}
	g.abort()
}

// errBusy refuses what would meet content that is being replaced.
func errBusy(name string) error {
	return fault.New(fault.Conflict, "volume %s is being restored: try again when that is done", name)
}

// abort throws away what lies aside.
func (g *Staging) abort() {
	g.done = true
	if g.Dir != nil {
		g.Dir.Close()
	}
	if g.tmp != "" {
		if err := g.s.moveToTrash(g.tmp); err != nil {
			g.s.log.Warn("cannot clear content of a volume that was not finished", "path", g.tmp, "cause", err)
		}
	}
	if g.project != 0 {
		g.s.lift(g.project)
	}
}

// Copy fills the staging with another volume's content: blocks are shared where
// the file system can.
func (g *Staging) Copy(ctx context.Context, from *os.File) error {
	c := &copier{ctx: ctx, links: map[inode]string{}, top: int(g.Dir.Fd())}
	if err := c.dir(int(from.Fd()), int(g.Dir.Fd()), ""); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fault.New(fault.Of(err), "cannot copy volume: %w", err)
	}
	return nil
}
