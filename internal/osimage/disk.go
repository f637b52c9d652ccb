package osimage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osimage/cpio"
	"github.com/cloudos-io/cloudos/internal/osimage/fat"
	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/qcow2"
	"github.com/cloudos-io/cloudos/internal/osimage/squashfs"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/osimage/verity"
	"github.com/cloudos-io/cloudos/internal/osimage/xz"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// The partitions of a disk, in MiB.
const (
	mib      = 1 << 20
	biosSize = slots.BIOSSize
	espSize  = slots.ESPSize
	slotSize = slots.SlotSize
)

// initialWindow of the initial file system packed with xz: the kernel takes that much more memory while it unpacks.
const initialWindow = 8 * mib

// system is what all formats are made of.
type system struct {
	kind         kernel.Kind
	kernel       *kernel.Kernel
	initrd       []byte
	root         string // a file
	rootUsage    squashfs.Usage
	initialTree  *tree.Tree
	rootTree     *tree.Tree
	rootFileSize int64
	quickTree    *tree.Tree // VM mode: the programs of a start, beside the root
	packedRoot   [][]byte   // VM mode: the disk with both, packed
	packedKernel []byte     // VM mode: a kernel that does not unpack itself, packed
	quickUsage   squashfs.Usage
	verity       verity.Root // of disks
}

// makeSystem makes kernel, initial file system and root; the caller removes root.
func makeSystem(ctx context.Context, o Options, apt *kernel.Apt, kind kernel.Kind, initial, modules []string) (*system, error) {
	k, err := kernel.Get(ctx, apt, kind, o.Arch, o.KernelPackage)
	if err != nil {
		return nil, err
	}
	o.Log("kernel %s from %s", k.Version, k.Package)
	initial, modules = modulesFor(o.Arch, kind, initial, modules)
	s := &system{kind: kind, kernel: k}
	if s.initialTree, err = initialRoot(o, k, initial); err != nil {
		return nil, err
	}
	var small *xz.Packer // real machines start from discs, sticks and networks; clouds and VM mode from disks
	if kind == kernel.Metal {
		if small, err = xz.New(o.Arch, filepath.Join(o.Cache, "packed")); err != nil {
			return nil, err
		}
	}
	pack := packSmall
	switch {
	case o.Format == "vm":
		pack = packQuick
	case small != nil:
		pack = func(b []byte) ([]byte, error) { return small.Pack(ctx, b, true, initialWindow) }
	}
	if s.initrd, err = packInitial(s.initialTree, pack); err != nil {
		return nil, err
	}
	if o.Format != "vm" {
		modules = append(slices.Clip(modules), trustModules...)
	}
	if s.rootTree, err = systemRoot(ctx, o, apt, k, modules); err != nil {
		return nil, err
	}
	if err := addTrust(s.rootTree, o, kind); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(o.Output, ".root-")
	if err != nil {
		return nil, err
	}
	s.root = f.Name()
	switch {
	case o.Format == "vm":
		err = s.writeParts(o, f)
	case small != nil:
		o.Log("packing the root with xz: what was not packed before takes a while")
		s.rootUsage, err = squashfs.WriteSmall(f, s.rootTree, epoch, func(b []byte, code bool, window int) ([]byte, error) { return small.Pack(ctx, b, code, window) })
	default:
		s.rootUsage, err = squashfs.Write(f, s.rootTree, epoch)
	}
	if err == nil && (o.Format == "disk" || o.Format == "release" || o.Format == "iso") {
		err = s.appendTree(f)
	}
	if err == nil {
		s.rootFileSize, err = f.Seek(0, io.SeekEnd)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		os.Remove(s.root)
		return nil, err
	}
	return s, nil
}

// packInitial packs the initial file system. Zeros fill it up to where another may follow.
func packInitial(t *tree.Tree, pack func([]byte) ([]byte, error)) ([]byte, error) {
	var b bytes.Buffer
	if err := cpio.Write(&b, t); err != nil {
		return nil, err
	}
	out, err := pack(b.Bytes())
	return append(out, make([]byte, (512-len(out)%512)%512)...), err
}

// packSmall makes a third of it.
func packSmall(b []byte) ([]byte, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(8<<20), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	return enc.EncodeAll(b, nil), nil
}

// packQuick makes a bit more of it, which an emulated processor unpacks with a quarter of the
// instructions. The format is the one of "lz4 -l", which kernels take.
func packQuick(b []byte) ([]byte, error) {
	var out bytes.Buffer
	w := lz4.NewWriter(&out)
	err := w.Apply(lz4.LegacyOption(true), lz4.CompressionLevelOption(lz4.Level9), lz4.ConcurrencyOption(1))
	if err == nil {
		_, err = w.Write(b)
	}
	err = errors.Join(err, w.Close())
	return out.Bytes(), err
}

func (s *system) describe(o Options) *vmwire.Image {
	return &vmwire.Image{
		FormatVersion: vmwire.FormatVersion, Format: o.Format, Version: o.Version, Arch: o.Arch,
		Kernel: s.kernel.Version, KernelPackage: s.kernel.Package, Config: string(o.Config), Files: map[string]vmwire.File{},
	}
}

// diskCommandLine starts a system on a disk with both consoles.
func diskCommandLine(arch string) string {
	serial := "ttyS0"
	if arch == "arm64" {
		serial = "ttyAMA0"
	}
	return "console=tty0 console=" + serial + " quiet loglevel=4 panic=10 random.trust_cpu=on rdinit=/init cloudos.data=partlabel=cloudos-data"
}

// bootPartition is the tree of the partition that firmware boots from, with slot a.
func bootPartition(ctx context.Context, o Options, apt *kernel.Apt, s *system) (*tree.Tree, error) {
	t, err := efiTree(ctx, o, apt, slots.Script())
	if err != nil {
		return nil, err
	}
	dir := slots.Folder("a")
	t.Bytes(dir+"/kernel", 0o644, partKernel, s.kernel.Image)
	t.Bytes(dir+"/initrd", 0o644, partInit, s.initrd)
	t.Bytes(dir+"/boot.cfg", 0o644, partSettings, []byte(BootScript("a", o.Arch, join(s.words(), o.Words))))
	block, err := slots.State{Good: "a"}.Block()
	if err != nil {
		return nil, err
	}
	t.Bytes(slots.BlockFile, 0o644, partSettings, block)
	p, err := s.payload(ctx, o, apt, false, nil)
	if err != nil {
		return nil, err
	}
	t.Dir(slots.Folder("b"), 0o755)
	t.Bytes(dir+"/"+release.RawName("boot.cfg"), 0o644, partSettings, p.content["boot.cfg"])
	t.Bytes(dir+"/"+slots.SealedFile, 0o644, partSettings, p.sealed)
	return t, nil
}

// BootScript is a slot's boot.cfg: words are added to the kernel's command line. It says from which boot partition
// the system was started, since another disk may have partitions of the same names.
func BootScript(slot, arch, words string) string {
	line := diskCommandLine(arch) + inVM(arch) + " cloudos.slot=" + slot + " cloudos.root=partlabel=" + slots.Partition(slot) + " cloudos.esp=$esp"
	if words != "" {
		line += " " + words
	}
	dir := "($root)/" + slots.Folder(slot)
	return fmt.Sprintf("set esp=\nprobe --set=esp --part-uuid $root\nlinux %s/kernel %s\ninitrd %s/initrd\n", dir, line, dir)
}

// efiTree holds Debian's signed boot loaders with a configuration.
func efiTree(ctx context.Context, o Options, apt *kernel.Apt, script string) (*tree.Tree, error) {
	l := loaders[o.Arch]
	t := tree.New()
	for _, x := range []struct{ name, pkg, file string }{
		{"EFI/BOOT/" + l.bootName, l.shimPackage, l.shim}, {"EFI/BOOT/" + l.grubName, l.grubPackage, l.grub},
	} {
		b, err := fromPackage(ctx, apt, x.pkg, x.file)
		if err != nil {
			return nil, err
		}
		t.Bytes(x.name, 0o644, partLoader, b)
	}
	t.Bytes("EFI/DEBIAN/GRUB.CFG", 0o644, partLoader, []byte(script))
	return t, nil
}

func buildDisk(ctx context.Context, o Options) (*vmwire.Image, error) {
	apt := &kernel.Apt{Cache: o.Cache, Arch: o.Arch, Log: o.Log}
	s, err := makeSystem(ctx, o, apt, kernel.Cloud, diskModules, cloudModules)
	if err != nil {
		return nil, err
	}
	defer os.Remove(s.root)
	if s.rootFileSize > slotSize*mib {
		return nil, fault.New(fault.Exhausted, "the root of %d MiB does not fit into a slot of %d", s.rootFileSize>>20, slotSize)
	}
	partition := bootPartition
	if o.Owner != nil {
		partition = ownersPartition
	}
	esp, err := partition(ctx, o, apt, s)
	if err != nil {
		return nil, err
	}
	id := identity("disk", o.Version, o.Arch, s.kernel.Package, digest(s.initrd))
	boot, err := fat.Image(esp, espSize*mib, "CLOUDOS", binary.LittleEndian.Uint32(id[:]))
	if err != nil {
		return nil, err
	}
	table, sectors := layout(id)
	img := s.describe(o)
	img.CommandLine, img.Verity = diskCommandLine(o.Arch), s.verity.String()
	raw := filepath.Join(o.Output, "disk.raw")
	write := func(f *os.File) error {
		if err := f.Truncate(int64(sectors * gpt.Sector)); err != nil {
			return err
		}
		if o.Arch == "amd64" && o.Owner == nil { // a BIOS checks nothing
			if err := writeBIOS(ctx, apt, f, table); err != nil {
				return err
			}
		}
		if err := table.Write(f, sectors); err != nil {
			return err
		}
		if err := sparse(f, bytes.NewReader(boot), table.Partitions[1].First); err != nil {
			return err
		}
		r, err := os.Open(s.root)
		if err != nil {
			return err
		}
		defer r.Close()
		return sparse(f, r, table.Partitions[2].First)
	}
	if err := s.contents(o); err != nil {
		return nil, err
	}
	if o.DiskFormat != "qcow2" {
		return img, finish(img, o, "disk", "disk.raw", "raw", write)
	}
	if err := durable.Replace(raw, 0o644, durable.Content, write); err != nil {
		return nil, err
	}
	defer os.Remove(raw)
	return img, finish(img, o, "disk", "disk.qcow2", "qcow2", func(f *os.File) error {
		r, err := os.Open(raw)
		if err != nil {
			return err
		}
		defer r.Close()
		return qcow2.Write(f, r, int64(sectors*gpt.Sector))
	})
}

// layout is a disk's partition table, and how many sectors the disk has.
func layout(id gpt.GUID) (*gpt.Table, uint64) {
	return slots.Layout(id, func(name string) gpt.GUID { return identity(string(id[:]), name) })
}

// writeBIOS writes what a BIOS starts: code in the first sector, and GRUB's core
// in a partition of its own.
func writeBIOS(ctx context.Context, apt *kernel.Apt, f io.WriterAt, t *gpt.Table) error {
	core, files, err := grubBIOS(ctx, apt, "i386-pc", "(,gpt2)/EFI/debian", "boot.img")
	if err != nil {
		return err
	}
	if len(core) > biosSize*mib {
		return fault.New(fault.Internal, "the boot loader for BIOS has %d bytes, more than its partition", len(core))
	}
	at := t.Partitions[0].First
	if err := linkBIOS(files["boot.img"], core, at); err != nil {
		return err
	}
	if _, err := f.WriteAt(core, int64(at*gpt.Sector)); err != nil {
		return err
	}
	_, err = f.WriteAt(files["boot.img"][:bootCode], 0)
	return err
}

// sparse copies r to a sector of f, leaving out what is zero.
func sparse(f io.WriterAt, r io.Reader, sector uint64) error {
	b, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(sector * gpt.Sector); ; {
		n, err := io.ReadFull(r, b)
		if n > 0 && !bytes.Equal(b[:n], zero[:n]) {
			if _, werr := f.WriteAt(b[:n], at); werr != nil {
				return werr
			}
		}
		at += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
