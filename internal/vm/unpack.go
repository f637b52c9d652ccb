package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

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
			if err := Unpack(*path, digest, to); err != nil {
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
	list, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cannot remove what an older image was unpacked to: %w", err)
	}
	for _, e := range list {
		name := strings.TrimPrefix(e.Name(), ".") // durable's temporary files
		if !strings.HasPrefix(name, role+"-") || !strings.Contains(name, ".img") {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove what an older image was unpacked to: %w", err)
		}
	}
	return nil
}

// Unpack writes what a packed file of an image, of a SHA-256 in hexadecimal, holds to another file: whole, or not at all. It
// takes its content as it unpacks it, whatever was there when the image was checked.
func Unpack(packed, digest, to string) error {
	f, err := os.Open(packed)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	d, err := zstd.NewReader(io.TeeReader(f, h), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return err
	}
	defer d.Close()
	err = durable.Replace(to, 0o600, durable.Content, func(w *os.File) error {
		n, err := io.Copy(w, io.LimitReader(d, maxRoot+1))
		if err == nil && n > maxRoot {
			err = fault.New(fault.Invalid, "it holds more than %d bytes", maxRoot)
		}
		if err != nil {
			return err
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != strings.ToLower(digest) { // it was read to its end
			return fault.New(fault.Invalid, "it is damaged, or was replaced meanwhile: its SHA-256 is %s instead of %s", got, digest)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot unpack %s: %w", packed, err)
	}
	return nil
}
