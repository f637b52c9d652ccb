// Package pe puts sections into programs for UEFI and signs them, as firmware with
// Secure Boot wants it: PE32+ with an Authenticode signature. The same inputs give
// the same bytes: signatures are RSA's of PKCS #1 version 1.5 and carry no time.
//
// Rules are of Microsoft's "PE Format" and "Windows Authenticode Portable Executable
// Signature Format". The builder of images imports it.
package pe

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Section is a part of a program by name, of at most 8 bytes.
type Section struct {
	Name string
	Data []byte
}

// Places in the headers.
const (
	lfanew      = 0x3c
	coffSize    = 24 // with the signature
	sectionSize = 40

	plus          = 0x20b
	optAlignment  = 32
	optFile       = 36
	optImage      = 56
	optHeaders    = 60
	optCheckSum   = 64
	optDirCount   = 108
	optDirs       = 112
	certDirectory = 4
)

type image struct {
	b        []byte
	opt      int // where the optional header is
	table    int // where the table of sections is
	sections int
}

var errImage = errors.New("this is no program for UEFI of 64 bits")

func parse(b []byte) (*image, error) {
	if len(b) < 0x40 || b[0] != 'M' || b[1] != 'Z' {
		return nil, errImage
	}
	at := int64(binary.LittleEndian.Uint32(b[lfanew:]))
	if at < 0x40 || at+coffSize+optDirs+8*(certDirectory+1) > int64(len(b)) || string(b[at:at+4]) != "PE\x00\x00" {
		return nil, errImage
	}
	p := &image{b: b, opt: int(at) + coffSize, sections: int(binary.LittleEndian.Uint16(b[at+6:]))}
	p.table = p.opt + int(binary.LittleEndian.Uint16(b[at+20:]))
	if binary.LittleEndian.Uint16(b[p.opt:]) != plus || p.u32(p.opt+optDirCount) <= certDirectory ||
		p.table < p.opt+optDirs+8*(certDirectory+1) || p.table+p.sections*sectionSize > len(b) {
		return nil, errImage
	}
	for i := range p.sections {
		s := p.section(i)
		if int64(p.u32(s+20))+int64(p.u32(s+16)) > int64(len(b)) {
			return nil, errImage
		}
	}
	return p, nil
}

func (p *image) u32(at int) uint32            { return binary.LittleEndian.Uint32(p.b[at:]) }
func (p *image) put(at int, v uint32)         { binary.LittleEndian.PutUint32(p.b[at:], v) }
func (p *image) section(i int) int            { return p.table + i*sectionSize }
func (p *image) certificates() (off, n int64) { return p.directory(certDirectory) }

func (p *image) directory(i int) (off, n int64) {
	at := p.opt + optDirs + 8*i
	return int64(p.u32(at)), int64(p.u32(at + 4))
}

func align(n, to uint64) uint64 { return (n + to - 1) / to * to }

// WithSections returns a program with further sections behind its own. One that is
// signed already is refused.
func WithSections(program []byte, more ...Section) ([]byte, error) {
	p, err := parse(append([]byte(nil), program...))
	if err != nil {
		return nil, err
	}
	if off, n := p.certificates(); off != 0 || n != 0 {
		return nil, errors.New("the program is signed: sections cannot be added")
	}
	fileAlign := uint64(p.u32(p.opt + optFile))
	if fileAlign < 512 || fileAlign&(fileAlign-1) != 0 {
		return nil, errImage
	}
	const page = 4096
	// The first section begins where the headers end: what is free before it is for more of them.
	free, next, end := uint64(p.u32(p.opt+optHeaders)), uint64(0), uint64(0)
	for i := range p.sections {
		s := p.section(i)
		if raw := uint64(p.u32(s + 20)); raw != 0 {
			free, end = min(free, raw), max(end, raw+uint64(p.u32(s+16)))
		}
		next = max(next, align(uint64(p.u32(s+12))+uint64(max(p.u32(s+8), p.u32(s+16))), page))
	}
	if end < free || end > uint64(len(p.b)) {
		return nil, errImage
	}
	if need := uint64(p.section(p.sections + len(more))); need > free {
		return nil, fmt.Errorf("the program's headers have no room for %d sections", len(more))
	}
	// Symbols behind the last section are left out: signatures want no gaps between sections.
	b := p.b[:end]
	clear(b[p.opt-coffSize+12 : p.opt-coffSize+20])
	b = append(b, make([]byte, align(uint64(len(b)), fileAlign)-uint64(len(b)))...)
	for i, m := range more {
		if len(m.Name) > 8 || len(m.Data) == 0 {
			return nil, fmt.Errorf("the section %q has a long name or no data", m.Name)
		}
		raw := align(uint64(len(m.Data)), fileAlign)
		if uint64(len(b))+raw > 1<<31 {
			return nil, errors.New("the program would be larger than 2 GiB")
		}
		h := b[p.section(p.sections+i):][:sectionSize]
		clear(h)
		copy(h, m.Name)
		binary.LittleEndian.PutUint32(h[8:], uint32(len(m.Data)))
		binary.LittleEndian.PutUint32(h[12:], uint32(next))
		binary.LittleEndian.PutUint32(h[16:], uint32(raw))
		binary.LittleEndian.PutUint32(h[20:], uint32(len(b)))
		binary.LittleEndian.PutUint32(h[36:], 0x40000040) // initialised data, readable
		b = append(b, m.Data...)
		b = append(b, make([]byte, raw-uint64(len(m.Data)))...)
		next = align(next+uint64(len(m.Data)), page)
	}
	p.b = b
	binary.LittleEndian.PutUint16(b[p.opt-coffSize+6:], uint16(p.sections+len(more)))
	p.put(p.opt+optImage, uint32(next))
	p.put(p.opt+optCheckSum, 0)
	return b, nil
}
