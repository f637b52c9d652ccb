package nri

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	mcontainer "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/container"
)

func podOf(p *container.Pod) *adaptation.PodSandbox {
	out := &adaptation.PodSandbox{
		Id: p.ID, Name: p.Name, Namespace: p.Namespace, Uid: p.UID, Labels: p.Labels, Annotations: p.Annotations,
		RuntimeHandler: p.Runtime, Linux: &adaptation.LinuxPodSandbox{CgroupParent: p.CgroupParent},
	}
	for _, ip := range p.IPs {
		out.Ips = append(out.Ips, ip.String())
	}
	return out
}

func stateOf(r *container.Record) adaptation.ContainerState {
	switch r.State.Status {
	case mcontainer.StateCreated:
		return adaptation.ContainerState_CONTAINER_CREATED
	case mcontainer.StateRunning, mcontainer.StateRestarting:
		return adaptation.ContainerState_CONTAINER_RUNNING
	case mcontainer.StatePaused:
		return adaptation.ContainerState_CONTAINER_PAUSED
	}
	return adaptation.ContainerState_CONTAINER_STOPPED
}

// containerOf describes a container. Much of it is known only while its spec is.
func containerOf(r *container.Record, spec *specs.Spec) *adaptation.Container {
	c := &adaptation.Container{
		Id: r.ID, PodSandboxId: r.Pod.Pod, Name: r.Pod.Name, State: stateOf(r), Labels: r.Config.Labels,
		Args: append(append([]string{}, r.Config.Entrypoint...), r.Config.Cmd...), Env: r.Config.Env,
		Pid: uint32(max(r.State.Pid, 0)), CreatedAt: r.Created.UnixNano(), ExitCode: int32(r.State.ExitCode),
		Linux: &adaptation.LinuxContainer{Resources: limitsOf(r)},
	}
	if c.Name == "" {
		c.Name = r.Name
	}
	if t := r.State.StartedAt; !t.IsZero() {
		c.StartedAt = t.UnixNano()
	}
	if t := r.State.FinishedAt; !t.IsZero() {
		c.FinishedAt = t.UnixNano()
	}
	if spec == nil {
		return c
	}
	c.Annotations = spec.Annotations
	c.Mounts, c.Hooks = api.FromOCIMounts(spec.Mounts), api.FromOCIHooks(spec.Hooks)
	if p := spec.Process; p != nil {
		c.Args, c.Env = p.Args, p.Env
		c.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: p.User.AdditionalGids}
		for _, l := range p.Rlimits {
			c.Rlimits = append(c.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
		}
		c.Linux.OomScoreAdj, c.Linux.IoPriority = api.Int(p.OOMScoreAdj), api.FromOCILinuxIOPriority(p.IOPriority)
		c.Linux.Scheduler = api.FromOCILinuxScheduler(p.Scheduler)
	}
	if l := spec.Linux; l != nil {
		c.Linux.Devices, c.Linux.CgroupsPath, c.Linux.Sysctl = api.FromOCILinuxDevices(l.Devices), l.CgroupsPath, l.Sysctl
		c.Linux.Resources = api.FromOCILinuxResources(l.Resources, nil)
		// Where the namespaces are is the engine's affair: the paths are of
		// descriptors of its own.
		for _, n := range l.Namespaces {
			c.Linux.Namespaces = append(c.Linux.Namespaces, &api.LinuxNamespace{Type: string(n.Type)})
		}
	}
	return c
}

// limitsOf are the limits that a record names.
func limitsOf(r *container.Record) *adaptation.LinuxResources {
	res := &r.HostConfig.Resources
	out := &adaptation.LinuxResources{Memory: &adaptation.LinuxMemory{}, Cpu: &adaptation.LinuxCPU{Cpus: res.CpusetCpus, Mems: res.CpusetMems}}
	if v := res.Memory; v != 0 {
		out.Memory.Limit = api.Int64(v)
	}
	if v := res.MemorySwap; v != 0 {
		out.Memory.Swap = api.Int64(v)
	}
	if v := res.CPUShares; v != 0 {
		out.Cpu.Shares = api.UInt64(uint64(v))
	}
	if v := res.CPUQuota; v != 0 {
		out.Cpu.Quota = api.Int64(v)
	}
	if v := res.CPUPeriod; v != 0 {
		out.Cpu.Period = api.UInt64(uint64(v))
	}
	return out
}

// copyOf is a spec that may be changed: the engine's shares parts with those of
// other containers. The seccomp profile, which is large, is replaced as a whole
// or not at all.
func copyOf(s *specs.Spec) (*specs.Spec, error) {
	lean := *s
	var profile *specs.LinuxSeccomp
	if s.Linux != nil {
		l := *s.Linux
		profile, l.Seccomp = l.Seccomp, nil
		lean.Linux = &l
	}
	b, err := json.Marshal(&lean)
	if err != nil {
		return nil, fmt.Errorf("cannot copy the container's spec: %w", err)
	}
	out := new(specs.Spec)
	if err := json.Unmarshal(b, out); err != nil {
		return nil, fmt.Errorf("cannot copy the container's spec: %w", err)
	}
	if out.Linux != nil {
		out.Linux.Seccomp = profile
	}
	return out, nil
}

// logger gives the library's messages to the engine's log. Its chatter about
// each step is not worth a line.
type logger struct{ *slog.Logger }

func (l logger) Debugf(_ context.Context, f string, a ...any) {
	l.Debug("nri: " + fmt.Sprintf(f, a...))
}
func (l logger) Infof(_ context.Context, f string, a ...any) { l.Debug("nri: " + fmt.Sprintf(f, a...)) }
func (l logger) Warnf(_ context.Context, f string, a ...any) { l.Warn("nri: " + fmt.Sprintf(f, a...)) }
func (l logger) Errorf(_ context.Context, f string, a ...any) {
	l.Error("nri: " + fmt.Sprintf(f, a...))
}
