// Package durable replaces files: a reader of a path sees what was there, or all of what is
// there now, never a part, whenever the writer is killed. What a power cut may take besides
// is the caller's choice, since a sync costs milliseconds that a container's start has not.
//
// The new content is written to a *temporary file* beside the path, under one name that
// follows from the path's, and locked while it is written: what a killed process left is
// removed by the next who writes there, so that nothing piles up, and two who replace one
// file at once do so one after the other. A directory whose files come and go under new
// names sweeps what IsTemporary names when it is read.
//
// Who writes into a directory that others may change meanwhile works relative to a
// descriptor of it instead. Whoever keeps files imports this.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Sync is what of a replaced file outlasts a power cut.
type Sync uint8

const (
	// Nothing is synced: for what is under /run, what can be made anew, and what is synced
	// later. After a power cut the file may be empty.
	Nothing Sync = iota + 1
	// Content is synced before the file has its name: after a power cut it is whole, but
	// may be the former one.
	Content
	// Everything is synced before the call returns: the file is there from then on.
	Everything
)

const (
	prefix, suffix = ".", ".new"
	// longest is how much of a name goes into its temporary file's: both fit into 255 bytes.
	longest = 200
)

// WriteFile replaces path by a file of that content and mode (the umask does not matter).
func WriteFile(path string, data []byte, mode fs.FileMode, s Sync) error {
	return Replace(path, mode, s, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// Replace replaces path by a file of that mode with what write writes; when that fails, path
// stays as it is.
func Replace(path string, mode fs.FileMode, s Sync, write func(*os.File) error) error {
	if s < Nothing || s > Everything {
		return &fs.PathError{Op: "replace", Path: path, Err: errors.New("what to sync was not said")}
	}
	f, err := temporary(path)
	if err != nil {
		return err
	}
	placed := false
	defer func() { // also when write panics; while it is locked it is ours
		if !placed {
			closeFirst(f)
			_ = os.Remove(f.Name())
		}
		_ = f.Close()
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := chmod(f, mode); err != nil {
		return err
	}
	if s >= Content {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := closeFirst(f); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	placed = true
	if s < Everything {
		return nil
	}
	return SyncDir(filepath.Dir(path))
}

// IsTemporary tells whether a file's name is one of this package's temporary files.
func IsTemporary(name string) bool {
	return strings.HasPrefix(name, prefix) && strings.HasSuffix(name, suffix) && len(name) > len(prefix)+len(suffix)
}

// fixed is the one name of a path's temporary file.
func fixed(path string) string {
	dir, base := filepath.Split(path)
	return dir + prefix + short(base) + suffix
}

// random makes a temporary file where locks are of no use.
func random(path string) (*os.File, error) {
	// Dir is never empty, which would be the system's directory for such files.
	return os.CreateTemp(filepath.Dir(path), prefix+short(filepath.Base(path))+".*"+suffix)
}

func short(base string) string { return strings.ToValidUTF8(base[:min(len(base), longest)], "") }
