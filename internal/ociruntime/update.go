package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/docker/go-units"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func updateFlags(f *flags) {
	f.text("resources,r", "", "path to the file containing the resources to update or '-' to read from the standard input; all other options are ignored then")
	f.number("blkio-weight", "specifies per cgroup weight, range is from 10 to 1000")
	f.text("cpu-period", "", "CPU CFS period to be used for hardcapping (in usecs). 0 to use system default")
	f.text("cpu-quota", "", "CPU CFS hardcap limit (in usecs). Allowed cpu time in a given period")
	f.text("cpu-burst", "", "CPU CFS hardcap burst limit (in usecs). Allowed accumulated cpu time additionally for burst a given period")
	f.text("cpu-share", "", "CPU shares (relative weight vs. other containers)")
	f.text("cpu-rt-period", "", "CPU realtime period to be used for hardcapping (in usecs). 0 to use system default")
	f.text("cpu-rt-runtime", "", "CPU realtime hardcap limit (in usecs). Allowed cpu time in a given period")
	f.text("cpuset-cpus", "", "CPU(s) to use")
	f.text("cpuset-mems", "", "memory node(s) to use")
	f.text("kernel-memory", "", "")
	f.text("kernel-memory-tcp", "", "")
	f.text("memory", "", "memory limit (in bytes)")
	f.text("cpu-idle", "", "set cgroup SCHED_IDLE or not, 0: default behavior, 1: SCHED_IDLE")
	f.text("memory-reservation", "", "memory reservation or soft_limit (in bytes)")
	f.text("memory-swap", "", "total memory usage (memory + swap); set '-1' to enable unlimited swap")
	f.number("pids-limit", "maximum number of pids allowed in the container")
	f.text("l3-cache-schema", "", "(refused: there is no Intel RDT here)")
	f.text("mem-bw-schema", "", "(refused: there is no Intel RDT here)")
}

func (a *app) update(f *flags) error {
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	if *f.str["l3-cache-schema"] != "" {
		//lint:ignore ST1005 as callers know it
		return errors.New("Intel RDT/CAT: l3 cache schema is not enabled")
	}
	if *f.str["mem-bw-schema"] != "" {
		//lint:ignore ST1005 as callers know it
		return errors.New("Intel RDT/MBA: memory bandwidth schema is not enabled")
	}
	r, err := a.updates(f)
	if err != nil {
		return err
	}
	lock, err := c.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	status, err := c.status()
	if err != nil {
		return err
	}
	if status == statusStopped {
		return errNotRunning
	}
	old := c.rec.Config.Cgroups.Resources
	now := *old
	mergeResources(&now, r)
	// Rules for devices are not changed by this, also not those that others have set.
	now.SkipDevices = true
	if err := c.cg.Set(&now); err != nil {
		back := *old
		back.SkipDevices = true
		if berr := c.cg.Set(&back); berr != nil {
			a.log.Warnf("setting back the limits failed: %v; the record and the cgroup may differ", berr)
		}
		return err
	}
	now.SkipDevices = old.SkipDevices
	c.rec.Config.Cgroups.Resources = &now
	return c.save()
}

// updates reads what is to be changed, from flags or a document.
func (a *app) updates(f *flags) (*specs.LinuxResources, error) {
	no := false
	r := &specs.LinuxResources{Memory: &specs.LinuxMemory{CheckBeforeUpdate: &no}, CPU: &specs.LinuxCPU{}, BlockIO: &specs.LinuxBlockIO{}, Pids: &specs.LinuxPids{}}
	if in := *f.str["resources"]; in != "" {
		from := a.stdin
		if in != "-" {
			var err error
			if from, err = os.Open(in); err != nil {
				return nil, err
			}
			defer from.Close()
		}
		if err := json.NewDecoder(from).Decode(r); err != nil {
			return nil, err
		}
		r.Memory, r.CPU, r.BlockIO, r.Pids = orNew(r.Memory), orNew(r.CPU), orNew(r.BlockIO), orNew(r.Pids)
	} else if err := f.resources(r); err != nil {
		return nil, err
	}
	if r.Memory.Limit != nil && *r.Memory.Limit == -1 && r.Memory.Swap == nil {
		zero := int64(0) // no limit of swap without one of memory
		r.Memory.Swap = &zero
	}
	if r.CPU.Idle != nil && r.CPU.Shares == nil {
		zero := uint64(0) // an idle group takes no weight
		r.CPU.Shares = &zero
	}
	if r.Memory.Kernel != nil || r.Memory.KernelTCP != nil { //nolint:staticcheck // obsolete, not gone
		a.log.Warnf("kernel memory limits are obsolete and ignored")
	}
	return r, nil
}

func orNew[T any](p *T) *T {
	if p == nil {
		return new(T)
	}
	return p
}

func (f *flags) resources(r *specs.LinuxResources) error {
	if w := *f.num["blkio-weight"]; w != 0 {
		v := uint16(w)
		r.BlockIO.Weight = &v
	}
	r.CPU.Cpus, r.CPU.Mems = *f.str["cpuset-cpus"], *f.str["cpuset-mems"]
	for name, to := range map[string]**uint64{"cpu-burst": &r.CPU.Burst, "cpu-period": &r.CPU.Period, "cpu-rt-period": &r.CPU.RealtimePeriod, "cpu-share": &r.CPU.Shares} {
		if v := *f.str[name]; v != "" {
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				return fmt.Errorf("invalid value for %s: %w", name, err)
			}
			*to = &n
		}
	}
	for name, to := range map[string]**int64{"cpu-quota": &r.CPU.Quota, "cpu-rt-runtime": &r.CPU.RealtimeRuntime, "cpu-idle": &r.CPU.Idle} {
		if v := *f.str[name]; v != "" {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				return fmt.Errorf("invalid value for %s: %w", name, err)
			}
			*to = &n
		}
	}
	for name, to := range map[string]**int64{
		"memory": &r.Memory.Limit, "memory-swap": &r.Memory.Swap, "memory-reservation": &r.Memory.Reservation,
		"kernel-memory": &r.Memory.Kernel, "kernel-memory-tcp": &r.Memory.KernelTCP, //nolint:staticcheck // obsolete, not gone
	} {
		v := *f.str[name]
		if v == "" {
			continue
		}
		n := int64(-1)
		if v != "-1" {
			var err error
			if n, err = units.RAMInBytes(v); err != nil {
				return fmt.Errorf("invalid value for %s: %w", name, err)
			}
		}
		*to = &n
	}
	if f.isSet("pids-limit") {
		n := int64(*f.num["pids-limit"])
		r.Pids.Limit = &n
	}
	return nil
}

// mergeResources puts changes over the limits in force.
func mergeResources(to *cgroups.Resources, r *specs.LinuxResources) {
	n := cgroup.Resources(r)
	if r.BlockIO.Weight != nil {
		to.BlkioWeight = n.BlkioWeight
	}
	if r.BlockIO.LeafWeight != nil {
		to.BlkioLeafWeight = n.BlkioLeafWeight
	}
	for _, d := range n.BlkioWeightDevice {
		to.BlkioWeightDevice = upsert(to.BlkioWeightDevice, d, func(x *cgroups.WeightDevice) bool { return x.Major == d.Major && x.Minor == d.Minor })
	}
	for _, p := range []struct {
		to   *[]*cgroups.ThrottleDevice
		from []*cgroups.ThrottleDevice
	}{
		{&to.BlkioThrottleReadBpsDevice, n.BlkioThrottleReadBpsDevice}, {&to.BlkioThrottleWriteBpsDevice, n.BlkioThrottleWriteBpsDevice},
		{&to.BlkioThrottleReadIOPSDevice, n.BlkioThrottleReadIOPSDevice}, {&to.BlkioThrottleWriteIOPSDevice, n.BlkioThrottleWriteIOPSDevice},
	} {
		for _, d := range p.from {
			*p.to = upsert(*p.to, d, func(x *cgroups.ThrottleDevice) bool { return x.Major == d.Major && x.Minor == d.Minor })
		}
	}
	// Quota and period mean something only together: what is not given stays.
	if (n.CpuPeriod == 0) == (n.CpuQuota == 0) {
		to.CpuPeriod, to.CpuQuota = n.CpuPeriod, n.CpuQuota
	} else if n.CpuPeriod != 0 {
		to.CpuPeriod = n.CpuPeriod
	} else {
		to.CpuQuota = n.CpuQuota
	}
	to.CpuBurst, to.CPUIdle, to.CpusetCpus, to.CpusetMems = n.CpuBurst, n.CPUIdle, n.CpusetCpus, n.CpusetMems
	if r.CPU.Shares != nil {
		to.CpuShares, to.CpuWeight = n.CpuShares, cgroups.ConvertCPUSharesToCgroupV2Value(n.CpuShares)
	}
	if r.CPU.RealtimePeriod != nil {
		to.CpuRtPeriod = n.CpuRtPeriod
	}
	if r.CPU.RealtimeRuntime != nil {
		to.CpuRtRuntime = n.CpuRtRuntime
	}
	m := r.Memory
	if m.Limit != nil {
		to.Memory = n.Memory
	}
	if m.Reservation != nil {
		to.MemoryReservation = n.MemoryReservation
	}
	if m.Swap != nil {
		to.MemorySwap = n.MemorySwap
	}
	if m.CheckBeforeUpdate != nil {
		to.MemoryCheckBeforeUpdate = *m.CheckBeforeUpdate
	}
	to.PidsLimit, to.Unified = n.PidsLimit, n.Unified
	if len(n.HugetlbLimit) > 0 {
		to.HugetlbLimit = n.HugetlbLimit
	}
}

// upsert puts d in the place of the last one like it.
func upsert[T any](list []T, d T, same func(T) bool) []T {
	for i := len(list) - 1; i >= 0; i-- {
		if same(list[i]) {
			list[i] = d
			return list
		}
	}
	return append(list, d)
}
