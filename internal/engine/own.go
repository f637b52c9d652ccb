package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	vol "github.com/cloudos-io/cloudos/internal/volume"
)

// ownMounts gives the sources of mounts to the container as their options say: "U"
// to its user, "z" and "Z" to its SELinux label. mounts are those of r.Mounts, in
// their order; a source that was changed is mounted by its descriptor.
func (e *Engine) ownMounts(ctx context.Context, u *unit, r *container.Record, mounts []oci.Mount, user specs.User, label string, back *scope) error {
	for i, p := range r.Mounts {
		m := &mounts[i]
		relabel := p.Relabel
		if !e.cfg.Host.SELinux || label == "" {
			relabel = ""
		} else if p.Type == mount.TypeVolume && relabel == "" {
			relabel = "z" // nothing but containers uses it
		}
		if p.Type != mount.TypeBind && p.Type != mount.TypeVolume || !p.Chown && relabel == "" {
			continue
		}
		f, err := vol.OpenSource(m.Source)
		if err != nil {
			return err
		}
		back.hold(f)
		if m.Source, err = e.heldSource(u, r, i, f, back); err != nil {
			return err
		}
		if p.Chown {
			uid, gid, err := e.onDisk(r, user, m.IDMap)
			if err != nil {
				return err
			}
			if err := vol.Chown(ctx, f, uid, gid); err != nil {
				return err
			}
		}
		if relabel != "" {
			if err := vol.Relabel(ctx, f, label, relabel == "z"); err != nil {
				return err
			}
		}
	}
	return nil
}

// heldSource names an open source of a mount. Other runtimes make mounts in a
// namespace of their own, where descriptors of ours cannot be mounted: for them it
// is mounted on the host.
func (e *Engine) heldSource(u *unit, r *container.Record, i int, f *os.File, back *scope) (string, error) {
	if e.native(r.HostConfig.Runtime) {
		return fdPath(f), nil
	}
	at := filepath.Join(e.hostDir(u), "source-"+strconv.Itoa(i))
	back.add(func(context.Context) { _ = e.dropHostMounts(u) })
	if err := mountHeld(f, at); err != nil {
		return "", fmt.Errorf("cannot mount %s for the runtime: %w", f.Name(), err)
	}
	return at, nil
}

func mountHeld(f *os.File, at string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
		return err
	}
	var err error
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.Mkdir(at, 0o700)
	} else {
		err = os.WriteFile(at, nil, 0o600)
	}
	if err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	tree, err := unix.OpenTree(int(f.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// onDisk is the owner that the container's user is shown as its own: through an
// idmapped mount its own ids, else the host's that they are mapped to.
func (e *Engine) onDisk(r *container.Record, user specs.User, idmapped bool) (uid, gid uint32, err error) {
	ns := r.UserNS
	if ns.Size == 0 || idmapped && !e.cfg.Rootless {
		return user.UID, user.GID, nil
	}
	if uint64(user.UID) >= uint64(ns.Size) || uint64(user.GID) >= uint64(ns.Size) {
		return 0, 0, fault.New(fault.Invalid, "cannot give a mount to user %d:%d: the container's user namespace has %d ids", user.UID, user.GID, ns.Size)
	}
	return uint32(ns.Host) + user.UID, uint32(ns.Host) + user.GID, nil
}
