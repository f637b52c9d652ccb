package criu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// StageArg is what a program that calls Main is run with to become a restore's
// stage; the name of the socket, in its working directory, follows.
const StageArg = "criu-restore-stage"

// Descriptors that CRIU is left with beside the standard ones. Those of images and
// log it takes from whoever speaks to it.
const (
	StageNetwork = 100
	stageSocket  = 101
)

// Order is what a stage is told, in one datagram with descriptors: the root's
// detached mount, those of Mounts, and with Network the network namespace.
type Order struct {
	// CRIU is the program to become. Dir is a directory of the host's that the
	// mounts may be put on top of, where nobody else sees them.
	CRIU, Dir string
	Mounts    []StageMount
	// Places must exist below the root: CRIU mounts on them and makes none.
	Places  []Place
	Network bool
}

// StageMount is one mount that CRIU is to bind: it lies at Dir/name.
type StageMount struct {
	Name string
	File bool // not a directory
}

// Place is a mount point in the container's root.
type Place struct {
	Path string
	File bool
}

// Report is what a stage answers: that it becomes CRIU, or why not.
type Report struct{ Error string }

// maxOrder bounds an order; longer ones are no containers.
const maxOrder = 192 << 10

// Main is the stage. ours tells that this process was run as one; it does not
// return then unless it failed.
func Main() (code int, ours bool) {
	if len(os.Args) != 3 || os.Args[1] != StageArg {
		return 0, false
	}
	// What follows is of one thread, which is the one that becomes CRIU.
	runtime.LockOSThread()
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(sock, &unix.SockaddrUnix{Name: os.Args[2]})
	}
	if err != nil {
		return 1, true // nobody to tell
	}
	b, _ := json.Marshal(Report{Error: stage(sock).Error()})
	_, _ = unix.Write(sock, b)
	return 1, true
}

// stage carries the order out and becomes CRIU.
func stage(sock int) error {
	var o Order
	fds, err := receive(sock, &o)
	if err != nil {
		return fmt.Errorf("cannot read the order: %w", err)
	}
	want := 1 + len(o.Mounts)
	if o.Network {
		want++
	}
	if len(fds) != want {
		return fmt.Errorf("cannot read the order: %d descriptors came, not %d", len(fds), want)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", o.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err != nil {
		return fmt.Errorf("cannot mount at %s: %w", o.Dir, err)
	}
	if err := place(fds[0], filepath.Join(o.Dir, "root"), false); err != nil {
		return fmt.Errorf("cannot mount the root file system: %w", err)
	}
	root, err := unix.Open(filepath.Join(o.Dir, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open the root file system: %w", err)
	}
	for i, m := range o.Mounts {
		if m.Name != filepath.Base(m.Name) || m.Name == "root" {
			return fmt.Errorf("cannot mount %q: not a plain name", m.Name)
		}
		if err := place(fds[1+i], filepath.Join(o.Dir, m.Name), m.File); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.Name, err)
		}
	}
	for _, p := range o.Places {
		_, fd, err := Mountpoint(root, p.Path, !p.File)
		if err != nil {
			return fmt.Errorf("cannot make the mount point %s: %w", p.Path, err)
		}
		unix.Close(fd)
	}
	keep := []struct{ from, to int }{{sock, stageSocket}}
	if o.Network {
		keep = append(keep, struct{ from, to int }{fds[1+len(o.Mounts)], StageNetwork})
	}
	for _, k := range keep {
		if k.from == StageNetwork || k.from == stageSocket {
			return errors.New("cannot keep the descriptors: too many came")
		}
		if err := unix.Dup3(k.from, k.to, 0); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	if _, err := unix.Write(sock, []byte("{}")); err != nil {
		return os.NewSyscallError("write", err)
	}
	return os.NewSyscallError("execve", syscall.Exec(o.CRIU, []string{o.CRIU, "swrk", strconv.Itoa(stageSocket)}, os.Environ()))
}

// receive reads the order with its descriptors.
func receive(sock int, o *Order) ([]int, error) {
	buf, oob := make([]byte, maxOrder), make([]byte, unix.CmsgSpace(253*4))
	n, oobn, flags, _, err := unix.Recvmsg(sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("recvmsg", err)
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, errors.New("it is too long")
	}
	var fds []int
	cms, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for i := range cms {
		f, err := unix.ParseUnixRights(&cms[i])
		if err != nil {
			return nil, err
		}
		fds = append(fds, f...)
	}
	return fds, json.Unmarshal(buf[:n], o)
}

// place attaches a detached mount at a path of ours.
func place(fd int, at string, file bool) error {
	var err error
	if file {
		err = os.WriteFile(at, nil, 0o600)
	} else {
		err = os.Mkdir(at, 0o700)
	}
	if err != nil {
		return err
	}
	return unix.MoveMount(fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// OpenIn opens a place below a root, never outside of it.
func OpenIn(root int, path string) (int, error) {
	return unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
}

// Mountpoint opens a place in the root, and makes it where it is missing, step by
// step, each resolved within the root.
func Mountpoint(root int, path string, dir bool) (string, int, error) {
	path = filepath.Clean("/" + path)
	at := "/"
	for _, name := range strings.Split(strings.Trim(path, "/"), "/") {
		next := filepath.Join(at, name)
		fd, err := OpenIn(root, next)
		if err == unix.ENOENT {
			parent, perr := OpenIn(root, at)
			if perr != nil {
				return "", -1, perr
			}
			if next == path && !dir {
				err = unix.Mknodat(parent, name, unix.S_IFREG|0o644, 0)
			} else {
				err = unix.Mkdirat(parent, name, 0o755)
			}
			unix.Close(parent)
			if err == nil {
				fd, err = OpenIn(root, next)
			}
		}
		if err != nil {
			return "", -1, err
		}
		if next == path {
			return path, fd, nil
		}
		unix.Close(fd)
		at = next
	}
	fd, err := OpenIn(root, "/")
	return "/", fd, err
}
