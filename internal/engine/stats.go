package engine

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// ContainerStats calls emit for each reading; once if !stream. A reading needs
// an earlier one to tell rates from: the first comes a second after that unless
// oneShot is set.
func (e *Engine) ContainerStats(ctx context.Context, name string, stream, oneShot bool, emit func(*mcontainer.StatsResponse) error) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	var prev *mcontainer.StatsResponse
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		r := u.rec.Load()
		now, err := e.reading(ctx, u, r)
		if err != nil {
			return err
		}
		stopped := now.Read.IsZero()
		switch {
		case stopped && !stream, oneShot:
			return emit(now)
		case prev != nil:
			now.PreCPUStats, now.PreRead = prev.CPUStats, prev.Read
			if err := emit(now); err != nil || !stream {
				return err
			}
		case stopped:
			if err := emit(now); err != nil {
				return err
			}
		case stream:
			if err := emit(now); err != nil {
				return err
			}
		}
		prev = now
		if stopped {
			prev = nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		case <-e.ctx.Done():
			return nil
		}
		u.mu.Lock()
		gone := u.gone
		u.mu.Unlock()
		if gone {
			return nil
		}
	}
}

// reading takes the counters of a container; of one that does not run, all are zero.
func (e *Engine) reading(ctx context.Context, u *unit, r *container.Record) (*mcontainer.StatsResponse, error) {
	out := &mcontainer.StatsResponse{ID: r.ID, Name: "/" + r.Name, OSType: "linux"}
	t := u.running()
	if t == nil {
		return out, nil
	}
	s, err := t.Stats(ctx)
	if err != nil {
		if gone(t) {
			return out, nil
		}
		return nil, fmt.Errorf("cannot read the counters of container %s: %w", u.id, err)
	}
	fillStats(out, s)
	if total := uint64(memTotal()); out.MemoryStats.Limit == 0 || out.MemoryStats.Limit > total {
		out.MemoryStats.Limit = total // no limit: all there is
	}
	if !r.HostConfig.NetworkMode.IsHost() {
		out.Networks = interfaceCounters(t.Pid())
	}
	return out, nil
}

func fillStats(out *mcontainer.StatsResponse, s *runtime.Stats) {
	out.Read = s.At
	out.CPUStats = mcontainer.CPUStats{
		CPUUsage:    mcontainer.CPUUsage{TotalUsage: s.CPUTotal, PercpuUsage: s.PerCPU, UsageInKernelmode: s.CPUSystem, UsageInUsermode: s.CPUUser},
		SystemUsage: s.SystemCPU, OnlineCPUs: uint32(s.OnlineCPUs),
		ThrottlingData: mcontainer.ThrottlingData{Periods: s.Periods, ThrottledPeriods: s.ThrottledPeriods, ThrottledTime: s.ThrottledTime},
	}
	out.MemoryStats = mcontainer.MemoryStats{Usage: s.Memory, MaxUsage: s.MemoryMax, Limit: s.MemoryLimit, Failcnt: s.MemoryFailures, Stats: s.MemoryStat}
	out.PidsStats = mcontainer.PidsStats{Current: s.Pids, Limit: s.PidsLimit}
	for _, b := range s.Blkio {
		en := mcontainer.BlkioStatEntry{Major: b.Major, Minor: b.Minor, Op: b.Op, Value: b.Value}
		switch b.Table {
		case "io_service_bytes_recursive":
			out.BlkioStats.IoServiceBytesRecursive = append(out.BlkioStats.IoServiceBytesRecursive, en)
		case "io_serviced_recursive":
			out.BlkioStats.IoServicedRecursive = append(out.BlkioStats.IoServicedRecursive, en)
		}
	}
}

// interfaceCounters reads the counters of every interface but loopback in a
// process's network namespace.
func interfaceCounters(pid int) map[string]mcontainer.NetworkStats {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/net/dev")
	if err != nil {
		return nil
	}
	defer f.Close()
	out := map[string]mcontainer.NetworkStats{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, rest, ok := strings.Cut(sc.Text(), ":")
		name = strings.TrimSpace(name)
		c := strings.Fields(rest)
		if !ok || name == "lo" || len(c) < 12 {
			continue
		}
		n := func(i int) uint64 { v, _ := strconv.ParseUint(c[i], 10, 64); return v }
		out[name] = mcontainer.NetworkStats{
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3),
			TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11),
		}
	}
	return out
}
