package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

func psFlags(f *flags) { f.text("format,f", "table", "select one of: table or json") }

func (a *app) ps(f *flags) error {
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	pids, err := c.cg.GetAllPids()
	if err != nil && errors.Is(err, os.ErrNotExist) && !c.alive() {
		err = nil // it has stopped, and its cgroup is gone
	}
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			a.log.Warnf("%s ps failure might be caused by lack of full access to cgroups", a.name)
		}
		return fmt.Errorf("unable to get all container pids: %w", err)
	}
	switch *f.str["format"] {
	case "table":
	case "json":
		return json.NewEncoder(a.stdout).Encode(pids)
	default:
		return errFormat
	}
	args := f.args[1:]
	if len(args) == 0 {
		args = []string{"-ef"}
	}
	out, err := osexec.Command("ps", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	head, rest, _ := strings.Cut(string(out), "\n")
	col := slices.Index(strings.Fields(head), "PID")
	if col < 0 {
		return errors.New("couldn't find PID field in ps output")
	}
	fmt.Fprintln(a.stdout, head)
	for line := range strings.Lines(rest) {
		fields := strings.Fields(line)
		if len(fields) <= col {
			continue
		}
		pid, err := strconv.Atoi(fields[col])
		if err != nil {
			return fmt.Errorf("unable to parse pid: %w", err)
		}
		if slices.Contains(pids, pid) {
			fmt.Fprint(a.stdout, line)
		}
	}
	return nil
}

func eventsFlags(f *flags) {
	f.duration("interval", 5*time.Second, "set the stats collection interval")
	f.boolean("stats", "display the container's stats then exit")
}

// event is a line of events, as runc writes them.
type event struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Data any    `json:"data,omitempty"`
}

func (a *app) events(f *flags) error {
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	interval := *f.dur["interval"]
	if interval <= 0 {
		return errors.New("duration interval must be greater than 0")
	}
	status, err := c.status()
	if err != nil {
		return err
	}
	if status == statusStopped {
		return fmt.Errorf("container with id %s is not running", c.id)
	}
	enc := json.NewEncoder(a.stdout)
	tell := func() error {
		s, err := c.cg.GetStats()
		if err != nil {
			return fmt.Errorf("unable to get container cgroup stats: %w", err)
		}
		return enc.Encode(event{"stats", c.id, statsOf(s)})
	}
	if *f.flag["stats"] {
		return tell()
	}
	ooms, err := c.watchOOM()
	if err != nil {
		return err
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case _, ok := <-ooms:
			if !ok {
				return nil // the container has ended
			}
			if err := enc.Encode(event{Type: "oom", ID: c.id}); err != nil {
				return err
			}
		case <-tick.C:
			if err := tell(); err != nil {
				a.log.Errorf("%v", err)
			}
		}
	}
}

// watchOOM tells each time that the kernel killed a process for want of memory; the
// channel is closed when the container has ended.
func (c *container) watchOOM() (<-chan struct{}, error) {
	if dir := c.cg.Path(""); dir != "" && cgroups.IsCgroup2UnifiedMode() {
		return c.watchOOMUnified(dir)
	}
	dir := c.cg.Path("memory")
	if dir == "" {
		return nil, errors.New("memory controller missing")
	}
	control, err := os.Open(dir + "/memory.oom_control")
	if err != nil {
		return nil, err
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		control.Close()
		return nil, os.NewSyscallError("eventfd", err)
	}
	ev := os.NewFile(uintptr(fd), "eventfd")
	if err := os.WriteFile(dir+"/cgroup.event_control", []byte(fmt.Sprintf("%d %d", fd, control.Fd())), 0); err != nil {
		control.Close()
		ev.Close()
		return nil, err
	}
	ch := make(chan struct{})
	go func() {
		defer close(ch)
		defer control.Close()
		defer ev.Close()
		var buf [8]byte
		for {
			if _, err := ev.Read(buf[:]); err != nil {
				return
			}
			// The removal of the cgroup is an event, too.
			if _, err := os.Lstat(dir + "/cgroup.event_control"); err != nil {
				return
			}
			ch <- struct{}{}
		}
	}()
	return ch, nil
}

func (c *container) watchOOMUnified(dir string) (<-chan struct{}, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init", err)
	}
	for _, file := range []string{"memory.events", "cgroup.events"} {
		if _, err := unix.InotifyAddWatch(fd, dir+"/"+file, unix.IN_MODIFY); err != nil {
			unix.Close(fd)
			return nil, &os.PathError{Op: "watch", Path: dir + "/" + file, Err: err}
		}
	}
	keyed := func(file, key string) uint64 {
		b, _ := os.ReadFile(dir + "/" + file)
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
				n, _ := strconv.ParseUint(v, 10, 64)
				return n
			}
		}
		return 0
	}
	before := keyed("memory.events", "oom_kill")
	f := os.NewFile(uintptr(fd), "inotify")
	ch := make(chan struct{})
	go func() {
		defer close(ch)
		defer f.Close()
		buf := make([]byte, 4096)
		for {
			if _, err := f.Read(buf); err != nil {
				return
			}
			if n := keyed("memory.events", "oom_kill"); n > before {
				before = n
				ch <- struct{}{}
			}
			if keyed("cgroup.events", "populated") == 0 {
				return
			}
		}
	}()
	return ch, nil
}

// The statistics as runc's events show them. Times are nanoseconds, sizes bytes.
type (
	stats struct {
		CPU      cpuStats                `json:"cpu"`
		CPUSet   cpusetStats             `json:"cpuset"`
		Memory   memoryStats             `json:"memory"`
		Pids     cgroupPids              `json:"pids"`
		Blkio    blkioStats              `json:"blkio"`
		Hugetlb  map[string]hugetlbStats `json:"hugetlb"`
		IntelRdt struct{}                `json:"intel_rdt"`
		Networks []struct{}              `json:"network_interfaces"`
	}
	cpuStats struct {
		Usage struct {
			Total        uint64   `json:"total,omitempty"`
			PerCPU       []uint64 `json:"percpu,omitempty"`
			PerCPUKernel []uint64 `json:"percpu_kernel,omitempty"`
			PerCPUUser   []uint64 `json:"percpu_user,omitempty"`
			Kernel       uint64   `json:"kernel"`
			User         uint64   `json:"user"`
		} `json:"usage"`
		Throttling struct {
			Periods          uint64 `json:"periods,omitempty"`
			ThrottledPeriods uint64 `json:"throttledPeriods,omitempty"`
			ThrottledTime    uint64 `json:"throttledTime,omitempty"`
		} `json:"throttling"`
		PSI *cgroups.PSIStats `json:"psi,omitempty"`
	}
	cpusetStats struct {
		CPUs                  []uint16 `json:"cpus,omitempty"`
		CPUExclusive          uint64   `json:"cpu_exclusive"`
		Mems                  []uint16 `json:"mems,omitempty"`
		MemHardwall           uint64   `json:"mem_hardwall"`
		MemExclusive          uint64   `json:"mem_exclusive"`
		MemoryMigrate         uint64   `json:"memory_migrate"`
		MemorySpreadPage      uint64   `json:"memory_spread_page"`
		MemorySpreadSlab      uint64   `json:"memory_spread_slab"`
		MemoryPressure        uint64   `json:"memory_pressure"`
		SchedLoadBalance      uint64   `json:"sched_load_balance"`
		SchedRelaxDomainLevel int64    `json:"sched_relax_domain_level"`
	}
	memoryEntry struct {
		Limit   uint64 `json:"limit"`
		Usage   uint64 `json:"usage,omitempty"`
		Max     uint64 `json:"max,omitempty"`
		Failcnt uint64 `json:"failcnt"`
	}
	memoryStats struct {
		Cache     uint64            `json:"cache,omitempty"`
		Usage     memoryEntry       `json:"usage"`
		Swap      memoryEntry       `json:"swap"`
		Kernel    memoryEntry       `json:"kernel"`
		KernelTCP memoryEntry       `json:"kernelTCP"`
		Raw       map[string]uint64 `json:"raw,omitempty"`
		PSI       *cgroups.PSIStats `json:"psi,omitempty"`
	}
	cgroupPids struct {
		Current uint64 `json:"current,omitempty"`
		Limit   uint64 `json:"limit,omitempty"`
	}
	blkioEntry struct {
		Major uint64 `json:"major,omitempty"`
		Minor uint64 `json:"minor,omitempty"`
		Op    string `json:"op,omitempty"`
		Value uint64 `json:"value,omitempty"`
	}
	blkioStats struct {
		ServiceBytes []blkioEntry      `json:"ioServiceBytesRecursive,omitempty"`
		Serviced     []blkioEntry      `json:"ioServicedRecursive,omitempty"`
		Queued       []blkioEntry      `json:"ioQueueRecursive,omitempty"`
		ServiceTime  []blkioEntry      `json:"ioServiceTimeRecursive,omitempty"`
		WaitTime     []blkioEntry      `json:"ioWaitTimeRecursive,omitempty"`
		Merged       []blkioEntry      `json:"ioMergedRecursive,omitempty"`
		Time         []blkioEntry      `json:"ioTimeRecursive,omitempty"`
		Sectors      []blkioEntry      `json:"sectorsRecursive,omitempty"`
		PSI          *cgroups.PSIStats `json:"psi,omitempty"`
	}
	hugetlbStats struct {
		Usage   uint64 `json:"usage,omitempty"`
		Max     uint64 `json:"max,omitempty"`
		Failcnt uint64 `json:"failcnt"`
	}
)

func statsOf(cg *cgroups.Stats) *stats {
	s := &stats{Hugetlb: map[string]hugetlbStats{}, CPUSet: cpusetStats(cg.CPUSetStats)}
	u := cg.CpuStats.CpuUsage
	s.CPU.Usage.Total, s.CPU.Usage.Kernel, s.CPU.Usage.User = u.TotalUsage, u.UsageInKernelmode, u.UsageInUsermode
	s.CPU.Usage.PerCPU, s.CPU.Usage.PerCPUKernel, s.CPU.Usage.PerCPUUser = u.PercpuUsage, u.PercpuUsageInKernelmode, u.PercpuUsageInUsermode
	t := cg.CpuStats.ThrottlingData
	s.CPU.Throttling.Periods, s.CPU.Throttling.ThrottledPeriods, s.CPU.Throttling.ThrottledTime = t.Periods, t.ThrottledPeriods, t.ThrottledTime
	s.CPU.PSI = cg.CpuStats.PSI
	s.Pids = cgroupPids(cg.PidsStats)
	entry := func(d cgroups.MemoryData) memoryEntry { return memoryEntry{d.Limit, d.Usage, d.MaxUsage, d.Failcnt} }
	m := cg.MemoryStats
	s.Memory = memoryStats{m.Cache, entry(m.Usage), entry(m.SwapUsage), entry(m.KernelUsage), entry(m.KernelTCPUsage), m.Stats, m.PSI}
	table := func(list []cgroups.BlkioStatEntry) []blkioEntry {
		out := make([]blkioEntry, 0, len(list))
		for _, e := range list {
			out = append(out, blkioEntry(e))
		}
		return out
	}
	b := cg.BlkioStats
	s.Blkio = blkioStats{table(b.IoServiceBytesRecursive), table(b.IoServicedRecursive), table(b.IoQueuedRecursive), table(b.IoServiceTimeRecursive),
		table(b.IoWaitTimeRecursive), table(b.IoMergedRecursive), table(b.IoTimeRecursive), table(b.SectorsRecursive), b.PSI}
	for k, v := range cg.HugetlbStats {
		s.Hugetlb[k] = hugetlbStats{v.Usage, v.MaxUsage, v.Failcnt}
	}
	return s
}
