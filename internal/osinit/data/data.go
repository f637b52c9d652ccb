// Package data keeps the machine's data disk: an empty one gets an ext4 file
// system without outside programs, one that grew is grown while it is in use, one with
// somebody else's data is left alone. The first process imports it.
package data

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/dm"
)

// Label is that of our file systems.
const Label = "cloudos-data"

// Device is a block device.
type Device struct {
	// Path is below /dev.
	Path string

	crypt *dm.Crypt // where Path is one that is made of an encrypted one
}

// Find returns the block device with a serial number or a name: "serial=cloudos-data",
// "name=vdb". ok is false while there is none.
func Find(spec string) (Device, bool) {
	kind, want, _ := strings.Cut(spec, "=")
	disks, err := os.ReadDir(classBlock)
	if err != nil {
		return Device{}, false
	}
	for _, d := range disks {
		dir := filepath.Join(classBlock, d.Name())
		var got string
		switch kind {
		case "serial":
			got = read(filepath.Join(dir, "serial"))
			if got == "" {
				got = read(filepath.Join(dir, "device/serial"))
			}
		case "name":
			got = d.Name()
		}
		if got != "" && got == want {
			return Device{Path: "/dev/" + d.Name()}, true
		}
	}
	return Device{}, false
}

func read(p string) string {
	b, err := os.ReadFile(p)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Size is the device's, in bytes.
func (d Device) Size() (uint64, error) {
	f, err := os.OpenFile(d.Path, os.O_RDONLY, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return size(f)
}

func size(f *os.File) (uint64, error) {
	var n uint64
	if err := ioctl(f, unix.BLKGETSIZE64, unsafe.Pointer(&n)); err != nil {
		return 0, fmt.Errorf("cannot tell the size of %s: %w", f.Name(), err)
	}
	return n, nil
}

// Mount mounts the device at target, after making a file system on it if it is
// empty.
func (d Device) Mount(target string) error {
	f, err := os.OpenFile(d.Path, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return fmt.Errorf("cannot open the data disk: %w", err)
	}
	err = prepare(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("cannot prepare the data disk %s: %w", d.Path, err)
	}
	if err := unix.Mount(d.Path, target, "ext4", unix.MS_NOATIME|unix.MS_NODEV, "prjquota,discard,errors=remount-ro"); err != nil {
		return fmt.Errorf("cannot mount the data disk %s: %w", d.Path, err)
	}
	return nil
}

func prepare(f *os.File) error {
	what, err := inspect(f)
	if err != nil {
		return err
	}
	switch what {
	case ours:
		return nil
	case foreign, encrypted:
		return fault.New(fault.Conflict, "it holds something that is not ours: give an empty disk, or one of this system")
	}
	n, err := size(f)
	if err != nil {
		return err
	}
	return format(f, n, false)
}

// extIOCResize is EXT4_IOC_RESIZE_FS.
const extIOCResize = 0x40086610

// Grow gives the mounted file system all blocks that the device has, and tells
// how many bytes that is.
func (d Device) Grow(mounted string) (uint64, error) {
	n, err := d.Size()
	if err != nil {
		return 0, err
	}
	n = n / blockSize * blockSize
	f, err := os.Open(mounted)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	blocks := n / blockSize
	// What the file system says of its size is without its own tables; asking
	// for what it has already is no work.
	if err := ioctl(f, extIOCResize, unsafe.Pointer(&blocks)); err != nil {
		return 0, fmt.Errorf("cannot grow the data to %d MiB: %w", n>>20, err)
	}
	return n, nil
}

// Trim tells the device which blocks are free, and how many bytes those are.
func Trim(mounted string) (uint64, error) {
	f, err := os.Open(mounted)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r := struct{ start, length, min uint64 }{0, ^uint64(0), 0}
	if err := ioctl(f, 0xc0185879 /* FITRIM */, unsafe.Pointer(&r)); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return 0, nil // a disk that cannot is no failure
		}
		return 0, fmt.Errorf("cannot trim %s: %w", mounted, err)
	}
	return r.length, nil
}

func discard(f *os.File, request uint, from, length uint64) error {
	r := [2]uint64{from, length}
	return ioctl(f, request, unsafe.Pointer(&r))
}

func ioctl(f *os.File, request uint, arg unsafe.Pointer) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var no unix.Errno
	err = c.Control(func(fd uintptr) {
		_, _, no = unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(arg))
	})
	if err == nil && no != 0 {
		err = no
	}
	return err
}
