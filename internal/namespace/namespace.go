// Package namespace makes kernel namespaces that no process needs to live in and
// pins them to files, so that they outlive the daemon and others can join them by
// path. The engine uses it for pods.
//
// Vocabulary. A *set* is a directory with a tmpfs of its own, in which each
// namespace is a bound nsfs file: ns/net, ns/ipc, ns/uts, ns/user. Taking the
// tmpfs away (Drop) takes all of them away; the kernel destroys a namespace with
// its last user.
package namespace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Config of a set.
type Config struct {
	// Dir is an existing directory that becomes the set. Size bounds its tmpfs, bytes.
	Dir  string
	Size int64
	// Net, IPC and UTS say which namespaces are made.
	Net, IPC, UTS bool
	// UserHost and UserSize map the ids from 0 on in a user namespace that owns
	// the others; a zero size makes none.
	UserHost, UserSize uint32
	// Hostname of the UTS namespace; "" leaves the host's.
	Hostname string
	// Sysctls are set inside, by their names with dots or slashes.
	Sysctls map[string]string
}

// Path is the file of a namespace ("net", "ipc", "uts", "user") of the set at dir.
func Path(dir, kind string) string { return filepath.Join(dir, "ns", kind) }

// Prepare makes dir a mount of its own that no mount namespace shares, so that
// what is pinned below it is not held by others. It may be repeated.
func Prepare(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	if err != nil {
		return &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return &os.PathError{Op: "bind", Path: dir, Err: err}
		}
	}
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return &os.PathError{Op: "make private", Path: dir, Err: err}
	}
	return nil
}

// Unprepare undoes Prepare.
func Unprepare(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unmount", Path: dir, Err: err}
	}
	return nil
}

// Make makes a set. On failure nothing is left but the directory.
func Make(c Config) (err error) {
	opts := "mode=0711"
	if c.Size > 0 {
		opts += ",size=" + strconv.FormatInt(c.Size, 10)
	}
	if err := unix.Mount("pod", c.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, opts); err != nil {
		return fault.New(fault.Internal, "cannot mount the directory of a pod: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Drop(c.Dir))
		}
	}()
	if err := os.Mkdir(filepath.Join(c.Dir, "ns"), 0o700); err != nil {
		return err
	}
	var kinds []string
	var flags uintptr
	for _, k := range []struct {
		on   bool
		name string
		flag uintptr
	}{{c.Net, "net", unix.CLONE_NEWNET}, {c.IPC, "ipc", unix.CLONE_NEWIPC}, {c.UTS, "uts", unix.CLONE_NEWUTS}, {c.UserSize > 0, "user", unix.CLONE_NEWUSER}} {
		if !k.on {
			continue
		}
		kinds = append(kinds, k.name)
		flags |= k.flag
		if err := os.WriteFile(Path(c.Dir, k.name), nil, 0o400); err != nil {
			return err
		}
	}
	if flags == 0 {
		return nil
	}
	if c.UserSize > 0 {
		if err := c.fork(kinds, flags); err != nil {
			return err
		}
	}
	return thread(func() error { return c.inside(kinds, flags) })
}

// thread calls fn on a thread that ends afterwards, and never on the process's
// first one, whose namespaces are what /proc/self shows.
func thread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- thread(fn) // it gets another, for this one is taken
			runtime.UnlockOSThread()
			return
		}
		done <- fn() // never unlocked: the thread ends with the goroutine
	}()
	return <-done
}

// inside enters the set, on a thread that ends afterwards, and sets it up.
func (c Config) inside(kinds []string, flags uintptr) error {
	if c.UserSize == 0 {
		if err := unix.Unshare(int(flags)); err != nil {
			return fault.New(fault.Internal, "cannot make namespaces: %w", err)
		}
		if err := c.pin(kinds, "/proc/thread-self/ns/"); err != nil {
			return err
		}
	} else {
		for _, k := range kinds {
			if k == "user" {
				continue // a thread cannot enter one; it owns the others, which is enough
			}
			if err := enter(c.Dir, k); err != nil {
				return err
			}
		}
	}
	if c.Net {
		if err := loopbackUp(); err != nil {
			return fault.New(fault.Internal, "cannot set up a pod's loopback: %w", err)
		}
	}
	if c.UTS && c.Hostname != "" {
		if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
			return fault.New(fault.Invalid, "cannot set the hostname %q: %w", c.Hostname, err)
		}
	}
	for name, value := range c.Sysctls {
		if err := c.sysctl(name, value); err != nil {
			return err
		}
	}
	return nil
}

func enter(dir, kind string) error {
	fd, err := unix.Open(Path(dir, kind), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: Path(dir, kind), Err: err}
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, 0); err != nil {
		return fault.New(fault.Internal, "cannot enter a %s namespace: %w", kind, err)
	}
	return nil
}

// Enter calls fn on a thread of its own in the network namespace at path. What fn
// opens stays in that namespace.
func Enter(path string, fn func() error) error {
	return thread(func() error {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fault.New(fault.NotFound, "cannot open the network namespace: %w", err)
		}
		err = unix.Setns(fd, unix.CLONE_NEWNET)
		unix.Close(fd)
		if err != nil {
			return fault.New(fault.Internal, "cannot enter the network namespace: %w", err)
		}
		return fn()
	})
}

// fork makes the namespaces with a child that is traced, and so never comes to
// execute its first instruction: only a process without threads can make a user
// namespace.
func (c Config) fork(kinds []string, flags uintptr) error {
	runtime.LockOSThread() // ptrace belongs to the thread
	defer runtime.UnlockOSThread()
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(c.UserHost), Size: int(c.UserSize)}}
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"namespace"}, &syscall.ProcAttr{
		Env: []string{}, Files: []uintptr{},
		Sys: &syscall.SysProcAttr{
			Cloneflags: flags, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
			Ptrace: true, Pdeathsig: syscall.SIGKILL,
		},
	})
	if err != nil {
		return fault.New(fault.Invalid, "cannot make namespaces with ids from %d: %w", c.UserHost, err)
	}
	err = c.pin(kinds, "/proc/"+strconv.Itoa(pid)+"/ns/")
	_ = syscall.Kill(pid, syscall.SIGKILL)
	for {
		var ws syscall.WaitStatus
		if _, werr := syscall.Wait4(pid, &ws, 0, nil); werr == syscall.EINTR || werr == nil && !ws.Exited() && !ws.Signaled() {
			continue
		}
		return err
	}
}

func (c Config) pin(kinds []string, from string) error {
	for _, k := range kinds {
		if err := unix.Mount(from+k, Path(c.Dir, k), "", unix.MS_BIND, ""); err != nil {
			return fault.New(fault.Internal, "cannot pin a %s namespace: %w", k, err)
		}
	}
	return nil
}

// sysctl writes one setting. Those of an ipc namespace are its own root's to
// write; the thread becomes that for the rest of its life.
func (c Config) sysctl(name, value string) error {
	p, err := sysctlPath(name)
	if err != nil {
		return err
	}
	write := func() error {
		fd, err := unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte(value))
		return err
	}
	err = write()
	if c.UserSize > 0 && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
		keep := ^uintptr(0)
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(c.UserHost), keep); e != 0 {
			return fault.New(fault.Internal, "cannot set sysctl %s: %w", name, e)
		}
		err = write()
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep); e != 0 {
			return fault.New(fault.Internal, "cannot set sysctl %s: %w", name, e)
		}
	}
	if err != nil {
		return fault.New(fault.Invalid, "cannot set sysctl %s to %q: %w", name, value, err)
	}
	return nil
}

// sysctlPath refuses names that lead elsewhere. Slashes, where there are any,
// separate; else dots do.
func sysctlPath(name string) (string, error) {
	sep := "."
	if strings.Contains(name, "/") {
		sep = "/"
	}
	parts := strings.Split(name, sep)
	for _, p := range parts {
		if p == "" || p == "." || p == ".." || strings.ContainsAny(p, "\x00/\n ") {
			return "", fault.New(fault.Invalid, "invalid sysctl %q", name)
		}
	}
	return "/proc/sys/" + strings.Join(parts, "/"), nil
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, r); err != nil {
		return err
	}
	r.SetUint16(r.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
}

// Drop takes a set away, whole or half made; one that is gone is no error.
func Drop(dir string) error {
	for range 64 {
		err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil
		default:
			return fmt.Errorf("cannot unmount the directory of a pod: %w", err)
		}
	}
	return fault.New(fault.Internal, "cannot unmount the directory of a pod: too much is mounted there")
}

// Mounted tells whether a set stands at dir.
func Mounted(dir string) bool {
	var st unix.Statx_t
	return unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, 0, &st) == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
