package oci

import (
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// cfsPeriod is the period in microseconds that --cpus is a share of.
const cfsPeriod = 100_000

func (g *generator) resources() error {
	l := g.spec.Linux
	l.CgroupsPath = g.in.CgroupPath
	r, err := Resources(&g.in.HostConfig.Resources, g.in.Devices)
	if err != nil {
		return err
	}
	if g.in.CgroupPath == "" {
		if limits(r) {
			g.warn("No cgroup is delegated to this engine. Resource limits discarded.")
		}
		l.Resources = nil
		return nil
	}
	if g.in.CgroupV2 && r.Memory != nil {
		if s := r.Memory.Swappiness; s != nil {
			g.warn("Memory swappiness is not supported on cgroup v2. Memory swappiness discarded.")
		}
		if k := r.Memory.DisableOOMKiller; k != nil && *k {
			g.warn("Your kernel does not support OomKillDisable. OomKillDisable discarded.")
		}
		m := *r.Memory
		m.Swappiness, m.DisableOOMKiller = nil, nil
		if r.Memory = &m; m == (specs.LinuxMemory{}) {
			r.Memory = nil
		}
	}
	r.Devices = l.Resources.Devices
	l.Resources = r
	return nil
}

func limits(r *specs.LinuxResources) bool {
	return r.Memory != nil && (r.Memory.Limit != nil || r.Memory.Reservation != nil || r.Memory.Swap != nil) ||
		r.CPU != nil || r.BlockIO != nil || r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit > 0
}

// Resources converts limits, for a spec and for updates. device finds a block
// device by path. Parts with no limit in them are nil.
func Resources(r *container.Resources, device func(string) ([]specs.LinuxDevice, error)) (*specs.LinuxResources, error) {
	io, err := blockIO(r, device)
	if err != nil {
		return nil, err
	}
	return &specs.LinuxResources{Memory: memory(r), CPU: cpu(r), Pids: pids(r), BlockIO: io}, nil
}

func ptr[T any](v T) *T { return &v }

func memory(r *container.Resources) *specs.LinuxMemory {
	var m specs.LinuxMemory
	if r.Memory > 0 {
		m.Limit = ptr(r.Memory)
	}
	if r.MemoryReservation > 0 {
		m.Reservation = ptr(r.MemoryReservation)
	}
	// -1 is unlimited swap; it means something only beside a memory limit.
	if r.MemorySwap > 0 || r.MemorySwap == -1 && r.Memory > 0 {
		m.Swap = ptr(r.MemorySwap)
	}
	if r.MemorySwappiness != nil && *r.MemorySwappiness >= 0 {
		m.Swappiness = ptr(uint64(*r.MemorySwappiness))
	}
	// False is the kernel's default: writing it costs a system call for nothing.
	if r.OomKillDisable != nil && *r.OomKillDisable {
		m.DisableOOMKiller = ptr(true)
	}
	if m == (specs.LinuxMemory{}) {
		return nil
	}
	return &m
}

func cpu(r *container.Resources) *specs.LinuxCPU {
	c := specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems}
	if r.CPUShares > 0 {
		c.Shares = ptr(uint64(r.CPUShares))
	}
	if r.NanoCPUs > 0 {
		c.Period = ptr(uint64(cfsPeriod))
		c.Quota = ptr(nanoQuota(r.NanoCPUs))
	}
	if r.CPUPeriod != 0 {
		c.Period = ptr(uint64(r.CPUPeriod))
	}
	if r.CPUQuota != 0 {
		c.Quota = ptr(r.CPUQuota)
	}
	if r.CPURealtimePeriod != 0 {
		c.RealtimePeriod = ptr(uint64(r.CPURealtimePeriod))
	}
	if r.CPURealtimeRuntime != 0 {
		c.RealtimeRuntime = ptr(r.CPURealtimeRuntime)
	}
	if c == (specs.LinuxCPU{}) {
		return nil
	}
	return &c
}

// nanoQuota is microseconds a period; the kernel refuses less than 1000.
func nanoQuota(nano int64) int64 {
	return max(1000, nano/1_000_000*cfsPeriod/1000+nano%1_000_000*cfsPeriod/1_000_000_000)
}

func pids(r *container.Resources) *specs.LinuxPids {
	if r.PidsLimit == nil {
		return nil
	}
	if *r.PidsLimit <= 0 {
		return &specs.LinuxPids{Limit: ptr(int64(-1))}
	}
	return &specs.LinuxPids{Limit: ptr(*r.PidsLimit)}
}

func blockIO(r *container.Resources, device func(string) ([]specs.LinuxDevice, error)) (*specs.LinuxBlockIO, error) {
	find := func(path string) (specs.LinuxBlockIODevice, error) {
		var none specs.LinuxBlockIODevice
		if device == nil {
			return none, fault.New(fault.Invalid, "cannot limit block device %s: no device can be resolved", path)
		}
		d, err := device(path)
		if err != nil {
			return none, fault.New(fault.Invalid, "cannot limit block device %s: %w", path, err)
		}
		if len(d) != 1 || d[0].Type != "b" {
			return none, fault.New(fault.Invalid, "cannot limit block device %s: it is no block device", path)
		}
		return specs.LinuxBlockIODevice{Major: d[0].Major, Minor: d[0].Minor}, nil
	}
	var io specs.LinuxBlockIO
	any := false
	if r.BlkioWeight != 0 {
		io.Weight, any = ptr(r.BlkioWeight), true
	}
	for _, w := range r.BlkioWeightDevice {
		d, err := find(w.Path)
		if err != nil {
			return nil, err
		}
		io.WeightDevice, any = append(io.WeightDevice, specs.LinuxWeightDevice{LinuxBlockIODevice: d, Weight: ptr(w.Weight)}), true
	}
	for _, t := range []struct {
		from []*blkiodev.ThrottleDevice
		to   *[]specs.LinuxThrottleDevice
	}{
		{r.BlkioDeviceReadBps, &io.ThrottleReadBpsDevice},
		{r.BlkioDeviceWriteBps, &io.ThrottleWriteBpsDevice},
		{r.BlkioDeviceReadIOps, &io.ThrottleReadIOPSDevice},
		{r.BlkioDeviceWriteIOps, &io.ThrottleWriteIOPSDevice},
	} {
		for _, v := range t.from {
			d, err := find(v.Path)
			if err != nil {
				return nil, err
			}
			*t.to, any = append(*t.to, specs.LinuxThrottleDevice{LinuxBlockIODevice: d, Rate: v.Rate}), true
		}
	}
	if !any {
		return nil, nil
	}
	return &io, nil
}
