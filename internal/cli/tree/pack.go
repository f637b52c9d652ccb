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
)

// Pack writes the file or directory at src as a tar stream in which it is called
// name; "." stands for what is in a directory.
func Pack(w io.Writer, src, name string, warn func(string)) error {
	p := &packer{tw: tar.NewWriter(w), warn: warn, links: map[inode]string{}}
	if err := p.add(src, name); err != nil {
		return err
	}
	return p.tw.Close()
}

// PackAll is Pack with extended attributes (capabilities of programs, access
// lists, user attributes), as far as the system tells them.
func PackAll(w io.Writer, src, name string, warn func(string)) error {
	p := &packer{tw: tar.NewWriter(w), warn: warn, links: map[inode]string{}, attrs: true}
	if err := p.add(src, name); err != nil {
		return err
	}
	return p.tw.Close()
}

type packer struct {
	tw    *tar.Writer
	warn  func(string)
	links map[inode]string
	attrs bool
}

// complete adds to a header what PackAll has and Pack has not.
func (p *packer) complete(src string, h *tar.Header) error {
	if !p.attrs {
		return nil
	}
	attrs, err := xattrs(src)
	if err != nil {
		return fmt.Errorf("cannot read the attributes of %s: %w", src, err)
	}
	for k, v := range attrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	return nil
}

func (p *packer) add(src, name string) error {
	fi, err := os.Lstat(src)
	if err != nil {
		return err
	}
	switch {
	case fi.Mode()&fs.ModeSocket != 0:
		if p.warn != nil {
			p.warn("left out " + src + ": it is a socket")
		}
		return nil
	case fi.IsDir():
		return p.dir(src, name, fi)
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(src)
		if err != nil {
			return err
		}
		h, err := header(fi, filepath.ToSlash(target), name)
		if err != nil {
			return err
		}
		return p.tw.WriteHeader(h)
	case fi.Mode().IsRegular():
		return p.file(src, name, fi)
	}
	h, err := header(fi, "", name)
	if err != nil {
		return err
	}
	return p.tw.WriteHeader(h)
}

func header(fi fs.FileInfo, link, name string) (*tar.Header, error) {
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return nil, err
	}
	h.Name = name
	if fi.IsDir() {
		h.Name += "/"
	}
	// Names of the host's users mean nothing in the container.
	h.Uname, h.Gname = "", ""
	h.Format = tar.FormatPAX
	return h, nil
}

func (p *packer) dir(src, name string, fi fs.FileInfo) error {
	h, err := header(fi, "", name)
	if err != nil {
		return err
	}
	if err := p.complete(src, h); err != nil {
		return err
	}
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	list, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	for _, e := range list {
		err := p.add(filepath.Join(src, e.Name()), path.Join(name, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went away meanwhile
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) file(src, name string, fi fs.FileInfo) error {
	h, err := header(fi, "", name)
	if err != nil {
		return err
	}
	if err := p.complete(src, h); err != nil {
		return err
	}
	if id, many := inodeOf(fi); many {
		if first, ok := p.links[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return p.tw.WriteHeader(h)
		}
		p.links[id] = name
	}
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	// A file that grows meanwhile is cut, one that shrinks is an error.
	n, err := io.Copy(p.tw, io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		err = fmt.Errorf("%s became shorter while it was read", src)
	}
	return err
}
