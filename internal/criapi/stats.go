package criapi

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// rates remembers the last readings of processor time.
type rates struct {
	mu sync.Mutex
	m  map[string]reading
}

// of takes a reading and gives the rate since one at least a second older.
func (r *rates) of(id string, at time.Time, cpu uint64) (rate uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last, known := r.m[id]
	if !known {
		r.m[id] = reading{at: at, cpu: cpu}
		return 0, false
	}
	if d := at.Sub(last.at); d >= time.Second {
		now := reading{at: at, cpu: cpu, rated: true}
		if cpu > last.cpu {
			now.rate = uint64(float64(cpu-last.cpu) / d.Seconds())
		}
		r.m[id] = now
		return now.rate, true
	}
	return last.rate, last.rated
}

func (r *rates) keep(exists func(id string) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.m, func(id string, _ reading) bool { return !exists(id) })
}

func u64(v uint64) *v1.UInt64Value { return &v1.UInt64Value{Value: v} }

// memory reads what Kubernetes calls the parts of memory: the working set is what
// cannot be given back at once.
func memory(c *engine.Counters) (working, rss, cache, faults, major uint64) {
	st := c.MemoryStat
	inactive := st["total_inactive_file"]
	rss, cache, faults, major = st["total_rss"], st["total_cache"], st["total_pgfault"], st["total_pgmajfault"]
	if c.CgroupV2 {
		inactive = st["inactive_file"]
		rss, cache, faults, major = st["anon"], st["file"], st["pgfault"], st["pgmajfault"]
	}
	if working = c.Memory; working > inactive {
		working -= inactive
	} else {
		working = 0
	}
	return working, rss, cache, faults, major
}

func (s *Server) attributes(r *container.Record) *v1.ContainerAttributes {
	c := s.edges.get(r)
	return &v1.ContainerAttributes{Id: r.ID, Metadata: c.GetMetadata(), Labels: c.GetLabels(), Annotations: c.GetAnnotations()}
}

func (s *Server) containerStats(c engine.ContainerCounters) *v1.ContainerStats {
	at := c.At.UnixNano()
	out := &v1.ContainerStats{Attributes: s.attributes(c.Record), Cpu: s.cpu(c.Record.ID, c.At, c.CPUTotal), Memory: s.memory(c)}
	out.Swap = &v1.SwapUsage{Timestamp: at, SwapUsageBytes: u64(c.MemoryStat["total_swap"])}
	if c.CgroupV2 {
		out.Swap.SwapUsageBytes = u64(c.MemoryStat["swap"])
	}
	fs := &v1.FilesystemUsage{Timestamp: c.LayerAt.UnixNano(), FsId: &v1.FilesystemIdentifier{Mountpoint: s.cfg.Engine.PodHost().Root}}
	if c.Layer >= 0 {
		fs.UsedBytes = u64(uint64(c.Layer))
	} else {
		fs.Timestamp, fs.UsedBytes = at, u64(0)
	}
	out.WritableLayer = fs
	if c.Details != nil && c.Details.Pressure != nil {
		p := c.Details.Pressure
		out.Cpu.Psi, out.Memory.Psi, out.Io = psi(p["cpu"]), psi(p["memory"]), &v1.IoUsage{Timestamp: at, Psi: psi(p["io"])}
	}
	return out
}

func psi(p engine.Pressure) *v1.PsiStats {
	return &v1.PsiStats{
		Full: &v1.PsiData{Total: p.Full.Total, Avg10: p.Full.Avg10, Avg60: p.Full.Avg60, Avg300: p.Full.Avg300},
		Some: &v1.PsiData{Total: p.Some.Total, Avg10: p.Some.Avg10, Avg60: p.Some.Avg60, Avg300: p.Some.Avg300},
	}
}

func (s *Server) cpu(id string, at time.Time, total uint64) *v1.CpuUsage {
	c := &v1.CpuUsage{Timestamp: at.UnixNano(), UsageCoreNanoSeconds: u64(total)}
	if r, ok := s.rates.of(id, at, total); ok {
		c.UsageNanoCores = u64(r)
	}
	return c
}

func (s *Server) memory(c engine.ContainerCounters) *v1.MemoryUsage {
	working, rss, _, faults, major := memory(c.Counters)
	m := &v1.MemoryUsage{
		Timestamp: c.At.UnixNano(), WorkingSetBytes: u64(working), UsageBytes: u64(c.Memory), RssBytes: u64(rss), PageFaults: u64(faults), MajorPageFaults: u64(major),
	}
	if limit := uint64(max(c.Record.HostConfig.Memory, 0)); limit > working {
		m.AvailableBytes = u64(limit - working)
	}
	return m
}

// ContainerStats implements the CRI.
func (s *Server) ContainerStats(ctx context.Context, req *v1.ContainerStatsRequest) (*v1.ContainerStatsResponse, error) {
	r, err := s.cfg.Engine.PodContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	l := s.statsOf(ctx, engine.CounterOptions{Container: r.ID, Fresh: true})
	if len(l) == 0 {
		return nil, fault.New(fault.Conflict, "cannot tell what container %s uses: it is not running", r.ID)
	}
	return &v1.ContainerStatsResponse{Stats: l[0]}, nil
}

func (s *Server) statsOf(ctx context.Context, o engine.CounterOptions) []*v1.ContainerStats {
	var out []*v1.ContainerStats
	o.Details = s.cfg.Engine.PodHost().CgroupV2 // pressure is there alone
	for _, p := range s.cfg.Engine.PodCounters(ctx, o) {
		for _, c := range p.Containers {
			out = append(out, s.containerStats(c))
		}
	}
	return out
}

func (s *Server) listStats(ctx context.Context, f *v1.ContainerStatsFilter) []*v1.ContainerStats {
	var o engine.CounterOptions
	if id := f.GetId(); id != "" {
		r, err := s.cfg.Engine.PodContainer(id)
		if err != nil {
			return nil
		}
		o.Container, o.Fresh = r.ID, true
	}
	if id := f.GetPodSandboxId(); id != "" {
		p, err := s.cfg.Engine.Pod(id)
		if err != nil {
			return nil
		}
		o.Pod = p.ID
	}
	if l := f.GetLabelSelector(); len(l) > 0 {
		o.Match = func(r *container.Record) bool { return hasLabels(s.edges.get(r).GetLabels(), l) }
	}
	return s.statsOf(ctx, o)
}

// ListContainerStats implements the CRI.
func (s *Server) ListContainerStats(ctx context.Context, req *v1.ListContainerStatsRequest) (*v1.ListContainerStatsResponse, error) {
	return &v1.ListContainerStatsResponse{Stats: s.listStats(ctx, req.GetFilter())}, nil
}

func (s *Server) podStats(p engine.PodCounters) *v1.PodSandboxStats {
	out := &v1.PodSandboxStats{
		Attributes: &v1.PodSandboxAttributes{Id: p.Pod.ID, Metadata: podMetadata(p.Pod), Labels: p.Pod.Labels, Annotations: p.Pod.Annotations},
		Linux:      &v1.LinuxPodSandboxStats{},
	}
	l, at := out.Linux, p.At.UnixNano()
	var cpu, processes uint64
	mem := &v1.MemoryUsage{Timestamp: at, WorkingSetBytes: u64(0), UsageBytes: u64(0), RssBytes: u64(0), PageFaults: u64(0), MajorPageFaults: u64(0)}
	for _, c := range p.Containers {
		st := s.containerStats(c)
		l.Containers = append(l.Containers, st)
		cpu += c.CPUTotal
		processes += c.Pids
		for to, v := range map[*v1.UInt64Value]*v1.UInt64Value{
			mem.WorkingSetBytes: st.Memory.WorkingSetBytes, mem.UsageBytes: st.Memory.UsageBytes, mem.RssBytes: st.Memory.RssBytes,
			mem.PageFaults: st.Memory.PageFaults, mem.MajorPageFaults: st.Memory.MajorPageFaults,
		} {
			to.Value += v.Value
		}
	}
	l.Cpu, l.Memory = s.cpu(p.Pod.ID, p.At, cpu), mem
	l.Process = &v1.ProcessUsage{Timestamp: at, ProcessCount: u64(processes)}
	if p.Interfaces != nil {
		l.Network = &v1.NetworkUsage{Timestamp: at}
		for _, name := range slices.Sorted(maps.Keys(p.Interfaces)) {
			c := p.Interfaces[name]
			i := &v1.NetworkInterfaceUsage{Name: name, RxBytes: u64(c.RxBytes), RxErrors: u64(c.RxErrors), TxBytes: u64(c.TxBytes), TxErrors: u64(c.TxErrors)}
			if l.Network.DefaultInterface == nil && name == "eth0" {
				l.Network.DefaultInterface = i
			}
			l.Network.Interfaces = append(l.Network.Interfaces, i)
		}
	}
	return out
}

// PodSandboxStats implements the CRI.
func (s *Server) PodSandboxStats(ctx context.Context, req *v1.PodSandboxStatsRequest) (*v1.PodSandboxStatsResponse, error) {
	p, err := s.cfg.Engine.Pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	l := s.cfg.Engine.PodCounters(ctx, engine.CounterOptions{Pod: p.ID, Network: true, Fresh: true})
	if len(l) == 0 {
		return nil, fault.New(fault.Conflict, "cannot tell what pod %s uses: it is not ready", p.ID)
	}
	return &v1.PodSandboxStatsResponse{Stats: s.podStats(l[0])}, nil
}

func (s *Server) listPodStats(ctx context.Context, f *v1.PodSandboxStatsFilter) []*v1.PodSandboxStats {
	o := engine.CounterOptions{Network: true, Details: s.cfg.Engine.PodHost().CgroupV2}
	if id := f.GetId(); id != "" {
		p, err := s.cfg.Engine.Pod(id)
		if err != nil {
			return nil
		}
		o.Pod, o.Fresh = p.ID, true
	}
	var out []*v1.PodSandboxStats
	for _, p := range s.cfg.Engine.PodCounters(ctx, o) {
		if hasLabels(p.Pod.Labels, f.GetLabelSelector()) {
			out = append(out, s.podStats(p))
		}
	}
	return out
}

// ListPodSandboxStats implements the CRI.
func (s *Server) ListPodSandboxStats(ctx context.Context, req *v1.ListPodSandboxStatsRequest) (*v1.ListPodSandboxStatsResponse, error) {
	return &v1.ListPodSandboxStatsResponse{Stats: s.listPodStats(ctx, req.GetFilter())}, nil
}
