//go:build !linux

package host

import "io/fs"

// resident is unknown here.
func resident(int) uint64 { return 0 }

// allocated is at most the file's size.
func allocated(fi fs.FileInfo) uint64 { return uint64(fi.Size()) }
