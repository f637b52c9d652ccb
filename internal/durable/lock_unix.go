//go:build unix

package durable

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// turns is how often others may be quicker before a name of its own is taken.
const turns = 100

// temporary makes path's temporary file, empty, readable by its owner alone, and locked until
// it is closed. Who has it locked, and finds it under its name then, is alone in renaming and
// removing it.
func temporary(path string) (*os.File, error) {
	name := fixed(path)
	for range turns {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrExist) {
			if !outlast(name) {
				return random(path)
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if flock(f) != nil { // a file system without locks
			_ = os.Remove(name)
			_ = f.Close()
			return random(path)
		}
		if is(f, name) {
			return f, nil
		}
		_ = f.Close() // taken for a left-over one before it was locked
	}
	return random(path)
}

// outlast waits for who writes the temporary file, and removes it if that was killed. It says
// no where the file is not ours: a directory that others write to is no place for locks.
func outlast(name string) bool {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return false
	}
	if s, ok := st.Sys().(*syscall.Stat_t); !ok || int(s.Uid) != os.Geteuid() {
		return false
	}
	if flock(f) != nil {
		return false
	}
	return !is(f, name) || os.Remove(name) == nil
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			return err
		}
	}
}

// is tells whether the file is still the one of that name.
func is(f *os.File, name string) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(name)
	return err == nil && os.SameFile(mine, there)
}

func chmod(f *os.File, mode fs.FileMode) error { return f.Chmod(mode) }

// closeFirst is for systems that rename and remove closed files only: here a file is renamed
// while it is locked.
func closeFirst(*os.File) error { return nil }

// SyncDir has a directory's names on the disk.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
