package data

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
)

// Disk is a whole disk with partitions. Two are equal if they are the same disk, attached once.
type Disk struct {
	// Name is the kernel's, as in /dev.
	Name string
	// seq is the kernel's number of the attachment: a name is used again, this never.
	seq string
}

// String is the disk's path.
func (d Disk) String() string { return "/dev/" + d.Name }

// classBlock has all block devices, each in the folder of what it is part of.
const classBlock = "/sys/class/block"

func newDisk(name string) Disk {
	return Disk{Name: name, seq: read(filepath.Join(classBlock, name, "diskseq"))}
}

// disks calls fn with each disk that has partitions.
func disks(fn func(d Disk)) {
	list, err := os.ReadDir(classBlock)
	if err != nil {
		return
	}
	for _, e := range list {
		if found, _ := filepath.Glob(filepath.Join(classBlock, e.Name(), "*", "partition")); len(found) > 0 {
			fn(newDisk(e.Name()))
		}
	}
}

// DisksWith lists the disks with a partition of that identity. More than one are copies of each other.
func DisksWith(id gpt.GUID) []Disk {
	var out []Disk
	disks(func(d Disk) {
		if n, err := d.number(id); err == nil && n > 0 {
			out = append(out, d)
		}
	})
	return out
}

// DisksNamed lists the disks with a partition of that name.
func DisksNamed(name string) []Disk {
	var out []Disk
	disks(func(d Disk) {
		if len(d.named(name)) > 0 {
			out = append(out, d)
		}
	})
	return out
}

// number is that of the partition with an identity; 0 is none.
func (d Disk) number(id gpt.GUID) (int, error) {
	f, err := os.Open(d.String())
	if err != nil {
		return 0, err
	}
	defer f.Close()
	bytes, err := size(f)
	if err != nil {
		return 0, err
	}
	t, err := gpt.Read(f, bytes/gpt.Sector)
	if err != nil {
		return 0, err
	}
	for i, p := range t.Partitions {
		if p.ID == id {
			return i + 1, nil
		}
	}
	return 0, nil
}

// partitions calls fn with each of the disk's own, as the kernel has them.
func (d Disk) partitions(fn func(p Device, number int, name string)) {
	found, _ := filepath.Glob(filepath.Join(classBlock, d.Name, "*", "partition"))
	for _, file := range found {
		number, err := strconv.Atoi(read(file))
		if err != nil {
			continue
		}
		dir, name := filepath.Dir(file), ""
		for _, line := range strings.Split(read(filepath.Join(dir, "uevent")), "\n") {
			if v, ok := strings.CutPrefix(line, "PARTNAME="); ok {
				name = v
			}
		}
		fn(Device{Path: "/dev/" + filepath.Base(dir)}, number, name)
	}
}

func (d Disk) named(name string) []Device {
	var out []Device
	d.partitions(func(p Device, _ int, has string) {
		if has == name {
			out = append(out, p)
		}
	})
	return out
}

// Partition is the disk's one with that name.
func (d Disk) Partition(name string) (Device, error) {
	switch found := d.named(name); len(found) {
	case 0:
		return Device{}, fault.New(fault.NotFound, "the disk %s has no partition %s", d, name)
	case 1:
		return found[0], nil
	default:
		return Device{}, fault.New(fault.Conflict, "the disk %s has %d partitions with the name %s", d, len(found), name)
	}
}

// Renew gives the disk and its partitions new identities, and returns that of the partition which had one: the disk is
// then no copy any more of what it was written from. Cut off, it has the old ones or the new ones.
func (d Disk) Renew(of gpt.GUID) (gpt.GUID, error) {
	fail := func(err error) (gpt.GUID, error) {
		return of, fmt.Errorf("cannot give %s an identity of its own: %w", d, err)
	}
	f, err := os.OpenFile(d.String(), os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	bytes, err := size(f)
	if err != nil {
		return fail(err)
	}
	t, err := gpt.Read(f, bytes/gpt.Sector)
	if err != nil {
		return fail(err)
	}
	now := of
	t.Disk = gpt.NewGUID()
	for i := range t.Partitions {
		id := gpt.NewGUID()
		if t.Partitions[i].ID == of {
			now = id
		}
		t.Partitions[i].ID = id
	}
	if now == of {
		return fail(fault.New(fault.NotFound, "it has no partition %s", of))
	}
	err = t.Write(f, bytes/gpt.Sector)
	if serr := f.Sync(); err == nil {
		err = serr
	}
	if err != nil {
		return fail(err)
	}
	return now, nil
}

// ByID is the disk's partition with that identity.
func (d Disk) ByID(id gpt.GUID) (Device, error) {
	n, err := d.number(id)
	if err != nil {
		return Device{}, fmt.Errorf("cannot read the partition table of %s: %w", d, err)
	}
	out := Device{}
	d.partitions(func(p Device, number int, _ string) {
		if number == n {
			out = p
		}
	})
	if n == 0 || out.Path == "" {
		return Device{}, fault.New(fault.NotFound, "the disk %s has no partition %s", d, id)
	}
	return out, nil
}
