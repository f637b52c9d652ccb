package upgrade

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// Partition is the device of the boot partition.
func (b *Boot) Partition() (string, error) { return b.device() }

// tail is how much of a file is written last, after all else is on the disk: a file that has it is
// whole. In signed programs the signature is there, so that two with the same one are the same.
const tail = 4096

// SetDefault makes the file of the removable path, which has its folder for itself, a copy of a slot's
// unified image. While it is written it cannot be started: whoever calls this has an entry of the firmware's for
// the slot. Cut off, it is done again by the next call.
func (b *Boot) SetDefault(slot, path string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	same := false
	err := b.with(false, func(dir string) (err error) {
		same, err = equal(filepath.Join(dir, slots.Folder(slot), slots.UnifiedFile), filepath.Join(dir, path), tail)
		return err
	})
	if err != nil || same {
		return err
	}
	if err := b.sweep(filepath.Dir(path)); err != nil {
		return err
	}
	return b.with(true, func(dir string) error {
		from, to := filepath.Join(dir, slots.Folder(slot), slots.UnifiedFile), filepath.Join(dir, path)
		if err := copyFile(from, to); err != nil {
			return fmt.Errorf("cannot write %s: %w", path, err)
		}
		same, err := equal(from, to, 1<<62)
		if err == nil && !same {
			err = fmt.Errorf("cannot write %s: what was read back is something else", path)
		}
		return err
	})
}

// equal compares two files: their sizes, and so many bytes at their ends. A second one that is not there, or
// cannot be read, is another.
func equal(name, other string, last int64) (bool, error) {
	f, err := os.Open(name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	g, err := os.Open(other)
	if err != nil {
		return false, nil
	}
	defer g.Close()
	fs, err := f.Stat()
	if err != nil {
		return false, err
	}
	gs, err := g.Stat()
	if err != nil || gs.Size() != fs.Size() {
		return false, nil
	}
	a, b := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := max(0, fs.Size()-last); at < fs.Size(); at += int64(len(a)) {
		n := min(int64(len(a)), fs.Size()-at)
		if _, err := f.ReadAt(a[:n], at); err != nil {
			return false, err
		}
		if _, err := g.ReadAt(b[:n], at); err != nil || !bytes.Equal(a[:n], b[:n]) {
			return false, nil
		}
	}
	return true, nil
}

// copyFile copies a file into a folder where none of its name is to stay.
func copyFile(from, to string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	st, err := r.Stat()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	w, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer w.Close()
	for _, n := range []int64{max(0, st.Size()-tail), st.Size()} {
		at, err := w.Seek(0, io.SeekCurrent)
		if err == nil {
			_, err = io.CopyN(w, r, n-at)
		}
		if err == nil {
			err = w.Sync()
		}
		if err == nil {
			err = durable.SyncDir(filepath.Dir(to))
		}
		if err != nil {
			return err
		}
	}
	return w.Close()
}
