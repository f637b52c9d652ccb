package tree

import "io/fs"

// inode tells files apart; here each name is taken for a file of its own.
type inode struct{}

func inodeOf(fs.FileInfo) (inode, bool) { return inode{}, false }
