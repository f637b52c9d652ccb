package data

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/dm"
	"github.com/cloudos-io/cloudos/internal/osinit/luks"
)

// opened is the name of the device that an encrypted one is read through.
const opened = "cloudos-data"

// Encrypted reports whether the device is, and Empty whether a file system is made
// on it when it is mounted.
func (d Device) Encrypted() (encryptedData, emptyDisk bool, err error) {
	f, err := os.Open(d.Path)
	if err != nil {
		return false, false, fmt.Errorf("cannot open the data disk: %w", err)
	}
	defer f.Close()
	what, err := inspect(f)
	return what == encrypted, what == empty || what == unfinished, err
}

// Header is an encrypted device's, open to be changed.
type Header struct {
	*luks.Header
	Disk *os.File
	dev  Device
}

// Header reads the header; Close it.
func (d Device) Header() (*Header, error) {
	if d.crypt != nil { // of the device below
		d = Device{Path: d.crypt.Path}
	}
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the data disk: %w", err)
	}
	h, err := luks.Read(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Header{h, f, d}, nil
}

// Close closes the device below.
func (h *Header) Close() error { return h.Disk.Close() }

// Attach makes the device that is read and written through encryption. The key goes to
// the kernel and is overwritten here.
func (h *Header) Attach(key []byte) (Device, error) {
	offset, sector := h.Data()
	c := dm.Crypt{Name: opened, Path: h.dev.Path, Offset: offset, Sector: sector, KeyID: "cloudos:" + h.UUID, KeyLen: len(key)}
	err := dm.PutKey(c.KeyID, key)
	clear(key)
	if err != nil {
		return Device{}, err
	}
	n, err := size(h.Disk)
	if err != nil {
		return Device{}, err
	}
	path, err := c.Open(n)
	if err != nil {
		return Device{}, fmt.Errorf("cannot open the encrypted data: %w", err)
	}
	return Device{Path: path, crypt: &c}, nil
}

// Encrypt makes an empty device an encrypted one with an empty file system, and
// returns what to mount. fill adds key slots and tokens to the header. The header is written last: a
// machine that stops before is at its beginning again.
func (d Device) Encrypt(fill func(h *Header, key []byte) error) (Device, error) {
	fail := func(err error) (Device, error) {
		return Device{}, fmt.Errorf("cannot encrypt the data disk %s: %w", d.Path, err)
	}
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	n, err := size(f)
	if err != nil {
		return fail(err)
	}
	if what, err := inspect(f); err != nil || what != empty && what != unfinished {
		return fail(errors.Join(err, fault.New(fault.Conflict, "it is not empty")))
	}
	if n < templateSize+luks.DataOffset {
		return fail(fmt.Errorf("it has %d MiB: at least %d are needed", n>>20, (templateSize+luks.DataOffset)>>20))
	}
	first := make([]byte, blockSize)
	copy(first, mark)
	if _, err := f.WriteAt(first, 0); err != nil {
		return fail(err)
	}
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	if err := discard(f, 0x1277 /* BLKDISCARD */, blockSize, n-blockSize); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) {
		return fail(fmt.Errorf("cannot discard: %w", err))
	}
	key := make([]byte, luks.KeySize)
	rand.Read(key)
	lh, err := luks.New(Label, key)
	if err != nil {
		return fail(err)
	}
	h := &Header{lh, f, d}
	if err := fill(h, key); err != nil {
		return fail(err)
	}
	out, err := h.Attach(key)
	if err != nil {
		return fail(err)
	}
	if err := out.formatScrambled(); err != nil {
		dm.Remove(opened)
		return fail(err)
	}
	if err := h.Write(f); err != nil {
		dm.Remove(opened)
		return fail(err)
	}
	return out, nil
}

// Close removes the device that encrypted data are read through; nobody has it mounted.
func (d Device) Close() error {
	if d.crypt == nil {
		return nil
	}
	return dm.Remove(d.crypt.Name)
}

func (d Device) formatScrambled() error {
	f, err := os.OpenFile(d.Path, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	n, err := size(f)
	if err == nil {
		err = format(f, n, true)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// growEncrypted grows the partition below and the device over it.
func (d Device) growEncrypted() error {
	below := Device{Path: d.crypt.Path}
	if err := below.GrowPartition(); err != nil {
		return err
	}
	n, err := below.Size()
	if err != nil {
		return err
	}
	have, err := d.Size()
	if err != nil || have+d.crypt.Offset+d.crypt.Sector > n {
		return err
	}
	return d.crypt.Resize(n)
}
