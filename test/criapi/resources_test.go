package criapi

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

func owner(fi os.FileInfo) int {
	if fi == nil {
		return -1
	}
	return int(fi.Sys().(*syscall.Stat_t).Uid)
}

// limit reads a limit of a container as the kernel has it, whatever the version of
// its cgroups.
func limit(t *testing.T, n *node, id, v1File, v2File string) string {
	t.Helper()
	var found string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		if strings.Contains(d.Name(), id) {
			for _, f := range []string{v1File, v2File} {
				if b, err := os.ReadFile(path + "/" + f); err == nil {
					found = strings.TrimSpace(string(b))
				}
			}
			return filepath.SkipDir
		}
		return nil
	})
	return found
}

func resources(t *testing.T, n *node) {
	c := sleeper("a")
	c.Linux.Resources = &v1.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 64 << 20, CpusetCpus: "0",
		HugepageLimits: []*v1.HugepageLimit{{PageSize: "2MB", Limit: 0}, {PageSize: "1GB", Limit: 0}}}
	p := podConfig(t)
	p.Linux.CgroupParent = "/kubepods-test-" + p.Metadata.Name + "/burstable"
	t.Cleanup(func() { removeGroups(p.Linux.CgroupParent) })
	_, id := n.up(t, p, c)
	for name, got := range map[string]string{
		"memory " + limit(t, n, id, "memory.limit_in_bytes", "memory.max"): "memory 67108864",
		"quota " + limit(t, n, id, "cpu.cfs_quota_us", ""):                 "quota 20000",
		"shares " + limit(t, n, id, "cpu.shares", ""):                      "shares 512",
		"cpus " + limit(t, n, id, "cpuset.cpus", ""):                       "cpus 0",
	} {
		if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil && !strings.HasPrefix(name, "memory") {
			continue
		}
		if name != got {
			t.Errorf("%q, want %q", name, got)
		}
	}
	if s := n.exec(t, id, "cat", "/proc/1/cgroup"); strings.TrimSpace(s) == "" {
		t.Error("no cgroup")
	}
	if b, err := os.ReadFile("/proc/self/cgroup"); err != nil || strings.Contains(string(b), id) {
		t.Errorf("%s %v", b, err)
	}
}

// removeGroups removes the parents that the kubelet would have made.
func removeGroups(parent string) {
	tops, _ := filepath.Glob("/sys/fs/cgroup/*")
	for _, top := range append(tops, "/sys/fs/cgroup") {
		_ = os.Remove(top + parent)
		_ = os.Remove(filepath.Dir(top + parent))
	}
}

func update(t *testing.T, n *node) {
	c := sleeper("a")
	c.Linux.Resources = &v1.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 100}
	p := podConfig(t)
	pod, id := n.up(t, p, c)
	up := func(id string, r *v1.LinuxContainerResources) error {
		_, err := n.rt.UpdateContainerResources(ctx(t), &v1.UpdateContainerResourcesRequest{ContainerId: id, Linux: r, Annotations: map[string]string{"u": "1"}})
		return err
	}
	for range 2 {
		if err := up(id, &v1.LinuxContainerResources{MemoryLimitInBytes: 128 << 20, CpuPeriod: 100000, CpuQuota: 50000}); err != nil {
			t.Fatal(err)
		}
	}
	if l := limit(t, n, id, "memory.limit_in_bytes", "memory.max"); l != "134217728" {
		t.Errorf("memory limit %s", l)
	}
	if s := n.status(t, id); s.Resources.Linux.MemoryLimitInBytes != 128<<20 || s.Resources.Linux.CpuShares != 100 || s.Resources.Linux.CpuQuota != 50000 || s.Annotations["u"] != "1" || s.Metadata.Name != "a" {
		t.Errorf("%v", s)
	}
	if err := up(id, nil); err != nil {
		t.Errorf("nothing: %v", err)
	}
	wants(t, "negative", up(id, &v1.LinuxContainerResources{CpuShares: -1}), codes.InvalidArgument)
	// One that is not started takes the limits along.
	created := n.create(t, pod, p, sleeper("b"))
	if err := up(created, &v1.LinuxContainerResources{MemoryLimitInBytes: 96 << 20}); err != nil {
		t.Fatal(err)
	}
	n.startContainer(t, created)
	if l := limit(t, n, created, "memory.limit_in_bytes", "memory.max"); l != "100663296" {
		t.Errorf("memory limit %s", l)
	}
	if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: created}); err != nil {
		t.Fatal(err)
	}
	wants(t, "update of one that ended", up(created, &v1.LinuxContainerResources{CpuShares: 5}), codes.FailedPrecondition)
	if _, err := n.rt.UpdatePodSandboxResources(ctx(t), &v1.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Resources: &v1.LinuxContainerResources{CpuShares: 7}}); err != nil {
		t.Error(err)
	}
}

func signals(t *testing.T, n *node) {
	p := podConfig(t)
	p.LogDirectory = t.TempDir()
	pod := n.run(t, p)
	c := sleeper("usr1")
	c.LogPath, c.StopSignal = "usr1.log", v1.Signal_SIGNAL_SIGUSR1
	c.Command = []string{"sh", "-c", "trap 'echo got; exit 9' USR1; echo up; while :; do sleep 0.05; done"}
	id := n.create(t, pod, p, c)
	n.startContainer(t, id)
	harness.Eventually(t, "the trap", 5e9, func() bool { return text(readLog(t, p.LogDirectory+"/usr1.log"), "stdout") == "up\n" })
	if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: id, Timeout: 20}); err != nil {
		t.Fatal(err)
	}
	if s := n.status(t, id); s.ExitCode != 9 || s.StopSignal != v1.Signal_SIGNAL_SIGUSR1 {
		t.Errorf("%v", s)
	}
	deaf := sleeper("deaf")
	deaf.Command = []string{"sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"}
	id = n.create(t, pod, p, deaf)
	n.startContainer(t, id)
	if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: id, Timeout: 1}); err != nil {
		t.Fatal(err)
	}
	if s := n.status(t, id); s.ExitCode != 137 {
		t.Errorf("%v", s)
	}
	rt := sleeper("rt")
	rt.StopSignal = v1.Signal_SIGNAL_SIGRTMINPLUS3
	if s := n.status(t, n.create(t, pod, p, rt)); s.StopSignal != v1.Signal_SIGNAL_SIGRTMINPLUS3 {
		t.Errorf("%v", s.StopSignal)
	}
}

func devices(t *testing.T, n *node) {
	c := sleeper("a")
	c.Devices = []*v1.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/nothing", Permissions: "r"}}
	_, id := n.up(t, podConfig(t), c)
	if s := n.exec(t, id, "sh", "-c", "head -c 4 /dev/nothing | wc -c"); strings.TrimSpace(s) != "4" {
		t.Errorf("%q", s)
	}
}

func unsupported(t *testing.T, n *node) {
	_, id := n.up(t, podConfig(t), sleeper("a"))
	_, err := n.rt.CheckpointContainer(ctx(t), &v1.CheckpointContainerRequest{ContainerId: id, Location: "/tmp/x"})
	wants(t, "CheckpointContainer", err, codes.Unimplemented)
}
