package criapi

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

func TestLife(t *testing.T) {
	n := start(t)
	p := podConfig(t)
	p.Labels, p.Annotations = map[string]string{"foo": "bar"}, map[string]string{"abc": "def"}
	begin := time.Now()
	pod := n.run(t, p)
	t.Log("run", time.Since(begin))
	st := n.podStatus(t, pod)
	if st.State != v1.PodSandboxState_SANDBOX_READY || st.Network.Ip == "" || st.Labels["foo"] != "bar" || st.Annotations["abc"] != "def" || st.Metadata.Uid != p.Metadata.Uid {
		t.Errorf("status: %v", st)
	}
	begin = time.Now()
	c := n.create(t, pod, p, sleeper("a"))
	t.Log("create", time.Since(begin))
	if s := n.status(t, c); s.State != v1.ContainerState_CONTAINER_CREATED || s.CreatedAt == 0 || s.StartedAt != 0 {
		t.Errorf("created: %v", s)
	}
	begin = time.Now()
	n.startContainer(t, c)
	t.Log("start", time.Since(begin))
	if s := n.status(t, c); s.State != v1.ContainerState_CONTAINER_RUNNING || s.StartedAt == 0 {
		t.Errorf("running: %v", s)
	}
	if out := n.exec(t, c, "echo", "-n", "hello"); out != "hello" {
		t.Errorf("exec: %q", out)
	}
	if out := n.exec(t, c, "ip", "-o", "-4", "addr", "show", "eth0"); !strings.Contains(out, st.Network.Ip+"/") {
		t.Errorf("address %s: %s", st.Network.Ip, out)
	}
	_, err := n.rt.StartContainer(ctx(t), &v1.StartContainerRequest{ContainerId: c})
	wants(t, "start of a running container", err, codes.FailedPrecondition)
	const term = 1 << 14 // of a mask of signals
	harness.Eventually(t, "the container heeds SIGTERM", 10*time.Second, func() bool {
		mask, err := strconv.ParseUint(n.exec(t, c, "sh", "-c", "sed -n 's/^SigCgt:[[:space:]]*//p' /proc/1/status | tr -d '\\n'"), 16, 64)
		return err == nil && mask&term != 0
	})
	begin = time.Now()
	for range 2 { // again is no error
		if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: c, Timeout: 20}); err != nil {
			t.Fatal(err)
		}
	}
	t.Log("stop", time.Since(begin))
	if s := n.status(t, c); s.State != v1.ContainerState_CONTAINER_EXITED || s.FinishedAt < s.StartedAt || s.ExitCode != 0 || s.Reason != "Completed" {
		t.Errorf("exited: %v", s)
	}
	begin = time.Now()
	for range 2 {
		if _, err := n.rt.StopPodSandbox(ctx(t), &v1.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
	}
	t.Log("stop pod", time.Since(begin))
	if st := n.podStatus(t, pod); st.State != v1.PodSandboxState_SANDBOX_NOTREADY || st.Network.Ip != "" {
		t.Errorf("stopped: %v", st)
	}
	_, err = n.rt.CreateContainer(ctx(t), &v1.CreateContainerRequest{PodSandboxId: pod, Config: sleeper("b"), SandboxConfig: p})
	wants(t, "create in a stopped pod", err, codes.FailedPrecondition)
	begin = time.Now()
	for range 2 {
		if _, err := n.rt.RemovePodSandbox(ctx(t), &v1.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
	}
	t.Log("remove pod", time.Since(begin))
	_, err = n.rt.PodSandboxStatus(ctx(t), &v1.PodSandboxStatusRequest{PodSandboxId: pod})
	wants(t, "status of a removed pod", err, codes.NotFound)
	_, err = n.rt.ContainerStatus(ctx(t), &v1.ContainerStatusRequest{ContainerId: c})
	wants(t, "status of a removed container", err, codes.NotFound)
}
