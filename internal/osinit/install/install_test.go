package install

import (
	"bytes"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
)

func TestChoose(t *testing.T) {
	const gb = 1e9
	empty := Disk{Path: "/dev/sda", Serial: "A", Size: 100 * gb, Sector: 512}
	larger := Disk{Path: "/dev/sdb", Serial: "B", Size: 200 * gb, Sector: 512}
	full := Disk{Path: "/dev/sdc", Serial: "C", Size: 300 * gb, Sector: 512, Holds: "a file system (ext4)"}
	tiny := Disk{Path: "/dev/sdd", Serial: "D", Size: gb / 10, Sector: 512}
	used := Disk{Path: "/dev/sde", Serial: "E", Size: 100 * gb, Sector: 512, InUse: "it is in use"}
	wide := Disk{Path: "/dev/sdf", Serial: "F", Size: 100 * gb, Sector: 4096}
	half := Disk{Path: "/dev/sdg", Serial: "G", Size: 100 * gb, Sector: 512, Unfinished: true}
	for name, c := range map[string]struct {
		rule  Rule
		disks []Disk
		want  string // a path, or a part of the refusal
	}{
		"the only empty one":       {Rule{}, []Disk{full, tiny, used, wide, empty}, "/dev/sda"},
		"one that was cut off":     {Rule{}, []Disk{full, half}, "/dev/sdg"},
		"two empty ones":           {Rule{}, []Disk{empty, larger}, "2 disks could be taken"},
		"the larger":               {Rule{Pick: "largest"}, []Disk{empty, larger}, "/dev/sdb"},
		"the smaller":              {Rule{Pick: "smallest"}, []Disk{larger, tiny, empty}, "/dev/sda"},
		"the largest has data":     {Rule{Pick: "largest"}, []Disk{larger, full}, "holds a file system (ext4)"},
		"the largest is wiped":     {Rule{Pick: "largest", Wipe: true}, []Disk{larger, full}, "/dev/sdc"},
		"equal ones":               {Rule{Pick: "largest"}, []Disk{empty, half}, "same size"},
		"by serial":                {Rule{Serial: "B"}, []Disk{empty, larger}, "/dev/sdb"},
		"by path":                  {Rule{Path: "/dev/sda"}, []Disk{empty, larger}, "/dev/sda"},
		"by path and wrong serial": {Rule{Path: "/dev/sda", Serial: "B"}, []Disk{empty, larger}, "no disk is as"},
		"by size":                  {Rule{MinSize: 150 * gb, MaxSize: 250 * gb}, []Disk{empty, larger, full}, "/dev/sdb"},
		"data":                     {Rule{Path: "/dev/sdc"}, []Disk{empty, full}, "not overwritten without"},
		"data that may go":         {Rule{Path: "/dev/sdc", Wipe: true}, []Disk{empty, full}, "/dev/sdc"},
		"wipe what":                {Rule{Wipe: true}, []Disk{empty}, "needs the disk"},
		"in use":                   {Rule{Path: "/dev/sde", Wipe: true}, []Disk{used}, "in use"},
		"too small":                {Rule{Serial: "D"}, []Disk{tiny}, "are needed"},
		"sectors":                  {Rule{Serial: "F"}, []Disk{wide}, "sectors of 4096"},
		"data alone":               {Rule{}, []Disk{full}, "no empty disk"},
		"no disk":                  {Rule{}, nil, "no disk was found"},
		"all data, none named":     {Rule{MinSize: 1}, []Disk{full, {Path: "/dev/sdh", Size: 300 * gb, Sector: 512, Holds: "100%s"}}, "100%s"},
	} {
		d, err := Choose(c.rule, c.disks)
		if err == nil && d.Path != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v, want %q", name, d.Path, err, c.want)
		}
	}
}

// image is a disk in memory.
type image []byte

func (d image) ReadAt(b []byte, at int64) (int, error)  { return bytes.NewReader(d).ReadAt(b, at) }
func (d image) WriteAt(b []byte, at int64) (int, error) { return copy(d[at:], b), nil }

func TestWhatIsOnADisk(t *testing.T) {
	const size = 8 << 20
	table := func(names ...string) func(image) {
		return func(d image) {
			g := &gpt.Table{}
			for i, n := range names {
				g.Partitions = append(g.Partitions, gpt.Partition{Type: gpt.LinuxData, ID: gpt.GUID{1}, First: uint64(2048 + i), Last: uint64(2048 + i), Name: n})
			}
			if err := g.Write(d, size/gpt.Sector); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		put        func(image)
		holds      string
		unfinished bool
	}{
		"empty":             {func(image) {}, "", false},
		"ext4":              {func(d image) { copy(d[0x438:], "\x53\xef") }, "ext4", false},
		"LUKS":              {func(d image) { copy(d, "LUKS\xba\xbe") }, "LUKS", false},
		"an MBR":            {func(d image) { copy(d[510:], "\x55\xaa") }, "a partition table", false},
		"a byte far in":     {func(d image) { d[size/2/512*512+3] = 1 }, "", false},
		"a byte at the end": {func(d image) { d[size-1] = 1 }, "not known", false},
		"a byte in front":   {func(d image) { d[4711] = 1 }, "not known", false},
		"partitions":        {table("data", "more"), `2 partitions: "data" "more"`, false},
		"a system":          {table("esp", slots.Partition("a")), "a system of CloudOS", false},
		"not yet sealed":    {func(d image) { table("esp", slots.Partition("a"))(d); d[510] = 0 }, "", true},
		"marked":            {func(d image) { copy(d[gpt.Sector:], marker); copy(d[510:], "\x55\xaa") }, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			d, disk := image(make([]byte, size)), Disk{Size: size}
			c.put(d)
			if err := disk.inspect(d); err != nil {
				t.Fatal(err)
			}
			if name == "a byte far in" { // places are probed, not all of it: either is right
				return
			}
			if disk.Unfinished != c.unfinished || (c.holds == "") != (disk.Holds == "") || !strings.Contains(disk.Holds, c.holds) {
				t.Errorf("it holds %q, unfinished %v", disk.Holds, disk.Unfinished)
			}
		})
	}
}

func TestIdentity(t *testing.T) {
	m := &release.Manifest{Parts: []release.Part{{Use: release.Root, SHA256: "x"}}}
	one := Identity([]byte("a"), m, Disk{Path: "/dev/sda", Serial: "1"})
	if one != Identity([]byte("a"), m, Disk{Path: "/dev/sda", Serial: "1", Holds: "x"}) ||
		one == Identity([]byte("b"), m, Disk{Path: "/dev/sda", Serial: "1"}) || one == Identity([]byte("a"), m, Disk{Path: "/dev/sda", Serial: "2"}) {
		t.Error("identities are wrong")
	}
}

func FuzzInspect(f *testing.F) {
	f.Add([]byte("EFI PART"), uint16(512))
	f.Add([]byte("\x55\xaa"), uint16(510))
	base := make([]byte, 2<<20)
	f.Fuzz(func(t *testing.T, b []byte, at uint16) {
		d := image(base)
		n := copy(d[at:], b)
		defer clear(d[at : int(at)+n])
		disk := Disk{Size: uint64(len(d))}
		if err := disk.inspect(d); err != nil {
			return
		}
		_ = disk.String()
		if disk.Holds == "" && !disk.Unfinished && !zero(d[:1<<20]) {
			t.Fatal("a disk with something on it is taken for empty")
		}
	})
}
