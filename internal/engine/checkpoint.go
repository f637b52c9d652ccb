package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/checkpoint"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/policy"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// manifest describes a container for a checkpoint that is about to be made.
func (e *Engine) manifest(r *container.Record, volumes bool) *checkpoint.Manifest {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	m := &checkpoint.Manifest{
		Version: checkpoint.Version, Created: time.Now().UTC(), Engine: e.cfg.Version,
		Kernel: unix.ByteSliceToString(uts.Release[:]), Arch: goruntime.GOARCH,
		Container: checkpoint.Container{
			ID: r.ID, Name: r.Name, Config: r.Config, HostConfig: r.HostConfig, Extra: r.Extra, Endpoints: r.Endpoints, Attached: r.Attached,
			Image:   checkpoint.Image{ID: r.Image.ID, Ref: r.Image.Ref, Digest: r.Image.Manifest.Digest, Platform: r.Image.Platform},
			Started: r.State.StartedAt,
		},
	}
	if volumes {
		for _, p := range r.Mounts {
			if p.Type == mount.TypeVolume {
				m.Volumes = append(m.Volumes, checkpoint.Volume{Name: p.Name, Target: filepath.Clean(p.Target)})
			}
		}
	}
	return m
}

// checkpointer finds the container, its task and what writes it down. The operation
// token is held if there is no error.
func (e *Engine) checkpointer(ctx context.Context, name string) (*unit, runtime.Task, runtime.Checkpointer, error) {
	u, err := e.lookup(name)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := u.acquire(ctx); err != nil {
		return nil, nil, nil, err
	}
	fail := func(err error) (*unit, runtime.Task, runtime.Checkpointer, error) {
		u.release()
		return nil, nil, nil, err
	}
	t := u.running()
	r := u.rec.Load()
	switch {
	case t == nil:
		return fail(fault.New(fault.Conflict, "cannot checkpoint container %s: container %s is not running", r.Name, u.id))
	case r.State.Status == mcontainer.StatePaused:
		return fail(fault.New(fault.Conflict, "cannot checkpoint container %s: it is paused: unpause it first", r.Name))
	}
	c, ok := t.(runtime.Checkpointer)
	if !ok {
		return fail(fault.New(fault.Unsupported, "cannot checkpoint container %s: its runtime %s cannot", r.Name, r.HostConfig.Runtime))
	}
	return u, t, c, nil
}

func checkpointFailed(r *container.Record, err error) error {
	return fault.New(fault.Of(err), "cannot checkpoint container %s: %w", r.Name, err)
}

// CheckpointCreate writes a container down and keeps that under a name.
func (e *Engine) CheckpointCreate(ctx context.Context, name string, o api.CheckpointCreate) error {
	if err := checkpoint.CheckName(o.CheckpointID); err != nil {
		return err
	}
	if o.Pre && (o.Exit || o.CheckpointDir != "") {
		return fault.New(fault.Invalid, "a pre-dump does not end the container, and is kept by the engine")
	}
	u, t, c, err := e.checkpointer(ctx, name)
	if err != nil {
		return err
	}
	defer u.release()
	r := u.rec.Load()
	place, err := e.checkpointPlace(u.id, o.CheckpointDir)
	if err != nil {
		return err
	}
	if o.CheckpointDir != "" {
		if err := e.mayUsePlace(ctx, r, place); err != nil {
			return err
		}
	}
	final := filepath.Join(place, o.CheckpointID)
	if _, err := os.Lstat(final); err == nil {
		return fault.New(fault.Conflict, "checkpoint with name %s already exists for container %s", o.CheckpointID, r.Name)
	}
	if err := os.MkdirAll(place, 0o700); err != nil {
		return fault.New(fault.Internal, "cannot make the checkpoint's directory: %w", err)
	}
	// What is begun is finished: who writes the container down must not be broken off.
	ctx = context.WithoutCancel(ctx)
	d, err := e.beginDraft(u, place, o.CheckpointID)
	if err != nil {
		return checkpointFailed(r, err)
	}
	defer d.close()
	d.options(o.TCPEstablished, o.FileLocks)
	if o.Pre {
		if err := c.Checkpointable(ctx); err != nil {
			return checkpointFailed(r, err)
		}
		if d.rounds >= checkpoint.MaxRounds-1 {
			return checkpointFailed(r, fault.New(fault.Conflict, "it has %d pre-dumps of that name: make the checkpoint, or remove them", d.rounds))
		}
		if err := d.round(ctx, c, true); err != nil {
			return checkpointFailed(r, err)
		}
		return d.keepPre(filepath.Join(place, prePrefix+o.CheckpointID))
	}
	h, err := e.still(ctx, u, t, c)
	if err != nil {
		return checkpointFailed(r, err)
	}
	m := e.manifest(r, o.Volumes)
	m.TCPEstablished, m.FileLocks = o.TCPEstablished, o.FileLocks
	err = d.round(ctx, c, false)
	if err == nil && o.TCPEstablished {
		h.setQuiet(ctx, true)
	}
	if err == nil {
		err = d.files(ctx, r, m)
	}
	if err == nil {
		d.describe(m)
		err = checkpoint.Store(d.dir, m)
	}
	if err == nil {
		err = d.keep(final)
	}
	if err != nil {
		h.letGo(ctx)
		return checkpointFailed(r, err)
	}
	e.publish(u, events.ActionCheckpoint, map[string]string{"checkpoint": o.CheckpointID})
	if !o.Exit {
		h.letGo(ctx)
		return nil
	}
	return h.end(ctx)
}

// mayUsePlace asks whether who calls may have the engine write to a directory of
// the host's: the same question as for a bind mount.
func (e *Engine) mayUsePlace(ctx context.Context, r *container.Record, dir string) error {
	if !e.policed() {
		return nil
	}
	c := asked(caller.From(ctx), r)
	c.Mounts = []policy.Mount{{Type: "bind", Source: realPath(dir), Target: "/"}}
	return policy.Refuse(e.cfg.Policy.Mounts(c))
}

// draft is a checkpoint that is being made.
type draft struct {
	e              *Engine
	u              *unit
	path           string
	dir            *os.File
	rounds         int
	tracked        bool
	res            runtime.CheckpointResult
	tcp, fileLocks bool
	logs           bool // keep what CRIU tells of its work
}

// beginDraft makes the directory of a checkpoint, or goes on with its pre-dumps.
func (e *Engine) beginDraft(u *unit, place, name string) (*draft, error) {
	d := &draft{e: e, u: u, path: filepath.Join(place, newPrefix+name)}
	_ = os.RemoveAll(d.path)
	pre := filepath.Join(place, prePrefix+name)
	if b, err := os.ReadFile(filepath.Join(pre, runFile)); err == nil {
		run, n, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
		rounds, _ := strconv.Atoi(n)
		if run == d.run() && rounds > 0 {
			if err := os.Rename(pre, d.path); err != nil {
				return nil, fault.New(fault.Internal, "cannot go on with the pre-dump: %w", err)
			}
			d.rounds, d.tracked = rounds, true
			_ = os.Remove(filepath.Join(d.path, runFile))
		} else {
			_ = os.RemoveAll(pre) // of a run that has ended
		}
	}
	if d.rounds == 0 {
		if err := os.Mkdir(d.path, 0o700); err != nil {
			return nil, fault.New(fault.Internal, "cannot make the checkpoint's directory: %w", err)
		}
	}
	var err error
	if d.dir, err = os.Open(d.path); err != nil {
		return nil, fault.New(fault.Internal, "cannot open the checkpoint's directory: %w", err)
	}
	return d, nil
}

func (d *draft) options(tcp, fileLocks bool) { d.tcp, d.fileLocks = tcp, fileLocks }

// run names the run of the container that a pre-dump is of.
func (d *draft) run() string {
	return d.u.rec.Load().State.StartedAt.UTC().Format(time.RFC3339Nano)
}

// round has the processes written down, or their memory alone.
func (d *draft) round(ctx context.Context, c runtime.Checkpointer, pre bool) error {
	lock, err := d.e.lockCRIU(d.u.id)
	if err != nil {
		return err
	}
	defer func() {
		_ = os.Remove(d.e.criuLock(d.u.id))
		lock.Close()
	}()
	n := d.rounds + 1
	dir, err := checkpoint.MakeRound(d.dir, n)
	if err != nil {
		return fault.New(fault.Internal, "cannot make the images' directory: %w", err)
	}
	defer dir.Close()
	work, err := d.e.workDir(d.u.id)
	if err != nil {
		return err
	}
	defer work.close()
	req := runtime.CheckpointRequest{Dir: dir, Work: work.dir, Pre: pre, Tracked: pre || d.tracked, TCPEstablished: d.tcp, FileLocks: d.fileLocks, Held: lock}
	if n > 1 {
		req.Parent = fmt.Sprintf("../%d", n-1)
	}
	res, err := c.Checkpoint(ctx, req)
	if err != nil {
		return err
	}
	if d.logs {
		for _, name := range criuLogs() {
			if err := os.Rename(filepath.Join(work.path, name), filepath.Join(d.path, name)); errors.Is(err, unix.EXDEV) {
				b, _ := os.ReadFile(filepath.Join(work.path, name))
				_ = os.WriteFile(filepath.Join(d.path, name), b, 0o600)
			}
		}
	}
	d.rounds, d.tracked = n, d.tracked || pre
	if !pre {
		d.res = res
	}
	return nil
}

// criuLogs are what CRIU writes beside its images.
func criuLogs() []string { return []string{"dump.log", "stats-dump"} }

// files writes what else belongs to the container: its layer and volumes.
func (d *draft) files(ctx context.Context, r *container.Record, m *checkpoint.Manifest) error {
	f, err := checkpoint.Create(d.dir, checkpoint.LayerName)
	if err != nil {
		return fault.New(fault.Internal, "cannot store the container's files: %w", err)
	}
	err = d.e.cfg.Snapshots.Diff(ctx, r.ID, f)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fault.New(fault.Internal, "cannot store the container's files: %w", err)
	}
	for i, v := range m.Volumes {
		f, err := checkpoint.Create(d.dir, checkpoint.VolumeName(i+1))
		if err == nil {
			_, err = d.e.VolumeService().VolumeBackup(ctx, v.Name, CopyVolumeOptions{}, f)
			err = errors.Join(err, f.Sync(), f.Close())
		}
		if err != nil {
			return fault.New(fault.Internal, "cannot store volume %s: %w", v.Name, err)
		}
	}
	return nil
}

// describe puts what was learnt while it was made into the manifest.
func (d *draft) describe(m *checkpoint.Manifest) {
	m.Rounds, m.CRIU, m.Streams, m.Binds = d.rounds, d.res.Version, d.res.Streams, d.res.Binds
	m.TCPEstablished, m.FileLocks = d.tcp, d.fileLocks
}

// keep gives the whole checkpoint its name.
func (d *draft) keep(final string) error {
	if err := syncTree(d.path); err != nil {
		return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
	}
	if err := os.Rename(d.path, final); err != nil {
		return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
	}
	d.path = ""
	if err := durable.SyncDir(filepath.Dir(final)); err != nil {
		return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
	}
	return nil
}

// keepPre keeps pre-dumps for what follows.
func (d *draft) keepPre(at string) error {
	err := os.WriteFile(filepath.Join(d.path, runFile), []byte(d.run()+" "+strconv.Itoa(d.rounds)), 0o600)
	if err == nil {
		err = os.Rename(d.path, at)
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot store the pre-dump: %w", err)
	}
	d.path = ""
	return nil
}

// close removes what came to nothing.
func (d *draft) close() {
	d.dir.Close()
	if d.path != "" {
		_ = os.RemoveAll(d.path)
		_ = os.Remove(filepath.Dir(d.path)) // if it is empty
	}
}

// syncTree syncs every file and directory below dir.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil || !e.IsDir() && !e.Type().IsRegular() {
			return err
		}
		return durable.SyncDir(p) // a file is synced the same way
	})
}

// scratch is a directory for CRIU's log.
type scratch struct {
	path string
	dir  *os.File
}

func (e *Engine) workDir(id string) (*scratch, error) {
	err := os.MkdirAll(e.cfg.RunRoot, 0o711)
	var s scratch
	if err == nil {
		s.path, err = os.MkdirTemp(e.cfg.RunRoot, "criu-log-")
	}
	if err == nil {
		s.dir, err = os.Open(s.path)
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot make a directory for criu's log of container %s: %w", short(id), err)
	}
	return &s, nil
}

func (s *scratch) close() {
	s.dir.Close()
	_ = os.RemoveAll(s.path)
}
