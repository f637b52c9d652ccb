package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// pins bind network namespaces to files, because plugins, and the daemons that
// some of them talk to, take paths, and because a plugin may need the namespace
// to undo what it did after its container has ended.
type pins struct{ dir string }

func newPins(dir string) (pins, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return pins{}, fmt.Errorf("cannot make the directory of network namespaces: %w", err)
	}
	return pins{dir}, nil
}

func (p pins) path(id string) string { return filepath.Join(p.dir, id) }

// set binds a namespace; one of that name which is bound already is replaced if
// it is another.
func (p pins) set(id string, ns *os.File) (string, error) {
	path := p.path(id)
	var have, want unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &want); err != nil {
		return "", fmt.Errorf("cannot look at the network namespace: %w", err)
	}
	if err := unix.Stat(path, &have); err == nil {
		if have.Ino == want.Ino && have.Dev == want.Dev {
			return path, nil
		}
		if err := p.drop(id); err != nil {
			return "", err
		}
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return "", fmt.Errorf("cannot bind the network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(int(ns.Fd())), path, "", unix.MS_BIND, ""); err != nil {
		_ = os.Remove(path)
		return "", fmt.Errorf("cannot bind the network namespace: %w", err)
	}
	return path, nil
}

// drop gives a namespace up; it is fine if there is none.
func (p pins) drop(id string) error {
	path := p.path(id)
	for {
		// More than one bind can be there if two engines met.
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("cannot give up the network namespace %s: %w", path, err)
		}
		break
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot give up the network namespace %s: %w", path, err)
	}
	return nil
}

// sweep drops those that nobody keeps.
func (p pins) sweep(keep func(id string) bool) error {
	es, err := os.ReadDir(p.dir)
	if err != nil {
		return fmt.Errorf("cannot list network namespaces: %w", err)
	}
	var errs error
	for _, e := range es {
		if !keep(e.Name()) {
			errs = errors.Join(errs, p.drop(e.Name()))
		}
	}
	return errs
}
