package criapi

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

func stats(t *testing.T, n *node) {
	p := podConfig(t)
	p.Labels = map[string]string{"stats": "pod"}
	pod := n.run(t, p)
	c := sleeper("a")
	c.Labels = map[string]string{"stats": "yes"}
	c.Command = []string{"sh", "-c", "head -c 3000000 /dev/zero >/file; while :; do :; done"}
	c.Linux.Resources = &v1.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuQuota: 20000, CpuPeriod: 100000}
	id := n.create(t, pod, p, c)
	_, err := n.rt.ContainerStats(ctx(t), &v1.ContainerStatsRequest{ContainerId: id})
	wants(t, "stats of one that does not run", err, codes.FailedPrecondition)
	n.startContainer(t, id)
	check := func(s *v1.ContainerStats) bool {
		return s.GetAttributes().GetId() == id && s.Attributes.Metadata.Name == "a" && s.Cpu.GetUsageCoreNanoSeconds().GetValue() > 0 && s.Memory.GetWorkingSetBytes().GetValue() > 0 &&
			s.Memory.GetUsageBytes().GetValue() > 0 && s.Memory.GetAvailableBytes().GetValue() > 0 && s.WritableLayer.GetUsedBytes() != nil && s.WritableLayer.FsId.Mountpoint != "" && s.Cpu.Timestamp > 0
	}
	harness.Eventually(t, "processor time", 5*time.Second, func() bool {
		r, err := n.rt.ContainerStats(ctx(t), &v1.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		return check(r.Stats)
	})
	harness.Eventually(t, "a rate and the layer's size", 20*time.Second, func() bool {
		r, err := n.rt.ContainerStats(ctx(t), &v1.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		return r.Stats.Cpu.GetUsageNanoCores().GetValue() > 1e6 && r.Stats.WritableLayer.UsedBytes.Value >= 3000000
	})
	for name, c := range map[string]struct {
		f    *v1.ContainerStatsFilter
		want bool
	}{
		"none": {nil, true}, "id": {&v1.ContainerStatsFilter{Id: id}, true}, "pod": {&v1.ContainerStatsFilter{PodSandboxId: pod}, true},
		"label": {&v1.ContainerStatsFilter{LabelSelector: map[string]string{"stats": "yes"}}, true}, "other label": {&v1.ContainerStatsFilter{LabelSelector: map[string]string{"stats": "no"}}, false},
		"other id": {&v1.ContainerStatsFilter{Id: "no-such"}, false}, "other pod": {&v1.ContainerStatsFilter{PodSandboxId: "no-such"}, false},
	} {
		r, err := n.rt.ListContainerStats(ctx(t), &v1.ListContainerStatsRequest{Filter: c.f})
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, s := range r.Stats {
			found = found || check(s)
		}
		if found != c.want {
			t.Errorf("%s: found %v", name, found)
		}
	}
	r, err := n.rt.PodSandboxStats(ctx(t), &v1.PodSandboxStatsRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	l := r.Stats.Linux
	if r.Stats.Attributes.Id != pod || len(l.Containers) != 1 || l.Network.GetDefaultInterface().GetName() != "eth0" || l.Network.DefaultInterface.RxBytes == nil ||
		l.Process.ProcessCount.Value == 0 || l.Cpu.UsageCoreNanoSeconds.Value == 0 || l.Memory.WorkingSetBytes.Value == 0 {
		t.Errorf("%v", r.Stats)
	}
	empty := podConfig(t)
	empty.Labels = map[string]string{"stats": "empty"}
	eid := n.run(t, empty)
	for name, c := range map[string]struct {
		f    *v1.PodSandboxStatsFilter
		want int
	}{
		"id": {&v1.PodSandboxStatsFilter{Id: eid}, 1}, "label": {&v1.PodSandboxStatsFilter{LabelSelector: map[string]string{"stats": "pod"}}, 1},
		"empty": {&v1.PodSandboxStatsFilter{LabelSelector: map[string]string{"stats": "empty"}}, 1}, "none": {&v1.PodSandboxStatsFilter{Id: "no-such"}, 0},
	} {
		r, err := n.rt.ListPodSandboxStats(ctx(t), &v1.ListPodSandboxStatsRequest{Filter: c.f})
		if err != nil || len(r.Stats) != c.want {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	fs, err := n.img.ImageFsInfo(ctx(t), &v1.ImageFsInfoRequest{})
	if err != nil || len(fs.ImageFilesystems) != 1 || fs.ImageFilesystems[0].UsedBytes.Value == 0 || fs.ImageFilesystems[0].InodesUsed.Value == 0 || fs.ImageFilesystems[0].FsId.Mountpoint != n.Dir+"/root" {
		t.Errorf("%v, %v", fs, err)
	}
}

func metrics(t *testing.T, n *node) {
	c := sleeper("measured")
	c.Linux.Resources = &v1.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 1024, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 64 << 20}
	p := podConfig(t)
	pod, id := n.up(t, p, c)
	d, err := n.rt.ListMetricDescriptors(ctx(t), &v1.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]int{}
	for _, m := range d.Descriptors {
		if m.Help == "" || len(m.LabelKeys) == 0 || labels[m.Name] != 0 {
			t.Errorf("descriptor %v", m)
		}
		labels[m.Name] = len(m.LabelKeys)
	}
	// Those that Kubernetes' own collector has.
	for _, name := range strings.Fields(`container_blkio_device_usage_total container_cpu_cfs_periods_total container_cpu_cfs_throttled_periods_total
		container_cpu_cfs_throttled_seconds_total container_cpu_system_seconds_total container_cpu_usage_seconds_total container_cpu_user_seconds_total
		container_file_descriptors container_fs_inodes_free container_fs_inodes_total container_fs_limit_bytes container_fs_reads_bytes_total container_fs_reads_total
		container_fs_usage_bytes container_fs_writes_bytes_total container_fs_writes_total container_hugetlb_max_usage_bytes container_hugetlb_usage_bytes container_last_seen
		container_memory_cache container_memory_failcnt container_memory_failures_total container_memory_kernel_usage container_memory_mapped_file container_memory_max_usage_bytes
		container_memory_rss container_memory_swap container_memory_usage_bytes container_memory_working_set_bytes container_network_receive_bytes_total
		container_network_receive_errors_total container_network_receive_packets_dropped_total container_network_receive_packets_total container_network_transmit_bytes_total
		container_network_transmit_errors_total container_network_transmit_packets_dropped_total container_network_transmit_packets_total container_oom_events_total
		container_pressure_cpu_stalled_seconds_total container_pressure_cpu_waiting_seconds_total container_pressure_io_stalled_seconds_total container_pressure_io_waiting_seconds_total
		container_pressure_memory_stalled_seconds_total container_pressure_memory_waiting_seconds_total
		container_processes container_sockets container_spec_cpu_period container_spec_cpu_quota container_spec_cpu_shares container_spec_memory_limit_bytes
		container_spec_memory_reservation_limit_bytes container_spec_memory_swap_limit_bytes container_start_time_seconds container_threads container_threads_max container_ulimits_soft`) {
		if labels[name] == 0 {
			t.Errorf("no descriptor of %s", name)
		}
	}
	r, err := n.rt.ListPodSandboxMetrics(ctx(t), &v1.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]uint64{}
	for _, pm := range r.PodMetrics {
		if pm.PodSandboxId != pod {
			continue
		}
		all := pm.Metrics
		for _, cm := range pm.ContainerMetrics {
			if cm.ContainerId != id {
				t.Errorf("metrics of container %s", cm.ContainerId)
			}
			all = append(all, cm.Metrics...)
		}
		for _, m := range all {
			if len(m.LabelValues) != labels[m.Name] || m.Timestamp == 0 {
				t.Errorf("%v has %d labels, not %d", m, len(m.LabelValues), labels[m.Name])
			}
			seen[m.Name] = m.Value.GetValue()
		}
	}
	// Only counters of block devices depend on there being some, and the kernel's
	// pressure and huge pages on the kernel.
	for name := range labels {
		optional := strings.Contains(name, "blkio") || strings.Contains(name, "fs_reads") || strings.Contains(name, "fs_writes") || strings.Contains(name, "pressure") || strings.Contains(name, "hugetlb")
		if _, ok := seen[name]; !ok && !optional {
			t.Errorf("no value of %s", name)
		}
	}
	if seen["container_spec_memory_limit_bytes"] != 64<<20 || seen["container_spec_cpu_quota"] != 50000 || seen["container_processes"] == 0 || seen["container_file_descriptors"] == 0 {
		t.Errorf("%v", seen)
	}
}

func runtimeInfo(t *testing.T, n *node) {
	v, err := n.rt.Version(ctx(t), &v1.VersionRequest{Version: "0.1.0"})
	if err != nil || v.RuntimeName != "servin" || v.RuntimeApiVersion != "v1" || v.RuntimeVersion == "" || v.Version == "" {
		t.Errorf("%v, %v", v, err)
	}
	s, err := n.rt.Status(ctx(t), &v1.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	ready := map[string]bool{}
	for _, c := range s.Status.Conditions {
		ready[c.Type] = c.Status
	}
	if !ready["RuntimeReady"] || !ready["NetworkReady"] || !s.Features.SupplementalGroupsPolicy || s.Info["config"] == "" || s.Info["network"] == "" {
		t.Errorf("%v", s)
	}
	handlers := map[string]*v1.RuntimeHandlerFeatures{}
	for _, h := range s.RuntimeHandlers {
		handlers[h.Name] = h.Features
	}
	if f := handlers[""]; f == nil || !f.RecursiveReadOnlyMounts || !f.UserNamespaces {
		t.Errorf("%v", s.RuntimeHandlers)
	}
	c, err := n.rt.RuntimeConfig(ctx(t), &v1.RuntimeConfigRequest{})
	if err != nil || c.Linux.CgroupDriver != v1.CgroupDriver_CGROUPFS {
		t.Errorf("%v, %v", c, err)
	}
	for range 2 {
		if _, err := n.rt.UpdateRuntimeConfig(ctx(t), &v1.UpdateRuntimeConfigRequest{RuntimeConfig: &v1.RuntimeConfig{NetworkConfig: &v1.NetworkConfig{PodCidr: "10.88.0.0/16"}}}); err != nil {
			t.Error(err)
		}
	}
}

func events(t *testing.T, n *node) {
	c, cancel := context.WithCancel(ctx(t))
	w, err := n.rt.GetContainerEvents(c, &v1.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan *v1.ContainerEventResponse, 1000)
	done := make(chan error, 1)
	go func() {
		for {
			e, err := w.Recv()
			if err != nil {
				done <- err
				return
			}
			got <- e
		}
	}()
	// The watch is set up behind the call.
	time.Sleep(100 * time.Millisecond)
	p := podConfig(t)
	pod := n.run(t, p)
	id := n.create(t, pod, p, sleeper("a"))
	n.startContainer(t, id)
	if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.rt.RemoveContainer(ctx(t), &v1.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	want := []v1.ContainerEventType{v1.ContainerEventType_CONTAINER_CREATED_EVENT, v1.ContainerEventType_CONTAINER_STARTED_EVENT, v1.ContainerEventType_CONTAINER_STOPPED_EVENT, v1.ContainerEventType_CONTAINER_DELETED_EVENT}
	for len(want) > 0 {
		select {
		case e := <-got:
			if e.ContainerId != id {
				continue
			}
			if e.ContainerEventType != want[0] || e.PodSandboxStatus.GetId() != pod || e.CreatedAt == 0 {
				t.Fatalf("%v, want %s", e, want[0])
			}
			if (e.ContainerEventType == v1.ContainerEventType_CONTAINER_DELETED_EVENT) != (len(e.ContainersStatuses) == 0) {
				t.Errorf("%s with %d containers", e.ContainerEventType, len(e.ContainersStatuses))
			}
			want = want[1:]
		case <-time.After(5 * time.Second):
			t.Fatalf("no event %s", want[0])
		}
	}
	cancel()
	wants(t, "the end of the watch", <-done, codes.Canceled)
}

func streamedLists(t *testing.T, n *node) {
	p := podConfig(t)
	pod, id := n.up(t, p, sleeper("a"))
	c := ctx(t)
	found := map[string]bool{}
	if s, err := n.rt.StreamPodSandboxes(c, &v1.StreamPodSandboxesRequest{Filter: &v1.PodSandboxFilter{Id: pod}}); err == nil {
		for {
			m, err := s.Recv()
			if err != nil {
				found["pods ended"] = err == io.EOF
				break
			}
			for _, x := range m.PodSandboxes {
				found["pod"] = x.Id == pod
			}
		}
	}
	if s, err := n.rt.StreamContainers(c, &v1.StreamContainersRequest{Filter: &v1.ContainerFilter{PodSandboxId: pod}}); err == nil {
		m, err := s.Recv()
		found["container"] = err == nil && len(m.Containers) == 1 && m.Containers[0].Id == id
	}
	if s, err := n.rt.StreamContainerStats(c, &v1.StreamContainerStatsRequest{Filter: &v1.ContainerStatsFilter{Id: id}}); err == nil {
		m, err := s.Recv()
		found["container stats"] = err == nil && len(m.ContainerStats) == 1
	}
	if s, err := n.rt.StreamPodSandboxStats(c, &v1.StreamPodSandboxStatsRequest{Filter: &v1.PodSandboxStatsFilter{Id: pod}}); err == nil {
		m, err := s.Recv()
		found["pod stats"] = err == nil && len(m.PodSandboxStats) == 1
	}
	if s, err := n.rt.StreamPodSandboxMetrics(c, &v1.StreamPodSandboxMetricsRequest{}); err == nil {
		m, err := s.Recv()
		found["pod metrics"] = err == nil && len(m.PodSandboxMetrics) > 0
	}
	if s, err := n.img.StreamImages(c, &v1.StreamImagesRequest{Filter: &v1.ImageFilter{Image: &v1.ImageSpec{Image: "bb"}}}); err == nil {
		m, err := s.Recv()
		found["image"] = err == nil && len(m.Images) == 1
	}
	for _, k := range []string{"pod", "pods ended", "container", "container stats", "pod stats", "pod metrics", "image"} {
		if !found[k] {
			t.Errorf("%s: not found", k)
		}
	}
	s, err := n.rt.StreamPodSandboxes(c, &v1.StreamPodSandboxesRequest{Filter: &v1.PodSandboxFilter{Id: "no-such"}})
	if err == nil {
		_, err = s.Recv()
	}
	if err != io.EOF {
		t.Errorf("an empty stream: %v", err)
	}
}

func oldVersion(t *testing.T, n *node) {
	var r v1.VersionResponse
	if err := n.conn.Invoke(ctx(t), "/runtime.v1alpha2.RuntimeService/Version", &v1.VersionRequest{}, &r); err != nil || r.RuntimeName != "servin" {
		t.Errorf("%v, %v", &r, err)
	}
	p := podConfig(t)
	id := n.run(t, p)
	var l v1.ListPodSandboxResponse
	if err := n.conn.Invoke(ctx(t), "/runtime.v1alpha2.RuntimeService/ListPodSandbox", &v1.ListPodSandboxRequest{Filter: &v1.PodSandboxFilter{Id: id}}, &l); err != nil || len(l.Items) != 1 {
		t.Errorf("%v, %v", &l, err)
	}
	var i v1.ListImagesResponse
	if err := n.conn.Invoke(ctx(t), "/runtime.v1alpha2.ImageService/ListImages", &v1.ListImagesRequest{}, &i); err != nil || len(i.Images) == 0 {
		t.Errorf("%v, %v", &i, err)
	}
}

// apart shows that plain containers and those of pods do not get in each other's way.
func apart(t *testing.T, n *node) {
	p := podConfig(t)
	p.LogDirectory = t.TempDir()
	conf := sleeper("a")
	conf.LogPath, conf.Command = "a.log", []string{"sh", "-c", "echo a line; while :; do sleep 0.1; done"}
	pod, id := n.up(t, p, conf)
	harness.Eventually(t, "the log by name", 5*time.Second, func() bool { return n.must("logs", "k8s_a_"+p.Metadata.Name+"_test_"+p.Metadata.Uid+"_0") == "a line" })
	seen := n.must("events", "--since", "1m", "--until", "0s", "--filter", "namespace=*")
	if out := n.must("events", "--since", "1m", "--until", "0s"); strings.Contains(out, id) || !strings.Contains(seen, id) {
		t.Errorf("events: %s", out)
	}
	ended := n.create(t, pod, p, sleeper("ended"))
	plain := n.must("run", "-d", "--name", "plain-"+p.Metadata.Name, "bb", "sleep", "1000")
	t.Cleanup(func() { n.must("rm", "-f", plain) })
	if out := n.must("ps", "-aq", "--no-trunc"); strings.Contains(out, id) || strings.Contains(out, ended) || !strings.Contains(out, plain) {
		t.Errorf("ps: %s", out)
	}
	if out := n.must("containers", "ls", "-a", "--no-trunc", "--all-namespaces"); !strings.Contains(out, id) || !strings.Contains(out, plain) || !strings.Contains(out, "test/"+p.Metadata.Name) {
		t.Errorf("ls of all: %s", out)
	}
	if out := n.must("ps", "-aq", "--no-trunc", "--filter", "namespace=kubernetes"); !strings.Contains(out, id) || strings.Contains(out, plain) {
		t.Errorf("ps of pods: %s", out)
	}
	n.must("container", "prune", "-f")
	if s := n.status(t, ended); s.State != v1.ContainerState_CONTAINER_CREATED {
		t.Errorf("after prune: %v", s)
	}
	r, err := n.rt.ListContainers(ctx(t), &v1.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Containers {
		if c.Id == plain {
			t.Error("the CRI lists a plain container")
		}
	}
	for range 2 {
		if _, err := n.rt.RemoveContainer(ctx(t), &v1.RemoveContainerRequest{ContainerId: plain}); err != nil {
			t.Fatal(err)
		}
		if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: plain}); err != nil {
			t.Fatal(err)
		}
	}
	if out := n.must("inspect", "-f", "{{.State.Status}}", plain); out != "running" {
		t.Errorf("the CRI stopped a plain container: %s", out)
	}
	if out := n.must("exec", id, "echo", "by id"); out != "by id" {
		t.Errorf("%q", out)
	}
}
