package vm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// SignatureFile is the envelope of an image's description, beside it.
const SignatureFile = "image.sig.json"

// signed checks the description of an image against its envelope: with trusted keys, one of them must have
// signed it. Without any, an envelope that is there has to be of this description all the same.
func signed(dir string, description []byte, trusted []release.Key) error {
	f, err := os.Open(filepath.Join(dir, SignatureFile))
	if errors.Is(err, fs.ErrNotExist) {
		if len(trusted) > 0 {
			return fault.New(fault.Forbidden, "it is not signed (it has no %s), and keys that have to sign images are configured", SignatureFile)
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, release.MaxEnvelope+1))
	if err != nil {
		return err
	}
	var want []byte
	if len(trusted) > 0 {
		want, _, err = release.SignedImage(b, trusted)
	} else {
		want, err = release.ImageIn(b)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", SignatureFile, err)
	}
	if !bytes.Equal(want, description) {
		return fault.New(fault.Forbidden, "its %s is not what %s is of", vmwire.Manifest, SignatureFile)
	}
	return nil
}
