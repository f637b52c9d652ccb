package criapi

import (
	"bytes"
	"context"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine"
)

// value is one value of a metric with what its further labels say.
type value struct {
	labels []string
	v      uint64
}

func one(v uint64) []value { return []value{{v: v}} }

// sample is what the metrics of one container are made of.
type sample struct {
	engine.ContainerCounters
	fs    engine.FilesystemUse
	procs processes
}

// processes are the counts that /proc has of a container's processes.
type processes struct{ descriptors, sockets, threads, descriptorLimit uint64 }

// metric is one that cAdvisor has, by its name there; labels are those besides the
// ones of every container.
type metric struct {
	name, help string
	gauge      bool
	labels     []string
	of         func(*sample) []value
}

// The labels of every metric, as the kubelet's own collector has them.
var baseLabels = []string{"id", "name", "image", "container", "pod", "namespace"}

const nano = 1_000_000_000

func containerMetrics() []metric {
	counter := func(name, help string, of func(*sample) uint64, labels ...string) metric {
		return metric{name: name, help: help, labels: labels, of: func(s *sample) []value { return one(of(s)) }}
	}
	gauge := func(name, help string, of func(*sample) uint64) metric {
		return metric{name: name, help: help, gauge: true, of: func(s *sample) []value { return one(of(s)) }}
	}
	onDisk := func(name, help string, isGauge bool, of func(*sample) uint64) metric {
		return metric{name: name, help: help, gauge: isGauge, labels: []string{"device"}, of: func(s *sample) []value {
			return []value{{labels: []string{s.fs.Path}, v: of(s)}}
		}}
	}
	io := func(name, help, table, op string) metric {
		return metric{name: name, help: help, labels: []string{"device"}, of: func(s *sample) []value { return blkio(s, table, op) }}
	}
	return []metric{
		{name: "container_blkio_device_usage_total", help: "Bytes carried to and from block devices", labels: []string{"device", "major", "minor", "operation"}, of: blkioUse},
		counter("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals", func(s *sample) uint64 { return s.Periods }),
		counter("container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals", func(s *sample) uint64 { return s.ThrottledPeriods }),
		counter("container_cpu_cfs_throttled_seconds_total", "Seconds for which the container was throttled", func(s *sample) uint64 { return s.ThrottledTime / nano }),
		counter("container_cpu_system_seconds_total", "Seconds of processor time spent in the kernel", func(s *sample) uint64 { return s.CPUSystem / nano }),
		{name: "container_cpu_usage_seconds_total", help: "Seconds of processor time used", labels: []string{"cpu"}, of: func(s *sample) []value {
			return []value{{labels: []string{"total"}, v: s.CPUTotal / nano}}
		}},
		counter("container_cpu_user_seconds_total", "Seconds of processor time spent in user space", func(s *sample) uint64 { return s.CPUUser / nano }),
		gauge("container_file_descriptors", "Number of open file descriptors", func(s *sample) uint64 { return s.procs.descriptors }),
		huge("container_hugetlb_max_usage_bytes", "The most bytes of huge pages that were ever in use", func(h engine.HugepageUse) uint64 { return h.Max }),
		huge("container_hugetlb_usage_bytes", "Bytes of huge pages in use", func(h engine.HugepageUse) uint64 { return h.Now }),
		stalled("container_pressure_cpu_stalled_seconds_total", "Seconds in which no task could run for want of processor time", "cpu", true),
		stalled("container_pressure_cpu_waiting_seconds_total", "Seconds in which tasks waited for processor time", "cpu", false),
		stalled("container_pressure_io_stalled_seconds_total", "Seconds in which no task could run for want of input and output", "io", true),
		stalled("container_pressure_io_waiting_seconds_total", "Seconds in which tasks waited for input and output", "io", false),
		stalled("container_pressure_memory_stalled_seconds_total", "Seconds in which no task could run for want of memory", "memory", true),
		stalled("container_pressure_memory_waiting_seconds_total", "Seconds in which tasks waited for memory", "memory", false),
		onDisk("container_fs_inodes_free", "Number of free inodes of the file system", true, func(s *sample) uint64 { return s.fs.IFree }),
		onDisk("container_fs_inodes_total", "Number of inodes of the file system", true, func(s *sample) uint64 { return s.fs.Inodes }),
		onDisk("container_fs_limit_bytes", "Bytes that the container can use of the file system", true, func(s *sample) uint64 { return s.fs.Total }),
		io("container_fs_reads_bytes_total", "Bytes read", "io_service_bytes_recursive", "read"),
		io("container_fs_reads_total", "Number of reads", "io_serviced_recursive", "read"),
		onDisk("container_fs_usage_bytes", "Bytes that the container uses of the file system", true, func(s *sample) uint64 { return uint64(max(s.Layer, 0)) }),
		io("container_fs_writes_bytes_total", "Bytes written", "io_service_bytes_recursive", "write"),
		io("container_fs_writes_total", "Number of writes", "io_serviced_recursive", "write"),
		gauge("container_last_seen", "When the container was last seen, seconds since 1970", func(s *sample) uint64 { return uint64(s.At.Unix()) }),
		gauge("container_memory_cache", "Bytes of page cache", func(s *sample) uint64 { _, _, c, _, _ := memory(s.Counters); return c }),
		counter("container_memory_failcnt", "How often memory hit its limit", func(s *sample) uint64 { return s.MemoryFailures }),
		{name: "container_memory_failures_total", help: "Number of page faults", labels: []string{"failure_type", "scope"}, of: func(s *sample) []value {
			_, _, _, faults, major := memory(s.Counters)
			return []value{{labels: []string{"pgfault", "container"}, v: faults}, {labels: []string{"pgmajfault", "container"}, v: major}}
		}},
		gauge("container_memory_kernel_usage", "Bytes of memory that the kernel has for the container", func(s *sample) uint64 { return s.MemoryStat["kernel"] }),
		gauge("container_memory_mapped_file", "Bytes of mapped files", func(s *sample) uint64 { return max(s.MemoryStat["total_mapped_file"], s.MemoryStat["file_mapped"]) }),
		gauge("container_memory_max_usage_bytes", "The most memory that was ever in use, bytes", func(s *sample) uint64 { return s.MemoryMax }),
		gauge("container_memory_rss", "Bytes of anonymous memory", func(s *sample) uint64 { _, r, _, _, _ := memory(s.Counters); return r }),
		gauge("container_memory_swap", "Bytes swapped out", func(s *sample) uint64 { return max(s.MemoryStat["total_swap"], s.MemoryStat["swap"]) }),
		gauge("container_memory_usage_bytes", "Bytes of memory in use, page cache included", func(s *sample) uint64 { return s.Memory }),
		gauge("container_memory_working_set_bytes", "Bytes of memory that cannot be given back at once", func(s *sample) uint64 { w, _, _, _, _ := memory(s.Counters); return w }),
		counter("container_oom_events_total", "How often a process was killed for want of memory", func(s *sample) uint64 { return oom(s) }),
		gauge("container_processes", "Number of processes", func(s *sample) uint64 { return s.Pids }),
		gauge("container_sockets", "Number of open sockets", func(s *sample) uint64 { return s.procs.sockets }),
		gauge("container_spec_cpu_period", "Period of the processor limit, microseconds", func(s *sample) uint64 { return uint64(max(s.Record.HostConfig.CPUPeriod, 0)) }),
		gauge("container_spec_cpu_quota", "Quota of the processor limit, microseconds", func(s *sample) uint64 { return uint64(max(s.Record.HostConfig.CPUQuota, 0)) }),
		gauge("container_spec_cpu_shares", "Share of processor time", func(s *sample) uint64 { return uint64(max(s.Record.HostConfig.CPUShares, 0)) }),
		gauge("container_spec_memory_limit_bytes", "Memory limit, bytes", func(s *sample) uint64 { return uint64(max(s.Record.HostConfig.Memory, 0)) }),
		gauge("container_spec_memory_reservation_limit_bytes", "Memory reservation, bytes", func(s *sample) uint64 { return uint64(max(s.Record.HostConfig.MemoryReservation, 0)) }),
		gauge("container_spec_memory_swap_limit_bytes", "Limit of memory and swap together, bytes", func(s *sample) uint64 { return uint64(max(s.Record.HostConfig.MemorySwap, 0)) }),
		gauge("container_start_time_seconds", "When the container was started, seconds since 1970", func(s *sample) uint64 { return uint64(max(s.Record.State.StartedAt.Unix(), 0)) }),
		gauge("container_threads", "Number of threads", func(s *sample) uint64 { return s.procs.threads }),
		gauge("container_threads_max", "How many threads there may be, 0 is without limit", func(s *sample) uint64 { return s.PidsLimit }),
		{name: "container_ulimits_soft", help: "Soft limits of the container's first process", gauge: true, labels: []string{"ulimit"}, of: func(s *sample) []value {
			return []value{{labels: []string{"max_open_files"}, v: s.procs.descriptorLimit}}
		}},
	}
}

// huge is a metric of every size of huge pages.
func huge(name, help string, of func(engine.HugepageUse) uint64) metric {
	return metric{name: name, help: help, gauge: true, labels: []string{"pagesize"}, of: func(s *sample) (out []value) {
		if s.Details == nil {
			return nil
		}
		for _, size := range slices.Sorted(maps.Keys(s.Details.Hugepages)) {
			out = append(out, value{labels: []string{size}, v: of(s.Details.Hugepages[size])})
		}
		return out
	}}
}

// stalled is a metric of the pressure on a resource, where the kernel tells it.
func stalled(name, help, resource string, full bool) metric {
	return metric{name: name, help: help, of: func(s *sample) []value {
		if s.Details == nil {
			return nil
		}
		p, ok := s.Details.Pressure[resource]
		switch {
		case !ok:
			return nil
		case full:
			return one(p.Full.Total / nano)
		}
		return one(p.Some.Total / nano)
	}}
}

// netMetric is one of a pod's network.
type netMetric struct {
	name, help string
	of         func(engine.InterfaceCounters) uint64
}

func podMetrics() []netMetric {
	return []netMetric{
		{"container_network_receive_bytes_total", "Bytes received", func(c engine.InterfaceCounters) uint64 { return c.RxBytes }},
		{"container_network_receive_errors_total", "Errors while receiving", func(c engine.InterfaceCounters) uint64 { return c.RxErrors }},
		{"container_network_receive_packets_dropped_total", "Packets dropped while receiving", func(c engine.InterfaceCounters) uint64 { return c.RxDropped }},
		{"container_network_receive_packets_total", "Packets received", func(c engine.InterfaceCounters) uint64 { return c.RxPackets }},
		{"container_network_transmit_bytes_total", "Bytes sent", func(c engine.InterfaceCounters) uint64 { return c.TxBytes }},
		{"container_network_transmit_errors_total", "Errors while sending", func(c engine.InterfaceCounters) uint64 { return c.TxErrors }},
		{"container_network_transmit_packets_dropped_total", "Packets dropped while sending", func(c engine.InterfaceCounters) uint64 { return c.TxDropped }},
		{"container_network_transmit_packets_total", "Packets sent", func(c engine.InterfaceCounters) uint64 { return c.TxPackets }},
	}
}

func blkio(s *sample, table, op string) (out []value) {
	for _, b := range s.Blkio {
		if b.Table == table && strings.EqualFold(b.Op, op) {
			out = append(out, value{labels: []string{device(b.Major, b.Minor)}, v: b.Value})
		}
	}
	return out
}

func blkioUse(s *sample) (out []value) {
	for _, b := range s.Blkio {
		if b.Table == "io_service_bytes_recursive" {
			out = append(out, value{labels: []string{device(b.Major, b.Minor), u(b.Major), u(b.Minor), b.Op}, v: b.Value})
		}
	}
	return out
}

func u(v uint64) string { return strconv.FormatUint(v, 10) }

func device(major, minor uint64) string { return u(major) + ":" + u(minor) }

func oom(s *sample) uint64 {
	if s.Record.State.OOMKilled {
		return 1
	}
	return 0
}

// ListMetricDescriptors implements the CRI.
func (s *Server) ListMetricDescriptors(context.Context, *v1.ListMetricDescriptorsRequest) (*v1.ListMetricDescriptorsResponse, error) {
	resp := &v1.ListMetricDescriptorsResponse{}
	add := func(name, help string, labels ...string) {
		resp.Descriptors = append(resp.Descriptors, &v1.MetricDescriptor{Name: name, Help: help, LabelKeys: append(append([]string{}, baseLabels...), labels...)})
	}
	for _, m := range containerMetrics() {
		add(m.name, m.help, m.labels...)
	}
	for _, m := range podMetrics() {
		add(m.name, m.help, "interface")
	}
	return resp, nil
}

// ListPodSandboxMetrics implements the CRI.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *v1.ListPodSandboxMetricsRequest) (*v1.ListPodSandboxMetricsResponse, error) {
	return &v1.ListPodSandboxMetricsResponse{PodMetrics: s.metrics(ctx)}, nil
}

func kind(gauge bool) v1.MetricType {
	if gauge {
		return v1.MetricType_GAUGE
	}
	return v1.MetricType_COUNTER
}

func (s *Server) metrics(ctx context.Context) []*v1.PodSandboxMetrics {
	fs, err := s.cfg.Engine.ImageFilesystem(ctx)
	if err != nil {
		s.log.Warn("cannot read the use of the image file system", "cause", err)
	}
	ofContainer, ofPod := containerMetrics(), podMetrics()
	var out []*v1.PodSandboxMetrics
	for _, p := range s.cfg.Engine.PodCounters(ctx, engine.CounterOptions{Network: true, Full: true, Details: true, Fresh: true}) {
		pm := &v1.PodSandboxMetrics{PodSandboxId: p.Pod.ID}
		base := []string{p.Pod.CgroupParent, p.Pod.ID, "", "POD", p.Pod.Name, p.Pod.Namespace}
		for name, c := range p.Interfaces {
			for _, m := range ofPod {
				pm.Metrics = append(pm.Metrics, &v1.Metric{
					Name: m.name, Timestamp: p.At.UnixNano(), MetricType: v1.MetricType_COUNTER, LabelValues: append(append([]string{}, base...), name), Value: u64(m.of(c)),
				})
			}
		}
		for _, c := range p.Containers {
			pm.ContainerMetrics = append(pm.ContainerMetrics, s.metricsOf(ofContainer, p.Pod, &sample{ContainerCounters: c, fs: fs, procs: countProcesses(c.Pid)}))
		}
		out = append(out, pm)
	}
	return out
}

func (s *Server) metricsOf(list []metric, p *container.Pod, c *sample) *v1.ContainerMetrics {
	conf := s.edges.get(c.Record)
	base := []string{p.CgroupParent + "/" + c.Record.ID, c.Record.Name, spec(conf).GetImage(), conf.GetMetadata().GetName(), p.Name, p.Namespace}
	cm := &v1.ContainerMetrics{ContainerId: c.Record.ID}
	for _, m := range list {
		for _, v := range m.of(c) {
			cm.Metrics = append(cm.Metrics, &v1.Metric{
				Name: m.name, Timestamp: c.At.UnixNano(), MetricType: kind(m.gauge), LabelValues: append(append([]string{}, base...), v.labels...), Value: u64(v.v),
			})
		}
	}
	return cm
}

// countProcesses looks at a container's first process: its descriptors, sockets,
// threads and limits.
func countProcesses(pid int) (p processes) {
	dir := "/proc/" + strconv.Itoa(pid)
	if list, err := os.ReadDir(dir + "/fd"); err == nil {
		p.descriptors = uint64(len(list))
		for _, f := range list {
			if to, err := os.Readlink(dir + "/fd/" + f.Name()); err == nil && strings.HasPrefix(to, "socket:") {
				p.sockets++
			}
		}
	}
	if b, err := os.ReadFile(dir + "/status"); err == nil {
		if _, rest, ok := bytes.Cut(b, []byte("\nThreads:")); ok {
			line, _, _ := bytes.Cut(rest, []byte("\n"))
			p.threads, _ = strconv.ParseUint(strings.TrimSpace(string(line)), 10, 64)
		}
	}
	if b, err := os.ReadFile(dir + "/limits"); err == nil {
		for line := range strings.Lines(string(b)) {
			if rest, ok := strings.CutPrefix(line, "Max open files"); ok {
				if f := strings.Fields(rest); len(f) > 0 {
					p.descriptorLimit, _ = strconv.ParseUint(f[0], 10, 64)
				}
			}
		}
	}
	return p
}
