package criapi

import (
	"context"
	"encoding/json"
	"maps"
	"net/netip"
	"sync"

	"google.golang.org/protobuf/proto"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

func invalid(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }

// RunPodSandbox implements the CRI.
func (s *Server) RunPodSandbox(ctx context.Context, req *v1.RunPodSandboxRequest) (*v1.RunPodSandboxResponse, error) {
	p, err := pod(req.GetConfig(), req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	id, err := s.cfg.Engine.PodRun(ctx, p)
	if err != nil {
		return nil, err
	}
	return &v1.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// pod decodes a pod's configuration.
func pod(c *v1.PodSandboxConfig, handler string) (*container.Pod, error) {
	m := c.GetMetadata()
	if m == nil {
		return nil, invalid("cannot run pod: its metadata must be given")
	}
	if c.GetWindows() != nil {
		return nil, fault.New(fault.Unsupported, "cannot run pod: this engine runs on Linux")
	}
	linux := c.GetLinux()
	sec := linux.GetSecurityContext()
	p := &container.Pod{
		Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(), Attempt: m.GetAttempt(), Hostname: c.GetHostname(),
		CgroupParent: linux.GetCgroupParent(), Runtime: handler, Sysctls: linux.GetSysctls(),
		Labels: c.GetLabels(), Annotations: c.GetAnnotations(),
	}
	ns := sec.GetNamespaceOptions()
	var err error
	if p.Network, err = podMode("network", ns.GetNetwork()); err != nil {
		return nil, err
	}
	if p.IPC, err = podMode("ipc", ns.GetIpc()); err != nil {
		return nil, err
	}
	switch ns.GetPid() {
	case v1.NamespaceMode_POD:
		p.PID = container.NamespacePod
	case v1.NamespaceMode_CONTAINER:
		p.PID = container.NamespaceContainer
	case v1.NamespaceMode_NODE:
		p.PID = container.NamespaceHost
	default:
		return nil, invalid("cannot run pod: pid namespace mode %s is not one of a pod", ns.GetPid())
	}
	if sec == nil || ns == nil {
		p.PID = container.NamespaceContainer // nothing was asked for: no process is needed
	}
	if p.UserNS, err = userNS(ns.GetUsernsOptions()); err != nil {
		return nil, err
	}
	if d := c.GetDnsConfig(); d != nil {
		p.DNS, p.Search, p.Options = d.GetServers(), d.GetSearches(), d.GetOptions()
		if !engine.PodDNSValid(p.DNS, p.Search, p.Options) {
			return nil, invalid("cannot run pod: its DNS configuration is not valid: %v", d)
		}
	}
	for _, m := range c.GetPortMappings() {
		port, err := portMapping(m)
		if err != nil {
			return nil, err
		}
		p.Ports = append(p.Ports, port)
	}
	if err := podSeccomp(sec); err != nil {
		return nil, err
	}
	if p.Edge, err = proto.Marshal(c); err != nil {
		return nil, invalid("cannot run pod: %w", err)
	}
	return p, nil
}

func podMode(what string, m v1.NamespaceMode) (container.NamespaceMode, error) {
	switch m {
	case v1.NamespaceMode_POD:
		return container.NamespacePod, nil
	case v1.NamespaceMode_NODE:
		return container.NamespaceHost, nil
	}
	return "", invalid("cannot run pod: %s namespace mode %s is not one of a pod", what, m)
}

// userNS reads the mapping of a pod's user namespace: one range, from 0 on, the
// same for users and groups.
func userNS(o *v1.UserNamespace) (container.UserNS, error) {
	var none container.UserNS
	switch o.GetMode() {
	case v1.NamespaceMode_NODE:
		if len(o.GetUids())+len(o.GetGids()) > 0 {
			return none, invalid("cannot run pod: ids are mapped, but its user namespace is the host's")
		}
		return none, nil
	case v1.NamespaceMode_POD:
	default:
		return none, invalid("cannot run pod: user namespace mode %s is not supported", o.GetMode())
	}
	if o == nil {
		return none, nil
	}
	if len(o.GetUids()) == 0 && len(o.GetGids()) == 0 {
		return none, nil // POD is also the zero value
	}
	if len(o.GetUids()) != 1 || len(o.GetGids()) != 1 {
		return none, invalid("cannot run pod: exactly one mapping of users and one of groups is supported, not %d and %d", len(o.GetUids()), len(o.GetGids()))
	}
	u, g := o.GetUids()[0], o.GetGids()[0]
	if !proto.Equal(u, g) {
		return none, invalid("cannot run pod: the mappings of users and groups differ")
	}
	if u.GetContainerId() != 0 {
		return none, invalid("cannot run pod: id 0 of the container must be mapped, the mapping begins at %d", u.GetContainerId())
	}
	if u.GetHostId() == 0 || u.GetLength() == 0 || uint64(u.GetHostId())+uint64(u.GetLength()) > 1<<32-1 {
		return none, invalid("cannot run pod: cannot map %d ids from %d on", u.GetLength(), u.GetHostId())
	}
	return container.UserNS{Host: u.GetHostId(), Size: u.GetLength()}, nil
}

func portMapping(m *v1.PortMapping) (p container.PodPort, err error) {
	switch m.GetProtocol() {
	case v1.Protocol_TCP:
		p.Protocol = "tcp"
	case v1.Protocol_UDP:
		p.Protocol = "udp"
	case v1.Protocol_SCTP:
		p.Protocol = "sctp"
	default:
		return p, invalid("cannot run pod: unknown protocol %s", m.GetProtocol())
	}
	if m.GetContainerPort() < 1 || m.GetContainerPort() > 65535 || m.GetHostPort() < 0 || m.GetHostPort() > 65535 {
		return p, invalid("cannot run pod: cannot publish port %d as %d", m.GetContainerPort(), m.GetHostPort())
	}
	if h := m.GetHostIp(); h != "" {
		if p.HostIP, err = netip.ParseAddr(h); err != nil {
			return p, invalid("cannot run pod: %q is no address to publish at", h)
		}
	}
	p.ContainerPort, p.HostPort = uint16(m.GetContainerPort()), uint16(m.GetHostPort())
	return p, nil
}

// StopPodSandbox implements the CRI.
func (s *Server) StopPodSandbox(ctx context.Context, req *v1.StopPodSandboxRequest) (*v1.StopPodSandboxResponse, error) {
	if req.GetPodSandboxId() == "" {
		return nil, invalid("cannot stop a pod: its id must be given")
	}
	return &v1.StopPodSandboxResponse{}, s.cfg.Engine.PodStop(ctx, req.GetPodSandboxId())
}

// RemovePodSandbox implements the CRI.
func (s *Server) RemovePodSandbox(ctx context.Context, req *v1.RemovePodSandboxRequest) (*v1.RemovePodSandboxResponse, error) {
	if req.GetPodSandboxId() == "" {
		return nil, invalid("cannot remove a pod: its id must be given")
	}
	return &v1.RemovePodSandboxResponse{}, s.cfg.Engine.PodRemove(ctx, req.GetPodSandboxId())
}

// PodSandboxStatus implements the CRI.
func (s *Server) PodSandboxStatus(_ context.Context, req *v1.PodSandboxStatusRequest) (*v1.PodSandboxStatusResponse, error) {
	p, err := s.cfg.Engine.Pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &v1.PodSandboxStatusResponse{Status: s.podStatus(p)}
	for _, r := range s.cfg.Engine.PodContainers(p.ID) {
		resp.ContainersStatuses = append(resp.ContainersStatuses, s.containerStatus(r))
	}
	resp.Timestamp = now()
	if req.GetVerbose() {
		resp.Info = map[string]string{"info": podInfo(p)}
	}
	return resp, nil
}

func podInfo(p *container.Pod) string {
	c := *p
	c.Edge = nil
	b, err := json.Marshal(&c)
	if err != nil {
		return "{}"
	}
	return string(b)
}

func podState(p *container.Pod) v1.PodSandboxState {
	if p.Ready {
		return v1.PodSandboxState_SANDBOX_READY
	}
	return v1.PodSandboxState_SANDBOX_NOTREADY
}

func podMetadata(p *container.Pod) *v1.PodSandboxMetadata {
	return &v1.PodSandboxMetadata{Name: p.Name, Uid: p.UID, Namespace: p.Namespace, Attempt: p.Attempt}
}

func (s *Server) podStatus(p *container.Pod) *v1.PodSandboxStatus {
	st := &v1.PodSandboxStatus{
		Id: p.ID, Metadata: podMetadata(p), State: podState(p), CreatedAt: p.Created.UnixNano(), Network: &v1.PodSandboxNetworkStatus{},
		Linux:  &v1.LinuxPodSandboxStatus{Namespaces: &v1.Namespace{Options: namespaceOptions(p)}},
		Labels: p.Labels, Annotations: p.Annotations, RuntimeHandler: p.Runtime,
	}
	for i, ip := range p.IPs {
		if i == 0 {
			st.Network.Ip = ip.String()
		} else {
			st.Network.AdditionalIps = append(st.Network.AdditionalIps, &v1.PodIP{Ip: ip.String()})
		}
	}
	return st
}

func namespaceOptions(p *container.Pod) *v1.NamespaceOption {
	mode := func(m container.NamespaceMode) v1.NamespaceMode {
		switch m {
		case container.NamespaceHost:
			return v1.NamespaceMode_NODE
		case container.NamespaceContainer:
			return v1.NamespaceMode_CONTAINER
		}
		return v1.NamespaceMode_POD
	}
	o := &v1.NamespaceOption{Network: mode(p.Network), Pid: mode(p.PID), Ipc: mode(p.IPC)}
	if p.UserNS.Size > 0 {
		m := []*v1.IDMapping{{HostId: p.UserNS.Host, Length: p.UserNS.Size}}
		o.UsernsOptions = &v1.UserNamespace{Mode: v1.NamespaceMode_POD, Uids: m, Gids: m}
	}
	return o
}

// listPods are the pods that a filter lets through.
func (s *Server) listPods(f *v1.PodSandboxFilter) []*v1.PodSandbox {
	var out []*v1.PodSandbox
	add := func(p *container.Pod) {
		if st := f.GetState(); st != nil && st.GetState() != podState(p) || !hasLabels(p.Labels, f.GetLabelSelector()) {
			return
		}
		out = append(out, &v1.PodSandbox{
			Id: p.ID, Metadata: podMetadata(p), State: podState(p), CreatedAt: p.Created.UnixNano(), Labels: p.Labels, Annotations: p.Annotations, RuntimeHandler: p.Runtime,
		})
	}
	if id := f.GetId(); id != "" {
		if p, err := s.cfg.Engine.Pod(id); err == nil {
			add(p)
		}
		return out
	}
	for _, p := range s.cfg.Engine.Pods() {
		add(p)
	}
	return out
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if h, ok := have[k]; !ok || h != v {
			return false
		}
	}
	return true
}

// ListPodSandbox implements the CRI.
func (s *Server) ListPodSandbox(_ context.Context, req *v1.ListPodSandboxRequest) (*v1.ListPodSandboxResponse, error) {
	return &v1.ListPodSandboxResponse{Items: s.listPods(req.GetFilter())}, nil
}

// UpdatePodSandboxResources implements the CRI. The kubelet has changed the pod's
// cgroup itself; what it tells is noted.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, req *v1.UpdatePodSandboxResourcesRequest) (*v1.UpdatePodSandboxResourcesResponse, error) {
	p, err := s.cfg.Engine.Pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	c := new(v1.PodSandboxConfig)
	if err := proto.Unmarshal(p.Edge, c); err != nil {
		return nil, err
	}
	if c.Linux == nil {
		c.Linux = &v1.LinuxPodSandboxConfig{}
	}
	if o := req.GetOverhead(); o != nil {
		c.Linux.Overhead = o
	}
	if r := req.GetResources(); r != nil {
		c.Linux.Resources = r
	}
	b, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	return &v1.UpdatePodSandboxResourcesResponse{}, s.cfg.Engine.PodUpdate(ctx, p.ID, b)
}

// PortForward implements the CRI.
func (s *Server) PortForward(_ context.Context, req *v1.PortForwardRequest) (*v1.PortForwardResponse, error) {
	p, err := s.cfg.Engine.Pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !p.Ready {
		return nil, fault.New(fault.Conflict, "cannot forward to pod %s: it is not ready", p.ID)
	}
	srv, err := s.streaming.server()
	if err != nil {
		return nil, err
	}
	return srv.GetPortForward(&v1.PortForwardRequest{PodSandboxId: p.ID, Port: req.GetPort()})
}

// edge is a decoded container configuration.
type edge struct {
	raw  *byte
	conf *v1.ContainerConfig
}

// edgeCache keeps the configurations of containers decoded: lists ask for all of
// them, often.
type edgeCache struct {
	mu sync.Mutex
	m  map[string]edge
}

// get decodes a record's configuration; what it returns must not be changed.
func (c *edgeCache) get(r *container.Record) *v1.ContainerConfig {
	if len(r.Pod.Edge) == 0 {
		return &v1.ContainerConfig{}
	}
	raw := &r.Pod.Edge[0]
	c.mu.Lock()
	e, ok := c.m[r.ID]
	c.mu.Unlock()
	if ok && e.raw == raw {
		return e.conf
	}
	conf := new(v1.ContainerConfig)
	if proto.Unmarshal(r.Pod.Edge, conf) != nil {
		return &v1.ContainerConfig{}
	}
	c.mu.Lock()
	c.m[r.ID] = edge{raw, conf}
	c.mu.Unlock()
	return conf
}

// keep forgets containers that are gone.
func (c *edgeCache) keep(exists func(id string) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.m, func(id string, _ edge) bool { return !exists(id) })
}
