package cgroup

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
)

// Stats reads what the group has used.
func (g *Group) Stats() (*contract.Stats, error) {
	if g.h.Mode == None {
		return nil, fault.New(fault.Unsupported, "cannot read statistics: %s", noDelegation)
	}
	s := &contract.Stats{At: time.Now(), OnlineCPUs: runtime.NumCPU(), CgroupV2: g.h.Mode == V2, MemoryStat: map[string]uint64{}}
	s.SystemCPU = systemCPU()
	if g.h.Mode == V2 {
		g.statsV2(s)
	} else {
		g.statsV1(s)
	}
	return s, nil
}

// systemCPU is the time all processors were busy or idle, in nanoseconds, as
// the first line of /proc/stat counts it in ticks of 10 ms.
func systemCPU() uint64 {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0
	}
	defer f.Close()
	var buf [512]byte
	n, _ := f.Read(buf[:])
	line, _, _ := strings.Cut(string(buf[:n]), "\n")
	var sum uint64
	for i, v := range strings.Fields(line) {
		if i >= 1 && i <= 7 { // guest time is in user time already
			sum += parse(v)
		}
	}
	return sum * 10_000_000
}

func parse(s string) uint64 {
	if s == "max" {
		return 0
	}
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}

func keyed(s string) map[string]uint64 {
	m := map[string]uint64{}
	for line := range strings.Lines(s) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			m[k] = parse(v)
		}
	}
	return m
}

func (g *Group) statsV1(s *contract.Stats) {
	value := func(ctrl, file string) uint64 {
		v, _ := read(g.dir(ctrl), file)
		return parse(v)
	}
	s.CPUTotal = value("cpuacct", "cpuacct.usage")
	v, _ := read(g.dir("cpuacct"), "cpuacct.usage_percpu")
	for _, f := range strings.Fields(v) {
		s.PerCPU = append(s.PerCPU, parse(f))
	}
	v, _ = read(g.dir("cpuacct"), "cpuacct.stat")
	k := keyed(v)
	s.CPUUser, s.CPUSystem = k["user"]*10_000_000, k["system"]*10_000_000
	v, _ = read(g.dir("cpu"), "cpu.stat")
	k = keyed(v)
	s.Periods, s.ThrottledPeriods, s.ThrottledTime = k["nr_periods"], k["nr_throttled"], k["throttled_time"]

	s.Memory = value("memory", "memory.usage_in_bytes")
	s.MemoryMax = value("memory", "memory.max_usage_in_bytes")
	s.MemoryLimit = value("memory", "memory.limit_in_bytes")
	s.MemoryFailures = value("memory", "memory.failcnt")
	v, _ = read(g.dir("memory"), "memory.stat")
	s.MemoryStat = keyed(v)
	s.Pids, s.PidsLimit = value("pids", "pids.current"), value("pids", "pids.max")
	for table, file := range map[string]string{
		"io_service_bytes_recursive": "blkio.throttle.io_service_bytes_recursive",
		"io_serviced_recursive":      "blkio.throttle.io_serviced_recursive",
	} {
		v, err := read(g.dir("blkio"), file)
		if err != nil {
			v, _ = read(g.dir("blkio"), strings.TrimSuffix(file, "_recursive"))
		}
		for line := range strings.Lines(v) {
			f := strings.Fields(line)
			if len(f) != 3 {
				continue
			}
			maj, min, _ := strings.Cut(f[0], ":")
			s.Blkio = append(s.Blkio, contract.BlkioEntry{Table: table, Major: parse(maj), Minor: parse(min), Op: f[1], Value: parse(f[2])})
		}
	}
}

func (g *Group) statsV2(s *contract.Stats) {
	dir := g.dir("")
	value := func(file string) uint64 {
		v, _ := read(dir, file)
		return parse(v)
	}
	v, _ := read(dir, "cpu.stat")
	k := keyed(v)
	s.CPUTotal, s.CPUUser, s.CPUSystem = k["usage_usec"]*1000, k["user_usec"]*1000, k["system_usec"]*1000
	s.Periods, s.ThrottledPeriods, s.ThrottledTime = k["nr_periods"], k["nr_throttled"], k["throttled_usec"]*1000
	s.Memory, s.MemoryMax, s.MemoryLimit = value("memory.current"), value("memory.peak"), value("memory.max")
	v, _ = read(dir, "memory.events")
	s.MemoryFailures = keyed(v)["max"]
	v, _ = read(dir, "memory.stat")
	s.MemoryStat = keyed(v)
	s.Pids, s.PidsLimit = value("pids.current"), value("pids.max")
	v, _ = read(dir, "io.stat")
	for line := range strings.Lines(v) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		maj, min, _ := strings.Cut(f[0], ":")
		for _, kv := range f[1:] {
			key, val, _ := strings.Cut(kv, "=")
			e := contract.BlkioEntry{Major: parse(maj), Minor: parse(min), Value: parse(val)}
			switch key {
			case "rbytes":
				e.Table, e.Op = "io_service_bytes_recursive", "read"
			case "wbytes":
				e.Table, e.Op = "io_service_bytes_recursive", "write"
			case "rios":
				e.Table, e.Op = "io_serviced_recursive", "read"
			case "wios":
				e.Table, e.Op = "io_serviced_recursive", "write"
			default:
				continue
			}
			s.Blkio = append(s.Blkio, e)
		}
	}
}
