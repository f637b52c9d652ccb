// Package layout reads one image out of the tar stream of an OCI layout, as the
// engine saves it, into a directory. What the stream says is believed of nothing:
// every blob is checked against its digest, names are never paths, numbers and
// sizes are bounded. Stages use it inside the sandbox.
package layout

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	maxIndex   = 4 << 20
	maxEntries = 10_000
	maxNesting = 3
	maxLayers  = 500
)

// Budget counts what is written.
type Budget interface{ Take(n int64) error }

// Read keeps an image of the stream in dir. Its layers, unpacked, are counted
// against the budget too.
func Read(r io.Reader, dir string, b Budget) (v1.Image, error) {
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o700); err != nil {
		return nil, err
	}
	index, err := spool(r, blobs, b)
	if err != nil {
		return nil, err
	}
	for name, text := range map[string]string{"oci-layout": `{"imageLayoutVersion":"1.0.0"}`, "index.json": string(index)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	p, err := layout.FromPath(dir)
	if err != nil {
		return nil, bad("cannot read the image: %w", err)
	}
	ii, err := p.ImageIndex()
	if err != nil {
		return nil, bad("cannot read the image's index: %w", err)
	}
	img, err := choose(ii, 0)
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, bad("cannot read the image's manifest: %w", err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, bad("cannot read the image's configuration: %w", err)
	}
	if len(m.Layers) > maxLayers || len(cf.RootFS.DiffIDs) != len(m.Layers) {
		return nil, bad("the image has %d layers and %d names for them; %d at most are read", len(m.Layers), len(cf.RootFS.DiffIDs), maxLayers)
	}
	return image{img, b}, nil
}

func bad(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }

// spool writes the blobs of the stream and gives its index.
func spool(r io.Reader, blobs string, b Budget) ([]byte, error) {
	tr := tar.NewReader(r)
	var index []byte
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, bad("cannot read the saved image: %w", err)
		}
		if n >= maxEntries {
			return nil, bad("the saved image has more than %d files", maxEntries)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		name := path.Clean(h.Name)
		if name == "index.json" {
			if index, err = io.ReadAll(io.LimitReader(tr, maxIndex+1)); err != nil || len(index) > maxIndex {
				return nil, bad("cannot read the index of the saved image: it is torn or larger than %d bytes", maxIndex)
			}
			continue
		}
		sum, ok := strings.CutPrefix(name, "blobs/sha256/")
		if raw, err := hex.DecodeString(sum); !ok || err != nil || len(raw) != sha256.Size || sum != strings.ToLower(sum) {
			continue
		}
		if err := blob(tr, filepath.Join(blobs, sum), sum, h.Size, b); err != nil {
			return nil, err
		}
	}
	if index == nil {
		return nil, bad("the saved image has no index: it is no OCI layout")
	}
	// The end of a tar is padding that some writers have and others do not.
	_, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	return index, err
}

func blob(r io.Reader, file, sum string, size int64, b Budget) error {
	if err := b.Take(size); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return bad("the saved image has blob %s twice", sum)
	}
	if err != nil {
		return err
	}
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(f, h), r)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot read blob %s: %w", sum, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != sum {
		return bad("the saved image has other bytes than blob %s says", sum)
	}
	return nil
}

// choose takes the first image of an index that is no attestation.
func choose(ii v1.ImageIndex, depth int) (v1.Image, error) {
	if depth > maxNesting {
		return nil, bad("the image's indexes are nested more than %d deep", maxNesting)
	}
	m, err := ii.IndexManifest()
	if err != nil {
		return nil, bad("cannot read the image's index: %w", err)
	}
	for _, d := range m.Manifests {
		if d.Annotations["vnd.docker.reference.type"] != "" {
			continue
		}
		switch d.MediaType {
		case types.OCIImageIndex, types.DockerManifestList:
			sub, err := ii.ImageIndex(d.Digest)
			if err != nil {
				continue // of a platform that was not saved
			}
			if img, err := choose(sub, depth+1); err == nil {
				return img, nil
			}
		case types.OCIManifestSchema1, types.DockerManifestSchema2:
			img, err := ii.Image(d.Digest)
			if err != nil {
				continue
			}
			if _, err := img.RawConfigFile(); err == nil {
				return img, nil
			}
		}
	}
	return nil, bad("the saved image holds no image of a platform")
}

// image bounds what the layers of an image unpack to.
type image struct {
	v1.Image
	b Budget
}

func (i image) Layers() ([]v1.Layer, error) {
	list, err := i.Image.Layers()
	for n := range list {
		list[n] = layer{list[n], i.b}
	}
	return list, err
}

type layer struct {
	v1.Layer
	b Budget
}

func (l layer) Uncompressed() (io.ReadCloser, error) {
	rc, err := l.Layer.Uncompressed()
	if err != nil {
		return nil, err
	}
	return &counted{rc, l.b}, nil
}

type counted struct {
	io.ReadCloser
	b Budget
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if n > 0 {
		if e := c.b.Take(int64(n)); e != nil {
			return 0, e
		}
	}
	return n, err
}
