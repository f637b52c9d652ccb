// Package gpt reads and writes partition tables (UEFI specification 2.10, chapter 5)
// of disks with sectors of 512 bytes. The builder of images writes them; the first
// process grows the last partition when the disk is larger than its table says.
package gpt

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"unicode/utf16"
)

// Sector is the size of a sector, in bytes.
const Sector = 512

const (
	entries   = 128
	entrySize = 128
	tableLen  = entries * entrySize / Sector // sectors
	signature = "EFI PART"
	headerLen = 92
)

// GUID is in its order on the disk.
type GUID [16]byte

// Types of partitions.
var (
	BIOSBoot  = mustGUID("21686148-6449-6E6F-744E-656564454649")
	ESP       = mustGUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
	LinuxData = mustGUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4")
)

func mustGUID(s string) GUID {
	g, err := ParseGUID(s)
	if err != nil {
		panic("gpt: " + err.Error())
	}
	return g
}

// ParseGUID reads one as it is written: "21686148-6449-6e6f-744e-656564454649".
func ParseGUID(s string) (GUID, error) {
	var g GUID
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(g) {
		return GUID{}, fmt.Errorf("%q is no GUID", s)
	}
	// The first three numbers are little-endian on the disk.
	for i, from := range [16]int{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15} {
		g[i] = b[from]
	}
	if g.String() != strings.ToLower(s) {
		return GUID{}, fmt.Errorf("%q is no GUID", s)
	}
	return g, nil
}

// NewGUID makes one that nothing else has.
func NewGUID() (g GUID) {
	rand.Read(g[:])
	g[7] = g[7]&0x0f | 0x40 // version 4, in the little-endian third number
	g[8] = g[8]&0x3f | 0x80
	return g
}

// String is how it is written.
func (g GUID) String() string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(g[0:]), le.Uint16(g[4:]), le.Uint16(g[6:]), g[8:10], g[10:])
}

// Partition is one entry; First and Last are sectors, both part of it.
type Partition struct {
	Type, ID    GUID
	First, Last uint64
	Attributes  uint64
	Name        string
}

// Table is a disk's table: index i is partition i+1.
type Table struct {
	Disk       GUID
	Partitions []Partition
}

// FirstUsable is the first sector that a partition may have.
const FirstUsable = 2 + tableLen

// LastUsable is the last one on a disk of so many sectors.
func LastUsable(sectors uint64) uint64 { return sectors - tableLen - 2 }

// Write writes the table and its copy to a disk of so many sectors: the copy first, so
// that one of both is whole at any time.
func (t *Table) Write(w io.WriterAt, sectors uint64) error {
	if sectors < 2*FirstUsable || len(t.Partitions) > entries {
		return errors.New("the table does not fit on the disk")
	}
	list := make([]byte, entries*entrySize)
	for i, p := range t.Partitions {
		name := utf16.Encode([]rune(p.Name))
		if len(name) > 36 || p.First > p.Last || p.First < FirstUsable || p.Last > LastUsable(sectors) {
			return fmt.Errorf("partition %d (%s) does not fit", i+1, p.Name)
		}
		e := list[i*entrySize:]
		copy(e[0:], p.Type[:])
		copy(e[16:], p.ID[:])
		binary.LittleEndian.PutUint64(e[32:], p.First)
		binary.LittleEndian.PutUint64(e[40:], p.Last)
		binary.LittleEndian.PutUint64(e[48:], p.Attributes)
		for j, c := range name {
			binary.LittleEndian.PutUint16(e[56+2*j:], c)
		}
	}
	header := func(own, other, at uint64) []byte {
		h := make([]byte, Sector)
		le := binary.LittleEndian
		copy(h, signature)
		le.PutUint32(h[8:], 0x00010000)
		le.PutUint32(h[12:], headerLen)
		le.PutUint64(h[24:], own)
		le.PutUint64(h[32:], other)
		le.PutUint64(h[40:], FirstUsable)
		le.PutUint64(h[48:], LastUsable(sectors))
		copy(h[56:], t.Disk[:])
		le.PutUint64(h[72:], at)
		le.PutUint32(h[80:], entries)
		le.PutUint32(h[84:], entrySize)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(list))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:headerLen]))
		return h
	}
	last := sectors - 1
	for _, x := range []struct {
		b  []byte
		at uint64
	}{
		{list, last - tableLen}, {header(last, 1, last-tableLen), last},
		{list, 2}, {header(1, last, 2), 1},
	} {
		if _, err := w.WriteAt(x.b, int64(x.at*Sector)); err != nil {
			return err
		}
	}
	// The protective MBR's entry: all of the disk, as far as 32 bits reach. Its code is left.
	mbr := make([]byte, 66+6)
	binary.LittleEndian.PutUint16(mbr[70:], 0xaa55)
	e := mbr[6:]
	copy(e, []byte{0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0})
	binary.LittleEndian.PutUint32(e[12:], uint32(min(last, 0xffffffff)))
	_, err := w.WriteAt(mbr, 440)
	return err
}

// Read reads the table of a disk, or its copy at the end.
func Read(r io.ReaderAt, sectors uint64) (*Table, error) {
	t, err := readAt(r, 1, sectors)
	if err == nil {
		return t, nil
	}
	if t, err2 := readAt(r, sectors-1, sectors); err2 == nil {
		return t, nil
	}
	return nil, err
}

func readAt(r io.ReaderAt, at, sectors uint64) (*Table, error) {
	h := make([]byte, Sector)
	if _, err := r.ReadAt(h, int64(at*Sector)); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	n := le.Uint32(h[12:])
	if string(h[:8]) != signature || n < headerLen || n > Sector {
		return nil, errors.New("the disk has no partition table")
	}
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	list := le.Uint64(h[72:])
	if crc32.ChecksumIEEE(h[:n]) != sum || le.Uint64(h[24:]) != at || le.Uint32(h[80:]) != entries || le.Uint32(h[84:]) != entrySize || list < 2 || list > sectors-tableLen {
		return nil, errors.New("the partition table is damaged")
	}
	b := make([]byte, entries*entrySize)
	if _, err := r.ReadAt(b, int64(list*Sector)); err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(b) != le.Uint32(h[88:]) {
		return nil, errors.New("the partition table is damaged")
	}
	t := &Table{Disk: GUID(h[56:72])}
	for i := range entries {
		e := b[i*entrySize : (i+1)*entrySize]
		if bytes.Equal(e[:16], make([]byte, 16)) {
			continue
		}
		for len(t.Partitions) < i {
			return nil, errors.New("the partition table has gaps: it is not ours")
		}
		var name []uint16
		for j := 56; j < entrySize; j += 2 {
			c := le.Uint16(e[j:])
			if c == 0 {
				break
			}
			name = append(name, c)
		}
		p := Partition{Type: GUID(e[:16]), ID: GUID(e[16:32]), First: le.Uint64(e[32:]), Last: le.Uint64(e[40:]), Attributes: le.Uint64(e[48:]), Name: string(utf16.Decode(name))}
		if p.First > p.Last || p.Last >= sectors {
			return nil, fmt.Errorf("partition %d reaches over the disk", i+1)
		}
		t.Partitions = append(t.Partitions, p)
	}
	return t, nil
}

// Grow gives the last partition, if it has that name and is the last on the disk, what
// the disk has behind it, in whole MiB. It tells whether there was anything.
func (t *Table) Grow(name string, sectors uint64) bool {
	last := -1
	for i, p := range t.Partitions {
		if last < 0 || p.First > t.Partitions[last].First {
			last = i
		}
	}
	if last < 0 || t.Partitions[last].Name != name {
		return false
	}
	const mib = 1 << 20 / Sector
	p := &t.Partitions[last]
	end := (LastUsable(sectors)+1)/mib*mib - 1
	if end < p.Last+mib {
		return false
	}
	p.Last = end
	return true
}
