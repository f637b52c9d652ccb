package network

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"strconv"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Pod describes a pod to a backend of pod networks (engine.PodNetwork): the
// embedded one, PodBridge, or a chain of CNI plugins.
type Pod struct {
	// ID is 64 hex digits. Name, Namespace and UID are Kubernetes'.
	ID, Name, Namespace, UID string
	Hostname                 string
	// NetNS is the path of the pod's network namespace, a bound nsfs file that
	// stays while the pod does; "" where the namespace is gone.
	NetNS               string
	Ports               []PodPort
	Labels, Annotations map[string]string
	// CgroupParent is the pod's cgroup as the kubelet names it, or "".
	CgroupParent string
	// DNS is what the pod's resolv.conf says.
	DNS PodDNS
}

// PodPort is a port of the pod's published on the host.
type PodPort struct {
	Protocol                string // tcp, udp or sctp
	HostIP                  netip.Addr
	HostPort, ContainerPort uint16
}

// PodDNS is the content of a resolv.conf.
type PodDNS struct{ Servers, Search, Options []string }

// PodResult is what a pod's network came to be.
type PodResult struct {
	// IPs are the pod's addresses, the primary one first.
	IPs []netip.Addr
	// DNS is what the network asks for where the pod says nothing.
	DNS PodDNS `json:",omitzero"`
	// Detail is the backend's own result, shown by a verbose status.
	Detail json.RawMessage `json:",omitempty"`
}

// PodBridge gives pods their network on a network of the Manager's, for hosts
// without CNI configuration. It implements engine.PodNetwork.
type PodBridge struct {
	m    *Manager
	name string
}

// NewPodBridge connects pods to the network of that name, "" the default bridge.
func NewPodBridge(m *Manager, name string) *PodBridge {
	if name == "" {
		name = network.NetworkBridge
	}
	return &PodBridge{m: m, name: name}
}

// Setup implements engine.PodNetwork.
func (b *PodBridge) Setup(ctx context.Context, p Pod) (PodResult, error) {
	ns, err := os.Open(p.NetNS)
	if err != nil {
		return PodResult{}, fault.New(fault.NotFound, "cannot connect the pod: its network namespace cannot be opened: %w", err)
	}
	defer ns.Close()
	req := AttachRequest{ContainerID: p.ID, ContainerName: p.ID, Hostname: p.Hostname, Network: b.name, NetNS: ns, IfName: "eth0", Ports: network.PortMap{}}
	for _, port := range p.Ports {
		if port.HostPort == 0 {
			continue
		}
		key, err := network.ParsePort(strconv.Itoa(int(port.ContainerPort)) + "/" + port.Protocol)
		if err != nil {
			return PodResult{}, fault.New(fault.Invalid, "cannot publish port %d/%s of the pod: %w", port.ContainerPort, port.Protocol, err)
		}
		req.Ports[key] = append(req.Ports[key], network.PortBinding{HostIP: port.HostIP, HostPort: strconv.Itoa(int(port.HostPort))})
	}
	at, err := b.m.Attach(ctx, req)
	if err != nil {
		return PodResult{}, err
	}
	var res PodResult
	for _, ip := range []netip.Addr{at.Settings.IPAddress, at.Settings.GlobalIPv6Address} {
		if ip.IsValid() {
			res.IPs = append(res.IPs, ip)
		}
	}
	return res, nil
}

// Teardown implements engine.PodNetwork.
func (b *PodBridge) Teardown(ctx context.Context, p Pod) error { return b.m.Release(ctx, p.ID) }

// Check implements engine.PodNetwork: the Manager mends its links by itself.
func (b *PodBridge) Check(context.Context, Pod) error { return nil }

// Status implements engine.PodNetwork.
func (b *PodBridge) Status(context.Context) error {
	b.m.up()
	if b.m.broken != nil {
		return b.m.broken
	}
	_, err := b.m.find(b.name)
	return err
}

// Configure implements engine.PodNetwork: the bridge's addresses are its own.
func (b *PodBridge) Configure(context.Context, string) error { return nil }

// Restore implements engine.PodNetwork: Manager.Restore has done it.
func (b *PodBridge) Restore(context.Context, []Pod) error { return nil }

// Info implements engine.PodNetwork.
func (b *PodBridge) Info() map[string]string {
	return map[string]string{"backend": "bridge", "network": b.name}
}

// HostLinks tells for each pod, by its id, which link on the host is the other end
// of its interface: pod to interface to link. What the pod sends, the link receives.
func (b *PodBridge) HostLinks() map[string]map[string]string {
	b.m.mu.RLock()
	defer b.m.mu.RUnlock()
	out := make(map[string]map[string]string, len(b.m.containers))
	for id, box := range b.m.containers {
		for _, e := range box.eps {
			if e.Outer == "" || e.IfName == "" {
				continue
			}
			if out[id] == nil {
				out[id] = make(map[string]string, len(box.eps))
			}
			out[id][e.IfName] = e.Outer
		}
	}
	return out
}

// HostLinks are those of pods on the embedded network.
func (p *PodPlugins) HostLinks() map[string]map[string]string {
	if p.cfg.Bridge == nil {
		return nil
	}
	return p.cfg.Bridge.HostLinks()
}
