// Package verity makes the tree of hashes by which the kernel's dm-verity checks
// a read-only device while it is read: the format 1 of cryptsetup's veritysetup, with SHA-256,
// blocks of 4096 bytes and no salt, so that equal data have equal trees. The tree
// stands behind the data, after a block with the parameters that veritysetup reads; the machine
// takes them from its command line alone. The builder of images imports it.
package verity

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Block is the size of blocks of data and of hashes, in bytes.
const Block = 4096

const fanout = Block / sha256.Size

// Root says how to check a device.
type Root struct {
	Hash   [sha256.Size]byte
	Blocks uint64 // of data; the tree begins one block behind them
}

// String is the word for the command line: HASH,BLOCKS.
func (r Root) String() string { return fmt.Sprintf("%s,%d", hex.EncodeToString(r.Hash[:]), r.Blocks) }

// Append reads data, a multiple of Block long, and writes the tree to w. id is the
// tree's identity.
func Append(w io.Writer, data io.Reader, id [16]byte) (Root, error) {
	fail := func(err error) (Root, error) {
		return Root{}, fmt.Errorf("cannot make the tree of hashes: %w", err)
	}
	var levels [][]byte // the lowest first
	var hashes []byte
	b := make([]byte, Block)
	for {
		_, err := io.ReadFull(data, b)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fail(err)
		}
		sum := sha256.Sum256(b)
		hashes = append(hashes, sum[:]...)
	}
	blocks := uint64(len(hashes) / sha256.Size)
	if blocks < 2 {
		return fail(errors.New("there are too few data"))
	}
	for {
		n := (len(hashes) + Block - 1) / Block
		level := make([]byte, n*Block)
		copy(level, hashes)
		levels = append(levels, level)
		if n == 1 {
			break
		}
		hashes = make([]byte, 0, n*sha256.Size)
		for at := 0; at < len(level); at += Block {
			sum := sha256.Sum256(level[at : at+Block])
			hashes = append(hashes, sum[:]...)
		}
	}
	if _, err := w.Write(super(blocks, id)); err != nil {
		return fail(err)
	}
	for i := len(levels) - 1; i >= 0; i-- {
		if _, err := w.Write(levels[i]); err != nil {
			return fail(err)
		}
	}
	return Root{Hash: sha256.Sum256(levels[len(levels)-1]), Blocks: blocks}, nil
}

// super is the block with the parameters.
func super(blocks uint64, id [16]byte) []byte {
	b := make([]byte, Block)
	copy(b, "verity\x00\x00")
	binary.LittleEndian.PutUint32(b[8:], 1)
	binary.LittleEndian.PutUint32(b[12:], 1)
	copy(b[16:], id[:])
	copy(b[32:], "sha256")
	binary.LittleEndian.PutUint32(b[64:], Block)
	binary.LittleEndian.PutUint32(b[68:], Block)
	binary.LittleEndian.PutUint64(b[72:], blocks)
	return b
}
