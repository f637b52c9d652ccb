package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	goruntime "runtime"
	"strings"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine/archive"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// tree is a container's file system opened for copying.
type tree struct {
	archive.Root
	r *container.Record
	// live: it is the running container's own view, mounts included.
	live bool
	dir  *os.File
	back scope
}

func (t *tree) close(ctx context.Context) {
	t.dir.Close()
	t.back.run(ctx)
	t.back.close()
}

// withTree calls fn with the container's file system and the name to use in it.
// A running container's is seen through its own root; of a stopped one the
// layers are mounted, and a name below a volume or bind is resolved in that.
func (e *Engine) withTree(ctx context.Context, name, file string, fn func(t *tree, file string) error) error {
	if strings.ContainsRune(file, 0) {
		return fault.New(fault.Invalid, "invalid path %q: it contains a NUL byte", file)
	}
	asked := file
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	// While the token is held the container neither starts nor goes away; a
	// running one may go on doing what it wants.
	if err := u.acquire(ctx); err != nil {
		return err
	}
	held := true
	defer func() {
		if held {
			u.release()
		}
	}()
	t := &tree{r: u.rec.Load()}
	if task := u.running(); task != nil {
		if t.dir, err = task.Root(); err == nil {
			t.live = true
			u.release()
			held = false
		} else if !gone(task) {
			return err
		}
	}
	if t.dir == nil {
		if err := u.settled(ctx); err != nil {
			return err
		}
		if st := t.r.State.Status; st == mcontainer.StateRemoving || st == mcontainer.StateDead {
			return fault.New(fault.Conflict, "cannot copy to or from container %s: it is marked for removal", u.id)
		}
		if file, err = e.openStopped(ctx, t, file); err != nil {
			return err
		}
	}
	defer t.close(context.WithoutCancel(ctx))
	t.Root = archive.In(t.dir)
	err = fn(t, file)
	var none *archive.NoFileError
	if errors.As(err, &none) {
		return fault.New(fault.NotFound, "Could not find the file %s in container %s", asked, name)
	}
	return err
}

// openStopped opens the mount below which the name lies: a volume, a bind, or
// the container's layers.
func (e *Engine) openStopped(ctx context.Context, t *tree, file string) (string, error) {
	var best, rest string
	var src func() (*os.File, error)
	clean := path.Clean("/" + file)
	for _, p := range t.r.Mounts {
		if clean != p.Target && !strings.HasPrefix(clean, p.Target+"/") || len(p.Target) < len(best) {
			continue
		}
		best, rest = p.Target, strings.TrimPrefix(file[min(len(file), len(p.Target)):], "/")
		if !strings.HasPrefix(file, p.Target) {
			rest = strings.TrimPrefix(clean, p.Target)
		}
		switch p.Type {
		case mount.TypeVolume:
			src = func() (*os.File, error) {
				if _, err := e.cfg.Volumes.Use(ctx, p.Name, t.r.ID); err != nil {
					return nil, err
				}
				t.back.add(func(ctx context.Context) { _ = e.cfg.Volumes.Release(ctx, p.Name, t.r.ID) })
				if p.Subpath != "" {
					f, err := e.subpath(p.Name, p.Subpath)
					if err != nil {
						return nil, err
					}
					return f, nil
				}
				return e.cfg.Volumes.Open(p.Name)
			}
		case mount.TypeBind:
			src = func() (*os.File, error) { return os.OpenFile(p.Source, unix.O_PATH|unix.O_CLOEXEC, 0) }
		default:
			src = nil
		}
	}
	if src != nil {
		f, err := src()
		if err != nil {
			return "", err
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			t.dir = f
			return "/" + rest, nil
		}
		f.Close() // a file bound over a file: the directory around it is meant
	}
	// Layers hold the ids that the container sees.
	f, err := e.cfg.Snapshots.Mount(ctx, t.r.ID, false, snapshot.IDMap{})
	if err != nil {
		return "", fmt.Errorf("cannot mount the container's file system: %w", err)
	}
	t.dir = f
	if wd := t.r.Config.WorkingDir; wd != "" && wd != "/" {
		// It is made when the container starts, but belongs to it from the beginning.
		if err := ensureDir(f, wd, t.r); err != nil {
			e.log.Debug("cannot make a container's working directory", "container", t.r.ID, "cause", err)
		}
	}
	return file, nil
}

// unmap turns owners as the host sees them into the container's.
func (t *tree) unmap() func(uid, gid uint32) (int, int) {
	if !t.live || t.r.UserNS.Size == 0 {
		return nil
	}
	ns := t.r.UserNS
	one := func(id uint32) int {
		if id >= ns.Host && id-ns.Host < ns.Size {
			return int(id - ns.Host)
		}
		return 65534
	}
	return func(uid, gid uint32) (int, int) { return one(uid), one(gid) }
}

// ContainerStatPath describes a file of a container.
func (e *Engine) ContainerStatPath(ctx context.Context, name, file string) (mcontainer.PathStat, error) {
	var out mcontainer.PathStat
	err := e.withTree(ctx, name, file, func(t *tree, file string) error {
		s, err := t.Lookup(file)
		out = pathStat(s)
		return err
	})
	return out, err
}

func pathStat(s archive.Stat) mcontainer.PathStat {
	return mcontainer.PathStat{Name: s.Name, Size: s.Size, Mode: s.Mode, Mtime: s.ModTime, LinkTarget: s.LinkTarget}
}

// ContainerGetArchive streams a file or directory of a container as a tar. w is
// called once, with what was found, for the writer.
func (e *Engine) ContainerGetArchive(ctx context.Context, name, file string, w func(mcontainer.PathStat) (io.Writer, error)) error {
	err := e.withTree(ctx, name, file, func(t *tree, inner string) error {
		s, err := t.Lookup(inner)
		if err != nil {
			return err
		}
		if path.Clean("/"+inner) == "/" && path.Clean("/"+file) != "/" {
			s.Name = path.Base(path.Clean("/" + file))
		}
		out, err := w(pathStat(s))
		if err != nil {
			return err
		}
		as := s.Name
		// "dir/." asks for the content of the directory alone.
		if p := strings.TrimRight(file, "/"); p == "." || strings.HasSuffix(p, "/.") {
			as = "./"
		}
		return t.Write(ctx, inner, out, archive.WriteOptions{As: as, Unmap: t.unmap()})
	})
	if err == nil {
		if u, lerr := e.lookup(name); lerr == nil {
			e.publish(u, events.ActionArchivePath, nil)
		}
	}
	return err
}

// ContainerPutArchive unpacks a tar into a directory of a container.
func (e *Engine) ContainerPutArchive(ctx context.Context, name, file string, noOverwriteDirNonDir, copyUIDGID bool, r io.Reader) error {
	asked := file
	err := e.withTree(ctx, name, file, func(t *tree, file string) error {
		if t.r.HostConfig.ReadonlyRootfs && !insideMount(t.r, asked) || readOnlyMount(t.r, asked) {
			return fault.New(fault.Forbidden, "container rootfs is marked read-only")
		}
		o := archive.ExtractOptions{NoOverwriteDirNonDir: noOverwriteDirNonDir}
		if copyUIDGID && t.r.Config.User != "" {
			us, _, err := oci.LookupUser(t.dir, t.r.Config.User, nil)
			if err != nil {
				return err
			}
			o.Owner = &[2]int{int(us.UID), int(us.GID)}
		}
		if !t.live || t.r.UserNS.Size == 0 {
			return t.Extract(ctx, file, r, o)
		}
		ns := t.r.UserNS
		o.Map = func(uid, gid int) (int, int, error) {
			if uid < 0 || gid < 0 || uint32(uid) >= ns.Size || uint32(gid) >= ns.Size {
				return 0, 0, fault.New(fault.Invalid, "owner %d:%d is outside the container's user namespace", uid, gid)
			}
			return uid + int(ns.Host), gid + int(ns.Host), nil
		}
		return asMapped(int(ns.Host), func() error { return t.Extract(ctx, file, r, o) })
	})
	if err == nil {
		if u, lerr := e.lookup(name); lerr == nil {
			e.publish(u, events.ActionExtractToDir, map[string]string{"path": file})
		}
	}
	return err
}

// asMapped runs fn on a thread whose file system ids are those of the container's
// root: through an idmapped mount the host's root has none. The thread ends after.
func asMapped(host int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread is not used again
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&hdr, &caps[0])
		if err == nil {
			_, _ = unix.SetfsgidRetGid(host)
			_, _ = unix.SetfsuidRetUid(host) // drops the file capabilities from the effective set
			err = unix.Capset(&hdr, &caps[0])
		}
		if err != nil {
			done <- fmt.Errorf("cannot take on the container's ids: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

func mountAt(r *container.Record, file string) (readOnly, found bool) {
	clean, best := path.Clean("/"+file), ""
	for _, p := range r.Mounts {
		if (clean == p.Target || strings.HasPrefix(clean, p.Target+"/")) && len(p.Target) >= len(best) {
			best, readOnly, found = p.Target, p.ReadOnly || p.Type == mount.TypeImage, true
		}
	}
	return readOnly, found
}

func insideMount(r *container.Record, file string) bool { _, ok := mountAt(r, file); return ok }

func readOnlyMount(r *container.Record, file string) bool {
	ro, ok := mountAt(r, file)
	return ok && ro
}

// ContainerExport streams the container's file system as a tar, without volumes
// and other mounts.
func (e *Engine) ContainerExport(ctx context.Context, name string, w io.Writer) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	err = e.withTree(ctx, name, "/", func(t *tree, _ string) error {
		return t.Write(ctx, "/", w, archive.WriteOptions{As: ".", OneFileSystem: true, Unmap: t.unmap()})
	})
	if err == nil {
		e.publish(u, events.ActionExport, nil)
	}
	return err
}

// ContainerChanges lists what differs from the image.
func (e *Engine) ContainerChanges(ctx context.Context, name string) ([]mcontainer.FilesystemChange, error) {
	u, err := e.lookup(name)
	if err != nil {
		return nil, err
	}
	l, err := e.cfg.Snapshots.Changes(ctx, u.id)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "No such container: %s", name)
	}
	return withoutMountPoints(u.rec.Load(), l), err
}

// withoutMountPoints drops what only the mounting of generated files and file
// systems left in the layer, and directories that nothing else changed in.
func withoutMountPoints(r *container.Record, l []mcontainer.FilesystemChange) []mcontainer.FilesystemChange {
	made := map[string]bool{"/dev": true, "/proc": true, "/sys": true, "/etc/hosts": true, "/etc/hostname": true, "/etc/resolv.conf": true}
	for _, p := range r.Mounts {
		made[p.Target] = true
	}
	dropped := map[string]bool{}
	keep := l[:0:0]
	for _, c := range l {
		if c.Kind == mcontainer.ChangeAdd && (made[c.Path] || strings.HasPrefix(c.Path, "/dev/")) {
			for d := path.Dir(c.Path); d != "/"; d = path.Dir(d) {
				dropped[d] = true
			}
			continue
		}
		keep = append(keep, c)
	}
	if len(dropped) == 0 {
		return keep
	}
	out := keep[:0:0]
	for i, c := range keep {
		inside := i+1 < len(keep) && strings.HasPrefix(keep[i+1].Path, c.Path+"/") // sorted by path
		if dropped[c.Path] && c.Kind == mcontainer.ChangeModify && !inside {
			continue
		}
		out = append(out, c)
	}
	return out
}
