// Package tree moves file trees of the host in and out of tar streams, for cp.
// What comes out of a container is hostile: extraction works through an os.Root,
// so no name, link or race in the archive can reach outside of the destination.
package tree

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// ExtractOptions of Extract.
type ExtractOptions struct {
	// From is the archive's top name and To what to call it in the destination:
	// "" puts what is in it straight there.
	From, To string
	// Owners keeps user and group ids and the set-id bits.
	Owners bool
	// Warn tells of an entry that was left out; may be nil.
	Warn func(string)
}

// maxEntries bounds what one archive may make.
const maxEntries = 10_000_000

// Extract unpacks a tar stream into the directory dir. Files that exist are
// replaced; a file never replaces a directory nor a directory a file.
func Extract(r io.Reader, dir string, o ExtractOptions) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	x := &extractor{root: root, o: o}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("cannot read the archive: %w", err)
		}
		if n > maxEntries {
			return errors.New("the archive has too many entries")
		}
		name, err := x.rename(h.Name)
		if err != nil {
			return err
		}
		if name == "" {
			continue
		}
		if err := x.entry(name, h, tr); err != nil {
			return fmt.Errorf("cannot write %s: %w", filepath.Join(dir, name), err)
		}
	}
	return x.finish()
}

type extractor struct {
	root *os.Root
	o    ExtractOptions
	dirs []dirTime
}

// dirTime is a directory whose mode and time are set last: its files need a
// writable directory and change its time.
type dirTime struct {
	name string
	mode fs.FileMode
	time time.Time
}

// rename maps an archive's name to one in the destination.
func (x *extractor) rename(name string) (string, error) {
	clean := path.Clean("/" + name)[1:]
	for _, part := range strings.Split(strings.TrimSuffix(name, "/"), "/") {
		if part == ".." {
			return "", fmt.Errorf("the archive names %q, outside of what was asked for", name)
		}
	}
	from := strings.Trim(x.o.From, "/")
	rest := clean
	if from != "" && from != "." {
		if clean != from && !strings.HasPrefix(clean, from+"/") {
			return "", fmt.Errorf("the archive names %q, outside of what was asked for", name)
		}
		rest = strings.TrimPrefix(strings.TrimPrefix(clean, from), "/")
	}
	out := path.Join(x.o.To, rest)
	if out == "" || out == "." {
		return "", nil
	}
	if !filepath.IsLocal(filepath.FromSlash(out)) {
		return "", fmt.Errorf("the archive names %q, which this system cannot hold", name)
	}
	return filepath.FromSlash(out), nil
}

const setID = fs.ModeSetuid | fs.ModeSetgid

func (x *extractor) entry(name string, h *tar.Header, r io.Reader) error {
	mode := h.FileInfo().Mode()
	if !x.o.Owners {
		mode &^= setID
	}
	if parent := filepath.Dir(name); parent != "." {
		if err := x.root.MkdirAll(parent, 0o755); err != nil {
			return err
		}
	}
	old, err := x.root.Lstat(name)
	exists := err == nil
	if exists && old.IsDir() != (h.Typeflag == tar.TypeDir) {
		if old.IsDir() {
			return errors.New("a directory is in the way of a file")
		}
		return errors.New("a file is in the way of a directory")
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if !exists {
			if err := x.root.Mkdir(name, 0o700); err != nil {
				return err
			}
		}
		x.dirs = append(x.dirs, dirTime{name, mode, h.ModTime})
		return x.owner(name, h)
	case tar.TypeReg:
		return x.file(name, h, mode, r, exists)
	case tar.TypeSymlink:
		if exists {
			if err := x.root.Remove(name); err != nil {
				return err
			}
		}
		if err := x.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return x.owner(name, h)
	case tar.TypeLink:
		target, err := x.rename(h.Linkname)
		if err != nil {
			return err
		}
		if exists {
			if err := x.root.Remove(name); err != nil {
				return err
			}
		}
		return x.root.Link(target, name)
	case tar.TypeXGlobalHeader:
		return nil
	}
	if x.o.Warn != nil {
		x.o.Warn(fmt.Sprintf("left out %s: devices, pipes and sockets are not copied to the host", name))
	}
	return nil
}

func (x *extractor) file(name string, h *tar.Header, mode fs.FileMode, r io.Reader, exists bool) error {
	if exists {
		// Not through an existing file: it may be a link, or have other names.
		if err := x.root.Remove(name); err != nil {
			return err
		}
	}
	f, err := x.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = x.owner(name, h) // before the mode: a change of owner clears set-id bits
	}
	if err == nil {
		err = f.Chmod(mode & (fs.ModePerm | setID | fs.ModeSticky))
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = x.root.Chtimes(name, h.ModTime, h.ModTime)
	}
	return err
}

func (x *extractor) owner(name string, h *tar.Header) error {
	if !x.o.Owners {
		return nil
	}
	return x.root.Lchown(name, h.Uid, h.Gid)
}

// finish sets modes and times of directories, innermost first.
func (x *extractor) finish() error {
	for i := len(x.dirs) - 1; i >= 0; i-- {
		d := x.dirs[i]
		if err := x.root.Chmod(d.name, d.mode&(fs.ModePerm|setID|fs.ModeSticky)); err != nil {
			return err
		}
		if err := x.root.Chtimes(d.name, d.time, d.time); err != nil {
			return err
		}
	}
	return nil
}

// CopyFile writes the data of the one file that an archive holds.
func CopyFile(w io.Writer, r io.Reader) error {
	tr := tar.NewReader(r)
	h, err := tr.Next()
	if err != nil {
		return fmt.Errorf("cannot read the archive: %w", err)
	}
	if h.Typeflag != tar.TypeReg {
		return errors.New("only a file can be copied there")
	}
	_, err = io.Copy(w, tr)
	return err
}
