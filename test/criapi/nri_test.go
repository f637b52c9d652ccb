package criapi

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/test/harness"
)

// plugin is an NRI plugin that notes what it is told and changes containers.
type plugin struct {
	stub stub.Stub
	done chan error

	mu     sync.Mutex
	events []string
	synced []string // containers that it was told of when it connected
}

func (p *plugin) note(e string) {
	p.mu.Lock()
	p.events = append(p.events, e)
	p.mu.Unlock()
}

func (p *plugin) saw(e string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.events, e)
}

func (p *plugin) Configure(context.Context, string, string, string) (stub.EventMask, error) {
	return 0, nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, cs []*api.Container) ([]*api.ContainerUpdate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.synced = []string{}
	for _, c := range cs {
		p.synced = append(p.synced, c.GetId())
	}
	return nil, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.note("run " + pod.GetName())
	if pod.GetAnnotations()["refuse"] != "" {
		return errors.New("not this one")
	}
	return nil
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.note("stop " + pod.GetName())
	return nil
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.note("remove " + pod.GetName())
	return nil
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.note("create " + c.GetName())
	if pod.GetAnnotations()["plain"] != "" {
		return nil, nil, nil
	}
	if slices.Contains(c.GetEnv(), "REFUSE=1") {
		return nil, nil, errors.New("not this container")
	}
	a := &api.ContainerAdjustment{}
	a.AddEnv("ADDED", pod.GetName())
	a.AddMount(&api.Mount{Source: "/etc", Destination: "/from-plugin", Type: "bind", Options: []string{"rbind", "ro"}})
	a.SetLinuxMemoryLimit(48 << 20)
	a.AddRlimit("RLIMIT_NOFILE", 777, 777)
	a.SetLinuxOomScoreAdj(func() *int { v := 500; return &v }())
	return a, nil, nil
}

func (p *plugin) PostCreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("created " + c.GetName())
	return nil
}

func (p *plugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("start " + c.GetName())
	return nil
}

func (p *plugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("started " + c.GetName())
	return nil
}

func (p *plugin) UpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.note("update " + c.GetName())
	u := &api.ContainerUpdate{}
	u.SetContainerId(c.GetId())
	u.SetLinuxMemoryLimit(r.GetMemory().GetLimit().GetValue() / 2)
	return []*api.ContainerUpdate{u}, nil
}

func (p *plugin) StopContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	p.note("ended " + c.GetName())
	return nil, nil
}

func (p *plugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("removed " + c.GetName())
	return nil
}

// plug connects a plugin to the daemon and waits until it was told what there is.
func (n *node) plug(t *testing.T, index string) *plugin {
	t.Helper()
	p := &plugin{done: make(chan error, 1)}
	var err error
	if p.stub, err = stub.New(p, stub.WithPluginName("test"), stub.WithPluginIdx(index), stub.WithSocketPath(n.Dir+"/nri.sock")); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "the plugins' socket", 10*time.Second, func() bool { _, err := os.Stat(n.Dir + "/nri.sock"); return err == nil })
	go func() { p.done <- p.stub.Run(context.Background()) }()
	harness.Eventually(t, "the plugin's connection", 10*time.Second, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.synced != nil
	})
	t.Cleanup(func() { p.stub.Stop(); <-p.done })
	return p
}

func TestNRI(t *testing.T) {
	n := startWith(t, "nri: {socket: DIR/nri.sock}\n")
	p := n.plug(t, "10")
	cfg := podConfig(t)
	pod := n.run(t, cfg)
	if !p.saw("run " + cfg.Metadata.Name) {
		t.Errorf("the plugin saw %q", p.events)
	}
	c := sleeper("c")
	c.Envs = []*v1.KeyValue{{Key: "KEPT", Value: []byte("1")}}
	id := n.create(t, pod, cfg, c)
	n.startContainer(t, id)
	for script, want := range map[string]string{
		"echo $ADDED $KEPT":            cfg.Metadata.Name + " 1",
		"ls -d /from-plugin/passwd":    "/from-plugin/passwd",
		"ulimit -n":                    "777",
		"cat /proc/1/oom_score_adj":    "500",
		"touch /from-plugin/x || true": "",
	} {
		if got := strings.TrimSpace(n.exec(t, id, "sh", "-c", script+" 2>/dev/null")); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	limit := func() string {
		return strings.TrimSpace(n.exec(t, id, "sh", "-c", "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max"))
	}
	if got := limit(); got != "50331648" {
		t.Errorf("memory limit %s", got)
	}
	// The plugin has its say in updates.
	if _, err := n.rt.UpdateContainerResources(ctx(t), &v1.UpdateContainerResourcesRequest{ContainerId: id, Linux: &v1.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}}); err != nil {
		t.Fatal(err)
	}
	if got := limit(); got != "33554432" {
		t.Errorf("memory limit after the update %s", got)
	}
	// And changes limits by itself.
	u := &api.ContainerUpdate{}
	u.SetContainerId(id)
	u.SetLinuxMemoryLimit(40 << 20)
	if failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{u}); err != nil || len(failed) > 0 {
		t.Errorf("unsolicited update: %v %v", failed, err)
	}
	if got := limit(); got != "41943040" {
		t.Errorf("memory limit after the plugin's update %s", got)
	}
	u.SetContainerId(strings.Repeat("0", 64))
	if failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{u}); err != nil || len(failed) != 1 {
		t.Errorf("an update of nobody: %v %v", failed, err)
	}

	// It refuses.
	bad := sleeper("bad")
	bad.Envs = []*v1.KeyValue{{Key: "REFUSE", Value: []byte("1")}}
	refused := n.create(t, pod, cfg, bad)
	if _, err := n.rt.StartContainer(ctx(t), &v1.StartContainerRequest{ContainerId: refused}); err == nil || !strings.Contains(err.Error(), "not this container") {
		t.Errorf("a container that the plugin refuses: %v", err)
	}
	no := podConfig(t)
	no.Metadata.Name, no.Metadata.Uid, no.Annotations = "no", "no", map[string]string{"refuse": "1"}
	if _, err := n.rt.RunPodSandbox(ctx(t), &v1.RunPodSandboxRequest{Config: no}); err == nil || !strings.Contains(err.Error(), "not this one") {
		t.Errorf("a pod that the plugin refuses: %v", err)
	}

	// The engine is killed: what runs goes on, and the plugin, when it comes back,
	// is told of it.
	n.Kill()
	n.Boot()
	if got := limit(); got != "41943040" {
		t.Errorf("memory limit after a restart %s", got)
	}
	p = n.plug(t, "10")
	if !slices.Contains(p.synced, id) {
		t.Errorf("the plugin was told of %q", p.synced)
	}

	// A plugin that goes is no trouble.
	second := n.plug(t, "20")
	second.stub.Stop()
	plain := podConfig(t)
	plain.Metadata.Name, plain.Metadata.Uid, plain.Annotations = "plain", "plain", map[string]string{"plain": "1"}
	_, other := n.up(t, plain, sleeper("other"))
	if got := n.exec(t, other, "sh", "-c", "echo $ADDED"); strings.TrimSpace(got) != "" {
		t.Errorf("a container that nobody changed: %q", got)
	}
	if _, err := n.rt.StopPodSandbox(ctx(t), &v1.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.rt.RemovePodSandbox(ctx(t), &v1.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	for _, e := range []string{"create other", "created other", "start other", "started other", "ended c", "removed c", "stop " + cfg.Metadata.Name, "remove " + cfg.Metadata.Name} {
		harness.Eventually(t, "event "+e, 5*time.Second, func() bool { return p.saw(e) })
	}
}
