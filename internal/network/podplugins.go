package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/cni"
)

// podIfName is the name that Kubernetes expects of a pod's interface.
const podIfName = "eth0"

// Annotations that limit a pod's bandwidth (Kubernetes' traffic shaping).
const (
	annotationIngress = "kubernetes.io/ingress-bandwidth"
	annotationEgress  = "kubernetes.io/egress-bandwidth"
)

// PodPluginsConfig makes PodPlugins.
type PodPluginsConfig struct {
	Service *cni.Service
	// Bridge serves where there is no CNI configuration; nil: pods wait for some.
	Bridge *PodBridge
	// Root holds the address range that Kubernetes allotted.
	Root string
}

// PodPlugins gives pods their network through the default CNI network, as it is
// when a pod starts. It implements engine.PodNetwork.
type PodPlugins struct {
	cfg  PodPluginsConfig
	disk string

	mu     sync.Mutex
	ranges []netip.Prefix
}

// NewPodPlugins connects pods through CNI.
func NewPodPlugins(c PodPluginsConfig) (*PodPlugins, error) {
	p := &PodPlugins{cfg: c, disk: c.Root}
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of pod networks: %w", err)
	}
	b, err := os.ReadFile(filepath.Join(c.Root, rangesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &p.ranges)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the address range of pods: %w", err)
	}
	return p, nil
}

const rangesFile = "podranges.json"

// useBridge tells whether the embedded network serves now.
func (p *PodPlugins) useBridge() bool { return p.cfg.Bridge != nil && !p.cfg.Service.Present() }

// Setup implements engine.PodNetwork.
func (p *PodPlugins) Setup(ctx context.Context, pod Pod) (PodResult, error) {
	if p.useBridge() {
		return p.cfg.Bridge.Setup(ctx, pod)
	}
	q, err := p.request(pod)
	if err != nil {
		return PodResult{}, err
	}
	ns, err := os.Open(pod.NetNS)
	if err != nil {
		return PodResult{}, fault.New(fault.NotFound, "cannot connect the pod: its network namespace cannot be opened: %w", err)
	}
	err = bridge.LoopbackUp(ns)
	ns.Close()
	if err != nil {
		return PodResult{}, err
	}
	res, err := p.cfg.Service.Add(ctx, q)
	if err != nil {
		return PodResult{}, err
	}
	out := PodResult{Detail: res.Raw(), DNS: PodDNS{Servers: res.DNS.Servers, Search: res.DNS.Searches, Options: res.DNS.Options}}
	for _, ip := range res.Inside() {
		out.IPs = append(out.IPs, ip.Address.Addr())
	}
	if len(out.IPs) == 0 {
		err := fault.New(fault.Internal, "cannot connect the pod: the plugins of CNI network %s gave it no address", res.Network)
		return PodResult{}, errors.Join(err, p.cfg.Service.Del(context.WithoutCancel(ctx), pod.ID))
	}
	return out, nil
}

// request describes a pod to plugins.
func (p *PodPlugins) request(pod Pod) (cni.Request, error) {
	q := cni.Request{Owner: cni.Pods, ContainerID: pod.ID, IfName: podIfName, NetNS: pod.NetNS, Args: [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", pod.Namespace},
		{"K8S_POD_NAME", pod.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", pod.ID},
		{"K8S_POD_UID", pod.UID},
	}}
	for _, port := range pod.Ports {
		if port.HostPort == 0 {
			continue
		}
		m := cni.PortMapping{HostPort: port.HostPort, ContainerPort: port.ContainerPort, Protocol: strings.ToLower(port.Protocol)}
		if port.HostIP.IsValid() && !port.HostIP.IsUnspecified() {
			m.HostIP = port.HostIP.String()
		}
		q.PortMappings = append(q.PortMappings, m)
	}
	var err error
	if q.Bandwidth, err = bandwidth(pod.Annotations); err != nil {
		return q, err
	}
	if d := pod.DNS; len(d.Servers)+len(d.Search)+len(d.Options) > 0 {
		q.DNS = &cni.DNS{Servers: d.Servers, Searches: d.Search, Options: d.Options}
	}
	q.CgroupPath, q.PodAnnotations = pod.CgroupParent, pod.Annotations
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.ranges {
		q.IPRanges = append(q.IPRanges, []cni.IPRange{{Subnet: r.String()}})
	}
	return q, nil
}

// bandwidth reads the limits of a pod's annotations.
func bandwidth(annotations map[string]string) (*cni.Bandwidth, error) {
	var b cni.Bandwidth
	for _, d := range []struct {
		key         string
		rate, burst *uint64
	}{{annotationIngress, &b.IngressRate, &b.IngressBurst}, {annotationEgress, &b.EgressRate, &b.EgressBurst}} {
		v, ok := annotations[d.key]
		if !ok {
			continue
		}
		rate, err := quantity(v)
		if err != nil || rate < 1e3 || rate > 1e15 {
			return nil, fault.New(fault.Invalid, "cannot limit the pod's bandwidth: %s is %q; bits per second from 1k to 1P are wanted", d.key, v)
		}
		// No limit on bursts but the plugin's own: what fits a signed 32 bit number.
		*d.rate, *d.burst = uint64(rate), math.MaxInt32
	}
	if b.IngressRate == 0 && b.EgressRate == 0 {
		return nil, nil
	}
	return &b, nil
}

// quantity reads a number as Kubernetes writes them: 10M, 1.5Gi, 2e6.
func quantity(s string) (float64, error) {
	scale := 1.0
	for _, u := range []struct {
		suffix string
		scale  float64
	}{
		{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"Ti", 1 << 40}, {"Pi", 1 << 50}, {"Ei", 1 << 60},
		{"k", 1e3}, {"M", 1e6}, {"G", 1e9}, {"T", 1e12}, {"P", 1e15}, {"E", 1e18}, {"m", 1e-3},
	} {
		if rest, ok := strings.CutSuffix(s, u.suffix); ok {
			s, scale = rest, u.scale
			break
		}
	}
	if strings.ContainsAny(s, "xXpP_iInN") { // what ParseFloat takes and Kubernetes does not
		return 0, strconv.ErrSyntax
	}
	f, err := strconv.ParseFloat(s, 64)
	return f * scale, err
}

// Teardown implements engine.PodNetwork. Whatever connected the pod disconnects
// it, even if the configuration has changed meanwhile.
func (p *PodPlugins) Teardown(ctx context.Context, pod Pod) error {
	err := p.cfg.Service.Del(ctx, pod.ID)
	if p.cfg.Bridge != nil {
		err = errors.Join(err, p.cfg.Bridge.Teardown(ctx, pod))
	}
	return err
}

// Check implements engine.PodNetwork.
func (p *PodPlugins) Check(ctx context.Context, pod Pod) error {
	if p.cfg.Service.Has(pod.ID) {
		return p.cfg.Service.Check(ctx, pod.ID)
	}
	if p.cfg.Bridge != nil {
		return p.cfg.Bridge.Check(ctx, pod)
	}
	return fault.New(fault.NotFound, "pod %s is not connected", pod.ID)
}

// Status implements engine.PodNetwork.
func (p *PodPlugins) Status(ctx context.Context) error {
	if p.useBridge() {
		return p.cfg.Bridge.Status(ctx)
	}
	return p.cfg.Service.Status(ctx, "")
}

// Configure implements engine.PodNetwork: plugins with the capability ipRanges
// are told the range.
func (p *PodPlugins) Configure(ctx context.Context, podCIDR string) error {
	var rs []netip.Prefix
	for _, s := range strings.Split(podCIDR, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		r, err := netip.ParsePrefix(s)
		if err != nil {
			return fault.New(fault.Invalid, "cannot use pod address range %q: %w", s, err)
		}
		rs = append(rs, r.Masked())
	}
	// Kubernetes says it once: it must be known after a restart.
	if err := writeRecord(p.disk, rangesFile, rs, durable.Everything); err != nil {
		return err
	}
	p.mu.Lock()
	p.ranges = rs
	p.mu.Unlock()
	return nil
}

// Restore implements engine.PodNetwork. What plugins hold for pods that no
// longer exist is given back, and, since the default network is that of this
// host's kubelet, what they hold for nobody.
func (p *PodPlugins) Restore(ctx context.Context, live []Pod) error {
	ids := make(map[string]bool, len(live))
	for _, pod := range live {
		ids[pod.ID] = true
	}
	p.cfg.Service.Restore(cni.Pods, func(id string) bool { return ids[id] })
	if n, err := p.cfg.Service.Network(""); err == nil {
		p.cfg.Service.CollectSoon(n.Name)
	}
	return nil
}

// Info implements engine.PodNetwork.
func (p *PodPlugins) Info() map[string]string {
	if p.useBridge() {
		return p.cfg.Bridge.Info()
	}
	info := map[string]string{"backend": "cni", "confDir": p.cfg.Service.ConfDir()}
	n, err := p.cfg.Service.Network("")
	if err != nil {
		info["problem"] = err.Error()
		return info
	}
	info["network"], info["cniVersion"], info["plugins"], info["config"] = n.Name, n.CNIVersion, strings.Join(n.Plugins, ","), string(n.Config)
	return info
}
