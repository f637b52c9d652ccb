package data

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/gpt"
)

// GrowPartition gives the partition that the data are on what its disk has behind
// it; what is no partition is left alone. The table is written before the kernel is told, so a
// machine that stops in between is right at its next start.
func (d Device) GrowPartition() error {
	if d.crypt != nil {
		return d.growEncrypted()
	}
	name := filepath.Base(d.Path)
	dir := filepath.Join(classBlock, name)
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		return nil
	}
	fail := func(err error) error { return fmt.Errorf("cannot grow the partition %s: %w", d.Path, err) }
	number, err := strconv.Atoi(read(filepath.Join(dir, "partition")))
	if err != nil {
		return fail(err)
	}
	link, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fail(err)
	}
	f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(link)), os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	bytes, err := size(f)
	if err != nil {
		return fail(err)
	}
	sectors := bytes / gpt.Sector
	t, err := gpt.Read(f, sectors)
	if err != nil {
		return fail(err)
	}
	if number < 1 || number > len(t.Partitions) || t.Partitions[number-1].Name != Label {
		return nil
	}
	if t.Grow(Label, sectors) {
		if err := t.Write(f, sectors); err != nil {
			return fail(err)
		}
		if err := f.Sync(); err != nil {
			return fail(err)
		}
	}
	p := t.Partitions[number-1]
	length := (p.Last - p.First + 1) * gpt.Sector
	have, err := d.Size()
	if err != nil || have >= length {
		return err
	}
	part := unix.BlkpgPartition{Start: int64(p.First * gpt.Sector), Length: int64(length), Pno: int32(number)}
	arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_RESIZE_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
	if err := ioctl(f, unix.BLKPG, unsafe.Pointer(&arg)); err != nil {
		return fail(err)
	}
	return nil
}

// FindISO returns the device with an ISO volume of that name.
func FindISO(label string) (string, bool) {
	disks, err := os.ReadDir(classBlock)
	if err != nil {
		return "", false
	}
	for _, d := range disks {
		f, err := os.Open("/dev/" + d.Name())
		if err != nil {
			continue
		}
		b := make([]byte, 72)
		_, err = f.ReadAt(b, 0x8000)
		f.Close()
		if err == nil && string(b[1:6]) == "CD001" && strings.TrimSpace(string(b[40:72])) == label {
			return "/dev/" + d.Name(), true
		}
	}
	return "", false
}

// Loop makes a read-only block device of a file. It goes when the last user of it goes.
func Loop(file string) (string, error) {
	fail := func(err error) error { return fmt.Errorf("cannot make a disk of %s: %w", file, err) }
	back, err := os.Open(file)
	if err != nil {
		return "", fail(err)
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", fail(err)
	}
	defer ctl.Close()
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "", fail(err)
	}
	path := fmt.Sprintf("/dev/loop%d", n)
	dev, err := os.Open(path)
	if err != nil {
		return "", fail(err)
	}
	defer dev.Close()
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &unix.LoopConfig{Fd: uint32(back.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY}}); err != nil {
		return "", fail(err)
	}
	return path, nil
}
