package engine

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/container"
	run "github.com/cloudos-io/cloudos/internal/runtime"
)

// Counters are a container's counters, see runtime.Stats.
type Counters = run.Stats

// PodCounters are the counters of a pod and of its running containers.
type PodCounters struct {
	Pod        *container.Pod
	At         time.Time
	Interfaces map[string]InterfaceCounters
	Containers []ContainerCounters
}

// ContainerCounters are those of one container.
type ContainerCounters struct {
	Record *container.Record
	*Counters
	// Layer is what its writable layer takes, bytes; negative if that is not known
	// yet. LayerAt is when that was found out.
	Layer   int64
	LayerAt time.Time
	Pid     int
	// Details are nil unless asked for, and where the runtime has none.
	Details *run.Details
}

// CounterOptions say which counters are wanted.
type CounterOptions struct {
	Pod, Container string // ids, "" all
	// Match, if set, chooses among the containers.
	Match func(*container.Record) bool
	// Empty pods are wanted, too, and interfaces' counters.
	Network bool
	// Full readings hold all there is; others processor, memory and processes.
	Full bool
	// Details of Full readings are wanted, too: pressure and huge pages.
	Details bool
	// Fresh waits for sizes of layers that are not known.
	Fresh bool
}

// gauge is implemented by tasks that can read the main counters alone.
type gauge interface {
	Gauge(ctx context.Context) (*run.Stats, error)
}

// detailed is implemented by tasks that know more.
type detailed interface {
	Details(ctx context.Context) (*run.Details, error)
}

// Pressure is of the details of counters.
type Pressure = run.Pressure

// HugepageUse is, too.
type HugepageUse = run.HugepageUse

// PodCounters reads the counters of pods. Containers that end meanwhile are left out.
func (e *Engine) PodCounters(ctx context.Context, o CounterOptions) []PodCounters {
	byPod := map[string][]*unit{}
	for _, u := range e.all() {
		r := u.rec.Load()
		if r.Pod == nil || o.Pod != "" && r.Pod.Pod != o.Pod || o.Container != "" && r.ID != o.Container || !r.State.Running() || o.Match != nil && !o.Match(r) {
			continue
		}
		byPod[r.Pod.Pod] = append(byPod[r.Pod.Pod], u)
	}
	var jobs []func()
	var out []*PodCounters
	var links hostLinks
	if o.Network && o.Pod == "" {
		links = e.hostLinks() // one look for all pods
	}
	for _, p := range e.allPods() {
		members := byPod[p.id]
		if o.Pod != "" && p.id != o.Pod || len(members) == 0 && !o.Network {
			continue
		}
		r := p.rec.Load()
		if !r.Ready && len(members) == 0 {
			continue
		}
		pc := &PodCounters{Pod: r, At: time.Now(), Containers: make([]ContainerCounters, len(members))}
		out = append(out, pc)
		if o.Network {
			if pc.Interfaces = links.of(p.id); pc.Interfaces == nil {
				jobs = append(jobs, func() { pc.Interfaces = e.interfacesOf(p, r, members) })
			}
		}
		for i, u := range members {
			jobs = append(jobs, func() { pc.Containers[i] = e.countersOf(ctx, u, o) })
		}
	}
	inParallel(jobs)
	res := make([]PodCounters, 0, len(out))
	for _, pc := range out {
		kept := pc.Containers[:0]
		for _, c := range pc.Containers {
			if c.Counters != nil {
				kept = append(kept, c)
			}
		}
		pc.Containers = kept
		res = append(res, *pc)
	}
	return res
}

// inParallel runs jobs on as many threads as there are processors.
func inParallel(jobs []func()) {
	n := min(runtime.GOMAXPROCS(0), len(jobs))
	if n <= 1 {
		for _, j := range jobs {
			j()
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(jobs) {
					return
				}
				jobs[i]()
			}
		})
	}
	wg.Wait()
}

func (e *Engine) countersOf(ctx context.Context, u *unit, o CounterOptions) (c ContainerCounters) {
	t := u.running()
	if t == nil {
		return c
	}
	var s *run.Stats
	var err error
	if g, ok := t.(gauge); ok && !o.Full {
		s, err = g.Gauge(ctx)
	} else {
		s, err = t.Stats(ctx)
	}
	if err != nil {
		if !gone(t) {
			e.log.Warn("cannot read a container's counters", "container", u.id, "cause", err)
		}
		return c
	}
	c = ContainerCounters{Record: u.rec.Load(), Counters: s, Pid: t.Pid()}
	if d, ok := t.(detailed); ok && o.Details {
		if c.Details, err = d.Details(ctx); err != nil {
			c.Details = nil
		}
	}
	c.Layer, c.LayerAt = e.layerUse(ctx, u.id, o.Fresh)
	return c
}

// layerKeep is how long the size of a writable layer is good for: finding it out
// takes a walk through the layer.
const layerKeep = 10 * time.Second

type layerSize struct {
	at    time.Time
	bytes int64
	busy  bool
}

// layerUse is the size of a writable layer as last found out. Where that is long
// ago, it is found out anew behind the call, or within it if nothing is known and
// somebody waits.
func (e *Engine) layerUse(ctx context.Context, id string, wait bool) (int64, time.Time) {
	l := &e.pods.layers
	l.mu.Lock()
	have, ok := l.m[id]
	due := !have.busy && time.Since(have.at) > layerKeep
	if due {
		have.busy = true
		if l.m == nil {
			l.m = map[string]layerSize{}
		}
		if !ok {
			have.bytes = -1
		}
		l.m[id] = have
	}
	l.mu.Unlock()
	find := func(ctx context.Context) (int64, time.Time) {
		n, err := e.cfg.Snapshots.Usage(ctx, id)
		now := layerSize{at: time.Now(), bytes: n}
		l.mu.Lock()
		defer l.mu.Unlock()
		if err != nil {
			delete(l.m, id)
			return -1, now.at
		}
		l.m[id] = now
		return n, now.at
	}
	if due && wait && have.bytes < 0 {
		return find(ctx)
	}
	if due {
		e.spawn(func() {
			e.pods.walks <- struct{}{} // one walk at a time: nobody waits for it
			defer func() { <-e.pods.walks }()
			find(e.ctx)
		})
	}
	if !ok {
		return -1, time.Time{}
	}
	return have.bytes, have.at
}

// forgetLayer drops what is remembered of a layer that goes.
func (e *Engine) forgetLayer(id string) {
	l := &e.pods.layers
	l.mu.Lock()
	delete(l.m, id)
	l.mu.Unlock()
}

// layerSizes remembers the sizes of writable layers.
type layerSizes struct {
	mu sync.Mutex
	m  map[string]layerSize
}

// FilesystemUse is what images and layers take of their file system.
type FilesystemUse struct {
	Path          string
	Used          uint64
	Total, Free   uint64
	Inodes, IFree uint64
}

// ImageFilesystem describes the file system of images and containers.
func (e *Engine) ImageFilesystem(ctx context.Context) (FilesystemUse, error) {
	n, err := e.cfg.Images.Usage(ctx)
	if err != nil {
		return FilesystemUse{}, err
	}
	u := FilesystemUse{Path: e.cfg.Root, Used: uint64(max(n, 0))}
	u.Total, u.Free, u.Inodes, u.IFree = diskUsage(e.cfg.Root)
	return u, nil
}

// PodHost is what pods can have on this host.
type PodHost struct {
	SystemdCgroups    bool
	CgroupV2          bool
	RecursiveReadonly bool
	UserNamespaces    bool
	// Runtimes are the names of handlers besides the default one.
	Runtimes []string
	Root     string
}

// PodHost describes the host.
func (e *Engine) PodHost() PodHost {
	h := PodHost{
		SystemdCgroups: e.cfg.CgroupDriver == "systemd", CgroupV2: e.cfg.CgroupV2, RecursiveReadonly: e.cfg.Host.RecursiveReadonly,
		UserNamespaces: !e.cfg.Rootless, Root: e.cfg.Root, Runtimes: []string{nativeRuntime},
	}
	for name := range e.cfg.Runtimes {
		h.Runtimes = append(h.Runtimes, name)
	}
	return h
}

// PodUpdate replaces what the edge remembers of a pod.
func (e *Engine) PodUpdate(ctx context.Context, id string, edge []byte) error {
	p, err := e.lookupPod(id)
	if err != nil {
		return err
	}
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	_, pend, err := e.changePod(p, func(n *container.Pod) { n.Edge = edge })
	if err != nil {
		return err
	}
	return pend.Wait()
}

// PodEvents calls emit for what happens to pods and their containers, from now on,
// until ctx ends or emit fails. The attribute AttrPod names the pod.
func (e *Engine) PodEvents(ctx context.Context, emit func(events.Message) error) error {
	return e.SystemService().Events(ctx, time.Time{}, time.Time{}, Filters{
		"namespace": {NamespaceKubernetes: true}, "type": {string(events.ContainerEventType): true, string(PodEventType): true},
	}, emit)
}

// AttrPod is the attribute of events that names the pod.
const AttrPod = attrPod
