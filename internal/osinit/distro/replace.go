package distro

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Bounds of an image.
const (
	maxPacked   = 1 << 30
	maxUnpacked = 4 << 30
	maxEntries  = 100_000
)

// Replace puts the image with the digest, a packed tar, in the place of what is there: whole, or not at all. What
// is kept stays.
func (d Distribution) Replace(digest string, r io.Reader) error {
	if !isDigest(digest) {
		return fmt.Errorf("%q is no digest of an image", digest)
	}
	l, err := d.lock()
	if err != nil {
		return err
	}
	defer l.Close()
	used, err := d.current()
	if err != nil {
		return err
	}
	slot := other(used)
	place := d.path(vmwire.DistributionSlots, slot)
	if err := os.RemoveAll(place); err != nil {
		return fmt.Errorf("cannot remove older programs: %w", err)
	}
	if err := os.Mkdir(place, 0o755); err != nil {
		return err
	}
	sum := sha256.New()
	bounded := io.LimitReader(r, maxPacked)
	if err := unpack(io.TeeReader(bounded, sum), place); err != nil {
		return errors.Join(fmt.Errorf("cannot unpack the programs: %w", err), os.RemoveAll(place))
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != digest {
		return errors.Join(fmt.Errorf("the programs were damaged on their way: their SHA-256 is %s instead of %s", got, digest), os.RemoveAll(place))
	}
	if err := d.mark(slot, digest); err != nil {
		return err
	}
	if err := syncAll(place); err != nil {
		return err
	}
	// From here on they are those that are used.
	link := d.path(vmwire.DistributionSystem)
	if err := os.Remove(link + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(filepath.Join(vmwire.DistributionSlots, slot), link+".new"); err != nil {
		return err
	}
	if err := os.Rename(link+".new", link); err != nil {
		return err
	}
	if err := durable.SyncDir(d.path()); err != nil {
		return err
	}
	return d.settings(slot)
}

func (d Distribution) mark(slot, digest string) error {
	return durable.WriteFile(d.path(vmwire.DistributionSlots, slot, marker), []byte(digest+"\n"), 0o644, durable.Everything)
}

// settings makes what WSL reads that of the slot's image; it holds at the distribution's next start.
func (d Distribution) settings(slot string) error {
	from := d.path(vmwire.DistributionSlots, slot, "distribution/etc")
	names, err := os.ReadDir(from)
	if err != nil {
		return fmt.Errorf("cannot read the distribution's settings: %w", err)
	}
	for _, n := range names {
		want, err := os.ReadFile(filepath.Join(from, n.Name()))
		if err != nil {
			return err
		}
		to := d.path("etc", n.Name())
		if have, err := os.ReadFile(to); err == nil && bytes.Equal(have, want) {
			continue
		}
		if err := durable.WriteFile(to, want, 0o644, durable.Everything); err != nil {
			return err
		}
	}
	return nil
}

// sweep removes what an older image left.
func (d Distribution) sweep() error {
	used, err := d.current()
	if err != nil {
		return err
	}
	return os.RemoveAll(d.path(vmwire.DistributionSlots, other(used)))
}

func syncAll(place string) error {
	f, err := os.Open(place)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("cannot write the programs to the disk: %w", err)
	}
	return nil
}

// unpack unpacks what of an image's tar is in its slot into place, and reads the tar to its end.
func unpack(r io.Reader, place string) error {
	z, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	if err := unpackTar(io.LimitReader(z, maxUnpacked), place); err != nil {
		return err
	}
	// The digest is of all that came.
	if _, err := io.Copy(io.Discard, io.LimitReader(z, maxUnpacked)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

func unpackTar(r io.Reader, place string) error {
	root, err := os.OpenRoot(place)
	if err != nil {
		return err
	}
	defer root.Close()
	in := tar.NewReader(r)
	left := int64(maxUnpacked)
	prefix := vmwire.DistributionSlots + "/" + vmwire.DistributionFirst + "/"
	found := false
	for n := 0; ; n++ {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if n > maxEntries {
			return fmt.Errorf("it holds more than %d files", maxEntries)
		}
		name, ok := strings.CutPrefix(h.Name, prefix)
		if name = strings.TrimSuffix(name, "/"); !ok || name == "" {
			continue
		}
		found = true
		if left -= h.Size; left < 0 { // the holes of a sparse file are no bytes of the tar
			return fmt.Errorf("it holds more than %d bytes", int64(maxUnpacked))
		}
		if err := put(root, name, h, in); err != nil {
			return err
		}
	}
	if !found {
		return errors.New("it is no image of a distribution")
	}
	return nil
}

func put(root *os.Root, name string, h *tar.Header, r io.Reader) error {
	if !fs.ValidPath(name) {
		return fmt.Errorf("%q is no name in an image", name)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.Mkdir(name, fs.FileMode(h.Mode).Perm()); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return nil
	case tar.TypeSymlink:
		return root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(h.Mode).Perm())
		if err != nil {
			return err
		}
		if _, err := io.Copy(f, r); err != nil {
			f.Close()
			return err
		}
		return f.Close()
	}
	return fmt.Errorf("%q is no file, folder or link", name)
}
