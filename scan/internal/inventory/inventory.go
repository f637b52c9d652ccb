// Package inventory finds out what is installed in an image, with syft, and writes
// it down. An *inventory* is a bill of materials (SBOM); syft's own JSON is the form
// that is kept and read again. Stages use it inside the sandbox.
package inventory

import (
	"context"
	"fmt"
	"io"

	"github.com/anchore/stereoscope/pkg/file"
	"github.com/anchore/stereoscope/pkg/image"
	"github.com/anchore/syft/syft"
	"github.com/anchore/syft/syft/cataloging"
	"github.com/anchore/syft/syft/cataloging/filecataloging"
	sfile "github.com/anchore/syft/syft/file"
	"github.com/anchore/syft/syft/format/cyclonedxjson"
	"github.com/anchore/syft/syft/format/spdxjson"
	"github.com/anchore/syft/syft/format/syftjson"
	"github.com/anchore/syft/syft/sbom"
	"github.com/anchore/syft/syft/source/stereoscopesource"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// without are the catalogers of syft's for images that are left out: machine-learning
// models, app bundles, snaps and kernels are not what a container's image is scanned for.
var without = []string{
	"gguf-cataloger", "safetensors-cataloger", "apple-app-bundle-cataloger", "homebrew-cataloger", "snap-cataloger", "linux-kernel-cataloger",
}

// Options of Take.
type Options struct {
	Name    string // of the image
	Version string // of this program
}

// Take makes the inventory of an image and writes it as syft's JSON.
func Take(ctx context.Context, img v1.Image, o Options, w io.Writer) error {
	gen := file.NewTempDirGenerator("image")
	cache, err := gen.NewDirectory("layers")
	if err != nil {
		return err
	}
	d, err := img.Digest()
	if err != nil {
		return fault.As(fault.Invalid, fmt.Errorf("cannot read the manifest of the image: %w", err))
	}
	i := image.New(img, gen, cache, image.WithTags(o.Name), image.WithManifestDigest(d.String()))
	if err := i.Read(ctx); err != nil {
		return fault.As(fault.Invalid, fmt.Errorf("cannot read the layers of the image: %w", err))
	}
	src := stereoscopesource.New(i, stereoscopesource.ImageConfig{Reference: o.Name})
	cfg := syft.DefaultCreateSBOMConfig().
		WithTool("servin-scan", o.Version).
		WithParallelism(2).
		WithFilesConfig(filecataloging.DefaultConfig().WithSelection(sfile.NoFilesSelection)).
		WithCatalogerSelection(cataloging.NewSelectionRequest().WithDefaults("image").WithRemovals(without...))
	s, err := syft.CreateSBOM(ctx, src, cfg)
	if err != nil {
		return fault.As(fault.Invalid, fmt.Errorf("cannot find out what is in the image: %w", err))
	}
	// What was asked for is not of interest to who reads the result.
	s.Descriptor.Configuration = nil
	return syftjson.NewFormatEncoder().Encode(w, *s)
}

// Formats are the forms that Convert writes.
var Formats = []string{"table", "spdx-json", "cyclonedx-json", "syft-json"}

// Convert writes an inventory in another form.
func Convert(r io.ReadSeeker, format string, w io.Writer) error {
	s, err := Read(r)
	if err != nil {
		return err
	}
	var e sbom.FormatEncoder
	switch format {
	case "table":
		return table(s, w)
	case "syft-json":
		e = syftjson.NewFormatEncoder()
	case "spdx-json":
		e, err = spdxjson.NewFormatEncoderWithConfig(spdxjson.DefaultEncoderConfig())
	case "cyclonedx-json":
		e, err = cyclonedxjson.NewFormatEncoderWithConfig(cyclonedxjson.DefaultEncoderConfig())
	default:
		return fault.New(fault.Invalid, "cannot write format %q: choose one of %v", format, Formats)
	}
	if err != nil {
		return err
	}
	return e.Encode(w, *s)
}

// Read reads an inventory.
func Read(r io.ReadSeeker) (*sbom.SBOM, error) {
	s, _, _, err := syftjson.NewFormatDecoder().Decode(r)
	if err != nil {
		return nil, fault.As(fault.Invalid, fmt.Errorf("cannot read the inventory: %w", err))
	}
	return s, nil
}
