package engine

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine/archive"
	"github.com/cloudos-io/cloudos/internal/engine/volarchive"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
	vol "github.com/cloudos-io/cloudos/internal/volume"
)

// CopyVolumeOptions tell how the content of a volume is read.
type CopyVolumeOptions struct {
	// Pause holds the containers that run with the volume meanwhile, so that what
	// is read is of one moment.
	Pause bool
	// Size, if set, is told the bytes of the volume's files before anything else.
	Size func(int64)
}

// VolumeBackup writes an archive of a volume that VolumeRestore reads.
func (s *VolumeService) VolumeBackup(ctx context.Context, name string, o CopyVolumeOptions, w io.Writer) (out api.VolumeArchive, err error) {
	err = s.reading(ctx, name, o, func(v *volume.Volume, dir *os.File) error {
		h := volarchive.Head{Name: v.Name, Driver: v.Driver, Created: v.CreatedAt, Labels: v.Labels, Options: v.Options}
		out, err = volarchive.Write(ctx, w, dir, h)
		return err
	})
	return out, err
}

// VolumeExport writes a volume's content as a plain tar.
func (s *VolumeService) VolumeExport(ctx context.Context, name string, o CopyVolumeOptions, w io.Writer) error {
	return s.reading(ctx, name, o, func(_ *volume.Volume, dir *os.File) error {
		return archive.In(dir).Write(ctx, "/", w, archive.WriteOptions{As: ".", OneFileSystem: true})
	})
}

// reading calls fn with a volume's directory, mounted if it has to be, while its
// containers hold still if that was asked for.
func (s *VolumeService) reading(ctx context.Context, name string, o CopyVolumeOptions, fn func(*volume.Volume, *os.File) error) error {
	e := s.e
	v, err := e.cfg.Volumes.Inspect(ctx, name)
	if err != nil {
		return err
	}
	user := "read-" + newID()[:16]
	if _, err := e.cfg.Volumes.Use(ctx, name, user); err != nil {
		return err
	}
	defer func() { _ = e.cfg.Volumes.Release(context.WithoutCancel(ctx), name, user) }()
	dir, err := e.cfg.Volumes.Open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if o.Size != nil {
		o.Size(s.size(ctx, name))
	}
	if o.Pause {
		resume, err := s.hold(ctx, name)
		if err != nil {
			return err
		}
		defer resume()
	}
	return fn(v, dir)
}

// holdDir keeps a file for each container that is paused for a copy: an engine
// that is killed meanwhile must not leave them so.
func (e *Engine) holdDir() string { return filepath.Join(e.cfg.RunRoot, "held") }

// hold pauses the running containers that have the volume and returns what lets
// them go on.
func (s *VolumeService) hold(ctx context.Context, name string) (func(), error) {
	e := s.e
	var held []string
	resume := func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		for _, id := range slices.Backward(held) {
			e.letGo(ctx, id)
		}
	}
	if err := os.MkdirAll(e.holdDir(), 0o700); err != nil {
		return nil, fault.New(fault.Internal, "cannot note what is paused: %w", err)
	}
	for _, id := range e.cfg.Volumes.References(name) {
		u, err := e.lookup(id)
		if err != nil || u.rec.Load().State.Status != mcontainer.StateRunning {
			continue
		}
		// Another copy may hold it already: whoever made the file lets it go.
		f, err := os.OpenFile(filepath.Join(e.holdDir(), id), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if errors.Is(err, os.ErrExist) {
			resume()
			return nil, fault.New(fault.Conflict, "cannot pause container %s: another copy of a volume holds it; try again later", short(id))
		}
		if err != nil {
			resume()
			return nil, fault.New(fault.Internal, "cannot note what is paused: %w", err)
		}
		f.Close()
		if err := e.ContainerPause(ctx, id); err != nil {
			_ = os.Remove(filepath.Join(e.holdDir(), id))
			if _, gone := u.needTask(); gone != nil {
				continue // it ended meanwhile
			}
			resume()
			return nil, err
		}
		held = append(held, id)
	}
	return resume, nil
}

// letGo unpauses a container that was held for a copy.
func (e *Engine) letGo(ctx context.Context, id string) {
	u, err := e.lookup(id)
	if err == nil {
		if c, ok := u.running().(runtime.Checkpointer); ok {
			_ = c.Quiet(ctx, false) // a checkpoint may have cut it off
		}
	}
	switch {
	case err != nil:
	case u.rec.Load().State.Status == mcontainer.StatePaused:
		if err := e.ContainerUnpause(ctx, id); err != nil {
			e.log.Error("cannot unpause a container after a copy of its volume", "container", id, "cause", err)
			return
		}
	default:
		// Killed between the pause and the record of it.
		if t := u.running(); t != nil {
			_ = t.Resume(ctx)
		}
	}
	_ = os.Remove(filepath.Join(e.holdDir(), id))
}

// letAllGo unpauses what a killed engine held.
func (e *Engine) letAllGo(ctx context.Context) {
	list, err := os.ReadDir(e.holdDir())
	if err != nil {
		return
	}
	for _, f := range list {
		e.letGo(ctx, f.Name())
	}
}

// RestoreOptions tell how content is put into a volume.
type RestoreOptions struct {
	// Replace permits to replace what the volume holds.
	Replace bool
	// Devices permits device nodes in the archive.
	Devices bool
	// Labels of the volume that an import makes.
	Labels map[string]string
}

// VolumeRestore makes a volume, or replaces its content, of an archive that
// VolumeBackup wrote. Until the archive has been read to its end and found whole,
// nothing that exists is touched.
func (s *VolumeService) VolumeRestore(ctx context.Context, name string, o RestoreOptions, r io.Reader) (api.VolumeArchive, error) {
	var g *vol.Staging
	defer func() {
		if g != nil {
			g.Abort()
		}
	}()
	out, err := volarchive.Read(ctx, r, o.Devices, func(h volarchive.Head) (*os.File, error) {
		req := volume.CreateRequest{Name: name, Labels: h.Labels}
		if size := h.Options["size"]; size != "" {
			req.DriverOpts = map[string]string{"size": size} // of the others none is ours to repeat
		}
		delete(req.Labels, vol.AnonymousLabel) // it has a name now
		var err error
		if g, err = s.e.cfg.Volumes.Stage(ctx, req, o.Replace); err != nil {
			return nil, err
		}
		return g.Dir, nil
	})
	if err != nil {
		return out, err
	}
	v, err := g.Commit(ctx)
	if err != nil {
		return out, err
	}
	s.event("restore", v.Name, nil)
	return out, nil
}

// VolumeImport makes a volume, or replaces its content, of a tar archive, plain or
// compressed.
func (s *VolumeService) VolumeImport(ctx context.Context, name string, o RestoreOptions, r io.Reader) error {
	z, err := volarchive.Decompress(r)
	if err != nil {
		return err
	}
	defer z.Close()
	g, err := s.e.cfg.Volumes.Stage(ctx, volume.CreateRequest{Name: name, Labels: o.Labels}, o.Replace)
	if err != nil {
		return err
	}
	defer g.Abort()
	whole := volarchive.NewWhole(z)
	if err := archive.In(g.Dir).Extract(ctx, "/", whole, archive.ExtractOptions{Top: true, Sparse: true, NoDevices: !o.Devices}); err != nil {
		return err
	}
	if err := whole.Check(); err != nil {
		return err
	}
	v, err := g.Commit(ctx)
	if err == nil {
		s.event("restore", v.Name, nil)
	}
	return err
}

// VolumeClone makes a volume with the content, labels and size of another one.
func (s *VolumeService) VolumeClone(ctx context.Context, name string, o api.VolumeClone) (*volume.Volume, error) {
	var out *volume.Volume
	if o.Name == "" || o.Name == name {
		return nil, fault.New(fault.Invalid, "cannot clone volume %s: the clone needs a name of its own", name)
	}
	if _, err := s.e.cfg.Volumes.Inspect(ctx, o.Name); err == nil {
		return nil, fault.New(fault.Conflict, "cannot clone volume %s: a volume named %s exists already", name, o.Name)
	}
	err := s.reading(ctx, name, CopyVolumeOptions{Pause: o.Pause}, func(v *volume.Volume, dir *os.File) error {
		req := volume.CreateRequest{Name: o.Name, Labels: v.Labels}
		if size := v.Options["size"]; size != "" && v.Driver == vol.Driver {
			req.DriverOpts = map[string]string{"size": size}
		}
		delete(req.Labels, vol.AnonymousLabel)
		g, err := s.e.cfg.Volumes.Stage(ctx, req, false)
		if err != nil {
			return err
		}
		defer g.Abort()
		if err := g.Copy(ctx, dir); err != nil {
			return err
		}
		out, err = g.Commit(ctx)
		return err
	})
	if err == nil {
		s.event(events.ActionCreate, out.Name, nil)
	}
	return out, err
}
