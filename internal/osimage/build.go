// Package osimage builds images of the operating system: the same kernel, initial
// file system and read-only root in the shapes that machines start from. It needs
// no privileges, and the same inputs give the same bytes: nothing in an image depends on
// when, where or by whom it was built. The program cloudos-image imports it.
//
// Inputs are Debian's kernel package (package kernel), Debian's CA certificates and
// our programs from a folder. docs/cloudos-image.md is the guide.
package osimage

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osimage/cpio"
	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Options say what to build.
type Options struct {
	// Arch is amd64 or arm64; Format vm, wsl, disk, iso, netboot or release; DiskFormat raw or qcow2.
	Arch, Format, DiskFormat string
	// Words are added to the kernel's command line of disk, iso and release.
	Words string
	// Output is a folder, made if it is missing.
	Output string
	// Programs is the folder with our programs for Arch.
	Programs string
	// Version is that of the programs.
	Version string
	// Cache is a folder for packages.
	Cache string
	// KernelPackage is the file of a kernel's package; empty is Debian's newest.
	KernelPackage string
	// Config is the machine's configuration that the image carries (package
	// osinit/config); empty is none.
	Config []byte
	// Owner signs what firmware starts, of the formats disk and release; nil is Debian's signed chain.
	Owner *Owner
	// Sign are the keys that sign the image; it trusts them, and Trust.
	Sign  []ed25519.PrivateKey
	Trust []release.Key
	// Platform of a release: metal (default) or cloud.
	Platform string
	// Log takes progress.
	Log func(format string, args ...any)
}

// epoch is the time of everything in an image: 2024-01-01, seconds since 1970.
// Later than 1980, for FAT's sake, and before any real clock.
const epoch = 1704067200

// Build builds an image.
func Build(ctx context.Context, o Options) (*vmwire.Image, error) {
	if o.Arch != "amd64" && o.Arch != "arm64" {
		return nil, fault.New(fault.Invalid, "cannot build an image for %q: it is amd64 or arm64", o.Arch)
	}
	if len(o.Config) > 0 {
		if _, err := config.Parse(o.Config); err != nil {
			return nil, fault.New(fault.Invalid, "cannot put the configuration into the image: %w", err)
		}
	}
	var err error
	if o.Cache, err = filepath.Abs(o.Cache); err != nil { // apt takes it as below its root
		return nil, err
	}
	if err := os.MkdirAll(o.Output, 0o755); err != nil {
		return nil, err
	}
	if o.Owner != nil && o.Format != "disk" && o.Format != "release" {
		return nil, fault.New(fault.Unsupported, "cannot sign an image of the format %q for Secure Boot: only disk and release are", o.Format)
	}
	if err := o.fit(); err != nil {
		return nil, err
	}
	switch o.Format {
	case "vm", "netboot":
		return buildParts(ctx, o)
	case "wsl":
		return buildDistribution(ctx, o)
	case "disk":
		return buildDisk(ctx, o)
	case "iso":
		return buildISO(ctx, o)
	case "release":
		return buildRelease(ctx, o)
	}
	return nil, fault.New(fault.Invalid, "cannot build an image of the format %q: it is vm, wsl, disk, iso, netboot or release", o.Format)
}

// fit refuses what would have no effect.
func (o *Options) fit() error {
	switch {
	case o.Words != "" && (o.Format == "vm" || o.Format == "wsl" || o.Format == "netboot"):
		return fault.New(fault.Invalid, "cannot add words to the command line of the format %s: whoever starts it gives the command line", o.Format)
	case o.DiskFormat != "" && o.DiskFormat != "raw" && o.DiskFormat != "qcow2":
		return fault.New(fault.Invalid, "cannot build a disk of the format %q: it is raw or qcow2", o.DiskFormat)
	case o.DiskFormat == "qcow2" && o.Format != "disk":
		return fault.New(fault.Invalid, "cannot build the format %s as qcow2: only disk is", o.Format)
	case o.KernelPackage != "" && o.Format == "wsl":
		return fault.New(fault.Invalid, "cannot put a kernel into the format wsl: there it is Microsoft's")
	case o.Platform != "" && o.Platform != string(kernel.Metal) && o.Format != "release":
		return fault.New(fault.Invalid, "cannot build the format %s for the platform %q: only a release is for one", o.Format, o.Platform)
	}
	return nil
}

// buildParts makes the formats whose files a boot loader outside takes: vm and netboot.
func buildParts(ctx context.Context, o Options) (*vmwire.Image, error) {
	apt := &kernel.Apt{Cache: o.Cache, Arch: o.Arch, Log: o.Log}
	kind, initial, modules := kernel.Cloud, append(rootModules, earlyModules...), vmModules()
	if o.Format == "netboot" {
		kind, initial, modules = kernel.Metal, isoModules, metalModules
	}
	s, err := makeSystem(ctx, o, apt, kind, initial, modules)
	if err != nil {
		return nil, err
	}
	defer os.Remove(s.root)
	if o.Format == "vm" && o.Arch == "arm64" { // kernels for it do not unpack themselves
		if s.packedKernel, err = packSmall(s.kernel.Image); err != nil {
			return nil, err
		}
	}
	if err := s.contents(o); err != nil {
		return nil, err
	}
	img := s.describe(o)
	img.CommandLine = commandLine(o.Arch) + inVM(o.Arch)
	name, format := "kernel", ""
	if s.packedKernel != nil {
		name, format = "kernel.zst", vmwire.Packed
	}
	if err := writeFile(img, o.Output, "kernel", name, format, func(f *os.File) error { _, err := f.Write(s.kernelFile()); return err }); err != nil {
		return nil, err
	}
	if o.Format == "netboot" {
		// The root comes with the initial file system, behind it.
		img.CommandLine = "console=tty0 " + commandLine(o.Arch) + " cloudos.root=initrd cloudos.data=partlabel=cloudos-data"
		return img, finish(img, o, "initrd", "initrd", "", func(f *os.File) error {
			t := tree.New()
			if _, err := t.File("root.img", 0o644, partEngine, s.root); err != nil {
				return err
			}
			if _, err := f.Write(s.initrd); err != nil {
				return err
			}
			return cpio.Write(f, t)
		})
	}
	if err := writeFile(img, o.Output, "initrd", "initrd", "", func(f *os.File) error { _, err := f.Write(s.initrd); return err }); err != nil {
		return nil, err
	}
	return img, finish(img, o, "root", "root.img.zst", vmwire.Packed, func(f *os.File) error {
		for _, b := range s.packedRoot {
			if _, err := f.Write(b); err != nil {
				return err
			}
		}
		return nil
	})
}

// finish writes the last file of an image and then its description.
func finish(img *vmwire.Image, o Options, role, name, format string, write func(*os.File) error) error {
	if err := writeFile(img, o.Output, role, name, format, write); err != nil {
		return err
	}
	b, err := json.MarshalIndent(img, "", "  ")
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if err := durable.WriteFile(filepath.Join(o.Output, vmwire.Manifest), b, 0o644, durable.Content); err != nil {
		return err
	}
	return sealImage(o, b)
}

// inVM are words for kernels in virtual machines: the check of the timer's interrupt
// takes a host that is busy for a broken board, and panics. The tests of the kernel's own ciphers
// hold up every start; they are for machines whose processor may be faulty, or that must certify.
func inVM(arch string) string {
	words := " cryptomgr.notests"
	if arch == "amd64" {
		words += " no_timer_check"
	}
	return words
}

func commandLine(arch string) string {
	console := "console=ttyS0"
	if arch == "arm64" {
		console = "console=ttyAMA0"
	}
	return console + " quiet loglevel=4 panic=10 random.trust_cpu=on rdinit=/init"
}

// writeFile writes one file of an image and notes it.
func writeFile(img *vmwire.Image, dir, role, name, format string, write func(*os.File) error) error {
	p := filepath.Join(dir, name)
	if err := durable.Replace(p, 0o644, durable.Content, write); err != nil {
		return fmt.Errorf("cannot write %s: %w", p, err)
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return err
	}
	img.Files[role] = vmwire.File{Name: name, Size: n, SHA256: hex.EncodeToString(h.Sum(nil)), Format: format}
	return nil
}

// index returns the index of modules.
func index(picked []*kernel.Module) ([]byte, error) {
	var b bytes.Buffer
	err := kernel.Index(&b, picked)
	return b.Bytes(), err
}
