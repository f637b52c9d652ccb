package engine

import (
	"context"
	"time"

	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
)

// Reading is what is known of a container, for who watches all of them.
type Reading struct {
	// Record must not be changed.
	Record *container.Record
	// At is when the counters below were read; zero if they were not.
	At                  time.Time
	CPU                 time.Duration
	Memory, MemoryLimit uint64
	Pids                uint64
	Disk                int64 // bytes of the writable layer, -1 unknown
}

// Readings lists every container, without counters.
func (e *Engine) Readings() []Reading {
	all := e.all()
	out := make([]Reading, len(all))
	for i, u := range all {
		out[i] = Reading{Record: u.rec.Load(), Disk: -1}
	}
	return out
}

// Read reads the counters of a container and the size of its layer, as far as
// they can be had.
func (e *Engine) Read(ctx context.Context, id string, counters, disk bool) Reading {
	out := Reading{Disk: -1}
	u, err := e.lookup(id)
	if err != nil {
		return out
	}
	out.Record = u.rec.Load()
	if counters && out.Record.State.Running() {
		if s, err := e.reading(ctx, u, out.Record); err == nil && !s.Read.IsZero() {
			out.At, out.CPU = s.Read, time.Duration(s.CPUStats.CPUUsage.TotalUsage)
			out.Memory, out.MemoryLimit, out.Pids = workingSet(s.MemoryStats), s.MemoryStats.Limit, s.PidsStats.Current
		}
	}
	if disk {
		if n, err := e.cfg.Snapshots.Usage(ctx, id); err == nil {
			out.Disk = n
		}
	}
	return out
}

// RootUsed is how much of the file system that holds the engine's root is in
// use, in percent of what an ordinary user may fill.
func (e *Engine) RootUsed() float64 {
	var st unix.Statfs_t
	if unix.Statfs(e.cfg.Root, &st) != nil || st.Blocks == 0 {
		return 0
	}
	used := st.Blocks - st.Bfree
	return float64(used) / float64(used+st.Bavail) * 100
}

// WatchContainers calls fn for each event of a container until ctx ends. Who
// lags behind misses some, never all.
func (e *Engine) WatchContainers(ctx context.Context, fn func(m events.Message)) {
	for ctx.Err() == nil {
		sub, _ := e.cfg.Bus.Subscribe(time.Time{})
		for {
			m, ok := sub.Next(ctx)
			if !ok {
				break
			}
			if m.Type == events.ContainerEventType {
				fn(m)
			}
		}
		sub.Close()
	}
}
