// Package tree holds the files of an image before they are written: a sorted
// list of entries with fixed owners and no times of its own, so that the same
// entries become the same bytes. The writers of file systems import it.
package tree

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// Entry is a file, folder, symbolic link or device.
type Entry struct {
	// Path is relative, slash-separated and clean: "etc/passwd". The root is ".".
	Path string
	// Mode holds the type and permission bits.
	Mode fs.FileMode
	// Link is a symbolic link's target.
	Link string
	// Major and Minor are a device's numbers.
	Major, Minor uint32
	// Size is a regular file's; Part says which part of the image it belongs to.
	Size int64
	Part string
	// Store asks not to compress it: it is read while the machine starts.
	Store bool

	data []byte
	file string
}

// Open opens a regular file's content.
func (e *Entry) Open() (io.ReadCloser, error) {
	if e.file != "" {
		return os.Open(e.file)
	}
	return io.NopCloser(bytes.NewReader(e.data)), nil
}

// Tree is a set of entries by path.
type Tree struct {
	entries map[string]*Entry
}

// New returns a tree with nothing but its root.
func New() *Tree {
	t := &Tree{entries: map[string]*Entry{}}
	t.entries["."] = &Entry{Path: ".", Mode: fs.ModeDir | 0o755}
	return t
}

func (t *Tree) add(e *Entry) *Entry {
	e.Path = path.Clean(strings.TrimPrefix(e.Path, "/"))
	if !fs.ValidPath(e.Path) {
		panic(fmt.Sprintf("osimage: %q is no path of a tree", e.Path))
	}
	t.parents(e.Path)
	t.entries[e.Path] = e
	return e
}

func (t *Tree) parents(p string) {
	for d := path.Dir(p); d != "."; d = path.Dir(d) {
		if _, ok := t.entries[d]; !ok {
			t.entries[d] = &Entry{Path: d, Mode: fs.ModeDir | 0o755}
		}
	}
}

// Dir adds a folder.
func (t *Tree) Dir(p string, perm fs.FileMode) {
	t.add(&Entry{Path: p, Mode: fs.ModeDir | perm})
}

// Bytes adds a file with the content.
func (t *Tree) Bytes(p string, perm fs.FileMode, part string, data []byte) *Entry {
	return t.add(&Entry{Path: p, Mode: perm, Size: int64(len(data)), Part: part, data: data})
}

// File adds a file with the content of the file at from.
func (t *Tree) File(p string, perm fs.FileMode, part, from string) (*Entry, error) {
	st, err := os.Stat(from)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", from)
	}
	return t.add(&Entry{Path: p, Mode: perm, Size: st.Size(), Part: part, file: from}), nil
}

// Symlink adds a symbolic link.
func (t *Tree) Symlink(p, to string) {
	t.add(&Entry{Path: p, Mode: fs.ModeSymlink | 0o777, Link: to})
}

// Device adds a character device.
func (t *Tree) Device(p string, perm fs.FileMode, major, minor uint32) {
	t.add(&Entry{Path: p, Mode: fs.ModeDevice | fs.ModeCharDevice | perm, Major: major, Minor: minor})
}

// Graft adds all entries of another tree below a folder.
func (t *Tree) Graft(dir string, other *Tree) error {
	for _, e := range other.Sorted() {
		moved := *e
		moved.Path = path.Join(dir, e.Path)
		if old := t.entries[moved.Path]; old != nil && !(old.Mode.IsDir() && e.Mode.IsDir()) {
			return fmt.Errorf("osimage: %s is there already", moved.Path)
		}
		t.add(&moved)
	}
	return nil
}

// Get returns the entry at p, or nil.
func (t *Tree) Get(p string) *Entry { return t.entries[p] }

// Sorted returns all entries, folders before what is in them, the root first.
func (t *Tree) Sorted() []*Entry {
	out := make([]*Entry, 0, len(t.entries))
	for _, e := range t.entries {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b *Entry) int { return compare(a.Path, b.Path) })
	return out
}

// compare orders paths component by component.
func compare(a, b string) int {
	if a == "." || b == "." {
		return strings.Compare(strings.TrimPrefix(a, "."), strings.TrimPrefix(b, "."))
	}
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
}
