package osimage

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/cloudos-io/cloudos/internal/osimage/squashfs"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
)

// The root of VM mode is a disk of two partitions: the root, and the engine's program,
// which each start unpacks whole (ADR 56). The table is that of PCs.
const (
	sector       = 512
	partAlign    = 4096
	partsTable   = 446
	partsMark    = 510
	partTypeUnix = 0x83
	// enginePlace is where the root has a place for the engine's program.
	enginePlace = "bin/servind"
)

// writeParts writes the disk.
func (s *system) writeParts(o Options, f *os.File) error {
	s.quickTree = tree.New()
	if _, err := s.quickTree.File("servind", 0o755, partEngine, filepath.Join(o.Programs, "servind")); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	s.rootTree.Bytes(enginePlace, 0o755, partEngine, nil)
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
	if s.quickUsage, err = squashfs.WriteQuick(f, s.quickTree, epoch); err != nil {
		return err
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(partitionTable([][2]int64{{partAlign, middle}, {middle, end}}), 0)
	return err
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
