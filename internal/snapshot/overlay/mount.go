package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	"golang.org/x/sys/unix"
)

// capability is what the kernel's overlayfs can do, probed once.
type capability struct {
	// append: fsconfig knows lowerdir+ (6.7), one layer per call and no length limit.
	append bool
	// userxattr: we are not in the first user namespace, so overlayfs keeps its
	// marks in user.overlay attributes.
	userxattr bool
	// private: always mount in a mount namespace of a thread's own; the way for
	// older kernels, which tests also take.
	private bool
}

func probe(dir string) capability {
	var c capability
	if b, err := os.ReadFile("/proc/self/uid_map"); err == nil {
		f := strings.Fields(string(b))
		c.userxattr = len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295"
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return c
	}
	defer unix.Close(fd)
	// Before 6.5 overlayfs took any option, and refused unknown ones at the mount only.
	if unix.FsconfigSetString(fd, "no-such-option", "x") == nil {
		return c
	}
	c.append = unix.FsconfigSetString(fd, "lowerdir+", dir) == nil
	return c
}

// xattrPrefix is the prefix of overlayfs's own extended attributes.
func (c capability) xattrPrefix() string {
	if c.userxattr {
		return "user.overlay."
	}
	return "trusted.overlay."
}

func (c capability) recordAttr() string {
	if c.userxattr {
		return "user.servin.layer"
	}
	return "trusted.servin.layer"
}

// stack is one overlay to mount.
type stack struct {
	lowers   []string // topmost first, at least one
	dir      string   // holds upper and work; "" for a read-only stack
	volatile bool
	readonly bool
	label    string // SELinux label of all that is in it, "" for the files' own
}

// Mount mounts a layer. See snapshot.Store.
func (s *Store) Mount(ctx context.Context, id string, readonly bool, m snapshot.IDMap) (*os.File, error) {
	return s.mountLayer(ctx, id, readonly, m, "")
}

// MountLabelled mounts a layer under one label. See snapshot.Store.
func (s *Store) MountLabelled(ctx context.Context, id string, m snapshot.IDMap, label string) (*os.File, error) {
	return s.mountLayer(ctx, id, false, m, label)
}

func (s *Store) mountLayer(ctx context.Context, id string, readonly bool, m snapshot.IDMap, label string) (*os.File, error) {
	l, err := s.lookup(id)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	st := stack{lowers: l.Chain.Dirs, dir: l.dir, volatile: l.Ephemeral, readonly: readonly, label: label}
	if len(st.lowers) == 0 {
		st.lowers = []string{s.empty}
	}
	if l.Ephemeral {
		// A volatile layer refuses a second mount until this mark is gone. No
		// power cut lies between the two mounts, because of the boot id.
		if err := os.RemoveAll(filepath.Join(l.dir, workName, "work", "incompat")); err != nil {
			return nil, fmt.Errorf("cannot mount layer %s: %w", id, err)
		}
	}
	f, err := s.mount(st, m)
	if err != nil {
		return nil, mountFault("layer "+id, err)
	}
	return f, nil
}

// MountChain mounts a chain read-only. See snapshot.Store.
func (s *Store) MountChain(ctx context.Context, chain snapshot.Chain, m snapshot.IDMap) (*os.File, error) {
	return s.MountChainLabelled(ctx, chain, m, "")
}

// MountChainLabelled mounts a chain under one label. See snapshot.Store.
func (s *Store) MountChainLabelled(ctx context.Context, chain snapshot.Chain, m snapshot.IDMap, label string) (*os.File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dirs := chain.Dirs
	if label != "" {
		// A clone of a directory has the files' own labels; overlayfs wants two.
		for len(dirs) < 2 {
			dirs = append(dirs[:len(dirs):len(dirs)], s.empty)
		}
	}
	var f *os.File
	var err error
	switch len(dirs) {
	case 0:
		f, err = s.bind(s.empty, m)
	case 1:
		f, err = s.bind(dirs[0], m)
	default:
		f, err = s.mount(stack{lowers: dirs, readonly: true, label: label}, m)
	}
	if err != nil {
		return nil, mountFault("chain "+chain.ID, err)
	}
	return f, nil
}

func mountFault(what string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return fault.New(fault.NotFound, "cannot mount %s: %w (a directory of it is gone)", what, err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fault.New(fault.Exhausted, "cannot mount %s: %w", what, err)
	}
	return fmt.Errorf("cannot mount %s: %w", what, err)
}

// bind is a detached read-only clone of one directory; overlayfs wants two
// layers at least.
func (s *Store) bind(dir string, m snapshot.IDMap) (*os.File, error) {
	fd, err := s.clone(dir, m, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), dir), nil
}

func (s *Store) clone(dir string, m snapshot.IDMap, attr uint64) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, &os.PathError{Op: "open_tree", Path: dir, Err: err}
	}
	ma := unix.MountAttr{Attr_set: attr, Propagation: unix.MS_PRIVATE}
	if !identity(m) {
		ns, release, err := s.users.get(m)
		if err != nil {
			unix.Close(fd)
			return -1, err
		}
		defer release()
		ma.Attr_set |= unix.MOUNT_ATTR_IDMAP
		ma.Userns_fd = uint64(ns.Fd())
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &ma); err != nil {
		unix.Close(fd)
		if ma.Attr_set&unix.MOUNT_ATTR_IDMAP != 0 && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)) {
			return -1, fault.New(fault.Unsupported, "the file system of %s cannot map ids: %w (use --userns=host, or keep the engine's root on ext4, xfs or btrfs)", dir, err)
		}
		return -1, &os.PathError{Op: "mount_setattr", Path: dir, Err: err}
	}
	return fd, nil
}

// mount makes the overlay, detached.
func (s *Store) mount(st stack, m snapshot.IDMap) (*os.File, error) {
	if s.cap.private || !s.cap.append {
		return s.mountPrivate(st, m)
	}
	if identity(m) {
		return s.fsmount(st)
	}
	// Layers by descriptor of an idmapped clone: one clone for all lower
	// directories, one for upper and work. Kernels before 6.14 want layers to be
	// attached somewhere and refuse; then a private namespace does it.
	f, err := s.mountMapped(st, m)
	if errors.Is(err, unix.EINVAL) {
		return s.mountPrivate(st, m)
	}
	return f, err
}

func (s *Store) mountMapped(st stack, m snapshot.IDMap) (*os.File, error) {
	base := ancestor(st.lowers)
	low, err := s.clone(base, m, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(low)
	mapped := st
	mapped.lowers = make([]string, len(st.lowers))
	for i, d := range st.lowers {
		if mountRoot(d) {
			// A clone of what is around it does not have what is mounted on it.
			own, err := s.clone(d, m, 0)
			if err != nil {
				return nil, err
			}
			defer unix.Close(own)
			mapped.lowers[i] = fmt.Sprintf("/proc/thread-self/fd/%d", own)
			continue
		}
		rel, err := filepath.Rel(base, d)
		if err != nil {
			return nil, err
		}
		mapped.lowers[i] = filepath.Join(fmt.Sprintf("/proc/thread-self/fd/%d", low), rel)
	}
	if st.dir != "" {
		up, err := s.clone(st.dir, m, 0)
		if err != nil {
			return nil, err
		}
		defer unix.Close(up)
		mapped.dir = fmt.Sprintf("/proc/thread-self/fd/%d", up)
	}
	return s.fsmount(mapped)
}

// mountRoot tells whether something is mounted on dir, such as a lazily pulled
// layer.
func mountRoot(dir string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// ancestor is the deepest directory that holds all of dirs.
func ancestor(dirs []string) string {
	base := filepath.Dir(dirs[0])
	for _, d := range dirs[1:] {
		for base != "/" && !strings.HasPrefix(d, base+"/") {
			base = filepath.Dir(base)
		}
	}
	return base
}

// fsmount makes the overlay with the file system context calls.
func (s *Store) fsmount(st stack) (*os.File, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fd)
	set := func(key, value string) {
		if err == nil {
			if e := unix.FsconfigSetString(fd, key, value); e != nil {
				err = &os.PathError{Op: "fsconfig " + key, Path: value, Err: e}
			}
		}
	}
	set("source", "overlay")
	if s.cap.append {
		for _, d := range st.lowers {
			set("lowerdir+", d)
		}
	} else {
		set("lowerdir", joinLowers(st.lowers))
	}
	if st.dir != "" {
		set("upperdir", st.dir+"/"+upperName)
		set("workdir", st.dir+"/"+workName)
		set("index", "off")
	}
	// No redirects and no metadata-only copies: neither made, so that a layer can
	// be read without a mount, nor followed, so that an image cannot plant one.
	set("redirect_dir", "nofollow")
	if !s.cap.userxattr {
		set("metacopy", "off")
	}
	flag := func(key string) {
		if err == nil {
			if e := unix.FsconfigSetFlag(fd, key); e != nil {
				err = fmt.Errorf("fsconfig %s: %w", key, e)
			}
		}
	}
	if s.cap.userxattr {
		flag("userxattr")
	}
	if st.volatile && st.dir != "" {
		flag("volatile")
	}
	if st.label != "" {
		set("context", st.label)
	}
	if err != nil {
		return nil, explain(fd, err)
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, explain(fd, os.NewSyscallError("fsconfig create", err))
	}
	attr := 0
	if st.readonly {
		attr = unix.MOUNT_ATTR_RDONLY
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	return os.NewFile(uintptr(mfd), "overlay"), nil
}

// explain adds the kernel's own words on a failed context call.
func explain(fd int, err error) error {
	buf := make([]byte, 512)
	n, e := unix.Read(fd, buf)
	if e != nil || n <= 2 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.TrimSpace(string(buf[2:n])))
}

func joinLowers(dirs []string) string {
	esc := strings.NewReplacer(`\`, `\\`, `:`, `\:`)
	out := make([]string, len(dirs))
	for i, d := range dirs {
		out[i] = esc.Replace(d)
	}
	return strings.Join(out, ":")
}
