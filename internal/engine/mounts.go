package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	vol "github.com/cloudos-io/cloudos/internal/volume"
)

// createMounts resolves what the request says about mounts, makes the volumes
// it needs and fills new ones from the image.
func (e *Engine) createMounts(ctx context.Context, r *container.Record, chain snapshot.Chain, back *undo) (warnings []string, err error) {
	hc := r.HostConfig
	if len(hc.Binds)+len(hc.Mounts)+len(hc.Tmpfs)+len(hc.VolumesFrom)+len(r.Config.Volumes) == 0 {
		return nil, nil
	}
	points, err := vol.Resolve(r.Config, hc, e.volumesOf)
	if err != nil {
		return nil, err
	}
	made, fill := false, []*vol.Point{}
	var fresh []*vol.Point // volumes that were not there before
	for i := range points {
		p := &points[i]
		switch p.Type {
		case mount.TypeBind:
			if _, err := os.Stat(p.Source); errors.Is(err, os.ErrNotExist) && !p.CreateSource {
				return nil, fault.New(fault.Invalid, "invalid mount config for type \"bind\": bind source path does not exist: %s", p.Source)
			}
		case mount.TypeVolume:
			anonymous := p.Name == ""
			_, ierr := e.cfg.Volumes.Inspect(ctx, p.Name)
			if anonymous || ierr != nil {
				fresh = append(fresh, p)
			}
			v, err := e.cfg.Volumes.Create(ctx, volume.CreateRequest{Name: p.Name, Driver: p.Driver, DriverOpts: p.DriverOpts, Labels: p.Labels},
				vol.CreateOptions{For: r.ID, Ephemeral: r.Ephemeral && anonymous})
			if err != nil {
				return nil, err
			}
			p.Name, p.Source, p.Driver = v.Name, v.Mountpoint, v.Driver
			if anonymous {
				r.Anonymous = append(r.Anonymous, v.Name)
			}
			name := v.Name
			back.add(func(ctx context.Context) {
				e.cfg.Volumes.Unreference(name, r.ID)
				if anonymous {
					_ = e.cfg.Volumes.Remove(ctx, name, true)
				}
			})
			made = made || !r.Ephemeral || !anonymous
			if !p.NoCopy && !p.Inherited {
				fill = append(fill, p)
			}
		case mount.TypeImage:
			if err := e.holdImage(ctx, r, i, p, back); err != nil {
				return nil, err
			}
		}
	}
	if made {
		if err := e.cfg.Volumes.Sync(); err != nil {
			return nil, err
		}
	}
	if len(fill) > 0 && len(chain.Dirs) > 0 {
		root, err := e.cfg.Snapshots.MountChain(ctx, chain, snapshot.IDMap{})
		if err != nil {
			return nil, fmt.Errorf("cannot read the image's content for a volume: %w", err)
		}
		defer root.Close()
		for _, p := range fill {
			if err := e.cfg.Volumes.CopyUp(ctx, root, p.Target, p.Name, p.Subpath, snapshot.IDMap{}); err != nil {
				return nil, fmt.Errorf("cannot fill volume %s from the image: %w", p.Name, err)
			}
		}
	}
	r.Mounts = points
	for _, p := range fresh {
		e.publishVolume(p.Name, p.Driver, events.ActionCreate)
	}
	return nil, nil
}

// volumesOf serves HostConfig.VolumesFrom.
func (e *Engine) volumesOf(name string) ([]vol.Point, error) {
	u, err := e.other(name)
	if err != nil {
		return nil, err
	}
	return u.rec.Load().Mounts, nil
}

// startMounts makes the sources of a container's mounts ready and describes them
// for the spec.
func (e *Engine) startMounts(ctx context.Context, u *unit, r *container.Record, label string, back *scope) ([]oci.Mount, error) {
	if len(r.Mounts) == 0 {
		return nil, nil
	}
	out := make([]oci.Mount, 0, len(r.Mounts))
	for i, p := range r.Mounts {
		m := oci.Mount{
			Type: "bind", Source: p.Source, Target: p.Target, ReadOnly: p.ReadOnly, Propagation: string(p.Propagation),
			NonRecursive: p.NonRecursive, ReadOnlyNonRecursive: p.ReadOnlyNonRecursive, ReadOnlyForceRecursive: p.ReadOnlyForceRecursive,
			IDMap: p.IDMap,
		}
		switch p.Type {
		case mount.TypeBind:
			if p.CreateSource {
				if err := os.MkdirAll(p.Source, 0o755); err != nil && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, os.ErrExist) {
					return nil, fault.New(fault.Invalid, "error while creating mount source path '%s': %w", p.Source, err)
				}
			}
			if e.policed() {
				// What is checked is what is mounted.
				f, err := e.mayBind(r, p)
				if err != nil {
					return nil, err
				}
				back.hold(f)
				if m.Source, err = e.heldSource(u, r, i, f, back); err != nil {
					return nil, err
				}
			}
		case mount.TypeVolume:
			path, err := e.cfg.Volumes.Use(ctx, p.Name, r.ID)
			if err != nil {
				return nil, err
			}
			name := p.Name
			back.add(func(ctx context.Context) { _ = e.cfg.Volumes.Release(ctx, name, r.ID) })
			m.Source = path
			// Ranges of containers are disjoint: what is on disk are the ids as
			// the containers see them.
			m.IDMap = r.UserNS.Size != 0
			if p.Subpath != "" {
				f, err := e.subpath(p.Name, p.Subpath)
				if err != nil {
					return nil, err
				}
				back.hold(f)
				if m.Source, err = e.heldSource(u, r, i, f, back); err != nil {
					return nil, err
				}
			}
		case mount.TypeTmpfs:
			m.Type, m.Source, m.Options = "tmpfs", "tmpfs", p.Options
		case mount.TypeImage:
			back.add(func(context.Context) { _ = e.dropHostMounts(u) })
			path, err := e.imageMount(ctx, u, r, i, p, label)
			if err != nil {
				return nil, err
			}
			m.Source, m.ReadOnly, m.IDMap = path, true, false
		default:
			return nil, fault.New(fault.Unsupported, "cannot mount at %s: mounts of type %s are not supported", p.Target, p.Type)
		}
		out = append(out, m)
	}
	return out, nil
}

// subpath opens a part of a volume.
func (e *Engine) subpath(name, sub string) (*os.File, error) {
	root, err := e.cfg.Volumes.Open(name)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return openBelow(root, sub, "volume "+name)
}

// hostDir is where mounts of a running container are kept on the host: a shared
// /dev/shm and other images' file systems.
func (e *Engine) hostDir(u *unit) string { return filepath.Join(e.stateDir(true), u.id, "mnt") }

// imageLayer names the layer that keeps the image of a container's nth mount.
func imageLayer(id string, n int) string { return id + imageLayerMark + strconv.Itoa(n) }

const imageLayerMark = "-image-"

// holdImage notes which image a mount means and keeps its content for as long as
// there is the container: an empty layer stands on it.
func (e *Engine) holdImage(ctx context.Context, r *container.Record, n int, p *vol.Point, back *undo) error {
	img, err := e.cfg.Images.Resolve(ctx, p.Source, "")
	if err != nil {
		return err
	}
	id := imageLayer(r.ID, n)
	if err := e.cfg.Snapshots.Create(ctx, id, img.Chain, r.Ephemeral, 0); err != nil {
		return fmt.Errorf("cannot keep image %s for the container: %w", p.Source, err)
	}
	back.add(func(ctx context.Context) { _ = e.cfg.Snapshots.Remove(ctx, id) })
	p.ImageID = img.ID.String()
	return nil
}

// imageChain is what a mount of an image shows: what it was when the container was
// made. A pod's container is made with its mounts resolved anew.
func (e *Engine) imageChain(ctx context.Context, r *container.Record, n int, p vol.Point) (snapshot.Chain, error) {
	if p.ImageID != "" {
		return e.cfg.Snapshots.Chain(imageLayer(r.ID, n))
	}
	img, err := e.cfg.Images.Resolve(ctx, p.Source, "")
	return img.Chain, err
}

// dropImages lets go of the images that a container had mounted.
func (e *Engine) dropImages(ctx context.Context, r *container.Record) error {
	for i, p := range r.Mounts {
		if p.ImageID == "" {
			continue
		}
		if err := e.cfg.Snapshots.Remove(ctx, imageLayer(r.ID, i)); err != nil {
			return err
		}
	}
	return nil
}

// imageMount mounts another image for the container.
func (e *Engine) imageMount(ctx context.Context, u *unit, r *container.Record, i int, p vol.Point, label string) (string, error) {
	chain, err := e.imageChain(ctx, r, i, p)
	if err != nil {
		return "", err
	}
	f, err := e.cfg.Snapshots.MountChainLabelled(ctx, chain, idMap(r), label)
	if err != nil {
		return "", fmt.Errorf("cannot mount image %s: %w", p.Source, err)
	}
	defer f.Close()
	dir := filepath.Join(e.hostDir(u), "image-"+strconv.Itoa(i))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return "", fmt.Errorf("cannot mount image %s: %w", p.Source, err)
	}
	if p.Subpath == "" {
		return dir, nil
	}
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", err
	}
	defer root.Close()
	sub, err := openBelow(root, p.Subpath, "image "+p.Source)
	if err != nil {
		return "", err
	}
	defer sub.Close()
	// The mount is read-only: what was resolved inside it stays what it is.
	return os.Readlink("/proc/self/fd/" + strconv.Itoa(int(sub.Fd())))
}

// sharedShm mounts the /dev/shm that other containers may join.
func (e *Engine) sharedShm(u *unit, r *container.Record, label string) (string, error) {
	dir := filepath.Join(e.hostDir(u), "shm")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	opts := "mode=1777,size=" + strconv.FormatInt(r.HostConfig.ShmSize, 10)
	if r.UserNS.Size != 0 {
		opts += fmt.Sprintf(",uid=%d,gid=%d", r.UserNS.Host, r.UserNS.Host)
	}
	if label != "" {
		opts += `,context="` + label + `"`
	}
	if err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, opts); err != nil {
		return "", fmt.Errorf("cannot mount the shared /dev/shm: %w", err)
	}
	return dir, nil
}

// dropHostMounts unmounts what hostDir holds; it fails where it cannot tell what that is, or something stays.
func (e *Engine) dropHostMounts(u *unit) error {
	dir := e.hostDir(u)
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, d := range list {
		p := filepath.Join(dir, d.Name())
		for unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		}
		if err := os.Remove(p); errors.Is(err, unix.EBUSY) { // it is mounted still
			return fmt.Errorf("cannot unmount %s: %w", p, err)
		}
	}
	_ = os.Remove(dir)
	if u.dir != filepath.Dir(dir) {
		_ = os.Remove(filepath.Dir(dir))
	}
	return nil
}

// releaseMounts ends the use of a container's volumes.
func (e *Engine) releaseMounts(ctx context.Context, r *container.Record) {
	for _, p := range r.Mounts {
		if p.Type == mount.TypeVolume {
			if err := fault.Outwait(ctx, func() error { return e.cfg.Volumes.Release(ctx, p.Name, r.ID) }); err != nil {
				e.log.Warn("cannot release a volume", "volume", p.Name, "container", r.ID, "cause", err)
			}
		}
	}
}

// dropVolumes takes back the references of a removed container and, if asked,
// its anonymous volumes.
func (e *Engine) dropVolumes(ctx context.Context, r *container.Record, anonymous bool) {
	for _, p := range r.Mounts {
		if p.Type != mount.TypeVolume {
			continue
		}
		e.cfg.Volumes.Unreference(p.Name, r.ID)
		if !anonymous || !slices.Contains(r.Anonymous, p.Name) && !e.inheritedAnonymous(ctx, &p) {
			continue
		}
		switch err := fault.Outwait(ctx, func() error { return e.cfg.Volumes.Remove(ctx, p.Name, true) }); {
		case err == nil:
			e.publishVolume(p.Name, p.Driver, events.ActionDestroy)
		case !fault.Is(err, fault.Conflict) && !fault.Is(err, fault.NotFound):
			e.log.Warn("cannot remove an anonymous volume", "volume", p.Name, "container", r.ID, "cause", err)
		}
	}
}

// inheritedAnonymous tells a volume that nobody named and that came with
// --volumes-from: the last container that has it takes it along.
func (e *Engine) inheritedAnonymous(ctx context.Context, p *vol.Point) bool {
	if !p.Inherited {
		return false
	}
	v, err := e.cfg.Volumes.Inspect(ctx, p.Name)
	if err != nil {
		return false
	}
	_, ok := v.Labels[vol.AnonymousLabel]
	return ok
}

// openIn opens name below root as if root were the file system's root: neither
// "..", nor absolute links, nor magic links lead out of it.
func openIn(root *os.File, name string, flags int, mode uint32) (*os.File, error) {
	return openResolved(root, name, flags, mode, unix.RESOLVE_IN_ROOT)
}

// openBelow opens a part of a volume or image. A link that leads out of it, an
// absolute one too, is refused, in the words that Docker's clients know.
func openBelow(root *os.File, sub, of string) (*os.File, error) {
	f, err := openResolved(root, sub, unix.O_PATH, 0, unix.RESOLVE_BENEATH)
	switch {
	case errors.Is(err, unix.EXDEV):
		return nil, fault.New(fault.Invalid, "path concatenation escapes the base directory: subpath %s of %s", sub, of)
	case err != nil:
		return nil, fault.New(fault.Invalid, "cannot access path %s of %s: %w", sub, of, err)
	}
	return f, nil
}

func openResolved(root *os.File, name string, flags int, mode uint32, resolve uint64) (*os.File, error) {
	name = strings.TrimLeft(name, "/")
	if name == "" {
		name = "."
	}
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Mode: uint64(mode), Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS}
	for range 128 {
		fd, err := unix.Openat2(int(root.Fd()), name, &how)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue // something on the way was renamed meanwhile
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: "/" + name, Err: err}
		}
		return os.NewFile(uintptr(fd), "/"+name), nil
	}
	return nil, &os.PathError{Op: "open", Path: "/" + name, Err: unix.EAGAIN}
}

// mountPoints describes mounts for inspect and list.
func mountPoints(r *container.Record) []mcontainer.MountPoint {
	out := make([]mcontainer.MountPoint, 0, len(r.Mounts))
	for _, p := range r.Mounts {
		if p.Type == mount.TypeTmpfs && byTmpfs(r, p.Target) {
			continue // of HostConfig.Tmpfs, which are not listed twice
		}
		out = append(out, p.MountPoint())
	}
	return out
}

func byTmpfs(r *container.Record, target string) bool {
	for dst := range r.HostConfig.Tmpfs {
		if filepath.Clean(dst) == target {
			return true
		}
	}
	return false
}
