//go:build !windows

package tree

import (
	"io/fs"
	"syscall"
)

// inode tells files apart.
type inode struct{ dev, ino uint64 }

// inodeOf gives a file's inode and whether it has several names.
func inodeOf(fi fs.FileInfo) (inode, bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return inode{}, false
	}
	return inode{uint64(st.Dev), uint64(st.Ino)}, st.Nlink > 1
}
