package engine

import (
	"context"

	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	vol "github.com/cloudos-io/cloudos/internal/volume"
)

// ownMounts gives the sources of mounts to the container as their options say: "U"
// to its user, "z" and "Z" to its SELinux label. mounts are those of r.Mounts, in
// their order; a source that was changed is mounted by its descriptor.
func (e *Engine) ownMounts(ctx context.Context, r *container.Record, mounts []oci.Mount, user specs.User, label string, back *scope) error {
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
		m.Source = fdPath(f)
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
