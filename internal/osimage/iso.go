package osimage

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osimage/fat"
	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// isoLabel is the volume's name, by which the first process finds it.
const isoLabel = "CLOUDOS"

// buildISO makes an image for discs and sticks that BIOS and UEFI start.
func buildISO(ctx context.Context, o Options) (*vmwire.Image, error) {
	tool, err := exec.LookPath("xorriso")
	if err != nil {
		return nil, fault.New(fault.Unavailable, "cannot make an ISO image: the program xorriso is missing (Debian: apt-get install xorriso)")
	}
	apt := &kernel.Apt{Cache: o.Cache, Arch: o.Arch, Log: o.Log}
	s, err := makeSystem(ctx, o, apt, kernel.Metal, isoModules, metalModules)
	if err != nil {
		return nil, err
	}
	defer os.Remove(s.root)
	img := s.describe(o)
	img.CommandLine = strings.Replace(diskCommandLine(o.Arch), " quiet", "", 1) + " quiet cloudos.menu=1 cloudos.root=iso=" + isoLabel
	if o.Words != "" {
		img.CommandLine += " " + o.Words
	}
	if err := s.contents(o); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Output, ".iso-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	boot := fmt.Sprintf("linux ($root)/cloudos/kernel %s\ninitrd ($root)/cloudos/initrd\nboot\n", img.CommandLine)
	// UEFI reads a FAT file system in the image; the rest is on the ISO itself.
	efi, err := efiTree(ctx, o, apt, "search --no-floppy --set=root --label "+isoLabel+"\nset timeout=0\n"+boot)
	if err != nil {
		return nil, err
	}
	id := identity("iso", o.Version, o.Arch, s.kernel.Package)
	part, err := fat.Image(efi, efiSize(efi), "CLOUDOSEFI", binary.LittleEndian.Uint32(id[:]))
	if err != nil {
		return nil, err
	}
	put := map[string][]byte{"cloudos/kernel": s.kernel.Image, "cloudos/initrd": s.initrd, "boot/grub/grub.cfg": []byte("set timeout=0\n" + boot)}
	p, err := s.payload(ctx, o, apt, true, part) // what the system is installed from
	if err != nil {
		return nil, err
	}
	put["cloudos/"+release.EnvelopeFile] = p.sealed
	for _, name := range []string{"boot.cfg", "bios.img", baseFile, "esp.zst"} {
		if b := p.content[name]; b != nil {
			put["cloudos/"+name] = b
		}
	}
	args := []string{
		"-as", "mkisofs", "-quiet", "-R", "-V", isoLabel, "-o", "",
	}
	if o.Arch == "amd64" {
		core, files, err := grubBIOS(ctx, apt, "i386-pc-eltorito", "/boot/grub", "boot_hybrid.img")
		if err != nil {
			return nil, err
		}
		put["boot/bios.img"] = core
		hybrid := filepath.Join(dir, "hybrid")
		if err := os.WriteFile(hybrid, files["boot_hybrid.img"], 0o644); err != nil {
			return nil, err
		}
		args = append(args, "-b", "boot/bios.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "--grub2-boot-info", "--grub2-mbr", hybrid, "-eltorito-alt-boot")
	}
	args = append(args, "-e", "cloudos/"+baseFile, "-no-emul-boot", "-isohybrid-gpt-basdat")
	base := filepath.Join(dir, "files")
	t := tree.New()
	for name, b := range put {
		t.Bytes(name, 0o644, partKernel, b)
	}
	for _, e := range t.Sorted() {
		p := filepath.Join(base, e.Path)
		if e.Mode.IsDir() {
			err = os.Mkdir(p, 0o755)
		} else {
			err = os.WriteFile(p, put[e.Path], 0o644)
		}
		if err == nil {
			err = fixTime(p)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := os.Link(s.root, filepath.Join(base, "cloudos/root.img")); err != nil {
		return nil, err
	}
	if err := os.Chmod(s.root, 0o644); err != nil {
		return nil, err
	}
	for _, p := range []string{s.root, filepath.Join(base, "cloudos"), filepath.Join(base, "boot/grub"), filepath.Join(base, "boot"), base} {
		if err := fixTime(p); err != nil {
			return nil, err
		}
	}
	return img, finish(img, o, "iso", "cloudos.iso", "iso9660", func(f *os.File) error {
		args[7] = f.Name()
		cmd := exec.CommandContext(ctx, tool, append(args, "-r", base)...)
		cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch), "LC_ALL=C", "TZ=UTC")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("xorriso: %w: %s", err, strings.TrimSpace(string(out)))
		}
		return nil
	})
}

// efiSize is that of a file system which just holds a tree of a few files.
func efiSize(t *tree.Tree) int64 {
	const step, tables = 64 << 10, 128 << 10 // the tables, folders, and what clusters leave
	size := int64(tables)
	for _, e := range t.Sorted() {
		size += e.Size
	}
	return max((size+step-1)/step*step, 4*mib) // FAT16 has a least number of clusters
}

// fixTime gives a file the time of everything in an image.
func fixTime(p string) error {
	return os.Chtimes(p, time.Unix(epoch, 0), time.Unix(epoch, 0))
}
