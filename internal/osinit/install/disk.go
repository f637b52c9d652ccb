// Package install puts a system on a disk: it finds the disks of a machine and says what is
// on them, chooses one by the document's rule, and writes a verified release to it. A
// disk with somebody's data is left alone unless the document says so. The first process
// imports it.
package install

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// Disk is a whole disk.
type Disk struct {
	// Path is below /dev.
	Path          string
	Model, Serial string
	// Size is in bytes, Sector what the disk calls a sector.
	Size, Sector uint64
	// Holds says what is on it; empty is nothing.
	Holds string
	// Unfinished says that an installation on it was cut off.
	Unfinished bool
	// InUse says why it cannot be written: it is mounted, or read-only.
	InUse string
	// ID is the identity of its partition table, if it has one.
	ID gpt.GUID
}

func (d Disk) String() string {
	s := fmt.Sprintf("%s  %s", d.Path, size(d.Size))
	if d.Model != "" {
		s += "  " + d.Model
	}
	if d.Serial != "" {
		s += "  serial " + d.Serial
	}
	switch {
	case d.InUse != "":
		s += "  (" + d.InUse + ")"
	case d.Unfinished:
		s += "  (an installation that was cut off)"
	case d.Holds != "":
		s += "  (" + d.Holds + ")"
	default:
		s += "  (empty)"
	}
	return s
}

// size as disks are sold: in powers of ten.
func size(n uint64) string {
	switch {
	case n >= 1e12:
		return fmt.Sprintf("%.1f TB", float64(n)/1e12)
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	}
	return fmt.Sprintf("%.0f MB", float64(n)/1e6)
}

// Disks looks at the machine's disks.
func Disks() ([]Disk, error) {
	names, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	var out []Disk
	for _, n := range names {
		dir := filepath.Join("/sys/block", n.Name())
		if _, err := os.Stat(filepath.Join(dir, "device")); err != nil {
			continue // loop devices, memory, mappings
		}
		if strings.HasPrefix(n.Name(), "sr") || strings.HasPrefix(n.Name(), "fd") || strings.HasPrefix(n.Name(), "mtd") {
			continue
		}
		d, err := look(n.Name(), dir)
		if err != nil {
			return nil, err
		}
		if d.Size > 0 {
			out = append(out, d)
		}
	}
	return out, nil
}

func text(p ...string) string {
	b, err := os.ReadFile(filepath.Join(p...))
	if err != nil {
		return ""
	}
	return strings.Join(strings.Fields(string(b)), " ")
}

func look(name, dir string) (Disk, error) {
	d := Disk{Path: "/dev/" + name, Model: text(dir, "device/model"), Serial: text(dir, "serial")}
	if d.Serial == "" {
		d.Serial = text(dir, "device/serial")
	}
	if d.Serial == "" {
		d.Serial = vpdSerial(filepath.Join(dir, "device/vpd_pg80"))
	}
	n, _ := strconv.ParseUint(text(dir, "size"), 10, 54)
	d.Size = n * 512
	d.Sector, _ = strconv.ParseUint(text(dir, "queue/logical_block_size"), 10, 32)
	if text(dir, "ro") == "1" {
		d.InUse = "it is read-only"
	}
	f, err := os.OpenFile(d.Path, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		if f, err = os.Open(d.Path); err != nil {
			d.InUse = err.Error()
			return d, nil
		}
		d.InUse = "it is in use"
	}
	defer f.Close()
	if d.Size == 0 {
		return d, nil
	}
	err = d.inspect(f)
	if err != nil && d.InUse == "" {
		d.InUse = fmt.Sprintf("it cannot be read: %v", err)
	}
	return d, nil
}

// vpdSerial is the serial number of a SCSI disk, in its page 0x80.
func vpdSerial(p string) string {
	b, err := os.ReadFile(p)
	if err != nil || len(b) < 4 {
		return ""
	}
	return strings.TrimSpace(string(b[4:min(len(b), 4+int(binary.BigEndian.Uint16(b[2:])))]))
}

// marker is in the disk's second sector while it is installed on: where the table's header
// will be. The first sector's end is written last of all.
const marker = "CLOUDOS: an installation that is not finished\n"

// heads are what file systems and the like begin with.
var heads = []struct {
	at   int
	is   string
	name string
}{
	{0x438, "\x53\xef", "a file system (ext4)"}, {0, "XFSB", "a file system (xfs)"}, {0x10040, "_BHRfS_M", "a file system (btrfs)"},
	{3, "NTFS    ", "a file system (NTFS)"}, {3, "EXFAT   ", "a file system (exFAT)"}, {0x36, "FAT1", "a file system (FAT)"}, {0x52, "FAT32", "a file system (FAT)"},
	{0x8001, "CD001", "an ISO image"}, {0, "LUKS\xba\xbe", "encrypted data (LUKS)"}, {0x218, "LVM2 001", "a volume group (LVM)"},
	{0x1000, "\xfc\x4e\x2b\xa9", "a RAID member"}, {0, "hsqs", "a file system (squashfs)"}, {0xff6, "SWAPSPACE2", "swap space"},
}

// sample is how much of the disk's begin and end, and of places in between, must be zero for
// a disk to be empty.
const (
	sample = 1 << 20
	probe  = 64 << 10
	probes = 64
)

// inspect tells what is on a disk.
func (d *Disk) inspect(r io.ReaderAt) error {
	first := make([]byte, min(sample, d.Size))
	if _, err := r.ReadAt(first, 0); err != nil {
		return err
	}
	has := func(at int, s string) bool { return len(first) >= at+len(s) && string(first[at:at+len(s)]) == s }
	if has(gpt.Sector, marker) {
		d.Unfinished = true
		return nil
	}
	sealed := has(510, "\x55\xaa")
	if t, err := gpt.Read(r, d.Size/gpt.Sector); err == nil {
		d.ID = t.Disk
		var names []string
		ours := false
		for _, p := range t.Partitions {
			names = append(names, strconv.Quote(p.Name))
			ours = ours || p.Name == slots.Partition("a")
		}
		if ours && !sealed {
			d.Unfinished = true
			return nil
		}
		d.Holds = fmt.Sprintf("%d partitions: %s", len(names), strings.Join(names, " "))
		if ours {
			d.Holds = "a system of CloudOS, " + d.Holds
		}
		return nil
	}
	for _, h := range heads {
		if has(h.at, h.is) {
			d.Holds = h.name
			return nil
		}
	}
	if sealed {
		d.Holds = "a partition table"
		return nil
	}
	if !zero(first) {
		d.Holds = "something that is not known"
		return nil
	}
	b := make([]byte, probe)
	last := int64(d.Size) - probe
	for i := range int64(probes + 1) {
		at := last / probes * i / 512 * 512
		if i == probes {
			at = last
		}
		if at < 0 {
			break
		}
		if _, err := r.ReadAt(b, at); err != nil {
			return err
		}
		if !zero(b) {
			d.Holds = "something that is not known"
			return nil
		}
	}
	return nil
}

var zeros [64 << 10]byte

func zero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// Rule says which disk to take.
type Rule struct {
	// Path is the device, Serial its serial number.
	Path, Serial string
	// MinSize and MaxSize bound its size, in bytes; 0 does not.
	MinSize, MaxSize uint64
	// Pick is largest or smallest, of several that fit.
	Pick string
	// Wipe permits to overwrite what is on it.
	Wipe bool
}

// Named tells whether the rule says which disk, and not only what may be done with it.
func (r Rule) Named() bool {
	return r.Path != "" || r.Serial != "" || r.MinSize > 0 || r.MaxSize > 0 || r.Pick != ""
}

// Least is how large a disk must be, in bytes.
func Least() uint64 {
	_, n := slots.Layout(gpt.GUID{}, func(string) gpt.GUID { return gpt.GUID{} })
	return n * gpt.Sector
}

// Choose finds the disk that a rule means: exactly one.
func Choose(r Rule, disks []Disk) (Disk, error) {
	refuse := func(format string, args ...any) (Disk, error) {
		return Disk{}, fault.New(fault.Conflict, "cannot install: "+format+found(disks), args...)
	}
	if r.Wipe && !r.Named() {
		return refuse("install.disk.wipe needs the disk that it is about: path, serial, minSize, maxSize or pick")
	}
	var fit []Disk
	for _, d := range disks {
		if r.Path != "" && d.Path != r.Path || r.Serial != "" && d.Serial != r.Serial ||
			r.MinSize > 0 && d.Size < r.MinSize || r.MaxSize > 0 && d.Size > r.MaxSize {
			continue
		}
		// Who names a disk is told why it cannot be taken; who does not gets another.
		if r.Path == "" && r.Serial == "" && (d.InUse != "" || d.Size < Least() || d.Sector != gpt.Sector) {
			continue
		}
		if !r.Named() && d.Holds != "" {
			continue
		}
		fit = append(fit, d)
	}
	if r.Pick != "" {
		slices.SortStableFunc(fit, func(a, b Disk) int {
			c := 1
			if a.Size < b.Size {
				c = -1
			} else if a.Size == b.Size {
				c = 0
			}
			if r.Pick == "largest" {
				c = -c
			}
			return c
		})
		if len(fit) > 1 && fit[0].Size == fit[1].Size {
			return refuse("%s and %s have the same size: name one by path or serial", fit[0].Path, fit[1].Path)
		}
		fit = fit[:min(1, len(fit))]
	}
	switch {
	case len(fit) == 0 && !r.Named():
		return refuse("there is no empty disk of %s or more", size(Least()))
	case len(fit) == 0:
		return refuse("no disk is as install.disk says")
	case len(fit) > 1:
		return refuse("%d disks could be taken: say which in install.disk (path, serial, minSize, maxSize or pick)", len(fit))
	}
	d := fit[0]
	switch {
	case d.InUse != "":
		return refuse("%s cannot be written: %s", d.Path, d.InUse)
	case d.Sector != gpt.Sector:
		return refuse("%s has sectors of %d bytes, and this system needs 512", d.Path, d.Sector)
	case d.Size < Least():
		return refuse("%s has %s, and %s are needed", d.Path, size(d.Size), size(Least()))
	case d.Holds != "" && !r.Wipe:
		return refuse("%s holds %s: it is not overwritten without install.disk.wipe: true", d.Path, d.Holds)
	}
	return d, nil
}

// found lists what there is.
func found(disks []Disk) string {
	if len(disks) == 0 {
		return " (no disk was found)"
	}
	var names []string
	for _, d := range disks {
		names = append(names, strings.ReplaceAll(d.String(), "  ", " "))
	}
	return strings.ReplaceAll("; found: "+strings.Join(names, ", "), "%", "%%")
}
