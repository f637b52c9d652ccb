package engine

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/namespace"
)

// Pods lists the pods, the newest first. What it returns must not be changed.
func (e *Engine) Pods() []*container.Pod {
	e.pods.mu.RLock()
	l := make([]*container.Pod, 0, len(e.pods.m))
	for _, p := range e.pods.m {
		l = append(l, p.rec.Load())
	}
	e.pods.mu.RUnlock()
	slices.SortFunc(l, func(a, b *container.Pod) int { return b.Created.Compare(a.Created) })
	return l
}

// Pod finds a pod by its id or a unique prefix of it.
func (e *Engine) Pod(id string) (*container.Pod, error) {
	p, err := e.lookupPod(id)
	if err != nil {
		return nil, err
	}
	return p.rec.Load(), nil
}

// PodContainers lists the containers of a pod, or of all pods ("").
func (e *Engine) PodContainers(podID string) []*container.Record {
	e.mu.RLock()
	var l []*container.Record
	for _, u := range e.units {
		r := u.rec.Load()
		if r.Pod != nil && (podID == "" || r.Pod.Pod == podID) {
			l = append(l, r)
		}
	}
	e.mu.RUnlock()
	slices.SortFunc(l, func(a, b *container.Record) int { return b.Created.Compare(a.Created) })
	return l
}

// PodContainer finds a container of a pod by its id or a unique prefix of it.
func (e *Engine) PodContainer(id string) (*container.Record, error) {
	u, err := e.memberUnit(id)
	if err != nil {
		return nil, err
	}
	return u.rec.Load(), nil
}

// PodContainerStop is ContainerStop for the CRI: what does not run, or is gone,
// is no error. A negative timeout waits as long as it takes.
func (e *Engine) PodContainerStop(ctx context.Context, id string, timeout int64) error {
	u, err := e.memberUnit(id)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	signal := ""
	if timeout <= 0 {
		signal, timeout = "SIGKILL", 0
	}
	secs := int(min(timeout, 1<<31-1))
	err = e.ContainerStop(ctx, u.id, signal, &secs)
	if fault.Is(err, fault.NotModified) || fault.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// PodContainerRemove removes a container, killing it if it runs.
func (e *Engine) PodContainerRemove(ctx context.Context, id string) error {
	u, err := e.memberUnit(id)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	err = e.removeUnit(ctx, u, true, true)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// PodContainerReopenLog opens a running container's log anew, after somebody
// moved the file away.
func (e *Engine) PodContainerReopenLog(ctx context.Context, id string) error {
	u, err := e.memberUnit(id)
	if err != nil {
		return err
	}
	t, err := u.needTask()
	if err != nil {
		return err
	}
	if err := t.ReopenLog(ctx); err != nil {
		return fmt.Errorf("cannot open the log of container %s again: %w", short(u.id), err)
	}
	return nil
}

// PodForward connects stream to a port of the pod's loopback until either ends.
func (e *Engine) PodForward(ctx context.Context, id string, port uint16, stream io.ReadWriteCloser) error {
	p, err := e.lookupPod(id)
	if err != nil {
		return err
	}
	r := p.rec.Load()
	if !r.Ready {
		return fault.New(fault.Conflict, "cannot forward to pod %s: it is not ready", short(p.id))
	}
	var conn net.Conn
	dial := func() error {
		d := net.Dialer{Timeout: 10 * time.Second}
		var first error
		for _, a := range []struct{ network, host string }{{"tcp4", "127.0.0.1"}, {"tcp6", "::1"}} {
			c, err := d.DialContext(ctx, a.network, net.JoinHostPort(a.host, strconv.Itoa(int(port))))
			if err == nil {
				conn = c
				return nil
			}
			if first == nil {
				first = err
			}
		}
		return fault.New(fault.Unavailable, "cannot connect to port %d of pod %s: %w", port, short(p.id), first)
	}
	if r.Network == container.NamespaceHost {
		err = dial()
	} else {
		err = namespace.Enter(namespace.Path(p.dir, "net"), dial)
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	in, out := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, stream)
		if c, ok := conn.(*net.TCPConn); ok {
			_ = c.CloseWrite()
		}
		in <- err
	}()
	go func() {
		_, err := io.Copy(stream, conn)
		out <- err
	}()
	// The pod's side says when it is over: a client may have no more to say and
	// still listen.
	select {
	case err = <-in:
		if err == nil {
			select {
			case err = <-out:
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
	case err = <-out:
	case <-ctx.Done():
		err = ctx.Err()
	}
	return err
}

// interfacesOf reads the counters of a pod's interfaces.
func (e *Engine) interfacesOf(p *pod, r *container.Pod, members []*unit) map[string]InterfaceCounters {
	if r.Network == container.NamespaceHost || !r.Ready {
		return nil
	}
	for _, u := range members {
		if t := u.running(); t != nil {
			return readInterfaces("/proc/" + strconv.Itoa(t.Pid()) + "/net/dev")
		}
	}
	var out map[string]InterfaceCounters
	_ = namespace.Enter(namespace.Path(p.dir, "net"), func() error {
		out = readInterfaces("/proc/thread-self/net/dev")
		return nil
	})
	return out
}

// Namespaces of containers, values of the filter "namespace": by default lists,
// events and prunes know those of the first alone.
const (
	NamespacePlain      = "default"
	NamespaceKubernetes = "kubernetes"
	NamespaceAll        = "*"
)

// inNamespace tells whether a filter asks for plain containers or those of pods.
func inNamespace(f Filters, ofPod bool) bool {
	want := f["namespace"]
	switch {
	case want[NamespaceAll]:
		return true
	case ofPod:
		return want[NamespaceKubernetes]
	}
	return len(want) == 0 || want[NamespacePlain]
}

// markMember shows of which pod a container is.
func (e *Engine) markMember(s *mcontainer.Summary, r *container.Record) {
	_, p, err := e.podOf(r)
	if err != nil {
		return
	}
	labels := make(map[string]string, len(s.Labels)+1)
	maps.Copy(labels, s.Labels)
	labels[api.LabelPod] = p.Namespace + "/" + p.Name
	s.Labels = labels
}

// hostLinks are the counters of pods' links at their other end, on the host.
type hostLinks struct {
	links    map[string]map[string]string
	counters map[string]InterfaceCounters
}

func (e *Engine) hostLinks() (h hostLinks) {
	n, ok := e.cfg.PodNetwork.(interface {
		HostLinks() map[string]map[string]string
	})
	if !ok {
		return h
	}
	if h.links = n.HostLinks(); len(h.links) > 0 {
		h.counters = readInterfaces("/proc/self/net/dev")
	}
	return h
}

// of gives a pod's counters as it sees them, nil if they are not known.
func (h hostLinks) of(id string) map[string]InterfaceCounters {
	links := h.links[id]
	if links == nil {
		return nil
	}
	out := make(map[string]InterfaceCounters, len(links))
	for name, outer := range links {
		c, ok := h.counters[outer]
		if !ok {
			return nil
		}
		c.RxBytes, c.TxBytes = c.TxBytes, c.RxBytes
		c.RxPackets, c.TxPackets = c.TxPackets, c.RxPackets
		c.RxErrors, c.TxErrors = c.TxErrors, c.RxErrors
		c.RxDropped, c.TxDropped = c.TxDropped, c.RxDropped
		out[name] = c
	}
	return out
}

// InterfaceCounters are what an interface has carried.
type InterfaceCounters struct {
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

func readInterfaces(path string) map[string]InterfaceCounters {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	out := map[string]InterfaceCounters{}
	for line := range strings.Lines(string(b)) {
		name, rest, ok := strings.Cut(line, ":")
		name = strings.TrimSpace(name)
		c := strings.Fields(rest)
		if !ok || name == "lo" || len(c) < 12 {
			continue
		}
		n := func(i int) uint64 { v, _ := strconv.ParseUint(c[i], 10, 64); return v }
		out[name] = InterfaceCounters{n(0), n(1), n(2), n(3), n(8), n(9), n(10), n(11)}
	}
	return out
}

// PodNetworkStatus tells why pods cannot be connected, nil if they can, and
// describes the network.
func (e *Engine) PodNetworkStatus(ctx context.Context) (map[string]string, error) {
	return e.cfg.PodNetwork.Info(), e.cfg.PodNetwork.Status(ctx)
}

// PodNetworkConfigure hands on the address range of this node's pods.
func (e *Engine) PodNetworkConfigure(ctx context.Context, cidr string) error {
	return e.cfg.PodNetwork.Configure(ctx, cidr)
}

// diskUsage is what a path's file system says of itself.
func diskUsage(path string) (total, free, inodes, inodesFree uint64) {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return 0, 0, 0, 0
	}
	return st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize), st.Files, st.Ffree
}
