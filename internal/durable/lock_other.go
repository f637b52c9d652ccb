//go:build !unix

package durable

import (
	"io/fs"
	"os"
)

func temporary(path string) (*os.File, error) { return random(path) }

func chmod(*os.File, fs.FileMode) error { return nil }

func closeFirst(f *os.File) error { return f.Close() }

// SyncDir does nothing: directories cannot be opened for that here.
func SyncDir(string) error { return nil }
