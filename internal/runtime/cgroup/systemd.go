package cgroup

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// SystemdRunning reports whether the host was booted with systemd, without
// which there are no scopes.
func SystemdRunning() bool { return systemd.IsRunningSystemd() }

// Scope makes a group that systemd manages: a transient scope in a slice ("" is
// system.slice). It exists once a process has been put into it with Join.
func (h *Host) Scope(slice, id string) (*Group, error) {
	if slice == "" || slice == "/" {
		slice = "system.slice"
	}
	slice = filepath.Base(slice)
	if !strings.HasSuffix(slice, ".slice") {
		return nil, fault.New(fault.Invalid, "cgroup parent %q is not a systemd slice (name.slice)", slice)
	}
	cfg := &cgroups.Cgroup{Name: id, Parent: slice, ScopePrefix: "servin", Systemd: true, Resources: &cgroups.Resources{SkipDevices: true}}
	var mgr cgroups.Manager
	var err error
	if h.Mode == V2 {
		mgr, err = systemd.NewUnifiedManager(cfg, "")
	} else {
		mgr, err = systemd.NewLegacyManager(cfg, nil)
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot prepare systemd scope: %w", err)
	}
	g := &Group{h: h, mgr: mgr}
	dir, mount := mgr.Path("devices"), h.unified
	if h.Mode == V1 {
		for _, x := range h.v1 {
			if x.ctrls[0] == "devices" {
				mount = x.mount
			}
		}
	}
	g.path = "/" + strings.Trim(strings.TrimPrefix(dir, mount), "/")
	return g, nil
}

// Join puts a process into a group made by Scope.
func (g *Group) Join(pid int) error {
	if g.mgr == nil {
		return nil
	}
	if err := g.mgr.Apply(pid); err != nil {
		return fault.New(fault.Internal, "cannot have systemd start a scope: %w", err)
	}
	return nil
}

// applySystemd tells systemd the limits, since it would write its own over ours.
func (g *Group) applySystemd(r *specs.LinuxResources) error {
	if len(r.Devices) > 0 {
		with := *r
		with.Devices = append(slices.Clip(r.Devices), alwaysAllowed()...)
		r = &with
	}
	if err := g.mgr.Set(Resources(r)); err != nil {
		return fault.New(fault.Invalid, "cannot set limits: %w", err)
	}
	return nil
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// Resources is the part of the runtime spec's resources that the library knows.
func Resources(r *specs.LinuxResources) *cgroups.Resources {
	c := &cgroups.Resources{Unified: r.Unified, SkipDevices: len(r.Devices) == 0}
	for _, d := range r.Devices {
		c.Devices = append(c.Devices, rule(d))
	}
	if m := r.Memory; m != nil {
		c.Memory, c.MemorySwap, c.MemoryReservation = value(m.Limit), value(m.Swap), value(m.Reservation)
		c.MemorySwappiness, c.OomKillDisable = m.Swappiness, value(m.DisableOOMKiller)
	}
	if p := r.CPU; p != nil {
		c.CpuShares, c.CpuQuota, c.CpuPeriod, c.CpuBurst = value(p.Shares), value(p.Quota), value(p.Period), p.Burst
		c.CpuRtRuntime, c.CpuRtPeriod, c.CpusetCpus, c.CpusetMems, c.CPUIdle = value(p.RealtimeRuntime), value(p.RealtimePeriod), p.Cpus, p.Mems, p.Idle
		if c.CpuShares != 0 {
			c.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(c.CpuShares)
		}
	}
	if r.Pids != nil {
		c.PidsLimit = r.Pids.Limit
	}
	if b := r.BlockIO; b != nil {
		c.BlkioWeight, c.BlkioLeafWeight = value(b.Weight), value(b.LeafWeight)
		for _, w := range b.WeightDevice {
			c.BlkioWeightDevice = append(c.BlkioWeightDevice, cgroups.NewWeightDevice(w.Major, w.Minor, value(w.Weight), value(w.LeafWeight)))
		}
		throttle := func(l []specs.LinuxThrottleDevice) (out []*cgroups.ThrottleDevice) {
			for _, t := range l {
				out = append(out, cgroups.NewThrottleDevice(t.Major, t.Minor, t.Rate))
			}
			return out
		}
		c.BlkioThrottleReadBpsDevice, c.BlkioThrottleWriteBpsDevice = throttle(b.ThrottleReadBpsDevice), throttle(b.ThrottleWriteBpsDevice)
		c.BlkioThrottleReadIOPSDevice, c.BlkioThrottleWriteIOPSDevice = throttle(b.ThrottleReadIOPSDevice), throttle(b.ThrottleWriteIOPSDevice)
	}
	for _, l := range r.HugepageLimits {
		c.HugetlbLimit = append(c.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: l.Pagesize, Limit: l.Limit})
	}
	for name, l := range r.Rdma {
		if c.Rdma == nil {
			c.Rdma = map[string]cgroups.LinuxRdma{}
		}
		c.Rdma[name] = cgroups.LinuxRdma{HcaHandles: l.HcaHandles, HcaObjects: l.HcaObjects}
	}
	if n := r.Network; n != nil {
		c.NetClsClassid = value(n.ClassID)
		for _, p := range n.Priorities {
			c.NetPrioIfpriomap = append(c.NetPrioIfpriomap, &cgroups.IfPrioMap{Interface: p.Name, Priority: int64(p.Priority)})
		}
	}
	return c
}
