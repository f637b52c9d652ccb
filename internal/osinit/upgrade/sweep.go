package upgrade

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// A power cut in the middle of an upgrade may leave a folder whose files point at what is
// free, and space that nobody points at. Nothing repairs FAT here, so before a slot's folder is
// written it is emptied below the file system: what the other folders have is kept, and all
// else is free again. The order of writes makes this safe to be cut off, too.

// disk is what sweep works on.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

var (
	errNotFAT  = errors.New("this is no FAT32 file system as this system writes it")
	errDamaged = errors.New("the boot partition's file system is damaged")
)

// sweep empties a folder.
func (b *Boot) sweep(folder string) error {
	dev, err := b.device()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return fmt.Errorf("cannot open the boot partition: %w", err)
	}
	err = Sweep(f, folder)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if errors.Is(err, errNotFAT) {
		return nil // somebody made it: it is theirs to keep in order
	}
	if err != nil {
		return fmt.Errorf("cannot make room on the boot partition: %w", err)
	}
	return nil
}

// fatVolume is a FAT32 file system.
type fatVolume struct {
	d                      disk
	cluster                int64 // bytes
	tables, tableAt        int64
	tableBytes, dataAt     int64
	infoAt                 int64
	root                   uint32
	fat, used              []uint32
	wanted                 string
	emptied                bool
	depth, files, maxFiles int
}

// Sweep empties a folder of a FAT32 file system and frees what nothing points at.
func Sweep(d disk, folder string) error {
	v := &fatVolume{d: d, wanted: strings.ToUpper(folder), maxFiles: 4096}
	if err := v.open(); err != nil {
		return err
	}
	v.used = make([]uint32, len(v.fat))
	if err := v.folder(v.root, ""); err != nil {
		return err
	}
	if v.emptied {
		if err := d.Sync(); err != nil {
			return err
		}
	}
	return v.free()
}

func (v *fatVolume) open() error {
	b := make([]byte, 512)
	if _, err := v.d.ReadAt(b, 0); err != nil {
		return err
	}
	le := binary.LittleEndian
	reserved, tables, sectors := int64(le.Uint16(b[14:])), int64(b[16]), int64(le.Uint32(b[36:]))
	total := int64(le.Uint32(b[32:]))
	if le.Uint16(b[510:]) != 0xaa55 || le.Uint16(b[11:]) != 512 || b[13] == 0 || b[13]&(b[13]-1) != 0 || le.Uint16(b[17:]) != 0 || le.Uint16(b[22:]) != 0 ||
		reserved < 2 || tables < 1 || tables > 2 || sectors < 1 || sectors > 1<<16 || total > 1<<22 {
		return errNotFAT
	}
	v.cluster = int64(b[13]) * 512
	v.tables, v.tableAt, v.tableBytes = tables, reserved*512, sectors*512
	v.dataAt = v.tableAt + tables*v.tableBytes
	v.root = le.Uint32(b[44:])
	if info := int64(le.Uint16(b[48:])); info > 0 && info < reserved {
		v.infoAt = info * 512
	}
	clusters := (total*512 - v.dataAt) / v.cluster
	if clusters < 1 || (clusters+2)*4 > v.tableBytes {
		return errNotFAT
	}
	raw := make([]byte, (clusters+2)*4)
	if _, err := v.d.ReadAt(raw, v.tableAt); err != nil {
		return err
	}
	v.fat = make([]uint32, clusters+2)
	for i := range v.fat {
		v.fat[i] = le.Uint32(raw[i*4:])
	}
	return nil
}

// chain marks the clusters of a file as used, and returns them.
func (v *fatVolume) chain(first uint32) ([]uint32, error) {
	var out []uint32
	for c := first; ; {
		if c < 2 || int(c) >= len(v.fat) {
			return nil, fmt.Errorf("%w: a file points outside of it", errDamaged)
		}
		if v.used[c] != 0 {
			return nil, fmt.Errorf("%w: two files have the same place", errDamaged)
		}
		v.used[c] = 1
		out = append(out, c)
		if c = v.fat[c] & 0x0fffffff; c >= 0x0ffffff8 {
			return out, nil
		}
	}
}

func (v *fatVolume) at(cluster uint32) int64 { return v.dataAt + int64(cluster-2)*v.cluster }

// folder walks a folder, and empties it if it is the wanted one.
func (v *fatVolume) folder(first uint32, path string) error {
	if v.depth++; v.depth > 8 {
		return fmt.Errorf("%w: its folders are too deep", errDamaged)
	}
	defer func() { v.depth-- }()
	own, err := v.chain(first)
	if err != nil {
		return err
	}
	b := make([]byte, v.cluster)
	for n, c := range own {
		if _, err := v.d.ReadAt(b, v.at(c)); err != nil {
			return err
		}
		if path == v.wanted {
			// "." and ".." are its first entries; behind a zero there is nothing more.
			keep := 0
			if n == 0 && bytes.HasPrefix(b, []byte(".          ")) {
				keep = 64
			}
			clear(b[keep:])
			if _, err := v.d.WriteAt(b, v.at(c)); err != nil {
				return err
			}
			v.emptied = true
			continue
		}
		for e := b; len(e) >= 32; e = e[32:] {
			if e[0] == 0 {
				break
			}
			attr := e[11]
			if e[0] == 0xe5 || attr&0x3f == 0x0f || attr&0x08 != 0 || e[0] == '.' {
				continue
			}
			if v.files++; v.files > v.maxFiles {
				return fmt.Errorf("%w: it has too many files", errDamaged)
			}
			start := uint32(binary.LittleEndian.Uint16(e[20:]))<<16 | uint32(binary.LittleEndian.Uint16(e[26:]))
			name := strings.TrimRight(string(e[:8]), " ")
			if ext := strings.TrimRight(string(e[8:11]), " "); ext != "" {
				name += "." + ext
			}
			switch {
			case attr&0x10 != 0:
				err = v.folder(start, strings.TrimPrefix(path+"/"+name, "/"))
			case start != 0:
				_, err = v.chain(start)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// free writes tables in which only what is used has a place. Sectors that stay as they are
// are not written.
func (v *fatVolume) free() error {
	le := binary.LittleEndian
	old, b := make([]byte, 512), make([]byte, 512)
	for t := range v.tables {
		for at := int64(0); at < int64(len(v.fat))*4; at += 512 {
			if _, err := v.d.ReadAt(old, v.tableAt+t*v.tableBytes+at); err != nil {
				return err
			}
			copy(b, old)
			for i := 0; i < 128; i++ {
				c := int(at/4) + i
				if c < 2 || c >= len(v.fat) {
					continue
				}
				if v.used[c] == 0 {
					le.PutUint32(b[i*4:], 0)
				} else {
					le.PutUint32(b[i*4:], v.fat[c])
				}
			}
			if bytes.Equal(b, old) {
				continue
			}
			if _, err := v.d.WriteAt(b, v.tableAt+t*v.tableBytes+at); err != nil {
				return err
			}
		}
	}
	if v.infoAt > 0 { // how much is free is counted again
		if _, err := v.d.ReadAt(b, v.infoAt); err != nil {
			return err
		}
		if le.Uint32(b) == 0x41615252 && le.Uint32(b[484:]) == 0x61417272 {
			le.PutUint32(b[488:], 0xffffffff)
			le.PutUint32(b[492:], 0xffffffff)
			if _, err := v.d.WriteAt(b, v.infoAt); err != nil {
				return err
			}
		}
	}
	return v.d.Sync()
}
