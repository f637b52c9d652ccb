// Package efiboot changes what UEFI firmware starts: its boot entries (Boot0000 and so on), their
// order (BootOrder), and the one that is started at the next start alone (BootNext). Variables are
// files of the kernel's efivarfs: four bytes of attributes, then the content.
//
// The first process imports it. Formats are of the UEFI specification 2.10: 3.1.3 (load options),
// 3.3 (variables), 10.3 (device paths).
package efiboot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// global is the vendor of the specification's own variables.
const global = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"

// kept says that a variable stays over starts, and is there while firmware and system run.
const kept = 7

// maxVariable bounds what is read, in bytes.
const maxVariable = 64 << 10

// Vars are a machine's variables.
type Vars struct {
	// Dir is where efivarfs is.
	Dir string
}

// Loader is a program on a partition of a disk with a GPT.
type Loader struct {
	// Name is what firmware shows.
	Name string
	// Number, First and Sectors are the partition's, ID is its identity as on the disk.
	Number         uint32
	First, Sectors uint64
	ID             [16]byte
	// File is its path there, with backslashes.
	File string
}

// option is the content of a boot entry.
func (l Loader) option() []byte {
	le := binary.LittleEndian
	// A partition: media, hard drive; of a GPT, known by its identity.
	path := le.AppendUint16([]byte{4, 1}, 42)
	path = le.AppendUint32(path, l.Number)
	path = le.AppendUint64(path, l.First)
	path = le.AppendUint64(path, l.Sectors)
	path = append(path, l.ID[:]...)
	path = append(path, 2, 2)
	file := wide(l.File)
	path = le.AppendUint16(append(path, 4, 4), uint16(4+len(file)))
	path = append(path, file...)
	path = append(path, 0x7f, 0xff, 4, 0)
	b := le.AppendUint32(nil, 1) // active
	b = le.AppendUint16(b, uint16(len(path)))
	return append(append(b, wide(l.Name)...), path...)
}

func wide(s string) []byte {
	var b []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

func (v Vars) file(name string) string { return filepath.Join(v.Dir, name+global) }

// read returns a variable's content; nil is none.
func (v Vars) read(name string) ([]byte, error) {
	f, err := os.Open(v.file(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxVariable))
	if err != nil {
		return nil, err
	}
	if len(b) < 4 {
		return nil, nil // firmware that lost it
	}
	return b[4:], nil
}

// write sets a variable, and reads it again: there is firmware that says yes and does nothing.
func (v Vars) write(name string, content []byte) error {
	fail := func(err error) error {
		return fault.New(fault.Unavailable, "cannot set the firmware's variable %s: %w", name, err)
	}
	f, err := os.OpenFile(v.file(name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return fail(err)
	}
	// One write is one variable.
	_, err = f.Write(append(binary.LittleEndian.AppendUint32(nil, kept), content...))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fail(err)
	}
	if got, err := v.read(name); err != nil || !bytes.Equal(got, content) {
		return fail(errors.Join(errors.New("it was not kept"), err))
	}
	return nil
}

func entryName(n uint16) string { return fmt.Sprintf("Boot%04X", n) }

// Find returns the entry that starts a loader.
func (v Vars) Find(l Loader) (n uint16, ok bool, err error) {
	used, err := v.entries()
	if err != nil {
		return 0, false, err
	}
	want := l.option()
	for _, n := range used {
		b, err := v.read(entryName(n))
		if err != nil {
			return 0, false, err
		}
		if bytes.Equal(b, want) {
			return n, true, nil
		}
	}
	return 0, false, nil
}

// entries lists the numbers of boot entries.
func (v Vars) entries() ([]uint16, error) {
	list, err := os.ReadDir(v.Dir)
	if err != nil {
		return nil, err
	}
	var out []uint16
	for _, e := range list {
		name, ok := strings.CutSuffix(e.Name(), global)
		if !ok || len(name) != 8 || !strings.HasPrefix(name, "Boot") {
			continue
		}
		if n, err := strconv.ParseUint(name[4:], 16, 16); err == nil {
			out = append(out, uint16(n))
		}
	}
	return out, nil
}

// Ensure returns the entry that starts a loader, and makes it if it is not there. One that is new
// is in no order yet.
func (v Vars) Ensure(l Loader) (uint16, error) {
	n, ok, err := v.Find(l)
	if err != nil || ok {
		return n, err
	}
	used, err := v.entries()
	if err != nil {
		return 0, err
	}
	order, err := v.Order()
	if err != nil {
		return 0, err
	}
	for n := range 1 << 16 {
		n := uint16(n)
		// An order may name what is gone: it is not to come back as something else.
		if !slices.Contains(used, n) && !slices.Contains(order, n) {
			return n, v.write(entryName(n), l.option())
		}
	}
	return 0, fault.New(fault.Exhausted, "the firmware has no boot entry that is free")
}

func (v Vars) numbers(name string) ([]uint16, error) {
	b, err := v.read(name)
	if err != nil {
		return nil, err
	}
	var out []uint16
	for ; len(b) >= 2; b = b[2:] {
		out = append(out, binary.LittleEndian.Uint16(b))
	}
	return out, nil
}

// Order is the order in which entries are started.
func (v Vars) Order() ([]uint16, error) { return v.numbers("BootOrder") }

// Prefer puts entries first, takes others out of the order, and leaves the rest as it is. What is so
// already is not written: firmware's memory wears.
func (v Vars) Prefer(first, without []uint16) error {
	now, err := v.Order()
	if err != nil {
		return err
	}
	order := slices.Clone(first)
	for _, n := range now {
		if !slices.Contains(order, n) && !slices.Contains(without, n) {
			order = append(order, n)
		}
	}
	if slices.Equal(order, now) {
		return nil
	}
	var b []byte
	for _, n := range order {
		b = binary.LittleEndian.AppendUint16(b, n)
	}
	return v.write("BootOrder", b)
}

// Once has the next start be an entry's, whatever the order; the firmware forgets it before it starts that.
func (v Vars) Once(n uint16) error {
	return v.write("BootNext", binary.LittleEndian.AppendUint16(nil, n))
}

// NotOnce takes that back.
func (v Vars) NotOnce() error {
	if err := os.Remove(v.file("BootNext")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.Unavailable, "cannot remove the firmware's variable BootNext: %w", err)
	}
	return nil
}
