package criapi

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

// TestRestart kills the daemon under pods of every kind: none is lost, and no
// container is restarted.
func TestRestart(t *testing.T) {
	n := start(t)
	m := []*v1.IDMapping{{HostId: 200000, Length: 65536}}
	kinds := map[string]*v1.NamespaceOption{
		"plain":    {Pid: v1.NamespaceMode_CONTAINER},
		"shared":   {Pid: v1.NamespaceMode_POD},
		"host":     {Network: v1.NamespaceMode_NODE, Pid: v1.NamespaceMode_NODE, Ipc: v1.NamespaceMode_NODE},
		"own user": {Pid: v1.NamespaceMode_POD, UsernsOptions: &v1.UserNamespace{Uids: m, Gids: m}},
	}
	type up struct {
		pod, id, created, address string
		started                   int64
		config                    *v1.PodSandboxConfig
	}
	pods := map[string]*up{}
	for name, o := range kinds {
		p := podConfig(t)
		p.LogDirectory = t.TempDir()
		p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: o}
		c := sleeper("a")
		c.LogPath = "a.log"
		c.Linux.SecurityContext = &v1.LinuxContainerSecurityContext{NamespaceOptions: o, Capabilities: &v1.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}}
		c.Command = []string{"sh", "-c", "i=0; trap 'exit 5' TERM; while :; do echo $i; i=$((i+1)); sleep 0.02; done"}
		u := &up{config: p}
		u.pod, u.id = n.up(t, p, c)
		b := sleeper("b")
		b.Linux.SecurityContext = c.Linux.SecurityContext
		u.created = n.create(t, u.pod, p, b)
		u.address, u.started = n.podStatus(t, u.pod).Network.Ip, n.status(t, u.id).StartedAt
		pods[name] = u
	}
	ending := podConfig(t)
	short := sleeper("short")
	short.Command = []string{"sh", "-c", "sleep 0.5; exit 3"}
	_, shortID := n.up(t, ending, short)

	n.Kill()
	time.Sleep(700 * time.Millisecond) // one ends while nobody looks
	n.Boot()

	for name, u := range pods {
		s := n.podStatus(t, u.pod)
		if s.State != v1.PodSandboxState_SANDBOX_READY || s.Network.Ip != u.address {
			t.Errorf("%s: %v, had %s", name, s, u.address)
		}
		if c := n.status(t, u.id); c.State != v1.ContainerState_CONTAINER_RUNNING || c.StartedAt != u.started {
			t.Errorf("%s: %v", name, c)
		}
		if out := n.exec(t, u.id, "sh", "-c", "echo in; grep CapAmb /proc/self/status"); out != "in\nCapAmb:\t0000000000000400\n" {
			t.Errorf("%s: %q", name, out)
		}
		n.startContainer(t, u.created)
		kind := "net"
		if x, y := n.exec(t, u.id, "readlink", "/proc/self/ns/"+kind), n.exec(t, u.created, "readlink", "/proc/self/ns/"+kind); x != y {
			t.Errorf("%s: %s and %s", name, x, y)
		}
		if u.address != "" {
			if out := n.exec(t, u.created, "ip", "-o", "-4", "addr", "show", "eth0"); !strings.Contains(out, u.address+"/") {
				t.Errorf("%s: %s", name, out)
			}
		}
		// No line of the log is missing.
		for i, l := range readLog(t, u.config.LogDirectory+"/a.log") {
			if l.text != fmt.Sprint(i) {
				t.Errorf("%s: line %d is %q", name, i, l.text)
				break
			}
		}
		if _, err := n.rt.StopContainer(ctx(t), &v1.StopContainerRequest{ContainerId: u.id, Timeout: 10}); err != nil {
			t.Error(err)
		}
		if c := n.status(t, u.id); c.ExitCode != 5 {
			t.Errorf("%s: %v", name, c)
		}
	}
	if s := n.status(t, shortID); s.State != v1.ContainerState_CONTAINER_EXITED || s.ExitCode != 3 || s.Reason != "Error" {
		t.Errorf("%v", s)
	}
}

// TestKilled kills the daemon in the midst of calls again and again: afterwards
// everything can be removed, and nothing is left.
func TestKilled(t *testing.T) {
	n := start(t)
	rounds := 4
	if long {
		rounds = 40
	}
	for round := range rounds {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				c, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				p := podConfig(t)
				p.Linux.SecurityContext = &v1.LinuxSandboxSecurityContext{NamespaceOptions: &v1.NamespaceOption{Pid: v1.NamespaceMode(int32(round % 2))}}
				r, err := n.rt.RunPodSandbox(c, &v1.RunPodSandboxRequest{Config: p})
				if err != nil {
					return
				}
				k, err := n.rt.CreateContainer(c, &v1.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: sleeper("a"), SandboxConfig: p})
				if err != nil {
					return
				}
				_, _ = n.rt.StartContainer(c, &v1.StartContainerRequest{ContainerId: k.ContainerId})
				_, _ = n.rt.StopPodSandbox(c, &v1.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId})
				_, _ = n.rt.RemovePodSandbox(c, &v1.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId})
			})
		}
		time.Sleep(time.Duration(10+round*25%200) * time.Millisecond)
		n.Kill()
		wg.Wait()
		n.Boot()
	}
	l, err := n.rt.ListPodSandbox(ctx(t), &v1.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pods were there", len(l.Items))
	for _, p := range l.Items {
		if _, err := n.rt.StopPodSandbox(ctx(t), &v1.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			t.Error(err)
		}
		if _, err := n.rt.RemovePodSandbox(ctx(t), &v1.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			t.Error(err)
		}
	}
	k, err := n.rt.ListContainers(ctx(t), &v1.ListContainersRequest{})
	if err != nil || len(k.Containers) > 0 {
		t.Errorf("containers are left: %v, %v", k, err)
	}
	if d, err := os.ReadDir(n.Dir + "/run/pods"); err != nil || len(d) > 0 {
		t.Errorf("directories are left: %v, %v", d, err)
	}
	if d, _ := filepath.Glob(n.Dir + "/root/networks/*/*.json"); len(d) > 4 {
		t.Errorf("records of networks are left: %v", d)
	}
}

// TestRebooted shows pods as a kubelet finds them after the host was rebooted: the
// namespaces are gone, the records are not.
func TestRebooted(t *testing.T) {
	n := start(t)
	p := podConfig(t)
	pod, id := n.up(t, p, sleeper("a"))
	pid := n.exec(t, id, "true") // it runs
	_ = pid
	n.Kill()
	// What a reboot takes: processes, mounts, the run root.
	for _, proc := range processesIn(t, id) {
		_ = proc.Kill()
	}
	harness.Eventually(t, "the end of all processes", 5*time.Second, func() bool { return len(processesIn(t, id)) == 0 })
	unmountBelow(t, n.Dir+"/run")
	if err := os.RemoveAll(n.Dir + "/run"); err != nil {
		t.Fatal(err)
	}
	n.Boot()
	if s := n.podStatus(t, pod); s.State != v1.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("%v", s)
	}
	if s := n.status(t, id); s.State != v1.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 {
		t.Errorf("%v", s)
	}
	_, err := n.rt.StartContainer(ctx(t), &v1.StartContainerRequest{ContainerId: id})
	wants(t, "start", err, codes.FailedPrecondition)
	next := podConfig(t)
	next.Metadata = &v1.PodSandboxMetadata{Name: p.Metadata.Name, Namespace: p.Metadata.Namespace, Uid: p.Metadata.Uid, Attempt: 1}
	n.up(t, next, sleeper("a"))
}
