package osimage

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osimage/fat"
	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Files of the format release and beside every image.
const (
	releaseFile = "cloudos.release"
	// sealFile is the envelope of image.json.
	sealFile = "image.sig.json"
	// baseFile is the boot partition of an ISO image.
	baseFile = "efi.img"
)

// addTrust puts the keys into a root that the system there trusts, and what it was built for.
func addTrust(t *tree.Tree, o Options, kind kernel.Kind) error {
	keys := append([]release.Key{}, o.Trust...)
	for _, k := range o.Sign {
		keys = append(keys, release.Key{Public: k.Public().(ed25519.PublicKey)})
	}
	for _, k := range keys {
		b, err := release.EncodePublic(k.Public)
		if err != nil {
			return err
		}
		name := "etc/cloudos/keys/" + k.ID() + ".pub"
		if t.Get(name) == nil {
			t.Bytes(name, 0o644, partSettings, b)
		}
	}
	t.Bytes("etc/cloudos/platform", 0o644, partSettings, []byte(string(kind)+"\n"))
	return nil
}

// payload is a system as a release: its parts' content by name.
type payload struct {
	manifest *release.Manifest
	sealed   []byte
	content  map[string][]byte
	root     string // a file
}

// payload seals a system; loaders adds the parts that only installations need, packed against base, a boot
// partition with the same loaders that is there anyway, or nil.
func (s *system) payload(ctx context.Context, o Options, apt *kernel.Apt, loaders bool, base []byte) (*payload, error) {
	p := &payload{root: s.root, content: map[string][]byte{
		"kernel": s.kernel.Image, "initrd": s.initrd, "boot.cfg": []byte(BootScript(release.SlotMark, o.Arch, join(s.words(), o.Words))),
	}}
	p.manifest = &release.Manifest{
		FormatVersion: release.FormatVersion, Product: release.Product, Version: o.Version, Arch: o.Arch, Platform: string(s.kind), Kernel: s.kernel.Version,
	}
	type named struct {
		name string
		use  release.Use
	}
	list := []named{{"boot.cfg", release.Template}, {"kernel", release.Boot}, {"initrd", release.Boot}, {"root.img", release.Root}}
	if o.Owner != nil {
		u, err := ownersUnified(ctx, o, apt, s)
		if err != nil {
			return nil, err
		}
		p.content = map[string][]byte{slots.UnifiedFile: u}
		list = []named{{slots.UnifiedFile, release.Unified}, {"root.img", release.Root}}
	} else if loaders {
		var err error
		if p.content["esp.zst"], err = espPart(ctx, o, apt, base); err != nil {
			return nil, err
		}
		list = append([]named{{"esp.zst", release.ESP}}, list...)
		if base != nil {
			p.content[baseFile] = base
			list = append([]named{{baseFile, release.Base}}, list...)
		}
		if o.Arch == "amd64" {
			if p.content["bios.img"], err = biosPart(ctx, apt); err != nil {
				return nil, err
			}
			list = append([]named{{"bios.img", release.BIOS}}, list...)
		}
	}
	for _, x := range list {
		r, err := p.open(x.name)
		if err != nil {
			return nil, err
		}
		part, err := release.NewPart(x.name, x.use, r)
		r.Close()
		if err != nil {
			return nil, err
		}
		p.manifest.Parts = append(p.manifest.Parts, part)
	}
	var err error
	p.sealed, err = release.Seal(p.manifest, o.Sign...)
	return p, err
}

func (p *payload) open(name string) (io.ReadCloser, error) {
	if name == "root.img" {
		return os.Open(p.root)
	}
	return io.NopCloser(bytes.NewReader(p.content[name])), nil
}

// biosPart is what a BIOS starts: the first sector's code, filled up to a sector, and the
// boot loader's core for the first partition.
func biosPart(ctx context.Context, apt *kernel.Apt) ([]byte, error) {
	core, files, err := grubBIOS(ctx, apt, "i386-pc", "(,gpt2)/EFI/debian", "boot.img")
	if err != nil {
		return nil, err
	}
	t, _ := layout(gpt.GUID{})
	if len(core) > biosSize*mib {
		return nil, fault.New(fault.Internal, "the boot loader for BIOS has %d bytes, more than its partition", len(core))
	}
	if err := linkBIOS(files["boot.img"], core, t.Partitions[0].First); err != nil {
		return nil, err
	}
	return append(append(files["boot.img"][:bootCode:bootCode], make([]byte, gpt.Sector-bootCode)...), core...), nil
}

// espPart is a boot partition with the boot loaders and no system, packed against base.
func espPart(ctx context.Context, o Options, apt *kernel.Apt, base []byte) ([]byte, error) {
	t, err := efiTree(ctx, o, apt, slots.Script())
	if err != nil {
		return nil, err
	}
	block, err := slots.State{Good: "a"}.Block()
	if err != nil {
		return nil, err
	}
	t.Bytes(slots.BlockFile, 0o644, partSettings, block)
	for _, s := range []string{"a", "b"} {
		t.Dir(slots.Folder(s), 0o755)
	}
	id := identity("esp", o.Version, o.Arch)
	b, err := fat.Image(t, espSize*mib, "CLOUDOS", binary.LittleEndian.Uint32(id[:]))
	if err != nil {
		return nil, err
	}
	options := []zstd.EOption{zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8 << 20)}
	if base != nil {
		options = append(options, zstd.WithEncoderDictRaw(release.BaseID, base))
	}
	enc, err := zstd.NewWriter(nil, options...)
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	return enc.EncodeAll(b, nil), nil
}

// buildRelease makes an archive that systems are upgraded and installed from.
func buildRelease(ctx context.Context, o Options) (*vmwire.Image, error) {
	apt := &kernel.Apt{Cache: o.Cache, Arch: o.Arch, Log: o.Log}
	kind, initial, modules := kernel.Metal, isoModules, metalModules
	switch o.Platform {
	case "", string(kernel.Metal):
	case string(kernel.Cloud):
		kind, initial, modules = kernel.Cloud, diskModules, cloudModules
	default:
		return nil, fault.New(fault.Invalid, "cannot build for the platform %q: it is metal or cloud", o.Platform)
	}
	s, err := makeSystem(ctx, o, apt, kind, initial, modules)
	if err != nil {
		return nil, err
	}
	defer os.Remove(s.root)
	if s.rootFileSize > slotSize*mib {
		return nil, fault.New(fault.Exhausted, "the root of %d MiB does not fit into a slot of %d", s.rootFileSize>>20, slotSize)
	}
	p, err := s.payload(ctx, o, apt, true, nil)
	if err != nil {
		return nil, err
	}
	if err := s.contents(o); err != nil {
		return nil, err
	}
	img := s.describe(o)
	return img, finish(img, o, "release", releaseFile, "tar", func(f *os.File) error {
		return release.Pack(f, p.sealed, p.manifest, func(part *release.Part) (io.ReadCloser, error) { return p.open(part.Name) })
	})
}

// sealImage writes the envelope of an image's description.
func sealImage(o Options, description []byte) error {
	sealed, err := release.SealImage(description, o.Sign...)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(o.Output, sealFile), sealed, 0o644, durable.Content)
}

// Verify checks an image's folder, or a release's archive, against the keys, and returns the id
// of the key that signed it.
func Verify(path string, trusted []release.Key) (signer string, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", fault.New(fault.NotFound, "cannot verify the image: %w", err)
	}
	if !st.IsDir() {
		return verifyArchive(path, trusted)
	}
	sealed, err := os.ReadFile(filepath.Join(path, sealFile))
	if err != nil {
		return "", fault.New(fault.Forbidden, "cannot verify the image: %w", err)
	}
	description, signer, err := release.SignedImage(sealed, trusted)
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(filepath.Join(path, vmwire.Manifest))
	if err != nil {
		return "", err
	}
	if !bytes.Equal(b, description) {
		return "", fault.New(fault.Forbidden, "%s is not what was signed", vmwire.Manifest)
	}
	if _, err := Inspect(path); err != nil {
		return "", err
	}
	return signer, nil
}

func verifyArchive(path string, trusted []release.Key) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	a, err := release.ReadArchive(f)
	if err != nil {
		return "", err
	}
	m, signer, err := release.Signed(a.Envelope(), trusted)
	if err != nil {
		return "", err
	}
	buf := make([]byte, release.ChunkSize)
	for i := range m.Parts {
		r, err := a.Open(&m.Parts[i])
		if err != nil {
			return "", err
		}
		if err := m.Parts[i].Copy(r, buf, func([]byte, int64) error { return nil }); err != nil {
			return "", err
		}
	}
	if err := a.End(); err != nil {
		return "", fmt.Errorf("cannot verify the release: %w", err)
	}
	return signer, nil
}
