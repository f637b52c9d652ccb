package osimage

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
)

// loaders are Debian's signed boot loaders for UEFI, by architecture.
var loaders = map[string]struct {
	shimPackage, shim, grubPackage, grub string
	bootName, grubName                   string
}{
	"amd64": {"shim-signed", "usr/lib/shim/shimx64.efi.signed", "grub-efi-amd64-signed", "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", "BOOTX64.EFI", "GRUBX64.EFI"},
	"arm64": {"shim-signed", "usr/lib/shim/shimaa64.efi.signed", "grub-efi-arm64-signed", "usr/lib/grub/arm64-efi-signed/grubaa64.efi.signed", "BOOTAA64.EFI", "GRUBAA64.EFI"},
}

// fromPackage returns a file of a package.
func fromPackage(ctx context.Context, apt *kernel.Apt, name, file string) ([]byte, error) {
	deb, err := apt.Download(ctx, name)
	if err != nil {
		return nil, err
	}
	var out []byte
	err = kernel.Files(ctx, deb, func(n string, _ int64, r io.Reader) error {
		if n != file {
			return nil
		}
		var err error
		out, err = io.ReadAll(r)
		return err
	})
	if err == nil && out == nil {
		err = fault.New(fault.NotFound, "the package %s has no %s", name, file)
	}
	return out, err
}

// biosModules are the parts of GRUB that starting needs.
var biosModules = []string{"biosdisk", "part_gpt", "fat", "iso9660", "linux", "normal", "configfile", "loadenv", "test", "echo", "minicmd", "probe", "reboot", "sleep", "search", "search_label"}

// grubBIOS makes GRUB's image for BIOS: of the format i386-pc for disks, or
// i386-pc-eltorito for ISO images. It also returns files of GRUB's folder that are asked for.
func grubBIOS(ctx context.Context, apt *kernel.Apt, format, prefix string, files ...string) ([]byte, map[string][]byte, error) {
	tool, err := exec.LookPath("grub-mkimage")
	if err != nil {
		return nil, nil, fault.New(fault.Unavailable, "cannot make the boot loader for BIOS: the program grub-mkimage is missing (Debian: apt-get install grub-common)")
	}
	deb, err := apt.Download(ctx, "grub-pc-bin")
	if err != nil {
		return nil, nil, err
	}
	dir, err := os.MkdirTemp("", "cloudos-grub-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	err = kernel.Files(ctx, deb, func(n string, _ int64, r io.Reader) error {
		rest, ok := strings.CutPrefix(n, "usr/lib/grub/i386-pc/")
		if !ok || strings.Contains(rest, "/") {
			return nil
		}
		b, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, rest), b, 0o644)
	})
	if err != nil {
		return nil, nil, err
	}
	out := filepath.Join(dir, "core.img")
	args := append([]string{"-d", dir, "-O", format, "-o", out, "-p", prefix}, biosModules...)
	if msg, err := exec.CommandContext(ctx, tool, args...).CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("cannot make the boot loader for BIOS: %w: %s", err, strings.TrimSpace(string(msg)))
	}
	core, err := os.ReadFile(out)
	if err != nil {
		return nil, nil, err
	}
	found := map[string][]byte{}
	for _, f := range files {
		if found[f], err = os.ReadFile(filepath.Join(dir, f)); err != nil {
			return nil, nil, err
		}
	}
	return core, found, nil
}

// Places in GRUB's images that say where the next part is (grub-core/boot/i386/pc of GRUB).
const (
	bootCode      = 440
	bootSector    = 0x5c // of boot.img: the sector of the core
	bootCheck     = 0x66 // of boot.img: a jump that trusts the BIOS's drive number
	coreBlockList = gpt.Sector - 12
)

// linkBIOS makes boot.img load the core at a sector, and the core load the rest of itself.
func linkBIOS(boot, core []byte, at uint64) error {
	if len(boot) < gpt.Sector || len(core) <= gpt.Sector {
		return errors.New("GRUB's images for BIOS are not what they were")
	}
	binary.LittleEndian.PutUint64(boot[bootSector:], at)
	boot[bootCheck], boot[bootCheck+1] = 0x90, 0x90
	binary.LittleEndian.PutUint64(core[coreBlockList:], at+1)
	binary.LittleEndian.PutUint16(core[coreBlockList+8:], uint16((len(core)-gpt.Sector+gpt.Sector-1)/gpt.Sector))
	return nil
}

// identity is an id that depends on nothing but what it is of.
func identity(parts ...string) (g gpt.GUID) {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	copy(g[:], sum[:])
	g[7] = g[7]&0x0f | 0x40
	g[8] = g[8]&0x3f | 0x80
	return g
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
