package data

import (
	"bytes"
	"crypto/rand"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/luks"
)

// template is an empty ext4 of templateSize: scripts/ext4-template made it.
//
//go:embed ext4.zst
var template []byte

const (
	blockSize    = 4096
	templateSize = 1 << 30
	// The superblock is in the first block, behind room for a boot sector, where
	// mark stands while a disk is being prepared.
	superAt = 1024
	mark    = "cloudos: this disk is being prepared\n"
)

// used are the template's blocks that the file system takes for its own, and so
// must be zero where the template has none: from, and how many. The first is tables of inodes, bitmaps
// and a few folders, the last the journal, the others room for tables of groups.
var used = [][2]int64{{1, 4248}, {32768, 129}, {98304, 129}, {163840, 129}, {229376, 129}, {131072, 16384}}

// zeroUsed is for devices on which zeros are not cheap, as encrypted ones.
func zeroUsed(dev *os.File) error {
	zero := make([]byte, 1<<20)
	for _, u := range used {
		for at, end := u[0]*blockSize, (u[0]+u[1])*blockSize; at < end; {
			n, err := dev.WriteAt(zero[:min(int64(len(zero)), end-at)], at)
			if err != nil {
				return err
			}
			at += int64(n)
		}
	}
	return nil
}

// zeroHole makes the template's part of a device read as zeros. Where it can, the device (a
// file of a host, say) gives the space back instead of keeping a gigabyte of zeros.
func zeroHole(dev *os.File) error {
	err := unix.Fallocate(int(dev.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, blockSize, templateSize-blockSize)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for _, u := range used {
		if err := discard(dev, 0x127f /* BLKZEROOUT */, uint64(u[0]*blockSize), uint64(u[1]*blockSize)); errors.Is(err, unix.ENOTTY) {
			return zeroUsed(dev)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// format puts an empty file system on the device: everything but its first block, then that. One that
// was killed in between leaves mark, and is done again.
// scrambled says that what was never written does not read as zeros.
func format(dev *os.File, size uint64, scrambled bool) error {
	if size < templateSize {
		return fmt.Errorf("the disk has %d MiB: at least %d are needed", size>>20, templateSize>>20)
	}
	first := make([]byte, blockSize)
	copy(first, mark)
	if _, err := dev.WriteAt(first, 0); err != nil {
		return err
	}
	if err := dev.Sync(); err != nil {
		return err
	}
	// What an earlier owner left is not to be taken for a journal. Devices that can,
	// do this at once.
	if err := discard(dev, 0x1277 /* BLKDISCARD */, blockSize, size-blockSize); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) {
		return fmt.Errorf("cannot discard: %w", err)
	}
	if scrambled {
		if err := zeroUsed(dev); err != nil {
			return fmt.Errorf("cannot write zeros: %w", err)
		}
	} else if err := zeroHole(dev); err != nil {
		return fmt.Errorf("cannot write zeros: %w", err)
	}
	z, err := zstd.NewReader(bytes.NewReader(template), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer z.Close()
	record := make([]byte, 4+blockSize)
	for {
		if _, err := io.ReadFull(z, record); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("cannot read the template: %w", err)
		}
		n, block := binary.LittleEndian.Uint32(record), record[4:]
		if n == 0 {
			copy(first, block)
			continue
		}
		if _, err := dev.WriteAt(block, int64(n)*blockSize); err != nil {
			return err
		}
	}
	if err := identify(first[superAt : superAt+1024]); err != nil {
		return err
	}
	if err := dev.Sync(); err != nil {
		return err
	}
	if _, err := dev.WriteAt(first, 0); err != nil {
		return err
	}
	return dev.Sync()
}

// identify gives a superblock a random UUID and seed of hashes. Checksums elsewhere
// are seeded by a field of their own (metadata_csum_seed), so they stay right.
func identify(super []byte) error {
	if _, err := rand.Read(super[0x68:0x78]); err != nil {
		return err
	}
	super[0x68+6] = super[0x68+6]&0x0f | 0x40
	super[0x68+8] = super[0x68+8]&0x3f | 0x80
	if _, err := rand.Read(super[0xec:0xfc]); err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(super[0x3fc:], checksum(super[:0x3fc]))
	return nil
}

// checksum is ext4's: crc32c that begins with all ones and is not inverted.
func checksum(b []byte) uint32 {
	return ^crc32.Update(0, crc32.MakeTable(crc32.Castagnoli), b) & math.MaxUint32
}

// content tells what a device holds.
type content int

const (
	empty content = iota
	ours
	unfinished
	foreign
	encrypted
)

// inspect looks at a device's first blocks.
func inspect(dev *os.File) (content, error) {
	b := make([]byte, 1<<20)
	n, err := dev.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return foreign, err
	}
	b = b[:n]
	if bytes.HasPrefix(b, []byte(mark)) {
		return unfinished, nil
	}
	if len(bytes.TrimLeft(b, "\x00")) == 0 {
		return empty, nil
	}
	if luks.Is(b) {
		return encrypted, nil
	}
	if len(b) >= superAt+1024 {
		super := b[superAt:]
		label := string(bytes.TrimRight(super[0x78:0x88], "\x00"))
		if binary.LittleEndian.Uint16(super[0x38:]) == 0xef53 && label == Label {
			return ours, nil
		}
	}
	return foreign, nil
}
