package slots

import "github.com/cloudos-io/cloudos/internal/gpt"

// The partitions of a disk, in MiB. Data is the last: it grows with the disk.
const (
	mib      = 1 << 20
	BIOSSize = 1
	ESPSize  = 160
	SlotSize = 192
	DataSize = 1024 + 16 // a file system's least, and the header of an encrypted one
)

// Names of partitions.
const (
	BIOSPartition = "bios"
	ESPPartition  = "esp"
	DataPartition = "cloudos-data"
)

// Layout is a disk's table, and how many sectors the smallest disk has. id gives identities to
// the partitions, by their names.
func Layout(disk gpt.GUID, id func(name string) gpt.GUID) (*gpt.Table, uint64) {
	t := &gpt.Table{Disk: disk}
	at := uint64(mib / gpt.Sector)
	for _, p := range []struct {
		name string
		kind gpt.GUID
		size uint64
	}{
		{BIOSPartition, gpt.BIOSBoot, BIOSSize}, {ESPPartition, gpt.ESP, ESPSize}, {Partition("a"), gpt.LinuxData, SlotSize},
		{Partition("b"), gpt.LinuxData, SlotSize}, {DataPartition, gpt.LinuxData, DataSize},
	} {
		n := p.size * mib / gpt.Sector
		t.Partitions = append(t.Partitions, gpt.Partition{Type: p.kind, ID: id(p.name), First: at, Last: at + n - 1, Name: p.name})
		at += n
	}
	return t, at + mib/gpt.Sector
}
