package source

import (
	"os"
	"path"
	"runtime"
	"strings"

	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"golang.org/x/sys/unix"
)

// Late makes a detached copy of a mount whose source lies in the container's root,
// on a mount that the stage has made by now. mntns is the stage's mount namespace,
// root where the root lies on the host, and in it, "" for on top of everything.
func Late(sl *plan.Slot, mntns *os.File, root, in, exe string) (int, error) {
	fail := func(err error) error {
		return &contract.StartError{Step: "open mount source " + sl.Source, Err: err}
	}
	type result struct {
		fd  int
		err error
	}
	done := make(chan result, 1)
	go func() {
		// A thread that has entered another mount namespace is of no use to
		// anybody else: it ends with this function.
		runtime.LockOSThread()
		fd, err := clone(sl, mntns, root, in)
		done <- result{fd, err}
	}()
	r := <-done
	if r.err != nil {
		return -1, fail(r.err)
	}
	if err := prepare(r.fd, sl, exe); err != nil {
		unix.Close(r.fd)
		return -1, err
	}
	return r.fd, nil
}

func clone(sl *plan.Slot, mntns *os.File, root, in string) (int, error) {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return -1, err
	}
	if err := unix.Setns(int(mntns.Fd()), unix.CLONE_NEWNS); err != nil {
		return -1, err
	}
	if in == "" {
		in = "/"
	}
	dir, err := unix.Open(in, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(dir)
	rel := strings.TrimPrefix(path.Clean(sl.Source), path.Clean(root))
	fd, err := unix.Openat2(dir, "."+rel, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if sl.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	return unix.OpenTree(fd, "", flags)
}
