package engine

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
)

// meters counts what the engine does.
type meters struct {
	starts, exits atomic.Uint64
	startNanos    atomic.Uint64
	buckets       [len(startBounds)]atomic.Uint64
}

// startBounds are the upper bounds of the start time histogram.
var startBounds = [...]time.Duration{2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second}

func (m *meters) started(d time.Duration) {
	m.starts.Add(1)
	m.startNanos.Add(uint64(d))
	for i, b := range startBounds {
		if d <= b {
			m.buckets[i].Add(1)
		}
	}
}

func (m *meters) exited() { m.exits.Add(1) }

// Metrics writes the engine's state in the Prometheus text format.
func (s *SystemService) Metrics(ctx context.Context, w io.Writer) error {
	e := s.e
	states := map[mcontainer.ContainerState]int{mcontainer.StateCreated: 0, mcontainer.StateRunning: 0, mcontainer.StatePaused: 0,
		mcontainer.StateRestarting: 0, mcontainer.StateRemoving: 0, mcontainer.StateExited: 0, mcontainer.StateDead: 0}
	health := map[mcontainer.HealthStatus]int{mcontainer.Starting: 0, mcontainer.Healthy: 0, mcontainer.Unhealthy: 0}
	for _, u := range e.all() {
		st := u.rec.Load().State
		states[st.Status]++
		if st.Health != nil && st.Running() {
			health[st.Health.Status]++
		}
	}
	e.mu.RLock()
	tearing := len(e.tearing)
	e.mu.RUnlock()
	var ms runtime.MemStats
	runtime.ReadMemStats(&ms)
	p := func(format string, a ...any) { fmt.Fprintf(w, format, a...) }
	head := func(name, kind, help string) { p("# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	head("servin_engine_info", "gauge", "The engine's version.")
	p("servin_engine_info{version=%q} 1\n", e.cfg.Version)
	head("servin_containers", "gauge", "Containers by state.")
	for _, s := range []mcontainer.ContainerState{mcontainer.StateCreated, mcontainer.StateRunning, mcontainer.StatePaused, mcontainer.StateRestarting, mcontainer.StateRemoving, mcontainer.StateExited, mcontainer.StateDead} {
		p("servin_containers{state=%q} %d\n", s, states[s])
	}
	head("servin_containers_health", "gauge", "Running containers with a health check, by health.")
	for _, s := range []mcontainer.HealthStatus{mcontainer.Starting, mcontainer.Healthy, mcontainer.Unhealthy} {
		p("servin_containers_health{health=%q} %d\n", s, health[s])
	}
	head("servin_container_start_seconds", "histogram", "Time from the decision to start until the process runs.")
	n := e.meters.starts.Load()
	for i, b := range startBounds {
		p("servin_container_start_seconds_bucket{le=\"%g\"} %d\n", b.Seconds(), e.meters.buckets[i].Load())
	}
	p("servin_container_start_seconds_bucket{le=\"+Inf\"} %d\nservin_container_start_seconds_sum %g\nservin_container_start_seconds_count %d\n", n, float64(e.meters.startNanos.Load())/1e9, n)
	head("servin_container_exits_total", "counter", "Container processes that ended.")
	p("servin_container_exits_total %d\n", e.meters.exits.Load())
	head("servin_teardown_backlog", "gauge", "Ended containers whose remains are not cleared yet.")
	p("servin_teardown_backlog %d\n", tearing)
	head("servin_event_listeners", "gauge", "Clients that follow events.")
	p("servin_event_listeners %d\n", e.cfg.Bus.Listeners())
	e.logMetrics(w)
	e.containerMetrics(ctx, w)
	head("go_goroutines", "gauge", "Goroutines of the engine.")
	p("go_goroutines %d\n", runtime.NumGoroutine())
	head("go_memstats_heap_alloc_bytes", "gauge", "Bytes of live and not yet collected heap objects.")
	p("go_memstats_heap_alloc_bytes %d\n", ms.HeapAlloc)
	head("go_memstats_sys_bytes", "gauge", "Bytes obtained from the system.")
	p("go_memstats_sys_bytes %d\n", ms.Sys)
	head("process_start_time_seconds", "gauge", "When the engine started, unix time.")
	_, err := fmt.Fprintf(w, "process_start_time_seconds %d\n", e.start.Unix())
	return err
}
