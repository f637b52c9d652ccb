package overlay

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	"golang.org/x/sys/unix"
)

// mountPrivate mounts the overlay in a mount namespace that only one thread
// sees, and takes a detached clone of it. It serves kernels without lowerdir+
// (the list is then given relative to its directory, to fit in one page) and
// those that take no detached layers (idmapped clones are laid over their own
// directories, so paths stay). The namespace dies with the thread.
func (s *Store) mountPrivate(st stack, m snapshot.IDMap) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f, err := s.mountHere(st, m)
		done <- result{f, err}
	}()
	r := <-done
	return r.f, r.err
}

func (s *Store) mountHere(st stack, m snapshot.IDMap) (*os.File, error) {
	// Made before the thread changes, because it starts a process.
	if !identity(m) {
		_, release, err := s.users.get(m)
		if err != nil {
			return nil, err
		}
		defer release()
	}
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return nil, os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, os.NewSyscallError("mount private", err)
	}
	base := ancestor(st.lowers)
	if !identity(m) {
		// What is mounted on a layer would be covered by the clone of what is
		// around it, and goes on top again.
		var own []int
		var ownDirs []string
		for _, d := range st.lowers {
			if mountRoot(d) {
				fd, err := s.clone(d, m, 0)
				if err != nil {
					return nil, err
				}
				defer unix.Close(fd)
				own, ownDirs = append(own, fd), append(ownDirs, d)
			}
		}
		over := []string{base}
		if st.dir != "" {
			over = append(over, st.dir)
		}
		for _, d := range over {
			fd, err := s.clone(d, m, 0)
			if err != nil {
				return nil, err
			}
			err = unix.MoveMount(fd, "", unix.AT_FDCWD, d, unix.MOVE_MOUNT_F_EMPTY_PATH)
			unix.Close(fd)
			if err != nil {
				return nil, &os.PathError{Op: "move_mount", Path: d, Err: err}
			}
		}
		for i, d := range ownDirs {
			if err := unix.MoveMount(own[i], "", unix.AT_FDCWD, d, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
				return nil, &os.PathError{Op: "move_mount", Path: d, Err: err}
			}
		}
	}
	if s.cap.append {
		return s.fsmount(st)
	}
	if err := unix.Chdir(base); err != nil {
		return nil, &os.PathError{Op: "chdir", Path: base, Err: err}
	}
	opts, err := s.options(st, base)
	if err != nil {
		return nil, err
	}
	var flags uintptr
	if st.readonly {
		flags = unix.MS_RDONLY
	}
	if err := unix.Mount("overlay", s.empty, "overlay", flags, opts); err != nil {
		return nil, &os.PathError{Op: "mount overlay", Path: opts, Err: err}
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, s.empty, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("open_tree", err)
	}
	return os.NewFile(uintptr(fd), "overlay"), nil
}

// options is the mount(2) data of the stack, lower directories relative to base.
func (s *Store) options(st stack, base string) (string, error) {
	rel := make([]string, len(st.lowers))
	for i, d := range st.lowers {
		r, err := filepath.Rel(base, d)
		if err != nil {
			return "", err
		}
		rel[i] = r
	}
	opts := []string{"lowerdir=" + strings.ReplaceAll(joinLowers(rel), ",", `\,`), "redirect_dir=nofollow"}
	if st.dir != "" {
		dir := strings.NewReplacer(`\`, `\\`, `:`, `\:`, ",", `\,`).Replace(st.dir)
		opts = append(opts, "upperdir="+dir+"/"+upperName, "workdir="+dir+"/"+workName, "index=off")
	}
	if s.cap.userxattr {
		opts = append(opts, "userxattr")
	} else {
		opts = append(opts, "metacopy=off")
	}
	if st.volatile && st.dir != "" {
		opts = append(opts, "volatile")
	}
	if st.label != "" {
		opts = append(opts, `context="`+st.label+`"`)
	}
	o := strings.Join(opts, ",")
	if len(o) >= os.Getpagesize() {
		return "", fault.New(fault.Unsupported, "%d layers are too many for this kernel (%s); use kernel 6.5 or newer, or fewer layers", len(st.lowers), fmt.Sprintf("mount data of %d bytes", len(o)))
	}
	return o, nil
}
