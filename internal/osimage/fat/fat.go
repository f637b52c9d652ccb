// Package fat writes trees as FAT file systems: the partition that firmware boots
// from. Those that are too small for FAT32 become FAT16. Names must be of 8 and 3
// characters. The same tree gives the same bytes.
package fat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"

	"github.com/cloudos-io/cloudos/internal/osimage/tree"
)

const (
	sector   = 512
	cluster  = 2 * sector
	reserved = 32
	rootSize = 512 * 32         // FAT16's root folder
	date     = 44<<9 | 1<<5 | 1 // 2024-01-01
	end      = 0x0fffffff
	// Files of at least large bytes begin at the same place of blocks of that many.
	large, aligned = 8 << 20, 64 << 10
)

// Image returns a file system of size bytes with the tree. label has up to 11
// characters, id is the volume's.
func Image(t *tree.Tree, size int64, label string, id uint32) ([]byte, error) {
	total := size / sector
	if total > math.MaxUint32 || size%cluster != 0 {
		return nil, errors.New("a FAT32 file system cannot have this size")
	}
	// Each of the clusters needs an entry in each of two tables.
	wide, entry, root := true, int64(4), int64(0)
	if (total-reserved)/(cluster/sector) < 65525+1024 {
		wide, entry, root = false, 2, rootSize/sector
	}
	table := (total-reserved-root)/(cluster/sector*sector/entry+2) + 1
	first := reserved + 2*table + root
	clusters := (total - first) / (cluster / sector)
	if clusters < 4085+16 || !wide && clusters > 65524-16 {
		return nil, fmt.Errorf("a FAT file system cannot have %d bytes", size)
	}
	w := &writer{b: make([]byte, size), base: first * sector, next: 2, limit: uint32(clusters) + 2, fat: make([]uint32, clusters+2), start: map[string]uint32{}}
	if !wide {
		w.root = w.b[(first-root)*sector : first*sector]
	}
	w.fat[0], w.fat[1] = 0x0ffffff8, end
	if err := w.tree(t, label); err != nil {
		return nil, fmt.Errorf("cannot write a FAT file system: %w", err)
	}
	le := binary.LittleEndian
	boot := make([]byte, sector)
	copy(boot, []byte{0xeb, 0x58, 0x90})
	copy(boot[3:], "CLOUDOS ")
	le.PutUint16(boot[11:], sector)
	boot[13] = cluster / sector
	le.PutUint16(boot[14:], reserved)
	boot[16], boot[21] = 2, 0xf8
	le.PutUint16(boot[24:], 32)
	le.PutUint16(boot[26:], 64)
	le.PutUint32(boot[32:], uint32(total))
	le.PutUint16(boot[510:], 0xaa55)
	more := boot[36:]
	if wide {
		le.PutUint32(boot[36:], uint32(table))
		le.PutUint32(boot[44:], 2)
		le.PutUint16(boot[48:], 1)
		le.PutUint16(boot[50:], 6)
		more = boot[64:]
	} else {
		le.PutUint16(boot[17:], rootSize/32)
		le.PutUint16(boot[22:], uint16(table))
	}
	more[0], more[2] = 0x80, 0x29
	le.PutUint32(more[3:], id)
	copy(more[7:], fmt.Sprintf("%-11s", label))
	copy(more[18:], map[bool]string{true: "FAT32   ", false: "FAT16   "}[wide])
	copy(w.b, boot)
	if wide {
		info := make([]byte, sector)
		le.PutUint32(info, 0x41615252)
		le.PutUint32(info[484:], 0x61417272)
		le.PutUint32(info[488:], uint32(clusters)-(w.next-2)+w.skipped)
		le.PutUint32(info[492:], w.next)
		le.PutUint32(info[508:], 0xaa550000)
		copy(w.b[sector:], info)
		copy(w.b[6*sector:], boot)
		copy(w.b[7*sector:], info)
	}
	for i := range int64(2) {
		at := (reserved + i*table) * sector
		for j, v := range w.fat {
			if wide {
				le.PutUint32(w.b[at+int64(j)*4:], v)
			} else {
				le.PutUint16(w.b[at+int64(j)*2:], uint16(v))
			}
		}
	}
	return w.b, nil
}

type writer struct {
	b           []byte
	root        []byte // of FAT16
	base        int64
	next, limit uint32
	skipped     uint32 // clusters before next that are free
	fat         []uint32
	start       map[string]uint32
}

// take chains enough clusters for n bytes and returns the first and its place.
func (w *writer) take(n int64) (uint32, []byte, error) {
	count := uint32((n + cluster - 1) / cluster)
	if count == 0 {
		return 0, nil, nil
	}
	if count > w.limit-w.next {
		return 0, nil, errors.New("it is full")
	}
	if n >= large { // the same content twice is the same blocks of a disk (package qcow2)
		at := w.base + int64(w.next-2)*cluster
		skip := uint32((aligned - at%aligned) % aligned / cluster)
		if count+skip <= w.limit-w.next {
			w.next += skip
			w.skipped += skip
		}
	}
	first := w.next
	for i := range count {
		w.fat[first+i] = first + i + 1
	}
	w.fat[first+count-1] = end
	w.next += count
	at := w.base + int64(first-2)*cluster
	return first, w.b[at : at+int64(count)*cluster], nil
}

func (w *writer) tree(t *tree.Tree, label string) error {
	children := map[string][]*tree.Entry{}
	var dirs []string
	for _, e := range t.Sorted() {
		if e.Path != "." {
			children[path.Dir(e.Path)] = append(children[path.Dir(e.Path)], e)
		}
		if e.Mode.IsDir() {
			dirs = append(dirs, e.Path)
		} else if !e.Mode.IsRegular() || e.Size > math.MaxUint32 {
			return fmt.Errorf("%s cannot be in it", e.Path)
		}
	}
	places := map[string][]byte{}
	for _, d := range dirs { // the root is the first, as it has to be
		n := int64(len(children[d])+2) * 32
		if d == "." && w.root != nil {
			if n > rootSize {
				return errors.New("the root folder is full")
			}
			places[d] = w.root
			continue
		}
		first, place, err := w.take(n)
		if err != nil {
			return err
		}
		w.start[d], places[d] = first, place
	}
	for _, d := range dirs {
		place := places[d]
		put := func(name string, attr byte, first uint32, size int64) {
			copy(place, name)
			place[11] = attr
			le := binary.LittleEndian
			le.PutUint16(place[16:], date)
			le.PutUint16(place[18:], date)
			le.PutUint16(place[24:], date)
			le.PutUint16(place[20:], uint16(first>>16))
			le.PutUint16(place[26:], uint16(first))
			le.PutUint32(place[28:], uint32(size))
			place = place[32:]
		}
		if d == "." {
			put(fmt.Sprintf("%-11s", label), 8, 0, 0)
		} else {
			parent := w.start[path.Dir(d)]
			if path.Dir(d) == "." {
				parent = 0
			}
			put(".          ", 0x10, w.start[d], 0)
			put("..         ", 0x10, parent, 0)
		}
		for _, e := range children[d] {
			name, err := short(path.Base(e.Path))
			if err != nil {
				return err
			}
			if e.Mode.IsDir() {
				put(name, 0x10, w.start[e.Path], 0)
				continue
			}
			first, to, err := w.take(e.Size)
			if err != nil {
				return err
			}
			r, err := e.Open()
			if err != nil {
				return err
			}
			_, err = io.ReadFull(r, to[:e.Size])
			r.Close()
			if err != nil {
				return fmt.Errorf("%s: %w", e.Path, err)
			}
			put(name, 0x20, first, e.Size)
		}
	}
	return nil
}

// short turns "grub.cfg" into "GRUB    CFG".
func short(name string) (string, error) {
	base, ext, _ := strings.Cut(strings.ToUpper(name), ".")
	if base == "" || len(base) > 8 || len(ext) > 3 || strings.Trim(base+ext, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") != "" {
		return "", fmt.Errorf("%q is no name of 8 and 3 characters", name)
	}
	return fmt.Sprintf("%-8s%-3s", base, ext), nil
}
