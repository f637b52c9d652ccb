// Package nri lets plugins of containerd's Node Resource Interface watch and
// change pods and their containers: it implements engine.PodHooks on the runtime
// half of the NRI library. It is made by internal/wire where the configuration
// asks for it; without that nothing of it runs.
package nri

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/nri/pkg/adaptation"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	ocigen "github.com/opencontainers/runtime-tools/generate"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Config makes Hooks.
type Config struct {
	// Socket is where plugins that are started by others connect; "" is nowhere.
	Socket string
	// PluginDir holds plugins to start, ConfigDir their configuration; "" are none.
	PluginDir, ConfigDir string
	Version              string
	Engine               Engine
	// Inject adds CDI devices to a spec.
	Inject func(ctx context.Context, spec *specs.Spec, devices []string) error
	// Ready is closed when the engine knows what there is: plugins wait for that.
	Ready  <-chan struct{}
	Logger *slog.Logger
}

// Engine is what plugins may see and do by themselves.
type Engine interface {
	Pods() []*container.Pod
	PodContainers(podID string) []*container.Record
	PodContainerLimit(ctx context.Context, id string, res *specs.LinuxResources) error
}

// Hooks passes what happens on to plugins. It implements engine.PodHooks.
type Hooks struct {
	cfg Config
	log *slog.Logger
	nri *adaptation.Adaptation

	// mu keeps a plugin that is being told what there is from missing, or seeing
	// twice, what happens meanwhile. The library handles one event at a time, too,
	// and ends what takes a plugin more than two seconds.
	mu sync.Mutex
}

// New makes the hooks; Run starts plugins.
func New(c Config) (*Hooks, error) {
	h := &Hooks{cfg: c, log: c.Logger}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	for _, p := range []string{c.Socket, c.PluginDir, c.ConfigDir} {
		if p != "" && !filepath.IsAbs(p) {
			return nil, fault.New(fault.Invalid, "cannot use %q for NRI: an absolute path is wanted", p)
		}
	}
	// An empty path would be the library's default, and what is not wanted must
	// not be found: no plugin has this name.
	none := "/proc/self/fdinfo/none"
	opts := []adaptation.Option{adaptation.WithPluginPath(or(c.PluginDir, none)), adaptation.WithPluginConfigPath(or(c.ConfigDir, none))}
	if c.Socket == "" {
		opts = append(opts, adaptation.WithDisabledExternalConnections())
	} else {
		opts = append(opts, adaptation.WithSocketPath(c.Socket))
	}
	// That the build has no WebAssembly (ADR 14) is an error to the library.
	nrilog.Set(logger{slog.New(slog.DiscardHandler)})
	defer nrilog.Set(logger{h.log})
	var err error
	if h.nri, err = adaptation.New("servin", c.Version, h.synchronize, h.unsolicited, opts...); err != nil {
		return nil, fmt.Errorf("cannot make the interface of plugins: %w", err)
	}
	return h, nil
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// Run serves plugins until ctx ends.
func (h *Hooks) Run(ctx context.Context) error {
	select {
	case <-h.cfg.Ready:
	case <-ctx.Done():
		return nil
	}
	if h.cfg.Socket != "" {
		if err := os.MkdirAll(filepath.Dir(h.cfg.Socket), 0o700); err != nil {
			return fmt.Errorf("cannot make the directory of the plugins' socket: %w", err)
		}
	}
	if err := h.nri.Start(); err != nil {
		return fmt.Errorf("cannot start plugins: %w", err)
	}
	<-ctx.Done()
	h.nri.Stop()
	if h.cfg.Socket != "" {
		_ = os.Remove(h.cfg.Socket)
	}
	return nil
}

// synchronize tells a plugin what there is.
func (h *Hooks) synchronize(ctx context.Context, tell adaptation.SyncCB) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var pods []*adaptation.PodSandbox
	var containers []*adaptation.Container
	for _, p := range h.cfg.Engine.Pods() {
		if !p.Ready {
			continue
		}
		pods = append(pods, podOf(p))
		for _, r := range h.cfg.Engine.PodContainers(p.ID) {
			if st := stateOf(r); st != adaptation.ContainerState_CONTAINER_STOPPED {
				containers = append(containers, containerOf(r, nil))
			}
		}
	}
	updates, err := tell(ctx, pods, containers)
	if err != nil {
		return err
	}
	h.apply(ctx, updates)
	return nil
}

// unsolicited are changes of limits that a plugin asks for by itself; those that
// failed are returned.
func (h *Hooks) unsolicited(ctx context.Context, updates []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
	return h.apply(ctx, updates), nil
}

func (h *Hooks) apply(ctx context.Context, updates []*adaptation.ContainerUpdate) (failed []*adaptation.ContainerUpdate) {
	for _, c := range changesOf(updates) {
		if err := h.cfg.Engine.PodContainerLimit(ctx, c.ID, c.Resources); err != nil && !c.Optional {
			h.log.Warn("limits that a plugin asked for could not be set", "container", c.ID, "cause", err)
			for _, u := range updates {
				if u.GetContainerId() == c.ID {
					failed = append(failed, u)
				}
			}
		}
	}
	return failed
}

// changesOf turns what plugins ask for into the engine's terms.
func changesOf(updates []*adaptation.ContainerUpdate) (out []engine.LimitChange) {
	for _, u := range updates {
		if res := u.GetLinux().GetResources(); res != nil {
			out = append(out, engine.LimitChange{ID: u.GetContainerId(), Resources: res.ToOCI(), Optional: u.GetIgnoreFailure()})
		}
	}
	return out
}

// PodRun implements engine.PodHooks.
func (h *Hooks) PodRun(ctx context.Context, p *container.Pod) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.nri.RunPodSandbox(ctx, &adaptation.RunPodSandboxRequest{Pod: podOf(p)})
}

// PodStop implements engine.PodHooks.
func (h *Hooks) PodStop(ctx context.Context, p *container.Pod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told(p.ID, h.nri.StopPodSandbox(ctx, &adaptation.StopPodSandboxRequest{Pod: podOf(p)}))
}

// PodRemove implements engine.PodHooks.
func (h *Hooks) PodRemove(ctx context.Context, p *container.Pod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told(p.ID, h.nri.RemovePodSandbox(ctx, &adaptation.RemovePodSandboxRequest{Pod: podOf(p)}))
}

func (h *Hooks) told(id string, err error) {
	if err != nil {
		h.log.Warn("a plugin could not take an event", "id", id, "cause", err)
	}
}

// ContainerCreate implements engine.PodHooks.
func (h *Hooks) ContainerCreate(ctx context.Context, p *container.Pod, r *container.Record, spec *specs.Spec) ([]engine.LimitChange, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	pod, c := podOf(p), containerOf(r, spec)
	c.State = adaptation.ContainerState_CONTAINER_CREATED
	resp, err := h.nri.CreateContainer(ctx, &adaptation.CreateContainerRequest{Pod: pod, Container: c})
	if err != nil {
		return nil, err
	}
	if resp.GetAdjust() != nil {
		own, err := copyOf(spec)
		if err != nil {
			return nil, err
		}
		g := ocigen.NewFromSpec(own)
		err = generate.SpecGenerator(&g, generate.WithCDIDeviceInjector(func(s *specs.Spec, devices []string) error {
			return h.cfg.Inject(ctx, s, devices)
		})).Adjust(resp.GetAdjust())
		if err != nil {
			return nil, fault.New(fault.Invalid, "cannot change the container as a plugin wants: %w", err)
		}
		if l := own.Linux; l != nil && (l.IntelRdt != nil || len(l.NetDevices) > 0) {
			return nil, fault.New(fault.Unsupported, "cannot change the container as a plugin wants: the engine's runtime sets up no resource control groups (RDT) and moves no network devices")
		}
		*spec = *own
	}
	// In this engine making a container's spec and starting it are one step.
	c = containerOf(r, spec)
	h.told(r.ID, h.nri.PostCreateContainer(ctx, &adaptation.PostCreateContainerRequest{Pod: pod, Container: c}))
	if err := h.nri.StartContainer(ctx, &adaptation.StartContainerRequest{Pod: pod, Container: c}); err != nil {
		return nil, err
	}
	return changesOf(resp.GetUpdate()), nil
}

// ContainerStarted implements engine.PodHooks.
func (h *Hooks) ContainerStarted(ctx context.Context, p *container.Pod, r *container.Record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told(r.ID, h.nri.PostStartContainer(ctx, &adaptation.PostStartContainerRequest{Pod: podOf(p), Container: containerOf(r, nil)}))
}

// ContainerUpdate implements engine.PodHooks.
func (h *Hooks) ContainerUpdate(ctx context.Context, p *container.Pod, r *container.Record, res *specs.LinuxResources) ([]engine.LimitChange, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	pod, c := podOf(p), containerOf(r, nil)
	resp, err := h.nri.UpdateContainer(ctx, &adaptation.UpdateContainerRequest{Pod: pod, Container: c, LinuxResources: adaptation.FromOCILinuxResources(res, nil)})
	if err != nil {
		return nil, err
	}
	var others []*adaptation.ContainerUpdate
	for _, u := range resp.GetUpdate() {
		if u.GetContainerId() != r.ID {
			others = append(others, u)
		} else if own := u.GetLinux().GetResources(); own != nil {
			rules := res.Devices
			*res = *own.ToOCI()
			res.Devices = rules // what the container may open is not a limit
		}
	}
	h.told(r.ID, h.nri.PostUpdateContainer(ctx, &adaptation.PostUpdateContainerRequest{Pod: pod, Container: c}))
	return changesOf(others), nil
}

// ContainerStopped implements engine.PodHooks.
func (h *Hooks) ContainerStopped(ctx context.Context, p *container.Pod, r *container.Record) []engine.LimitChange {
	h.mu.Lock()
	defer h.mu.Unlock()
	resp, err := h.nri.StopContainer(ctx, &adaptation.StopContainerRequest{Pod: podOf(p), Container: containerOf(r, nil)})
	h.told(r.ID, err)
	return changesOf(resp.GetUpdate())
}

// ContainerRemoved implements engine.PodHooks.
func (h *Hooks) ContainerRemoved(ctx context.Context, p *container.Pod, r *container.Record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told(r.ID, h.nri.RemoveContainer(ctx, &adaptation.RemoveContainerRequest{Pod: podOf(p), Container: containerOf(r, nil)}))
}
