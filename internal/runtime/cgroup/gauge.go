package cgroup

import (
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
)

// gaugeKeys are the lines of memory.stat that Gauge keeps.
var gaugeKeys = map[string]bool{
	"total_inactive_file": true, "total_rss": true, "total_pgfault": true, "total_pgmajfault": true, "total_swap": true,
	"inactive_file": true, "anon": true, "pgfault": true, "pgmajfault": true, "swap": true,
}

// Gauge reads the main counters alone: processor time, memory and processes, no
// limits. It is
// for those who ask for all containers at once.
func (g *Group) Gauge() (*contract.Stats, error) {
	if g.h.Mode == None {
		return nil, fault.New(fault.Unsupported, "cannot read statistics: %s", noDelegation)
	}
	s := &contract.Stats{At: time.Now(), CgroupV2: g.h.Mode == V2}
	var buf [8192]byte
	number := func(ctrl, file string) uint64 {
		return parse(strings.TrimSpace(string(readInto(buf[:], g.dir(ctrl), file))))
	}
	if s.CgroupV2 {
		for line := range strings.Lines(string(readInto(buf[:], g.dir(""), "cpu.stat"))) {
			if v, ok := strings.CutPrefix(line, "usage_usec "); ok {
				s.CPUTotal = parse(strings.TrimSpace(v)) * 1000
			}
		}
		s.Memory, s.Pids = number("", "memory.current"), number("", "pids.current")
	} else {
		s.CPUTotal = number("cpuacct", "cpuacct.usage")
		s.Memory, s.Pids = number("memory", "memory.usage_in_bytes"), number("pids", "pids.current")
	}
	s.MemoryStat = make(map[string]uint64, 5)
	for line := range strings.Lines(string(readInto(buf[:], g.dir("memory"), "memory.stat"))) {
		if k, v, ok := strings.Cut(line, " "); ok && gaugeKeys[k] && (s.CgroupV2 || strings.HasPrefix(k, "total_")) {
			s.MemoryStat[k] = parse(strings.TrimSpace(v))
		}
	}
	return s, nil
}

// readInto reads a small file in one go.
func readInto(buf []byte, dir, file string) []byte {
	if dir == "" {
		return nil
	}
	fd, err := unix.Open(dir+"/"+file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	n, _ := unix.Read(fd, buf)
	return buf[:max(n, 0)]
}

// Details reads what Stats leaves out.
func (g *Group) Details() (*contract.Details, error) {
	if g.h.Mode == None {
		return nil, fault.New(fault.Unsupported, "cannot read statistics: %s", noDelegation)
	}
	d := &contract.Details{Hugepages: map[string]contract.HugepageUse{}}
	dir, now, most := g.dir("hugetlb"), "usage_in_bytes", "max_usage_in_bytes"
	if g.h.Mode == V2 {
		now, most = "current", "peak"
		d.Pressure = map[string]contract.Pressure{}
		for _, r := range []string{"cpu", "memory", "io"} {
			if v, err := read(g.dir(""), r+".pressure"); err == nil {
				d.Pressure[r] = pressure(v)
			}
		}
	}
	if dir == "" {
		return d, nil
	}
	files, _ := filepath.Glob(dir + "/hugetlb.*." + now)
	for _, f := range files {
		size := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), "hugetlb."), "."+now)
		if strings.Contains(size, ".") { // counters of reservations
			continue
		}
		var u contract.HugepageUse
		v, _ := read(dir, filepath.Base(f))
		u.Now = parse(v)
		v, _ = read(dir, "hugetlb."+size+"."+most)
		u.Max = parse(v)
		d.Hugepages[size] = u
	}
	return d, nil
}

// pressure reads a file of pressure stall information, whose times are microseconds.
func pressure(s string) (p contract.Pressure) {
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		var x contract.Stall
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			switch k {
			case "avg10":
				x.Avg10, _ = strconv.ParseFloat(v, 64)
			case "avg60":
				x.Avg60, _ = strconv.ParseFloat(v, 64)
			case "avg300":
				x.Avg300, _ = strconv.ParseFloat(v, 64)
			case "total":
				x.Total = parse(v) * 1000
			}
		}
		switch f[0] {
		case "some":
			p.Some = x
		case "full":
			p.Full = x
		}
	}
	return p
}
