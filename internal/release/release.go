// Package release is what a system is installed and upgraded from: a *release*, the
// parts of one system (kernel, initial file system, root, boot loaders) with a
// *manifest* that has the digest of every piece of every part, and an *envelope*
// that holds the manifest with signatures over it. A part is read piece by piece, and no
// piece is handed on before it is what the manifest says: what is written to a disk has been
// verified before. The builder of images makes releases, the first process takes
// them; docs/cloudos-install.md is the guide.
//
// The envelope is DSSE (github.com/secure-systems-lab/dsse, version 1), with ed25519.
package release

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

const (
	// FormatVersion is that of manifests and archives.
	FormatVersion = 1
	// Product is what releases are of.
	Product = "cloudos"
	// EnvelopeFile is the envelope's name in archives, beside images and on disks.
	EnvelopeFile = "release.json"
	// ChunkSize is the size of the pieces that have a digest each; the last may be shorter.
	ChunkSize = 1 << 20
	// MaxEnvelope bounds an envelope, in bytes.
	MaxEnvelope = 1 << 20

	maxParts = 16
	maxPart  = 1 << 30
)

// Use says where a part goes.
type Use string

// Uses of parts.
const (
	// Boot is a file of a slot's folder on the boot partition; Template is one in
	// which SlotMark stands for the slot.
	Boot     Use = "boot"
	Template Use = "template"
	// Root is the content of a slot's partition.
	Root Use = "root"
	// Unified is the one file of a slot's folder, a program that firmware starts and its owner signed; there is no
	// other boot loader then.
	Unified Use = "unified"
	// BIOS is what a BIOS starts, the first sector of a disk and the content of the partition
	// for it; ESP is the boot partition with the boot loaders, packed with zstd, and Base what it
	// was packed against: the dictionary, of BaseLimit bytes at most. Only an installation takes
	// these; they come first, Base before ESP.
	BIOS Use = "bios"
	Base Use = "base"
	ESP  Use = "esp"
)

// BaseLimit is the most that a Base has; BaseID is its number as a dictionary.
const (
	BaseLimit = 8 << 20
	BaseID    = 1
)

// Loader tells whether only installations take what is for it.
func (u Use) Loader() bool { return u == BIOS || u == Base || u == ESP }

// SlotMark stands for the slot in a Template.
const SlotMark = "@slot@"

// Platforms of a system.
const (
	Metal = "metal" // the drivers of real machines, and those of clouds
	Cloud = "cloud" // virtual machines alone
)

// Manifest describes a release.
type Manifest struct {
	FormatVersion int    `json:"formatVersion"`
	Product       string `json:"product"`
	Version       string `json:"version"`
	Arch          string `json:"arch"`
	// Platform is metal or cloud.
	Platform string `json:"platform"`
	// Kernel is the kernel's version, as in uname -r.
	Kernel string `json:"kernel"`
	// Parts are in the order of an archive.
	Parts []Part `json:"parts"`
}

// Part is one file of a release.
type Part struct {
	Name string `json:"name"`
	Use  Use    `json:"use"`
	Size int64  `json:"size"`
	// SHA256 is the whole part's digest, Chunks those of its pieces, in hex.
	SHA256 string   `json:"sha256"`
	Chunks []string `json:"chunks"`
}

var (
	// Names on a FAT file system have 8 and 3 characters.
	partName = pattern.New(`^[a-z0-9_-]{1,8}(\.[a-z0-9_-]{1,3})?$`)
	version  = pattern.New(`^[0-9A-Za-z][0-9A-Za-z.+_~-]{0,99}$`)
	digest   = pattern.New(`^[0-9a-f]{64}$`)
)

// NewPart describes what r holds.
func NewPart(name string, use Use, r io.Reader) (Part, error) {
	p := Part{Name: name, Use: use}
	whole, b := sha256.New(), make([]byte, ChunkSize)
	for {
		n, err := io.ReadFull(r, b)
		if n > 0 {
			whole.Write(b[:n])
			sum := sha256.Sum256(b[:n])
			p.Chunks = append(p.Chunks, hex.EncodeToString(sum[:]))
			p.Size += int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			p.SHA256 = hex.EncodeToString(whole.Sum(nil))
			return p, nil
		}
		if err != nil {
			return p, err
		}
	}
}

// Encode returns the manifest's bytes.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	return json.Marshal(m)
}

// parse reads a manifest strictly.
func parse(b []byte) (*Manifest, error) {
	m := new(Manifest)
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(m); err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the manifest: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Invalid, "cannot read the manifest: something follows it")
	}
	return m, m.check()
}

func (m *Manifest) check() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "cannot use the manifest: "+format, args...)
	}
	switch {
	case m.FormatVersion != FormatVersion:
		return bad("its format is %d, and this system reads %d", m.FormatVersion, FormatVersion)
	case m.Product != Product:
		return bad("it is of %q", m.Product)
	case !version.MatchString(m.Version):
		return bad("%q is no version", m.Version)
	case m.Arch != "amd64" && m.Arch != "arm64":
		return bad("its architecture is %q", m.Arch)
	case m.Platform != Metal && m.Platform != Cloud:
		return bad("its platform is %q", m.Platform)
	case len(m.Kernel) > 100:
		return bad("its kernel's version is too long")
	case len(m.Parts) > maxParts:
		return bad("it has %d parts", len(m.Parts))
	}
	names, uses := map[string]bool{}, map[Use]int{}
	for _, p := range m.Parts {
		switch {
		case !partName.MatchString(p.Name) || p.Name == EnvelopeFile || p.Name == "release.jsn":
			return bad("%q is no part's name", p.Name)
		case names[p.Name]:
			return bad("the part %s is there twice", p.Name)
		case !slices.Contains([]Use{Boot, Template, Root, Unified, BIOS, Base, ESP}, p.Use):
			return bad("the part %s is for %q", p.Name, p.Use)
		case p.Size <= 0 || p.Size > maxPart:
			return bad("the part %s has %d bytes", p.Name, p.Size)
		case p.Use == Base && (p.Size > BaseLimit || uses[ESP] > 0):
			return bad("the part %s has %d bytes, or comes after what was packed against it", p.Name, p.Size)
		case p.Use == Template && p.Size > 64<<10:
			return bad("the template %s has %d bytes", p.Name, p.Size)
		case int64(len(p.Chunks)) != (p.Size+ChunkSize-1)/ChunkSize || !digest.MatchString(p.SHA256):
			return bad("the part %s lacks digests", p.Name)
		}
		for _, c := range p.Chunks {
			if !digest.MatchString(c) {
				return bad("the part %s has a digest that is none", p.Name)
			}
		}
		if p.Use.Loader() && uses[Root]+uses[Boot]+uses[Template]+uses[Unified] > 0 {
			return bad("the part %s comes too late: boot loaders are first", p.Name)
		}
		names[p.Name] = true
		uses[p.Use]++
	}
	loaded := uses[Boot] + uses[Template]
	if uses[Root] != 1 || uses[BIOS] > 1 || uses[Base] > 1 || uses[ESP] > 1 || loaded == 0 && uses[Unified] == 0 {
		return bad("it needs one root and something to boot")
	}
	if uses[Unified] > 1 || uses[Unified] == 1 && loaded+uses[BIOS]+uses[Base]+uses[ESP] > 0 {
		return bad("a unified image is all that is started")
	}
	return nil
}

// Part returns the part for a use, or nil.
func (m *Manifest) Part(use Use) *Part {
	for i := range m.Parts {
		if m.Parts[i].Use == use {
			return &m.Parts[i]
		}
	}
	return nil
}

// InFolder tells whether the part is a file of a slot's folder, as it is.
func (p *Part) InFolder() bool { return p.Use == Boot || p.Use == Unified }

// Size is that of all parts, in bytes.
func (m *Manifest) Size() (n int64) {
	for _, p := range m.Parts {
		n += p.Size
	}
	return n
}

// Copy hands r's content to each, piece by piece, every piece after it was found to be
// the manifest's. r must end where the part does. buf has ChunkSize bytes.
func (p *Part) Copy(r io.Reader, buf []byte, each func(piece []byte, at int64) error) error {
	var at int64
	for i, want := range p.Chunks {
		piece := buf[:min(ChunkSize, p.Size-at)]
		if _, err := io.ReadFull(r, piece); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return fault.New(fault.Invalid, "the part %s ends after %d of %d bytes", p.Name, at, p.Size)
			}
			return fmt.Errorf("cannot read the part %s: %w", p.Name, err)
		}
		sum := sha256.Sum256(piece)
		if hex.EncodeToString(sum[:]) != want {
			return fault.New(fault.Forbidden, "the part %s is not what was signed: piece %d of %d differs", p.Name, i+1, len(p.Chunks))
		}
		if err := each(piece, at); err != nil {
			return err
		}
		at += int64(len(piece))
	}
	if n, err := r.Read(buf[:1]); n > 0 || err == nil {
		return fault.New(fault.Invalid, "the part %s is longer than its manifest says", p.Name)
	}
	return nil
}
