package volume

import (
	"context"
	"errors"
	"net"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// validOptions checks the options of the local driver: type, o and device
// together, as mount(8) takes them.
func validOptions(o map[string]string) error {
	for k, v := range o {
		switch k {
		case "type", "o", "device":
		case "size":
			if n, err := units.RAMInBytes(v); err != nil || n <= 0 {
				return invalid("invalid option: size %q: write it as 10G", v)
			}
			if o["device"] != "" || o["type"] != "" {
				return invalid("invalid option: size is for volumes kept here: a mounted one takes the file system's own, such as o=size=%s of tmpfs", v)
			}
		default:
			return invalid("invalid option: %q", k)
		}
		if strings.ContainsRune(v, 0) {
			return invalid("invalid option: %q contains a NUL byte", k)
		}
	}
	need := func(k, by string) error {
		if o[by] != "" && o[k] == "" {
			return invalid("missing required option: %q", k)
		}
		return nil
	}
	for _, err := range []error{need("type", "device"), need("device", "type"), need("device", "o"), need("type", "o")} {
		if err != nil {
			return err
		}
	}
	if IsBind(o) && !path.IsAbs(o["device"]) {
		return invalid("invalid option: device %q of a bind must be an absolute path", o["device"])
	}
	_, _, err := mountFlags(o["o"])
	return err
}

// IsBind tells whether options of the local driver make a volume a bind.
func IsBind(o map[string]string) bool {
	if o["type"] == "bind" {
		return true
	}
	for f := range strings.SplitSeq(o["o"], ",") {
		if f == "bind" || f == "rbind" {
			return true
		}
	}
	return false
}

var flagBits = map[string]struct {
	set, clear uintptr
}{
	"": {}, "defaults": {}, "rw": {0, unix.MS_RDONLY}, "ro": {unix.MS_RDONLY, 0},
	"nosuid": {unix.MS_NOSUID, 0}, "suid": {0, unix.MS_NOSUID}, "nodev": {unix.MS_NODEV, 0}, "dev": {0, unix.MS_NODEV},
	"noexec": {unix.MS_NOEXEC, 0}, "exec": {0, unix.MS_NOEXEC}, "sync": {unix.MS_SYNCHRONOUS, 0}, "async": {0, unix.MS_SYNCHRONOUS},
	"dirsync": {unix.MS_DIRSYNC, 0}, "mand": {unix.MS_MANDLOCK, 0}, "nomand": {0, unix.MS_MANDLOCK},
	"noatime": {unix.MS_NOATIME, 0}, "atime": {0, unix.MS_NOATIME}, "nodiratime": {unix.MS_NODIRATIME, 0}, "diratime": {0, unix.MS_NODIRATIME},
	"relatime": {unix.MS_RELATIME, 0}, "norelatime": {0, unix.MS_RELATIME}, "strictatime": {unix.MS_STRICTATIME, 0}, "nostrictatime": {0, unix.MS_STRICTATIME},
	"bind": {unix.MS_BIND, 0}, "rbind": {unix.MS_BIND | unix.MS_REC, 0}, "silent": {unix.MS_SILENT, 0},
}

// mountFlags splits an option string as mount(8) does: flags of the kernel and
// data for the file system.
func mountFlags(o string) (flags uintptr, data string, err error) {
	if len(o) > 3800 { // a page less what is added
		return 0, "", invalid("invalid option: \"o\" is too long")
	}
	var rest []string
	for f := range strings.SplitSeq(o, ",") {
		if b, ok := flagBits[f]; ok {
			flags = flags&^b.clear | b.set
		} else {
			rest = append(rest, f)
		}
	}
	return flags, strings.Join(rest, ","), nil
}

// Use readies a volume for a container and returns the host path of its data. It
// may be repeated; Release with the same id undoes it once and for all.
func (s *Store) Use(ctx context.Context, name, containerID string) (string, error) {
	v, err := s.get(name)
	if err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	s.mu.Lock()
	gone := v.state != present
	s.mu.Unlock()
	if gone {
		return "", fault.New(fault.NotFound, "get %s: no such volume", name)
	}
	if v.busy {
		return "", errBusy(name)
	}
	if v.rec.Driver != "" {
		return s.useRemote(ctx, v, containerID)
	}
	if v.rec.mounts() && !v.mounted {
		if err := s.mount(ctx, v); err != nil {
			return "", err
		}
		v.mounted = true
	}
	v.uses[containerID] = true
	return filepath.Join(s.root, name, dataDir), nil
}

// Release ends a container's use; the last one unmounts. Unknown names and ids
// are ignored.
func (s *Store) Release(ctx context.Context, name, containerID string) error {
	v, err := s.get(name)
	if err != nil {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.uses[containerID] {
		return nil
	}
	if v.rec.Driver != "" {
		return s.releaseRemote(ctx, v, containerID)
	}
	delete(v.uses, containerID)
	if len(v.uses) > 0 {
		return nil
	}
	if err := s.unmount(v); err != nil {
		return fault.New(fault.Internal, "cannot unmount volume %s: %w", name, err)
	}
	return nil
}

// ReleaseUnused unmounts every volume that no container uses: after a restart,
// once the engine has told the uses of its containers, and at shutdown.
func (s *Store) ReleaseUnused(ctx context.Context) error {
	s.mu.Lock()
	var all []*vol
	for _, v := range s.m {
		if v.state == present && (v.rec.mounts() || v.rec.Driver != "") {
			all = append(all, v)
		}
	}
	s.mu.Unlock()
	var failed error
	for _, v := range all {
		v.mu.Lock()
		if v.rec.Driver != "" {
			s.dropLeft(ctx, v)
		} else if len(v.uses) == 0 {
			if err := s.unmount(v); err != nil {
				failed = errors.Join(failed, fault.New(fault.Internal, "cannot unmount volume %s: %w", v.rec.Name, err))
			}
		}
		v.mu.Unlock()
	}
	return failed
}

func (s *Store) mount(ctx context.Context, v *vol) error {
	name, o := v.rec.Name, v.rec.Options
	flags, data, err := mountFlags(o["o"])
	if err != nil {
		return err
	}
	fstype := o["type"]
	if IsBind(o) {
		flags |= unix.MS_BIND
	}
	switch {
	case strings.HasPrefix(fstype, "nfs"), fstype == "cifs", fstype == "smb3":
		if data, err = resolveAddr(ctx, data, fstype); err != nil {
			return fault.New(fault.Unavailable, "error while mounting volume '%s': %w", name, err)
		}
	}
	f, err := s.openData(name)
	if err != nil {
		return err
	}
	defer f.Close()
	// By descriptor: nobody can put a link in the way.
	target := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	if flags&unix.MS_BIND != 0 {
		err = bindMount(o["device"], target, flags)
	} else {
		err = unix.Mount(o["device"], target, fstype, flags, data)
	}
	if err != nil {
		return fault.New(fault.Internal, "error while mounting volume '%s': failed to mount local volume: mount %s:%s, flags: 0x%x: %w",
			name, o["device"], filepath.Join(s.root, name, dataDir), flags, err)
	}
	return nil
}

// bindMount binds and then sets the flags, which a bind by itself ignores.
func bindMount(source, target string, flags uintptr) error {
	kind := flags & (unix.MS_BIND | unix.MS_REC)
	if err := unix.Mount(source, target, "", kind, ""); err != nil {
		return err
	}
	rest := flags &^ uintptr(unix.MS_BIND|unix.MS_REC|unix.MS_SILENT)
	if rest == 0 {
		return nil
	}
	// The descriptor still names the directory below, so find the mount through it.
	top, err := os.Readlink(target)
	if err != nil {
		return err
	}
	if err := unix.Mount("", top, "", unix.MS_REMOUNT|unix.MS_BIND|rest, ""); err != nil {
		_ = unix.Unmount(top, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		return err
	}
	return nil
}

// resolveAddr turns addr=NAME into an address, which the kernel wants.
func resolveAddr(ctx context.Context, data, fstype string) (string, error) {
	opts := strings.Split(data, ",")
	for i, o := range opts {
		host, ok := strings.CutPrefix(o, "addr=")
		if !ok || host == "" || net.ParseIP(host) != nil {
			continue
		}
		ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
		if err != nil {
			return "", err
		}
		addr := "addr=" + ips[0].String()
		if fstype == "cifs" || fstype == "smb3" {
			addr = "ip=" + ips[0].String()
		}
		opts[i] = addr
	}
	return strings.Join(opts, ","), nil
}

// unmount takes down what is mounted at the volume's data; the caller holds v.mu.
func (s *Store) unmount(v *vol) error {
	if !v.rec.mounts() {
		return nil
	}
	for range 64 { // mounts may be stacked; never endlessly
		if !s.isMounted(v.rec.Name) {
			break
		}
		// Lazily: a process that still has a file open keeps it alive, nobody new sees it.
		if err := unix.Unmount(filepath.Join(s.root, v.rec.Name, dataDir), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return err
		}
	}
	v.mounted = false
	return nil
}

// isMounted asks the kernel whether the data directory is the root of a mount.
func (s *Store) isMounted(name string) bool {
	var st unix.Statx_t
	err := unix.Statx(int(s.dir.Fd()), name+"/"+dataDir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, 0, &st)
	return err == nil && st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
