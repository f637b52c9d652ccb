// Package qcow2 writes disk images in QEMU's format (docs/interop/qcow2.rst of
// QEMU), version 3: clusters of 64 KiB, those of zeros left out, the others
// compressed where that makes them smaller, and those with the same content once. The same disk gives the same bytes.
package qcow2

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	bits    = 16
	cluster = 1 << bits
	perL2   = cluster / 8
	perRef  = cluster / 2 // refcounts of 16 bits

	// Of entries in the second tables: the only one of its cluster; compressed. Bits 0 to
	// 61-(bits-8) of a compressed one's are the place, those above how many further sectors.
	aloneFlag  = 1 << 63
	packedFlag = 1 << 62
	shift      = 62 - (bits - 8)
)

// Write writes the disk of size bytes that r reads to w.
func Write(w io.WriterAt, r io.ReaderAt, size int64) error {
	count := (size + cluster - 1) / cluster
	tables := (count + perL2 - 1) / perL2
	l1Clusters := (tables*8 + cluster - 1) / cluster
	// The header, the first-level table and its seconds come first; data follow, packed; refcounts end it.
	l1 := int64(cluster)
	l2 := l1 + l1Clusters*cluster
	at := l2 + tables*cluster
	refs := map[int64]uint16{}
	for c := int64(0); c < at/cluster; c++ {
		refs[c] = 1
	}
	be := binary.BigEndian
	first := make([]byte, l1Clusters*cluster)
	second := make([]byte, tables*cluster)
	for i := range tables {
		be.PutUint64(first[i*8:], uint64(l2+i*cluster)|1<<63)
	}
	var packed bytes.Buffer
	z, err := flate.NewWriter(&packed, flate.BestCompression)
	if err != nil {
		return err
	}
	raw, zero := make([]byte, cluster), make([]byte, cluster)
	known := map[[sha256.Size]byte]int64{} // where a content is: its first entry of the second tables
	for i := range count {
		n, err := r.ReadAt(raw, i*cluster)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(raw[n:])
		if bytes.Equal(raw, zero) {
			continue
		}
		sum := sha256.Sum256(raw)
		if j, ok := known[sum]; ok {
			e := be.Uint64(second[j*8:])
			if e&packedFlag != 0 {
				at := int64(e & (1<<shift - 1))
				sectors := int64(e &^ packedFlag >> shift)
				for c := at / cluster; c <= (at/512+sectors)*512/cluster; c++ {
					refs[c]++
				}
			} else {
				e &^= aloneFlag // who writes to it makes a copy
				be.PutUint64(second[j*8:], e)
				refs[int64(e)/cluster]++
			}
			be.PutUint64(second[i*8:], e)
			continue
		}
		known[sum] = i
		packed.Reset()
		z.Reset(&packed)
		if _, err := z.Write(raw); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		if n := int64(packed.Len()); n < cluster*15/16 {
			if _, err := w.WriteAt(packed.Bytes(), at); err != nil {
				return err
			}
			sectors := (at+n-1)/512 - at/512
			be.PutUint64(second[i*8:], packedFlag|uint64(sectors)<<shift|uint64(at))
			for c := at / cluster; c <= (at+n-1)/cluster; c++ {
				refs[c]++
			}
			at += n
			continue
		}
		at = (at + cluster - 1) / cluster * cluster
		if _, err := w.WriteAt(raw, at); err != nil {
			return err
		}
		be.PutUint64(second[i*8:], uint64(at)|aloneFlag)
		refs[at/cluster]++
		at += cluster
	}
	at = (at + cluster - 1) / cluster * cluster
	// Refcounts count themselves, too.
	used := at / cluster
	blocks := int64(1)
	for (used+blocks+1+perRef-1)/perRef > blocks {
		blocks++
	}
	if blocks > cluster/8 {
		return fmt.Errorf("the disk is too big")
	}
	refTable := at
	for c := used; c < used+1+blocks; c++ {
		refs[c] = 1
	}
	table, counts := make([]byte, cluster), make([]byte, blocks*cluster)
	for i := range blocks {
		be.PutUint64(table[i*8:], uint64(refTable+(1+i)*cluster))
	}
	for c, n := range refs {
		be.PutUint16(counts[c*2:], n)
	}
	head := make([]byte, cluster)
	be.PutUint32(head, 0x514649fb)
	be.PutUint32(head[4:], 3)
	be.PutUint32(head[20:], bits)
	be.PutUint64(head[24:], uint64(size))
	be.PutUint32(head[36:], uint32(tables))
	be.PutUint64(head[40:], uint64(l1))
	be.PutUint64(head[48:], uint64(refTable))
	be.PutUint32(head[56:], 1)
	be.PutUint32(head[96:], 4)    // refcounts of 2^4 bits
	be.PutUint32(head[100:], 104) // the header's length
	for _, x := range []struct {
		b  []byte
		at int64
	}{{second, l2}, {first, l1}, {counts, refTable + cluster}, {table, refTable}, {head, 0}} {
		if _, err := w.WriteAt(x.b, x.at); err != nil {
			return err
		}
	}
	return nil
}
