package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"time"

	"github.com/distribution/reference"
	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/checkpoint"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/engine/archive"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// fromCheckpoint prepares the start of a container from one of its checkpoints.
func (e *Engine) fromCheckpoint(ctx context.Context, r *container.Record, o StartOptions, l *launch) (done func(), err error) {
	dir, m, err := e.openCheckpoint(r.ID, o.Checkpoint, o.CheckpointDir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if o.CheckpointDir != "" { // whoever wrote it
		if err := e.mayUsePlace(ctx, r, filepath.Clean(o.CheckpointDir)); err != nil {
			return nil, err
		}
		if err := e.mayBringIn(ctx, r.Config, r.HostConfig); err != nil {
			return nil, err
		}
	}
	if m.Cold {
		return func() {}, nil
	}
	return e.images(r.ID, dir, m, l)
}

// mayBringIn asks whether who calls may bring processes in that another engine
// wrote down: they can be in any state, so it is the question of a privileged
// container's creation.
func (e *Engine) mayBringIn(ctx context.Context, cfg *mcontainer.Config, hc *mcontainer.HostConfig) error {
	h := *hc
	h.Privileged = true
	// The container itself is judged when it is made: what counts here is what
	// privileges add.
	if err := e.mayAdd(ctx, cfg, hc, &h); err != nil {
		return fault.New(fault.Of(err), "cannot bring in processes of a checkpoint from elsewhere, which takes the right to run privileged containers: %w", err)
	}
	return nil
}

// images opens what the processes are brought back from.
func (e *Engine) images(id string, dir *os.File, m *checkpoint.Manifest, l *launch) (done func(), err error) {
	round, err := checkpoint.OpenRound(dir, m.Rounds)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot use the checkpoint: %w", err)
	}
	work, err := e.workDir(id)
	if err != nil {
		round.Close()
		return nil, err
	}
	l.images = &runtime.Images{
		Dir: round, Work: work.dir, TCPEstablished: m.TCPEstablished, FileLocks: m.FileLocks,
		CheckpointResult: runtime.CheckpointResult{Streams: m.Streams, Binds: m.Binds, Version: m.CRIU},
	}
	return func() {
		round.Close()
		work.close()
	}, nil
}

// CheckpointRestore makes a new container of a checkpoint that the engine keeps.
func (e *Engine) CheckpointRestore(ctx context.Context, name string, o api.RestoreOptions) (api.Restored, error) {
	u, err := e.lookup(name)
	if err != nil {
		return api.Restored{}, err
	}
	dir, m, err := e.openCheckpoint(u.id, o.Checkpoint, "")
	if err != nil {
		return api.Restored{}, err
	}
	defer dir.Close()
	return e.restoreNew(ctx, dir, m, o, false)
}

// CheckpointImport makes a container of a checkpoint's tar. Nothing of it is used
// before the whole was found sound.
func (e *Engine) CheckpointImport(ctx context.Context, o api.RestoreOptions, r io.Reader) (res api.Restored, err error) {
	if err := os.MkdirAll(e.checkpointRoot(), 0o700); err != nil {
		return res, fault.New(fault.Internal, "cannot make the checkpoints' directory: %w", err)
	}
	path, err := os.MkdirTemp(e.checkpointRoot(), ".in-")
	if err != nil {
		return res, fault.New(fault.Internal, "cannot make the checkpoint's directory: %w", err)
	}
	defer os.RemoveAll(path)
	dir, err := os.Open(path)
	if err != nil {
		return res, fault.New(fault.Internal, "cannot open the checkpoint's directory: %w", err)
	}
	defer dir.Close()
	m, err := checkpoint.Read(ctx, r, dir, checkpoint.ReadOptions{MaxBytes: e.room(), Manifest: func(m *checkpoint.Manifest) error {
		// What would refuse it in the end refuses it before it is sent.
		return e.admit(ctx, m, &o)
	}})
	if err != nil {
		return res, err
	}
	if res, err = e.restoreNew(ctx, dir, m, o, true); err != nil || ctx.Err() == nil {
		return res, err
	}
	// Nobody is there to be told that it runs: whoever sends a container of theirs
	// would let it go on there, too.
	if rerr := e.ContainerRemove(context.WithoutCancel(ctx), res.ID, true, true, false); rerr != nil {
		e.log.Warn("cannot remove a restored container whose sender has gone", "container", res.ID, "cause", rerr)
	}
	return api.Restored{}, fault.New(fault.Unavailable, "cannot restore: the sender has gone: %w", context.Cause(ctx))
}

// admit looks at a manifest of elsewhere before anything of the rest is read.
func (e *Engine) admit(ctx context.Context, m *checkpoint.Manifest, o *api.RestoreOptions) error {
	if o.Name == "" {
		o.Name = m.Container.Name
	}
	name, err := container.CheckName(o.Name)
	if err != nil {
		return err
	}
	if id, ok := e.names.Lookup(name); ok {
		return fault.New(fault.Conflict, "cannot restore: the name %q is in use by container %s; give another one", name, short(id))
	}
	if !m.Cold {
		if m.Arch != goruntime.GOARCH {
			return fault.New(fault.Unsupported, "cannot restore: the checkpoint is of %s, and this host is %s", m.Arch, goruntime.GOARCH)
		}
		if err := e.mayBringIn(ctx, m.Container.Config, m.Container.HostConfig); err != nil {
			return err
		}
	}
	if !o.KeepVolumes {
		for _, v := range m.Volumes {
			if e.namedVolume(m, v) {
				if _, err := e.cfg.Volumes.Inspect(ctx, v.Name); err == nil {
					return fault.New(fault.Conflict, "cannot restore: there is a volume %s already; remove it, or keep what it holds (--keep-volumes)", v.Name)
				}
			}
		}
	}
	if m.WithImage || m.Container.Image.ID == "" {
		return nil
	}
	_, err = e.imageOf(ctx, m)
	return err
}

// namedVolume tells whether a volume has a name that somebody gave it.
func (e *Engine) namedVolume(m *checkpoint.Manifest, v checkpoint.Volume) bool {
	hc := m.Container.HostConfig
	for _, b := range hc.Binds {
		if len(b) > len(v.Name) && b[:len(v.Name)+1] == v.Name+":" {
			return true
		}
	}
	return slices.ContainsFunc(hc.Mounts, func(x mount.Mount) bool { return x.Type == mount.TypeVolume && x.Source == v.Name })
}

// imageOf finds the very image of a checkpoint, pulled if need be, and gives the
// name that the new container's configuration is to have for it.
func (e *Engine) imageOf(ctx context.Context, m *checkpoint.Manifest) (string, error) {
	im := m.Container.Image
	if im.Ref != "" {
		if got, err := e.cfg.Images.Resolve(ctx, im.Ref, ""); err == nil && got.ID.String() == im.ID {
			return im.Ref, nil
		}
	}
	if got, err := e.cfg.Images.Resolve(ctx, im.ID, ""); err == nil && got.ID.String() == im.ID {
		return im.ID, nil
	}
	named, err := reference.ParseNormalizedNamed(im.Ref)
	if err != nil || im.Digest == "" {
		return "", fault.New(fault.NotFound, "cannot restore: image %s (%s) is not here; carry it along (--image)", im.Ref, im.ID)
	}
	byDigest, err := reference.WithDigest(reference.TrimNamed(named), im.Digest)
	if err != nil {
		return "", fault.New(fault.Invalid, "cannot restore: %w", err)
	}
	if err := e.cfg.Images.Pull(ctx, image.PullOptions{Ref: byDigest.String()}); err != nil {
		return "", fault.New(fault.NotFound, "cannot restore: image %s is not here, and cannot be pulled; carry it along (--image): %w", byDigest, err)
	}
	got, err := e.cfg.Images.Resolve(ctx, byDigest.String(), "")
	if err != nil {
		return "", err
	}
	if got.ID.String() != im.ID {
		return "", fault.New(fault.Invalid, "cannot restore: %s is image %s here, and the checkpoint is of %s", byDigest, got.ID, im.ID)
	}
	return byDigest.String(), nil
}

// restoreNew makes a container of a sound checkpoint and starts it. What the
// manifest says is a request: it is checked, judged and planned like any other.
// What is foreign comes from elsewhere.
func (e *Engine) restoreNew(ctx context.Context, dir *os.File, m *checkpoint.Manifest, o api.RestoreOptions, foreign bool) (res api.Restored, err error) {
	if m.WithImage {
		if err := e.loadImage(ctx, dir, m); err != nil {
			return res, err
		}
	}
	req, err := e.restoreRequest(ctx, m, o)
	if err != nil {
		return res, err
	}
	var fresh []string // volumes that this restore makes
	for _, v := range m.Volumes {
		if _, err := e.cfg.Volumes.Inspect(ctx, v.Name); err != nil && e.namedVolume(m, v) {
			fresh = append(fresh, v.Name)
		}
	}
	u, warnings, err := e.create(ctx, req)
	if err != nil {
		return res, err
	}
	ctx = context.WithoutCancel(ctx)
	defer func() {
		if err == nil {
			return
		}
		if u.running() != nil { // and cannot be stored
			_ = e.removeUnit(ctx, u, true, true)
		} else {
			e.discard(ctx, u)
		}
		for _, v := range fresh {
			_ = e.cfg.Volumes.Remove(ctx, v, true)
		}
	}()
	if err := e.fillRestored(ctx, u, dir, m, o, foreign); err != nil {
		return res, err
	}
	res = api.Restored{ID: u.id, Name: u.rec.Load().Name, Warnings: warnings}
	if o.NoStart && m.Cold || m.Stopped {
		_, p, err := e.change(u, func(*container.Record) {})
		if err == nil {
			err = p.Wait()
		}
		if err != nil {
			return res, fmt.Errorf("cannot create container: %w", err)
		}
		e.publish(u, events.ActionCreate, nil)
		return res, nil
	}
	// Its record is stored once it runs: an engine that is killed before leaves none.
	if err := u.acquire(ctx); err != nil {
		return res, err
	}
	defer u.release()
	l := launch{create: true, warnings: &res.Warnings}
	if !m.Cold {
		done, err := e.images(u.id, dir, m, &l)
		if err != nil {
			return res, err
		}
		defer done()
	}
	p, err := e.launch(ctx, u, l)
	if err != nil {
		return res, err
	}
	if err := p.Wait(); err != nil {
		return res, fmt.Errorf("cannot create container: %w", err)
	}
	res.Running = true
	return res, nil
}

// restoreRequest turns a manifest into a request for a container.
func (e *Engine) restoreRequest(ctx context.Context, m *checkpoint.Manifest, o api.RestoreOptions) (CreateRequest, error) {
	c := m.Container
	cfg, hc := *c.Config, *c.HostConfig
	if c.Image.ID != "" {
		ref, err := e.imageOf(ctx, m)
		if err != nil {
			return CreateRequest{}, err
		}
		cfg.Image = ref
	} else {
		cfg.Image = ""
	}
	if cfg.Hostname == short(c.ID) && m.Cold {
		cfg.Hostname = ""
	}
	req := CreateRequest{Name: o.Name, Config: &cfg, HostConfig: &hc, Extra: c.Extra}
	req.Extra.Debug = ""
	if len(c.Endpoints) > 0 {
		req.Networking = &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{}}
	}
	for name, ep := range c.Endpoints {
		n := ep.Copy()
		if o.KeepAddress {
			if at := c.Attached[name]; at != nil && (at.IPAddress.IsValid() || at.GlobalIPv6Address.IsValid()) {
				n.IPAMConfig = &network.EndpointIPAMConfig{IPv4Address: at.IPAddress, IPv6Address: at.GlobalIPv6Address}
				n.MacAddress = at.MacAddress
			}
		}
		req.Networking.EndpointsConfig[name] = n
	}
	return req, nil
}

// loadImage takes the image that a checkpoint carries.
func (e *Engine) loadImage(ctx context.Context, dir *os.File, m *checkpoint.Manifest) error {
	if got, err := e.cfg.Images.Resolve(ctx, m.Container.Image.ID, ""); err == nil && got.ID.String() == m.Container.Image.ID {
		return nil
	}
	f, err := checkpoint.Open(dir, checkpoint.ImageName)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := e.cfg.Images.Load(ctx, f, nil, nil); err != nil {
		return fault.New(fault.Of(err), "cannot restore: cannot load the image that the checkpoint carries: %w", err)
	}
	if _, err := e.cfg.Images.Resolve(ctx, m.Container.Image.ID, ""); err != nil {
		return fault.New(fault.Invalid, "cannot restore: the image that the checkpoint carries is not its container's (%s)", m.Container.Image.ID)
	}
	return nil
}

// fillRestored gives a container that was just made its files and volumes.
func (e *Engine) fillRestored(ctx context.Context, u *unit, dir *os.File, m *checkpoint.Manifest, o api.RestoreOptions, foreign bool) error {
	layer, err := checkpoint.Open(dir, checkpoint.LayerName)
	if err != nil {
		return err
	}
	defer layer.Close()
	root, err := e.cfg.Snapshots.Mount(ctx, u.id, false, snapshot.IDMap{})
	if err != nil {
		return fmt.Errorf("cannot mount the container's file system: %w", err)
	}
	err = archive.In(root).Apply(ctx, layer)
	err = errors.Join(err, root.Close())
	if err != nil {
		return fault.New(fault.Of(err), "cannot restore the container's files: %w", err)
	}
	for i, v := range m.Volumes {
		name := ""
		for _, p := range u.rec.Load().Mounts {
			if p.Type == mount.TypeVolume && filepath.Clean(p.Target) == v.Target {
				name = p.Name
			}
		}
		if name == "" || o.KeepVolumes && name == v.Name {
			continue
		}
		f, err := checkpoint.Open(dir, checkpoint.VolumeName(i+1))
		if err != nil {
			return err
		}
		err = e.fillVolume(ctx, u.id, name, f, !foreign)
		f.Close()
		if err != nil {
			return fault.New(fault.Of(err), "cannot restore volume %s: %w", name, err)
		}
	}
	return nil
}

// fillVolume puts content into a volume that was made for this container.
func (e *Engine) fillVolume(ctx context.Context, id, name string, f *os.File, devices bool) error {
	for _, user := range e.cfg.Volumes.References(name) {
		if user != id {
			return fault.New(fault.Conflict, "container %s uses it: keep what it holds (--keep-volumes)", short(user))
		}
	}
	_, err := e.VolumeService().VolumeRestore(ctx, name, RestoreOptions{Replace: true, Devices: devices}, f)
	return err
}

// settleMove starts a container again that a killed engine had stopped in order to
// carry it elsewhere.
func (e *Engine) settleMove(u *unit) {
	if _, err := os.Lstat(filepath.Join(e.checkpointDir(u.id), movingFile)); err != nil {
		return
	}
	e.log.Warn("a container was to be carried elsewhere, which came to no end: it runs here", "container", u.id)
	e.spawn(func() {
		if u.acquire(e.ctx) != nil {
			return
		}
		defer u.release()
		if u.rec.Load().State.Status == mcontainer.StateExited {
			e.startAfterMove(e.ctx, u, u.rec.Load())
		}
		if err := e.markMoving(u.id, false); err != nil {
			e.log.Warn("cannot forget that a container was carried elsewhere", "container", u.id, "cause", err)
		}
	})
}

// movingFile marks a container that was stopped in order to be carried elsewhere.
const movingFile = ".moving"

// markMoving notes it durably, or takes it back.
func (e *Engine) markMoving(id string, on bool) error {
	dir := e.checkpointDir(id)
	path := filepath.Join(dir, movingFile)
	if !on {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		_ = os.Remove(dir)
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := durable.SyncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	return durable.WriteFile(path, []byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0o600, durable.Everything)
}
