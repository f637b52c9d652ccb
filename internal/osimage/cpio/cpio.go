// Package cpio writes trees as cpio archives of the kind that the kernel unpacks
// ("newc"), the initial root file system. Nothing in them depends on when or by
// whom they are written.
package cpio

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"math"

	"github.com/cloudos-io/cloudos/internal/osimage/tree"
)

// Write writes the tree.
func Write(w io.Writer, t *tree.Tree) error {
	b := bufio.NewWriterSize(w, 1<<20)
	var at int64
	out := func(p []byte) error {
		n, err := b.Write(p)
		at += int64(n)
		return err
	}
	pad := func() error {
		if r := at % 4; r != 0 {
			return out(make([]byte, 4-r))
		}
		return nil
	}
	head := func(ino int, mode uint32, nlink int, size int64, major, minor uint32, name string) error {
		if size > math.MaxUint32 {
			return fmt.Errorf("%s is too big for a cpio archive", name)
		}
		h := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
			ino, mode, 0, 0, nlink, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
		if err := out([]byte(h)); err != nil {
			return err
		}
		return pad()
	}
	for i, e := range t.Sorted() {
		mode, size, nlink := uint32(e.Mode.Perm()), int64(0), 1
		switch {
		case e.Mode.IsDir():
			mode, nlink = mode|0o040000, 2
		case e.Mode&fs.ModeSymlink != 0:
			mode, size = mode|0o120000, int64(len(e.Link))
		case e.Mode&fs.ModeDevice != 0:
			mode |= 0o020000
		default:
			mode, size = mode|0o100000, e.Size
		}
		if err := head(i+1, mode, nlink, size, e.Major, e.Minor, e.Path); err != nil {
			return err
		}
		if e.Mode&fs.ModeSymlink != 0 {
			if err := out([]byte(e.Link)); err != nil {
				return err
			}
		} else if size > 0 {
			r, err := e.Open()
			if err != nil {
				return err
			}
			n, err := io.Copy(b, r)
			r.Close()
			if err != nil {
				return fmt.Errorf("cannot read %s: %w", e.Path, err)
			}
			if at += n; n != size {
				return fmt.Errorf("%s changed while it was read", e.Path)
			}
		}
		if err := pad(); err != nil {
			return err
		}
	}
	if err := head(0, 0, 1, 0, 0, 0, "TRAILER!!!"); err != nil {
		return err
	}
	if r := at % 512; r != 0 {
		if err := out(make([]byte, 512-r)); err != nil {
			return err
		}
	}
	return b.Flush()
}
