package osimage

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/squashfs"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
)

// The root of VM mode is a disk of two partitions: the root, and the programs of a start, which
// are stored as they are (ADR 57). The table is that of PCs; shim/first.c mounts both. The image
// has the disk packed, the host unpacks it once (internal/vm).
const (
	sector       = 512
	partAlign    = 4096
	partsTable   = 446
	partsMark    = 510
	partTypeUnix = 0x83
)

// quickPrograms are in the second partition; the root has a place for each.
var quickPrograms = []struct{ name, part string }{{"cloudos-init", partInit}, {"servind", partEngine}}

func isQuick(path string) bool {
	return slices.ContainsFunc(quickPrograms, func(p struct{ name, part string }) bool { return path == "bin/"+p.name })
}

// firstModules are the chains of modules that shim/first.c loads, side by side.
var firstModules = [][]string{{"virtio_pci", "virtio_blk"}, {"squashfs"}}

// addFirst makes a VM's initial file system start with the first stage.
func addFirst(t *tree.Tree, o Options, k *kernel.Kernel, picked []*kernel.Module) error {
	if _, err := t.File("init", 0o755, partInit, filepath.Join(o.Programs, "servin-shim")); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	var b strings.Builder
	for _, chain := range firstModules {
		for i, p := range kernel.Chain(picked, chain...) {
			if i > 0 {
				b.WriteByte(' ')
			}
			b.WriteString("/" + moduleFolder(k) + p)
		}
		b.WriteByte('\n')
	}
	for _, p := range quickPrograms {
		parts, err := startParts(filepath.Join(o.Programs, p.name))
		if err != nil {
			return err
		}
		for _, x := range parts {
			fmt.Fprintf(&b, "@/system/bin/%s %d %d\n", p.name, x.Offset, x.Size)
		}
	}
	t.Bytes("first", 0o644, partInit, []byte(b.String()))
	return nil
}

type part struct{ Offset, Size uint64 }

// startParts are the parts of a Go program's file that its start needs: its data, then code and
// constants up to the tables for stacks, a third of the file, which it hardly touches.
func startParts(path string) ([]part, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the program %s: %w", path, err)
	}
	defer f.Close()
	tables := f.Section(".gopclntab")
	data := f.Section(".noptrdata")
	if tables == nil || data == nil || tables.Offset == 0 || data.Offset < tables.Offset {
		return nil, fmt.Errorf("cannot read the program %s: its sections are not those of a Go program", path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	behind := tables.Offset + tables.FileSize
	return []part{{behind, uint64(info.Size()) - behind}, {0, tables.Offset}}, nil
}

// writeParts writes the disk.
func (s *system) writeParts(o Options, f *os.File) error {
	s.quickTree = tree.New()
	for _, p := range quickPrograms {
		if _, err := s.quickTree.File(p.name, 0o755, p.part, filepath.Join(o.Programs, p.name)); err != nil {
			return fmt.Errorf("%w (make build)", err)
		}
		s.rootTree.Bytes("bin/"+p.name, 0o755, p.part, nil)
	}
	if _, err := f.Write(make([]byte, partAlign)); err != nil {
		return err
	}
	var err error
	if s.rootUsage, err = squashfs.Write(f, s.rootTree, epoch); err != nil {
		return err
	}
	middle, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if s.quickUsage, err = squashfs.WriteStored(f, s.quickTree, epoch); err != nil {
		return err
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(partitionTable([][2]int64{{partAlign, middle}, {middle, end}}), 0); err != nil {
		return err
	}
	return s.packParts(f, middle, end)
}

// packParts packs the disk's two partitions each for itself, which tells what each takes.
func (s *system) packParts(f *os.File, middle, end int64) error {
	for _, p := range [][2]int64{{0, middle}, {middle, end}} {
		b := make([]byte, p[1]-p[0])
		if _, err := f.ReadAt(b, p[0]); err != nil {
			return err
		}
		packed, err := packSmall(b)
		if err != nil {
			return err
		}
		s.packedRoot = append(s.packedRoot, packed)
	}
	// A program's share is by its size.
	all, packed := int64(0), int64(len(s.packedRoot[1]))
	for _, e := range s.quickTree.Sorted() {
		all += e.Size
	}
	for _, e := range s.quickTree.Sorted() {
		s.quickUsage[e.Path] = e.Size * packed / max(all, 1)
	}
	return nil
}

// partitionTable is a disk's first sector, for partitions from a byte to another.
func partitionTable(parts [][2]int64) []byte {
	b := make([]byte, sector)
	le := binary.LittleEndian
	for i, p := range parts {
		e := b[partsTable+16*i:]
		copy(e[1:], "\xfe\xff\xff") // cylinders, heads and sectors say nothing any more
		e[4] = partTypeUnix
		copy(e[5:], "\xfe\xff\xff")
		le.PutUint32(e[8:], uint32(p[0]/sector))
		le.PutUint32(e[12:], uint32((p[1]-p[0])/sector))
	}
	copy(b[partsMark:], "\x55\xaa")
	return b
}
