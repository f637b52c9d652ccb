package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/namespace"
	"github.com/cloudos-io/cloudos/internal/network"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/store"
)

// PodBucket is where pod records are stored, in the durable database.
const PodBucket = "pods"

// PodEventType is the type of pods' messages on the event bus.
const PodEventType events.Type = "pod"

// podShm bounds a pod's /dev/shm, bytes.
const podShm = 64 << 20

// pod is a pod as this daemon knows it. Its namespaces are pinned under dir and
// need no process; a pod whose containers share processes has a pause besides,
// which is their init.
type pod struct {
	id, name string
	dir      string // its namespace set: namespaces, generated files, /dev/shm
	rec      atomic.Pointer[container.Pod]
	op       chan struct{} // the operation token, as a unit has

	mu    sync.Mutex // guards what follows
	pause runtime.Task
	gone  bool
}

// pods holds the pods of an engine.
type pods struct {
	mu    sync.RWMutex
	m     map[string]*pod
	ready sync.Once // the directory was prepared
	err   error

	pauseMu sync.Mutex
	paused  bool // the pause program was written

	layers layerSizes
	walks  chan struct{} // bounds walks through layers
	images podImages
}

func (e *Engine) podsDir() string { return filepath.Join(e.cfg.RunRoot, "pods") }

func (e *Engine) newPod(r *container.Pod) *pod {
	p := &pod{id: r.ID, name: podName(r), dir: filepath.Join(e.podsDir(), r.ID), op: make(chan struct{}, 1)}
	p.rec.Store(r)
	return p
}

// podName is unique among the names of all containers.
func podName(r *container.Pod) string {
	return fmt.Sprintf("k8s_POD_%s_%s_%s_%d", r.Name, r.Namespace, r.UID, r.Attempt)
}

// lookupPod finds a pod by its id or a unique prefix of it.
func (e *Engine) lookupPod(id string) (*pod, error) {
	e.pods.mu.RLock()
	defer e.pods.mu.RUnlock()
	if p := e.pods.m[id]; p != nil {
		return p, nil
	}
	var found *pod
	if len(id) >= 4 && len(id) < 64 && isHex(id) {
		for k, p := range e.pods.m {
			if strings.HasPrefix(k, id) {
				if found != nil {
					return nil, fault.New(fault.Invalid, "several pods have ids that begin with %s", id)
				}
				found = p
			}
		}
	}
	if found == nil {
		return nil, fault.New(fault.NotFound, "no such pod: %.128s", id)
	}
	return found, nil
}

func (e *Engine) allPods() []*pod {
	e.pods.mu.RLock()
	defer e.pods.mu.RUnlock()
	l := make([]*pod, 0, len(e.pods.m))
	for _, p := range e.pods.m {
		l = append(l, p)
	}
	return l
}

func (p *pod) acquire(ctx context.Context) error {
	select {
	case p.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fault.New(fault.DeadlineExceeded, "cannot change pod %s: another operation on it is under way: %w", short(p.id), ctx.Err())
	}
}

func (p *pod) release() { <-p.op }

// members are the containers of a pod.
func (e *Engine) members(id string) []*unit {
	var l []*unit
	for _, u := range e.all() {
		if m := u.rec.Load().Pod; m != nil && m.Pod == id {
			l = append(l, u)
		}
	}
	return l
}

// changePod publishes an altered copy of the record and has it stored.
func (e *Engine) changePod(p *pod, f func(r *container.Pod)) (*container.Pod, store.Pending, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.rec.Load().Clone()
	f(r)
	b, err := r.Encode()
	if err != nil {
		return nil, store.Pending{}, err
	}
	p.rec.Store(r)
	if p.gone {
		return r, store.Pending{}, nil
	}
	return r, e.cfg.Durable.Put(PodBucket, r.ID, b), nil
}

// PodRun makes a pod: what r asks for, with a new id. When it returns, the pod
// stands and its record is on disk.
func (e *Engine) PodRun(ctx context.Context, r *container.Pod) (id string, err error) {
	if e.closed.Load() || e.noRestarts.Load() {
		return "", fault.New(fault.Unavailable, "cannot run pod: the engine is shutting down")
	}
	if err := e.checkPod(r); err != nil {
		return "", err
	}
	e.pods.ready.Do(func() { e.pods.err = namespace.Prepare(e.podsDir()) })
	if e.pods.err != nil {
		return "", fmt.Errorf("cannot prepare the pods' directory: %w", e.pods.err)
	}
	r.Version, r.ID, r.Created, r.Ready, r.BootID = container.PodVersion, newID(), time.Now().UTC(), false, e.bootID
	p := e.newPod(r)
	// A client that goes away does not leave half a pod behind.
	ctx = context.WithoutCancel(ctx)
	var back undo
	defer func() {
		if err != nil {
			back.run(ctx)
		}
	}()
	if err := e.names.Reserve(p.name, r.ID); err != nil {
		return "", fault.New(fault.Conflict, "pod %s/%s (uid %s, attempt %d) exists already", r.Namespace, r.Name, r.UID, r.Attempt)
	}
	back.add(func(context.Context) { e.names.Release(p.name, r.ID) })
	p.op <- struct{}{} // who finds the pod waits until it stands
	defer p.release()
	e.pods.mu.Lock()
	e.pods.m[r.ID] = p
	e.pods.mu.Unlock()
	back.add(func(context.Context) {
		p.mu.Lock()
		p.gone = true
		p.mu.Unlock()
		e.pods.mu.Lock()
		delete(e.pods.m, r.ID)
		e.pods.mu.Unlock()
	})
	if err := e.raisePod(ctx, p, &back); err != nil {
		return "", fmt.Errorf("cannot run pod %s/%s: %w", r.Namespace, r.Name, err)
	}
	if e.hooks != nil {
		if err := e.hooks.PodRun(ctx, p.rec.Load()); err != nil {
			return "", fmt.Errorf("cannot run pod %s/%s: a plugin refuses it: %w", r.Namespace, r.Name, err)
		}
	}
	_, pend, err := e.changePod(p, func(n *container.Pod) { n.Ready = true })
	if err == nil {
		err = pend.Wait()
	}
	if err != nil {
		back.add(func(context.Context) { _ = e.cfg.Durable.Delete(PodBucket, r.ID).Wait() })
		return "", fmt.Errorf("cannot run pod: %w", err)
	}
	e.podEvent(p, events.ActionStart)
	return r.ID, nil
}

// checkPod refuses what cannot be.
func (e *Engine) checkPod(r *container.Pod) error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }
	if e.cfg.PodNetwork == nil {
		return fault.New(fault.Unsupported, "cannot run pod: this engine has no network for pods")
	}
	if r.Name == "" || r.Namespace == "" || r.UID == "" {
		return bad("cannot run pod: its name, namespace and uid must be given")
	}
	if strings.ContainsAny(r.Hostname, "\x00\n/ ") || len(r.Hostname) > 64 {
		return bad("cannot run pod: invalid hostname %q", r.Hostname)
	}
	if _, err := e.driver(r.Runtime); err != nil {
		return err
	}
	if r.UserNS.Size != 0 {
		if e.cfg.Rootless {
			return fault.New(fault.Unsupported, "cannot run pod: a rootless engine gives no user namespace of their own to pods")
		}
		if !e.native(r.Runtime) {
			return fault.New(fault.Unsupported, "cannot run pod: user namespaces of pods need the engine's own runtime, not %q", r.Runtime)
		}
	}
	if r.Network == container.NamespaceHost && len(r.Ports) > 0 {
		for _, p := range r.Ports {
			if p.HostPort != 0 && p.HostPort != p.ContainerPort {
				return bad("cannot run pod: on the host's network port %d cannot be published as %d", p.ContainerPort, p.HostPort)
			}
		}
	}
	for name := range r.Sysctls {
		kind := sysctlNamespace(name)
		if kind == "" || kind == "net" && r.Network == container.NamespaceHost || kind == "ipc" && r.IPC == container.NamespaceHost ||
			kind == "uts" && r.Network == container.NamespaceHost {
			return bad("cannot run pod: sysctl %q is not in a namespace of the pod's own", name)
		}
	}
	return nil
}

// sysctlNamespace tells which namespace a sysctl belongs to.
func sysctlNamespace(name string) string {
	name = strings.ReplaceAll(name, "/", ".")
	switch {
	case strings.HasPrefix(name, "net."):
		return "net"
	case strings.HasPrefix(name, "fs.mqueue."):
		return "ipc"
	}
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
		"kernel.shm_rmid_forced", "kernel.msg_next_id", "kernel.sem_next_id", "kernel.shm_next_id":
		return "ipc"
	case "kernel.domainname":
		return "uts"
	}
	return ""
}

// raisePod makes the namespaces, the files, the network and the pause.
func (e *Engine) raisePod(ctx context.Context, p *pod, back *undo) error {
	r := p.rec.Load()
	if err := os.Mkdir(p.dir, 0o711); err != nil {
		return fmt.Errorf("cannot make the pod's directory: %w", err)
	}
	back.add(func(context.Context) { _ = os.Remove(p.dir) })
	own := r.Network != container.NamespaceHost
	err := namespace.Make(namespace.Config{
		Dir: p.dir, Size: podShm, Net: own, UTS: own, IPC: r.IPC != container.NamespaceHost,
		UserHost: r.UserNS.Host, UserSize: r.UserNS.Size, Hostname: r.Hostname, Sysctls: e.podSysctls(r),
	})
	if err != nil {
		return err
	}
	back.add(func(context.Context) {
		if err := namespace.Drop(p.dir); err != nil {
			e.log.Warn("cannot clear what is left of a pod", "pod", p.id, "cause", err)
		}
	})
	if err := e.podFiles(p, r); err != nil {
		return err
	}
	paused := make(chan error, 1)
	if r.PID == container.NamespacePod {
		back.add(func(ctx context.Context) { e.endPause(ctx, p) })
		go func() { paused <- e.startPause(ctx, p, r) }()
	} else {
		paused <- nil
	}
	if own {
		// Registered before the call: half a network must go, too.
		back.add(func(ctx context.Context) {
			if err := e.cfg.PodNetwork.Teardown(ctx, e.podRequest(p, p.rec.Load())); err != nil {
				e.log.Warn("cannot take a pod's network down", "pod", p.id, "cause", err)
			}
		})
		var res network.PodResult
		if res, err = e.cfg.PodNetwork.Setup(ctx, e.podRequest(p, r)); err == nil {
			n := r.Clone()
			n.IPs, n.Detail = res.IPs, res.Detail
			p.rec.Store(n)
			if len(res.DNS.Servers) > 0 && len(r.DNS)+len(r.Search)+len(r.Options) == 0 {
				n.DNS, n.Search, n.Options = res.DNS.Servers, res.DNS.Search, res.DNS.Options
			}
			err = e.podNames(p, n)
		}
	}
	if perr := <-paused; err == nil {
		err = perr
	}
	return err
}

// podSysctls are those asked for and, in a network of its own, what the engine
// sets for all containers: ping, and low ports, without a capability.
func (e *Engine) podSysctls(r *container.Pod) map[string]string {
	m := make(map[string]string, len(r.Sysctls)+2)
	if r.Network != container.NamespaceHost {
		if e.cfg.Host.PingGroupRange && r.UserNS.Size == 0 {
			m["net.ipv4.ping_group_range"] = "0 2147483647"
		}
		if e.cfg.Host.UnprivilegedPortStart {
			m["net.ipv4.ip_unprivileged_port_start"] = "0"
		}
	}
	for k, v := range r.Sysctls {
		if !strings.Contains(k, "/") {
			delete(m, k)
		} else {
			delete(m, strings.ReplaceAll(k, "/", "."))
		}
		m[k] = v
	}
	return m
}

// podRequest describes a pod to the backend of its network.
func (e *Engine) podRequest(p *pod, r *container.Pod) network.Pod {
	n := network.Pod{
		ID: r.ID, Name: r.Name, Namespace: r.Namespace, UID: r.UID, Hostname: r.Hostname, Labels: r.Labels, Annotations: r.Annotations,
		CgroupParent: r.CgroupParent, DNS: network.PodDNS{Servers: r.DNS, Search: r.Search, Options: r.Options},
	}
	if namespace.Mounted(p.dir) {
		n.NetNS = namespace.Path(p.dir, "net")
	}
	for _, port := range r.Ports {
		n.Ports = append(n.Ports, network.PodPort{Protocol: port.Protocol, HostIP: port.HostIP, HostPort: port.HostPort, ContainerPort: port.ContainerPort})
	}
	return n
}

func (e *Engine) podEvent(p *pod, a events.Action) {
	r := p.rec.Load()
	e.emit(PodEventType, a, r.ID, map[string]string{"name": r.Name, "namespace": r.Namespace, "uid": r.UID, attrPod: r.ID})
}
