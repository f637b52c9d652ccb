package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // sets the device functions of package cgroups
	devcfg "github.com/opencontainers/cgroups/devices/config"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// setting is one value to write.
type setting struct {
	ctrl, file, value string
	// lenient: a missing file is a warning (the kernel lacks the feature).
	lenient bool
}

// Apply sets the limits that r asks for; what is absent stays. Warnings name
// limits that this kernel cannot enforce.
func (g *Group) Apply(r *specs.LinuxResources) (warnings []string, err error) {
	if r == nil {
		return nil, nil
	}
	if g.h.Mode == None {
		if r.Memory != nil || r.CPU != nil || r.Pids != nil || r.BlockIO != nil {
			warnings = append(warnings, "limits are ignored: there are no cgroups that the engine may write to")
		}
		return warnings, nil
	}
	if g.mgr != nil {
		return nil, g.applySystemd(r)
	}
	if g.h.Mode == V2 {
		warnings, err = g.applyV2(r)
	} else {
		warnings, err = g.applyV1(r)
	}
	if err == nil && r.Devices != nil && !g.h.delegated {
		// Rules for devices take BPF in the first user namespace. In another one no
		// device node can be made, so that there is nothing to forbid.
		err = g.setDevices(r.Devices)
	}
	return warnings, err
}

func (g *Group) writeAll(set []setting) (warnings []string, err error) {
	for _, s := range set {
		dir := g.dir(s.ctrl)
		if dir == "" {
			warnings = append(warnings, fmt.Sprintf("%s is ignored: the kernel has no %s cgroup controller", s.file, s.ctrl))
			continue
		}
		err := write(dir, s.file, s.value)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) && s.lenient {
			warnings = append(warnings, fmt.Sprintf("%s is ignored: this kernel does not support it", s.file))
			continue
		}
		if err != nil {
			return warnings, limitError(err)
		}
	}
	return warnings, nil
}

func limitError(err error) error {
	kind := fault.Internal
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) || errors.Is(err, unix.EBUSY) {
		kind = fault.Invalid
	}
	return fault.New(kind, "cannot set limit: %w", err)
}

func num[T ~int | ~int64 | ~uint16 | ~uint32 | ~uint64](v T) string { return fmt.Sprint(v) }

func (g *Group) applyV1(r *specs.LinuxResources) ([]string, error) {
	var set []setting
	add := func(ctrl, file, value string) { set = append(set, setting{ctrl: ctrl, file: file, value: value}) }
	if c := r.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			add("cpu", "cpu.shares", num(*c.Shares))
		}
		if c.Period != nil && *c.Period != 0 {
			add("cpu", "cpu.cfs_period_us", num(*c.Period))
		}
		if c.Quota != nil && *c.Quota != 0 {
			add("cpu", "cpu.cfs_quota_us", num(*c.Quota))
		}
		if c.Burst != nil {
			add("cpu", "cpu.cfs_burst_us", num(*c.Burst))
		}
		if c.RealtimePeriod != nil && *c.RealtimePeriod != 0 {
			add("cpu", "cpu.rt_period_us", num(*c.RealtimePeriod))
		}
		if c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0 {
			add("cpu", "cpu.rt_runtime_us", num(*c.RealtimeRuntime))
		}
		if c.Idle != nil {
			add("cpu", "cpu.idle", num(*c.Idle))
		}
		if c.Cpus != "" {
			add("cpuset", "cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			add("cpuset", "cpuset.mems", c.Mems)
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		add("pids", "pids.max", pidsLimit(*p.Limit))
	}
	if b := r.BlockIO; b != nil {
		set = append(set, g.blkioV1(b)...)
	}
	for _, l := range r.HugepageLimits {
		add("hugetlb", "hugetlb."+l.Pagesize+".limit_in_bytes", num(l.Limit))
	}
	set = append(set, rdma(r)...)
	if n := r.Network; n != nil {
		if n.ClassID != nil {
			add("net_cls", "net_cls.classid", num(*n.ClassID))
		}
		for _, p := range n.Priorities {
			add("net_prio", "net_prio.ifpriomap", p.Name+" "+num(p.Priority))
		}
	}
	w, err := g.writeAll(set)
	if err != nil {
		return w, err
	}
	if r.Memory != nil {
		mw, err := g.memoryV1(r.Memory)
		return append(w, mw...), err
	}
	return w, nil
}

func pidsLimit(n int64) string {
	if n <= 0 {
		return "max"
	}
	return num(n)
}

func rdma(r *specs.LinuxResources) (set []setting) {
	for dev, l := range r.Rdma {
		v := dev
		if l.HcaHandles != nil {
			v += " hca_handle=" + num(*l.HcaHandles)
		}
		if l.HcaObjects != nil {
			v += " hca_object=" + num(*l.HcaObjects)
		}
		set = append(set, setting{ctrl: "rdma", file: "rdma.max", value: v})
	}
	return set
}

func (g *Group) memoryV1(m *specs.LinuxMemory) (warnings []string, err error) {
	dir := g.dir("memory")
	if dir == "" {
		return []string{"memory limits are ignored: the kernel has no memory cgroup controller"}, nil
	}
	limit := func() error {
		if m.Limit == nil || *m.Limit == 0 {
			return nil
		}
		return write(dir, "memory.limit_in_bytes", num(*m.Limit))
	}
	swap := func() error {
		if m.Swap == nil || *m.Swap == 0 {
			return nil
		}
		err := write(dir, "memory.memsw.limit_in_bytes", num(*m.Swap))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			if m.Swap != nil && *m.Swap > 0 {
				warnings = append(warnings, "the swap limit is ignored: this kernel does not account swap")
			}
			return nil
		}
		return err
	}
	// memory+swap may never be below memory: whichever order the change needs.
	// Unlimited swap first, since a limit below it always fits.
	first, second := limit, swap
	if m.Swap != nil && *m.Swap == -1 {
		first, second = swap, limit
	}
	if err := first(); err != nil {
		if !errors.Is(err, unix.EINVAL) {
			return warnings, limitError(err)
		}
		if err := second(); err != nil {
			return warnings, limitError(err)
		}
		if err := first(); err != nil {
			return warnings, limitError(err)
		}
	} else if err := second(); err != nil {
		return warnings, limitError(err)
	}
	var set []setting
	if m.Reservation != nil && *m.Reservation != 0 {
		set = append(set, setting{"memory", "memory.soft_limit_in_bytes", num(*m.Reservation), true})
	}
	if m.KernelTCP != nil && *m.KernelTCP != 0 {
		set = append(set, setting{"memory", "memory.kmem.tcp.limit_in_bytes", num(*m.KernelTCP), true})
	}
	if m.Swappiness != nil && *m.Swappiness <= 100 {
		set = append(set, setting{"memory", "memory.swappiness", num(*m.Swappiness), true})
	}
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		set = append(set, setting{"memory", "memory.oom_control", "1", true})
	}
	w, err := g.writeAll(set)
	return append(warnings, w...), err
}

func (g *Group) blkioV1(b *specs.LinuxBlockIO) (set []setting) {
	if b.Weight != nil && *b.Weight != 0 {
		file := "blkio.weight"
		if unix.Access(g.dir("blkio")+"/blkio.bfq.weight", unix.F_OK) == nil {
			file = "blkio.bfq.weight"
		}
		set = append(set, setting{"blkio", file, num(*b.Weight), true})
	}
	for _, d := range b.WeightDevice {
		if d.Weight != nil {
			set = append(set, setting{"blkio", "blkio.weight_device", fmt.Sprintf("%d:%d %d", d.Major, d.Minor, *d.Weight), true})
		}
	}
	for _, t := range []struct {
		file string
		devs []specs.LinuxThrottleDevice
	}{
		{"blkio.throttle.read_bps_device", b.ThrottleReadBpsDevice},
		{"blkio.throttle.write_bps_device", b.ThrottleWriteBpsDevice},
		{"blkio.throttle.read_iops_device", b.ThrottleReadIOPSDevice},
		{"blkio.throttle.write_iops_device", b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range t.devs {
			set = append(set, setting{"blkio", t.file, fmt.Sprintf("%d:%d %d", d.Major, d.Minor, d.Rate), false})
		}
	}
	return set
}

func (g *Group) applyV2(r *specs.LinuxResources) ([]string, error) {
	set, err := settingsV2(r, unix.Access(g.dir("")+"/io.bfq.weight", unix.F_OK) == nil)
	if err != nil {
		return nil, err
	}
	return g.writeAll(set)
}

// settingsV2 is what to write where on cgroup v2; bfq tells which scheduler
// takes weights.
func settingsV2(r *specs.LinuxResources, bfq bool) (set []setting, err error) {
	add := func(file, value string) { set = append(set, setting{file: file, value: value}) }
	if c := r.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			add("cpu.weight", num(cgroups.ConvertCPUSharesToCgroupV2Value(*c.Shares)))
		}
		if c.Idle != nil {
			add("cpu.idle", num(*c.Idle))
		}
		if c.Quota != nil && *c.Quota != 0 || c.Period != nil && *c.Period != 0 {
			quota, period := "max", uint64(100000)
			if c.Quota != nil && *c.Quota > 0 {
				quota = num(*c.Quota)
			}
			if c.Period != nil && *c.Period != 0 {
				period = *c.Period
			}
			add("cpu.max", quota+" "+num(period))
		}
		if c.Burst != nil {
			add("cpu.max.burst", num(*c.Burst))
		}
		if c.Cpus != "" {
			add("cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			add("cpuset.mems", c.Mems)
		}
	}
	if m := r.Memory; m != nil {
		var limit, swap int64
		if m.Limit != nil {
			limit = *m.Limit
		}
		if m.Swap != nil {
			swap = *m.Swap
		}
		v, err := cgroups.ConvertMemorySwapToCgroupV2Value(swap, limit)
		if err != nil {
			return nil, fault.As(fault.Invalid, err)
		}
		if s := orMax(v); s != "" {
			set = append(set, setting{file: "memory.swap.max", value: s, lenient: true})
		}
		if s := orMax(limit); s != "" {
			add("memory.max", s)
		}
		if m.Reservation != nil {
			if s := orMax(*m.Reservation); s != "" {
				add("memory.low", s)
			}
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		add("pids.max", pidsLimit(*p.Limit))
	}
	if b := r.BlockIO; b != nil {
		if b.Weight != nil && *b.Weight != 0 {
			if bfq {
				add("io.bfq.weight", num(*b.Weight))
			} else {
				set = append(set, setting{file: "io.weight", value: num(cgroups.ConvertBlkIOToIOWeightValue(*b.Weight)), lenient: true})
			}
		}
		for _, t := range []struct {
			key  string
			devs []specs.LinuxThrottleDevice
		}{{"rbps", b.ThrottleReadBpsDevice}, {"wbps", b.ThrottleWriteBpsDevice}, {"riops", b.ThrottleReadIOPSDevice}, {"wiops", b.ThrottleWriteIOPSDevice}} {
			for _, d := range t.devs {
				add("io.max", fmt.Sprintf("%d:%d %s=%d", d.Major, d.Minor, t.key, d.Rate))
			}
		}
	}
	for _, l := range r.HugepageLimits {
		add("hugetlb."+l.Pagesize+".max", num(l.Limit))
	}
	set = append(set, rdma(r)...)
	for k, v := range r.Unified {
		if strings.Contains(k, "/") || !strings.Contains(k, ".") {
			return nil, fault.New(fault.Invalid, "unified resource %q is not a file name", k)
		}
		for _, line := range strings.Split(strings.TrimSpace(v), "\n") {
			add(k, line)
		}
	}
	return set, nil
}

func orMax(v int64) string {
	switch {
	case v == -1:
		return "max"
	case v > 0:
		return strconv.FormatInt(v, 10)
	}
	return ""
}

// DeviceKey names a list of device rules, to compare two.
func DeviceKey(rules []specs.LinuxDeviceCgroup) string {
	var b strings.Builder
	for _, d := range rules {
		b.WriteString(deviceLine(d))
		if d.Allow {
			b.WriteByte('+')
		}
		b.WriteByte(';')
	}
	return b.String()
}

func deviceLine(d specs.LinuxDeviceCgroup) string {
	n := func(p *int64) string {
		if p == nil || *p < 0 {
			return "*"
		}
		return num(*p)
	}
	typ, access := d.Type, d.Access
	if typ == "" {
		typ = "a"
	}
	if access == "" {
		access = "rwm"
	}
	return typ + " " + n(d.Major) + ":" + n(d.Minor) + " " + access
}

func (g *Group) setDevices(rules []specs.LinuxDeviceCgroup) error {
	key := DeviceKey(rules)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.rule == key || len(rules) == 0 {
		return nil
	}
	dir := g.dir("devices")
	if dir == "" {
		return nil
	}
	rules = append(slices.Clip(rules), alwaysAllowed()...)
	var err error
	if g.h.Mode == V1 && allowList(rules) {
		err = write(dir, "devices.deny", "a")
		for _, d := range rules[1:] {
			if err == nil {
				err = write(dir, "devices.allow", deviceLine(d))
			}
		}
	} else {
		r := &cgroups.Resources{}
		for _, d := range rules {
			r.Devices = append(r.Devices, rule(d))
		}
		if g.h.Mode == V1 {
			err = cgroups.DevicesSetV1(dir, r)
		} else {
			err = cgroups.DevicesSetV2(dir, r)
		}
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot set device rules: %w", err)
	}
	g.rule = key
	return nil
}

// alwaysAllowed are the devices that every container may use, as the runtime
// spec demands (config-linux, default devices), and the making of nodes of any
// kind, which gives no access. runc adds the same ones last, too.
func alwaysAllowed() []specs.LinuxDeviceCgroup {
	any := int64(-1)
	out := []specs.LinuxDeviceCgroup{
		{Allow: true, Type: "c", Major: &any, Minor: &any, Access: "m"},
		{Allow: true, Type: "b", Major: &any, Minor: &any, Access: "m"},
	}
	// null, zero, full, random, urandom, tty, ptmx, and every pts
	for _, d := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {136, -1}} {
		out = append(out, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d[0], Minor: &d[1], Access: "rwm"})
	}
	return out
}

// DefaultDevices are the rules of alwaysAllowed in the library's form.
func DefaultDevices() []*devcfg.Rule {
	var out []*devcfg.Rule
	for _, d := range alwaysAllowed() {
		out = append(out, rule(d))
	}
	return out
}

// allowList reports the ordinary form: deny everything, then allow some.
func allowList(rules []specs.LinuxDeviceCgroup) bool {
	return !rules[0].Allow && deviceLine(rules[0]) == "a *:* rwm" &&
		!slices.ContainsFunc(rules[1:], func(d specs.LinuxDeviceCgroup) bool {
			return !d.Allow || d.Type != "c" && d.Type != "b"
		})
}

func rule(d specs.LinuxDeviceCgroup) *devcfg.Rule {
	n := func(p *int64) int64 {
		if p == nil || *p < 0 {
			return devcfg.Wildcard
		}
		return *p
	}
	typ, access := devcfg.WildcardDevice, d.Access
	if d.Type != "" {
		typ = devcfg.Type(d.Type[0])
	}
	if access == "" {
		access = "rwm"
	}
	return &devcfg.Rule{Type: typ, Major: n(d.Major), Minor: n(d.Minor), Permissions: devcfg.Permissions(access), Allow: d.Allow}
}
