package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
)

// How a container gets secrets: a tmpfs of its own, made when it starts, holds them
// on the host below a directory that is root's alone. Those with a plain name are
// one read-only mount at /run/secrets, in which a new value can take a file's place
// while the container runs; one with a path of its own is a mount of a file.

const (
	secretsTarget = "/run/secrets"
	secretsMount  = "secrets" // below hostDir
	maxSecrets    = 256       // of one container
)

var errNoSecrets = fault.New(fault.Unsupported, "this engine keeps no secrets")

// createSecrets looks up what a new container is to get.
func (e *Engine) createSecrets(r *container.Record) error {
	refs := r.Extra.Secrets
	if len(refs) == 0 {
		return nil
	}
	if e.cfg.Secrets == nil {
		return errNoSecrets
	}
	if len(refs) > maxSecrets {
		return fault.New(fault.Invalid, "cannot give a container more than %d secrets and configs", maxSecrets)
	}
	out, at := slices.Clone(refs), map[string]bool{}
	for i := range out {
		if err := out[i].Check(); err != nil {
			return fault.As(fault.Invalid, err)
		}
		s, err := e.cfg.Secrets.Inspect(out[i].Kind, out[i].Name)
		if fault.Is(err, fault.NotFound) { // "not found" would be taken for the image
			return fault.New(fault.Invalid, "%v: make it with 'servin %ss create'", err, out[i].Kind)
		}
		if err != nil {
			return err
		}
		out[i].ID, out[i].Name = s.ID, s.Name
		t := secretTarget(out[i])
		if at[t] {
			return fault.New(fault.Invalid, "two secrets or configs have the target %s", t)
		}
		at[t] = true
	}
	r.Extra.Secrets = out
	return nil
}

// secretTarget is where a reference's file lies in the container.
func secretTarget(r api.SecretRef) string {
	switch {
	case path.IsAbs(r.Target):
		return path.Clean(r.Target)
	case r.Target != "":
		return path.Join(secretsTarget, r.Target)
	case r.Kind == api.KindConfig:
		return "/" + r.Name
	}
	return path.Join(secretsTarget, r.Name)
}

// shared tells whether a file is one of those mounted together, and its name there.
func shared(r api.SecretRef) (string, bool) {
	dir, name := path.Split(secretTarget(r))
	return name, path.Clean(dir) == secretsTarget
}

// secretMounts makes the files of a container that starts and adds their mounts.
func (e *Engine) secretMounts(u *unit, r *container.Record, mounts []oci.Mount, label string, back *scope) ([]oci.Mount, error) {
	if len(r.Extra.Secrets) == 0 {
		return mounts, nil
	}
	if e.cfg.Secrets == nil {
		return nil, errNoSecrets
	}
	values := make([][]byte, len(r.Extra.Secrets))
	var total int64
	for i, ref := range r.Extra.Secrets {
		b, _, err := e.cfg.Secrets.Reveal(ref.Kind, ref.ID)
		if err != nil {
			return nil, fault.New(fault.Of(err), "cannot give the container %s %s: %w", ref.Kind, ref.Name, err)
		}
		defer clear(b)
		values[i] = b
		total += int64(len(b)) + 8192
	}
	top := filepath.Join(e.hostDir(u), secretsMount)
	back.add(func(context.Context) { _ = e.dropHostMounts(u) })
	if err := mountMemory(top, 4*total+(1<<20), label); err != nil { // room for new values beside the old
		return nil, fmt.Errorf("cannot make memory for the container's secrets: %w", err)
	}
	dir := filepath.Join(top, "shared")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the container's secrets: %w", err)
	}
	together := false
	for i, ref := range r.Extra.Secrets {
		at := filepath.Join(top, strconv.Itoa(i))
		name, ok := shared(ref)
		if ok {
			at, together = filepath.Join(dir, name), true
		} else {
			mounts = append(mounts, oci.Mount{Type: "bind", Source: at, Target: secretTarget(ref), ReadOnly: true, Propagation: "rprivate", NonRecursive: true})
		}
		if err := writeSecret(at, ref, values[i], r.UserNS); err != nil {
			return nil, fmt.Errorf("cannot make the container's %s %s: %w", ref.Kind, ref.Name, err)
		}
	}
	if together {
		// Its owner is the container's root; nobody writes there but through the host.
		if err := errors.Join(os.Chown(dir, int(r.UserNS.Host), int(r.UserNS.Host)), os.Chmod(dir, 0o755)); err != nil {
			return nil, fmt.Errorf("cannot make the container's secrets: %w", err)
		}
		mounts = append(mounts, oci.Mount{Type: "bind", Source: dir, Target: secretsTarget, ReadOnly: true, Propagation: "rprivate", NonRecursive: true})
	}
	return mounts, nil
}

// mountMemory mounts a tmpfs that is not swapped out where the kernel can (6.4).
func mountMemory(dir string, size int64, label string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	opts := "mode=0711,size=" + strconv.FormatInt(size, 10)
	if label != "" {
		opts += `,context="` + label + `"`
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	err := unix.Mount("secrets", dir, "tmpfs", flags, opts+",noswap")
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		err = unix.Mount("secrets", dir, "tmpfs", flags, opts)
	}
	return err
}

// writeSecret puts a file in place, whole.
func writeSecret(at string, ref api.SecretRef, data []byte, ns container.UserNS) error {
	mode := uint32(0o444)
	if ref.Mode != nil {
		mode = *ref.Mode
	}
	uid, gid := ref.UID, ref.GID
	if ns.Size != 0 {
		if uid >= ns.Size || gid >= ns.Size {
			return fault.New(fault.Invalid, "its owner %d:%d is not among the %d ids of the container's user namespace", uid, gid, ns.Size)
		}
		uid, gid = ns.Host+uid, ns.Host+gid
	}
	// Beside the directory that the container sees.
	tmp := filepath.Join(filepath.Dir(at), "..", ".new-"+newID()[:16])
	if filepath.Base(filepath.Dir(at)) != "shared" {
		tmp = at + ".new"
	}
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chown(int(uid), int(gid)), f.Chmod(os.FileMode(mode)), f.Close())
	if err == nil {
		err = os.Rename(tmp, at)
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return err
}

// SecretService is the use cases about secrets and configs.
type SecretService struct{ e *Engine }

// SecretService returns the use cases about secrets and configs.
func (e *Engine) SecretService() *SecretService { return &SecretService{e} }

func (s *SecretService) store() (Secrets, error) {
	if s.e.cfg.Secrets == nil {
		return nil, errNoSecrets
	}
	return s.e.cfg.Secrets, nil
}

func (s *SecretService) event(a events.Action, x api.Secret) {
	t := events.SecretEventType
	if x.Kind == api.KindConfig {
		t = events.ConfigEventType
	}
	s.e.emit(t, a, x.ID, map[string]string{"name": x.Name})
}

// users are the containers that have an item.
func (s *SecretService) users(id string) []*unit {
	var out []*unit
	for _, u := range s.e.all() {
		if slices.ContainsFunc(u.rec.Load().Extra.Secrets, func(r api.SecretRef) bool { return r.ID == id }) {
			out = append(out, u)
		}
	}
	slices.SortFunc(out, func(a, b *unit) int { return compareNames(a.rec.Load().Name, b.rec.Load().Name) })
	return out
}

func compareNames(a, b string) int {
	if a < b {
		return -1
	}
	return 1
}

func (s *SecretService) withUsers(x api.Secret) api.Secret {
	for _, u := range s.users(x.ID) {
		x.UsedBy = append(x.UsedBy, u.rec.Load().Name)
	}
	return x
}

// SecretCreate stores a value.
func (s *SecretService) SecretCreate(_ context.Context, k api.SecretKind, spec api.SecretSpec) (api.Secret, error) {
	st, err := s.store()
	if err != nil {
		return api.Secret{}, err
	}
	x, err := st.Create(k, spec)
	if err == nil {
		s.event(events.ActionCreate, x)
	}
	return x, err
}

// SecretList describes all items of a kind.
func (s *SecretService) SecretList(_ context.Context, k api.SecretKind) ([]api.Secret, error) {
	st, err := s.store()
	if err != nil {
		return nil, err
	}
	l := st.List(k)
	for i := range l {
		l[i] = s.withUsers(l[i])
	}
	return l, nil
}

// SecretInspect describes an item; the value is there for configs alone.
func (s *SecretService) SecretInspect(_ context.Context, k api.SecretKind, ref string) (api.Secret, error) {
	st, err := s.store()
	if err != nil {
		return api.Secret{}, err
	}
	if k == api.KindConfig {
		b, x, err := st.Reveal(k, ref)
		x.Data = b
		return s.withUsers(x), err
	}
	x, err := st.Inspect(k, ref)
	if err != nil {
		return x, err
	}
	return s.withUsers(x), nil
}

// SecretUpdate stores a new value and puts it into the running containers that
// have it at /run/secrets.
func (s *SecretService) SecretUpdate(ctx context.Context, k api.SecretKind, ref string, spec api.SecretSpec) (api.SecretUpdated, error) {
	st, err := s.store()
	if err != nil {
		return api.SecretUpdated{}, err
	}
	x, err := st.Update(k, ref, spec)
	if err != nil {
		return api.SecretUpdated{}, err
	}
	out := api.SecretUpdated{Secret: s.withUsers(x)}
	if spec.Data != nil {
		for _, u := range s.users(x.ID) {
			s.refresh(ctx, u, x, spec.Data, &out)
		}
	}
	s.event(events.ActionUpdate, x)
	return out, nil
}

// refresh puts a new value into a container, if it runs.
func (s *SecretService) refresh(ctx context.Context, u *unit, x api.Secret, data []byte, out *api.SecretUpdated) {
	if u.acquire(ctx) != nil {
		out.Restart = append(out.Restart, u.rec.Load().Name)
		return
	}
	defer u.release()
	if u.running() == nil {
		return // it gets the value when it starts
	}
	r := u.rec.Load()
	live := true
	for _, ref := range r.Extra.Secrets {
		if ref.ID != x.ID {
			continue
		}
		name, ok := shared(ref)
		if !ok {
			live = false // the mount is of the old file
			continue
		}
		at := filepath.Join(s.e.hostDir(u), secretsMount, "shared", name)
		if _, err := os.Lstat(at); err != nil {
			live = false
		} else if err := writeSecret(at, ref, data, r.UserNS); err != nil {
			s.e.log.Warn("cannot put a new value into a running container", "container", u.id, "kind", x.Kind, "name", x.Name, "cause", err)
			live = false
		}
	}
	if live {
		out.Live = append(out.Live, r.Name)
	} else {
		out.Restart = append(out.Restart, r.Name)
	}
}

// SecretRemove deletes an item that no container has; with force one that is in
// use too: those containers do not start again.
func (s *SecretService) SecretRemove(_ context.Context, k api.SecretKind, ref string, force bool) error {
	st, err := s.store()
	if err != nil {
		return err
	}
	x, err := st.Inspect(k, ref)
	if err != nil {
		return err
	}
	if by := s.withUsers(x).UsedBy; len(by) > 0 && !force {
		return fault.New(fault.Conflict, "cannot remove %s %s: it is used by %v; remove those first, or force it", k, x.Name, by)
	}
	if err := st.Remove(k, x.ID); err != nil {
		return err
	}
	s.event(events.ActionRemove, x)
	return nil
}

// SecretUnlock opens the store with its passphrase.
func (s *SecretService) SecretUnlock(_ context.Context, passphrase string) error {
	st, err := s.store()
	if err != nil {
		return err
	}
	return st.Unlock(passphrase)
}

// SecretLock closes a store that has a passphrase.
func (s *SecretService) SecretLock(context.Context) error {
	st, err := s.store()
	if err != nil {
		return err
	}
	return st.Lock()
}

// SecretRekey makes new keys.
func (s *SecretService) SecretRekey(_ context.Context, passphrase string) error {
	st, err := s.store()
	if err != nil {
		return err
	}
	return st.Rekey(passphrase)
}
