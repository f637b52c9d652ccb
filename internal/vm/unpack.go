package vm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	// maxRoot bounds an unpacked root, in bytes.
	maxRoot = 2 << 30
	// maxWindow bounds what unpacking keeps in memory, in bytes.
	maxWindow = 64 << 20
)

// Unpack makes a packed kernel and root ready in dir, where they stay for later starts, and has
// the image name them. What was unpacked there of other images is removed.
func (i *Image) Unpack(dir string) error {
	for role, path := range map[string]*string{"kernel": &i.Kernel, "root": &i.Root} {
		digest := i.packed[role]
		if digest == "" {
			continue
		}
		to := filepath.Join(dir, role+"-"+digest[:32]+".img")
		if _, err := os.Stat(to); errors.Is(err, fs.ErrNotExist) {
			if err := forget(dir, role); err != nil {
				return err
			}
			if err := Unpack(*path, to); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		*path = to
	}
	return nil
}

// forget removes what was unpacked in dir, with what a process left that was killed there.
func forget(dir, role string) error {
	old, err := filepath.Glob(filepath.Join(dir, "*"+role+"-*.img*"))
	if err != nil {
		return err
	}
	for _, p := range old {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove what an older image was unpacked to: %w", err)
		}
	}
	return nil
}

// Unpack writes what a packed file of an image holds to another file: whole, or not at all.
func Unpack(packed, to string) error {
	f, err := os.Open(packed)
	if err != nil {
		return err
	}
	defer f.Close()
	d, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return err
	}
	defer d.Close()
	err = durable.Replace(to, 0o600, durable.Content, func(w *os.File) error {
		n, err := io.Copy(w, io.LimitReader(d, maxRoot+1))
		if err == nil && n > maxRoot {
			err = fault.New(fault.Invalid, "it holds more than %d bytes", maxRoot)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot unpack %s: %w", packed, err)
	}
	return nil
}
