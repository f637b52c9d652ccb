package osinit

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf16"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/osinit/dm"
	"github.com/cloudos-io/cloudos/internal/osinit/modules"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// A machine may have several disks of CloudOS: an old one that was left in, a stick beside the disk. Their partitions
// have the same names. So partitions are looked for on one disk alone, the one that the system was started from. Who
// starts it says which: the boot loader writes the identity of its own partition on the command line
// (cloudos.esp), the program that starts a unified image puts it into a variable of the firmware's.

// loaderPartition is that variable (systemd's Boot Loader Interface).
const loaderPartition = "LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"

// findESP notes from which boot partition the system was started, if somebody says.
func (m *machine) findESP(set *modules.Set) {
	word := m.cmdline["esp"]
	if word == "" && m.chain() == chainOwner {
		var err error
		if word, err = loaderVariable(set); err != nil {
			m.log.Printf("cannot tell which disk the firmware started: %v", err)
		}
	}
	if word == "" {
		return
	}
	id, err := gpt.ParseGUID(word)
	if err != nil {
		m.problem(fmt.Errorf("cannot tell which disk the system was started from: %w", err))
		return
	}
	m.esp = id
}

// loaderVariable reads the variable; nothing stays mounted.
func loaderVariable(set *modules.Set) (string, error) {
	if err := set.LoadAll("efivarfs"); err != nil {
		return "", err
	}
	at, err := efivars()
	if err != nil {
		return "", err
	}
	defer at.Close()
	b, err := os.ReadFile(filepath.Join(fmt.Sprintf("/proc/self/fd/%d", at.Fd()), loaderPartition))
	if err != nil {
		return "", err
	}
	return wideText(b), nil
}

// wideText is the text of a variable: four bytes of attributes, and then UTF-16.
func wideText(b []byte) string {
	var u []uint16
	for i := 4; i+1 < len(b); i += 2 {
		u = append(u, uint16(b[i])|uint16(b[i+1])<<8)
	}
	return strings.TrimRight(string(utf16.Decode(u)), "\x00")
}

// efivars mounts the firmware's variables nowhere: they are reached through the descriptor alone.
func efivars() (*os.File, error) {
	fs, err := unix.Fsopen("efivarfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot use the firmware's variables: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fault.New(fault.Unsupported, "cannot use the firmware's variables: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot mount the firmware's variables: %w", err)
	}
	return os.NewFile(uintptr(fd), "the firmware's variables"), nil
}

// startDisks are those that the system may have been started from: where nobody says which boot partition it was, all
// that have a partition of that name.
func (m *machine) startDisks(name string) []data.Disk {
	if m.esp != (gpt.GUID{}) {
		return data.DisksWith(m.esp)
	}
	return data.DisksNamed(name)
}

// startDisk is the disk with a partition of that name that the system was started from. There is none to be taken for
// it: data and slots of another disk are never used instead.
func (m *machine) startDisk(name string) (data.Disk, error) {
	found := m.startDisks(name)
	d, err := oneDisk(found, m.esp, name)
	if err == nil && m.home != (data.Disk{}) && d != m.home {
		err = fault.New(fault.Conflict, "the disk that the system was started from (%s) is gone, and %s is another one", m.home, d)
	}
	return d, err
}

func oneDisk(found []data.Disk, esp gpt.GUID, name string) (data.Disk, error) {
	known := esp != gpt.GUID{}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0 && known:
		return data.Disk{}, fault.New(fault.NotFound, "the disk that the system was started from is not there: none has the boot partition %s", esp)
	case len(found) == 0:
		return data.Disk{}, fault.New(fault.NotFound, "there is no disk with a partition %s", name)
	}
	var names []string
	for _, d := range found {
		names = append(names, d.String())
	}
	list := strings.Join(names, " and ")
	if known {
		return data.Disk{}, fault.New(fault.Conflict, "%s are copies of each other, and which of them the system was started from cannot be told: take all but one out", list)
	}
	return data.Disk{}, fault.New(fault.Conflict, "%s each have a partition %s, and which of them is meant cannot be told: take all but one out", list, name)
}

// rootOn finds the partition with the root on the disk that the system was started from. Of copies any with the
// root that belongs to the kernel is good enough to read from; nothing is written then (startDisk).
func (m *machine) rootOn(name string, v dm.Verity) (string, bool) {
	found := m.startDisks(name)
	for _, d := range found {
		dev, err := d.Partition(name)
		if err == nil && (len(found) == 1 || v.Blocks == 0 || hasRoot(dev.Path, v)) {
			m.home = d
			return dev.Path, true
		}
	}
	return "", false
}

// dataDevice finds what the command line names for the data; ok is false if there is none, and that is no failure.
func (m *machine) dataDevice(spec string) (dev data.Device, ok bool, err error) {
	kind, name, _ := strings.Cut(spec, "=")
	if kind != "partlabel" {
		dev, ok = data.Find(spec)
		return dev, ok, nil
	}
	d, err := m.startDisk(name)
	if err == nil {
		dev, err = d.Partition(name)
	}
	if err != nil && fault.Of(err) == fault.NotFound && m.cmdline["slot"] == "" {
		return data.Device{}, false, nil // a medium, on a machine without a system
	}
	if err != nil {
		return data.Device{}, false, fmt.Errorf("cannot use the data: %w", err)
	}
	return dev, true, nil
}

// renewDisk gives a disk that an image was written to an identity of its own, at its first start: the next disk that the
// image is written to may be in the same machine. Data that are sealed to what was measured keep the image's, since that
// is part of what is measured.
func (m *machine) renewDisk() {
	if m.esp == (gpt.GUID{}) || m.cmdline["encryption"] == "required" {
		return
	}
	d, err := m.startDisk(slots.DataPartition)
	if err == nil {
		m.esp, err = d.Renew(m.esp)
	}
	if err != nil {
		m.log.Printf("%v", err)
	}
}

// bootPartition is the device of the boot partition that the system was started from.
func (m *machine) bootPartition() (string, error) {
	slot := m.cmdline["slot"]
	if slot == "" {
		return "", fault.New(fault.Unsupported, "this machine has no boot partition: it does not run from a disk with slots")
	}
	d, err := m.startDisk(slots.Partition(slot))
	if err != nil {
		return "", err
	}
	var dev data.Device
	if m.esp != (gpt.GUID{}) {
		dev, err = d.ByID(m.esp)
	} else {
		dev, err = d.Partition(slots.ESPPartition)
	}
	return dev.Path, err
}
