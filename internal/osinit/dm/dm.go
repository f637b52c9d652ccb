// Package dm makes block devices with the kernel's device mapper: one whose reads
// are checked (verity) and one that is encrypted (crypt). The ioctls are those of
// linux/dm-ioctl.h, the tables those of Documentation/admin-guide/device-mapper. Keys
// are handed to the kernel through its keyring and are never part of a table. The
// first process imports it.
package dm

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	control    = "/dev/mapper/control"
	headerSize = 312
	specSize   = 40

	cmdCreate  = 3
	cmdRemove  = 4
	cmdSuspend = 6
	cmdLoad    = 9

	flagReadOnly = 1 << 0
	flagSuspend  = 1 << 1
)

// Sector is the unit of tables, in bytes.
const Sector = 512

// call runs one command for the device with a name; it returns the device's number.
func call(cmd uint, name string, flags uint32, payload []byte) (uint64, error) {
	if len(name) == 0 || len(name) > 127 {
		return 0, errors.New("the name is too long")
	}
	f, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("the kernel has no device mapper: %w", err)
	}
	defer f.Close()
	b := make([]byte, max(headerSize+len(payload), 1024))
	le := binary.NativeEndian
	le.PutUint32(b[0:], 4)
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint32(b[16:], headerSize)
	if len(payload) > 0 {
		le.PutUint32(b[20:], 1)
	}
	le.PutUint32(b[28:], flags)
	copy(b[48:], name)
	copy(b[headerSize:], payload)
	_, _, no := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(0xc138fd00|cmd), uintptr(unsafe.Pointer(&b[0])))
	if no != 0 {
		return 0, no
	}
	return le.Uint64(b[40:]), nil
}

// target is one target over a whole device.
func target(kind string, sectors uint64, params string) []byte {
	n := (specSize + len(params) + 1 + 7) &^ 7
	b := make([]byte, n)
	le := binary.NativeEndian
	le.PutUint64(b[8:], sectors)
	le.PutUint32(b[20:], uint32(n))
	copy(b[24:40], kind)
	copy(b[specSize:], params)
	return b
}

// create makes a device and returns its path.
func create(name, kind string, sectors uint64, params string, flags uint32) (string, error) {
	dev, err := call(cmdCreate, name, 0, nil)
	if err == nil {
		_, err = call(cmdLoad, name, flags, target(kind, sectors, params))
		if err == nil {
			_, err = call(cmdSuspend, name, 0, nil) // without the flag it is resumed
		}
		if err != nil {
			Remove(name)
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot make the device %s: %w", name, err)
	}
	// The number is packed as new_encode_dev does.
	return fmt.Sprintf("/dev/dm-%d", dev&0xff|dev>>12&0xfff00), nil
}

// Remove removes a device that nobody uses.
func Remove(name string) error {
	_, err := call(cmdRemove, name, 0, nil)
	return err
}

// Verity is how a device is checked.
type Verity struct {
	Hash   string // of the tree's top, hexadecimal
	Blocks uint64 // of data, of 4096 bytes; the tree is behind them and one more
}

// ParseVerity reads HASH,BLOCKS.
func ParseVerity(s string) (Verity, error) {
	hash, n, _ := strings.Cut(s, ",")
	b, err := hex.DecodeString(hash)
	blocks, nerr := strconv.ParseUint(n, 10, 40)
	if err != nil || nerr != nil || len(b) != 32 || blocks < 2 {
		return Verity{}, fmt.Errorf("%q is no hash and number of blocks", s)
	}
	return Verity{Hash: hash, Blocks: blocks}, nil
}

// Open makes a read-only device of path on which what was changed cannot be read.
func (v Verity) Open(name, path string) (string, error) {
	// Read errors of one block do not stop the machine: what reads it is told.
	params := fmt.Sprintf("1 %s %s 4096 4096 %d %d sha256 %s -", path, path, v.Blocks, v.Blocks+1, v.Hash)
	return create(name, "verity", v.Blocks*8, params, flagReadOnly)
}

// Crypt is an encrypted device.
type Crypt struct {
	Name   string
	Path   string
	Offset uint64 // of the data, in bytes
	Sector uint64 // the size of what is encrypted as one, in bytes
	KeyID  string // in the kernel's keyring
	KeyLen int
}

// PutKey gives the kernel a key that no program can read back.
func PutKey(id string, key []byte) error {
	if _, err := unix.AddKey("logon", id, key, unix.KEY_SPEC_USER_KEYRING); err != nil {
		return fmt.Errorf("cannot give the kernel a key: %w", err)
	}
	return nil
}

func (c Crypt) params() string {
	options := []string{"allow_discards"}
	if c.Sector != Sector {
		options = append(options, fmt.Sprintf("sector_size:%d", c.Sector))
	}
	return fmt.Sprintf("aes-xts-plain64 :%d:logon:%s 0 %s %d %d %s", c.KeyLen, c.KeyID, c.Path, c.Offset/Sector, len(options), strings.Join(options, " "))
}

func (c Crypt) sectors(size uint64) (uint64, error) {
	if size < c.Offset+c.Sector {
		return 0, errors.New("the device is smaller than its header says")
	}
	return (size - c.Offset) / c.Sector * c.Sector / Sector, nil
}

// Open makes the device over one of size bytes.
func (c Crypt) Open(size uint64) (string, error) {
	n, err := c.sectors(size)
	if err != nil {
		return "", err
	}
	return create(c.Name, "crypt", n, c.params(), 0)
}

// Resize gives the device what the one below has, while it is in use.
func (c Crypt) Resize(size uint64) error {
	n, err := c.sectors(size)
	if err != nil {
		return err
	}
	if _, err := call(cmdLoad, c.Name, 0, target("crypt", n, c.params())); err != nil {
		return fmt.Errorf("cannot resize the device %s: %w", c.Name, err)
	}
	if _, err := call(cmdSuspend, c.Name, flagSuspend, nil); err != nil {
		return fmt.Errorf("cannot suspend the device %s: %w", c.Name, err)
	}
	if _, err := call(cmdSuspend, c.Name, 0, nil); err != nil {
		return fmt.Errorf("cannot resume the device %s: %w", c.Name, err)
	}
	return nil
}
