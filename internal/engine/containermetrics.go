package engine

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	mcontainer "github.com/moby/moby/api/types/container"
)

// family is one metric of all containers.
type family struct {
	name, kind, help string
	lines            bytes.Buffer
}

var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// put adds a sample; labels are those of its container, then name and value pairs.
func (f *family) put(labels string, value float64, more ...string) {
	f.lines.WriteString(f.name)
	f.lines.WriteByte('{')
	f.lines.WriteString(labels)
	for i := 0; i+1 < len(more); i += 2 {
		fmt.Fprintf(&f.lines, `,%s="%s"`, more[i], labelEscapes.Replace(more[i+1]))
	}
	f.lines.WriteString("} ")
	f.lines.Write(strconv.AppendFloat(nil, value, 'g', -1, 64))
	f.lines.WriteByte('\n')
}

// containerMetrics writes what is known of each container, in the Prometheus
// text format: counters of those that run, restarts and health of all.
func (e *Engine) containerMetrics(ctx context.Context, w io.Writer) {
	var all []*family
	def := func(name, kind, help string) *family {
		f := &family{name: "servin_container_" + name, kind: kind, help: help}
		all = append(all, f)
		return f
	}
	up := def("running", "gauge", "1 while the container runs.")
	started := def("start_time_seconds", "gauge", "When it was last started, unix time.")
	restarts := def("restarts", "gauge", "How often its policy started it again.")
	health := def("healthy", "gauge", "Of a running container with a health check: 1 healthy, 0 not.")
	exit := def("exit_code", "gauge", "Exit code of the last run, of those that ended.")
	cpu := def("cpu_seconds_total", "counter", "Time on processors.")
	throttled := def("cpu_throttled_seconds_total", "counter", "Time that the limit took away.")
	mem := def("memory_bytes", "gauge", "Memory in use, page cache included.")
	working := def("memory_working_set_bytes", "gauge", "Memory in use without page cache that can be dropped at once.")
	limit := def("memory_limit_bytes", "gauge", "Limit of memory; of those without one, the host's memory.")
	failures := def("memory_failures_total", "counter", "How often the limit was hit.")
	pids := def("pids", "gauge", "Processes and threads.")
	rx := def("network_receive_bytes_total", "counter", "Bytes received, by interface.")
	tx := def("network_transmit_bytes_total", "counter", "Bytes sent, by interface.")
	rxd := def("network_receive_dropped_total", "counter", "Packets dropped on arrival, by interface.")
	txd := def("network_transmit_dropped_total", "counter", "Packets dropped on departure, by interface.")
	blk := def("blkio_bytes_total", "counter", "Bytes to and from block devices, by direction.")

	units := e.all()
	slices.SortFunc(units, func(a, b *unit) int { return strings.Compare(a.id, b.id) })
	for _, u := range units {
		if ctx.Err() != nil {
			return
		}
		r := u.rec.Load()
		st := r.State
		labels := fmt.Sprintf(`id="%s",name="%s",image="%s"`, short(r.ID), labelEscapes.Replace(r.Name), labelEscapes.Replace(r.Config.Image))
		restarts.put(labels, float64(r.RestartCount))
		if !st.StartedAt.IsZero() {
			started.put(labels, float64(st.StartedAt.UnixMilli())/1e3)
		}
		if !st.Running() {
			up.put(labels, 0)
			if st.Status == mcontainer.StateExited {
				exit.put(labels, float64(st.ExitCode))
			}
			continue
		}
		up.put(labels, 1)
		if st.Health != nil {
			v := 0.0
			if st.Health.Status == mcontainer.Healthy {
				v = 1
			}
			health.put(labels, v)
		}
		s, err := e.reading(ctx, u, r)
		if err != nil || s.Read.IsZero() {
			continue // it ended
		}
		cpu.put(labels, float64(s.CPUStats.CPUUsage.TotalUsage)/1e9)
		throttled.put(labels, float64(s.CPUStats.ThrottlingData.ThrottledTime)/1e9)
		mem.put(labels, float64(s.MemoryStats.Usage))
		working.put(labels, float64(workingSet(s.MemoryStats)))
		limit.put(labels, float64(s.MemoryStats.Limit))
		failures.put(labels, float64(s.MemoryStats.Failcnt))
		pids.put(labels, float64(s.PidsStats.Current))
		for _, i := range slices.Sorted(maps.Keys(s.Networks)) {
			n := s.Networks[i]
			rx.put(labels, float64(n.RxBytes), "interface", i)
			tx.put(labels, float64(n.TxBytes), "interface", i)
			rxd.put(labels, float64(n.RxDropped), "interface", i)
			txd.put(labels, float64(n.TxDropped), "interface", i)
		}
		sums := map[string]float64{}
		for _, b := range s.BlkioStats.IoServiceBytesRecursive {
			sums[strings.ToLower(b.Op)] += float64(b.Value)
		}
		for _, op := range []string{"read", "write"} {
			blk.put(labels, sums[op], "direction", op)
		}
	}
	for _, f := range all {
		if f.lines.Len() > 0 {
			fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", f.name, f.help, f.name, f.kind)
			_, _ = f.lines.WriteTo(w)
		}
	}
}

// workingSet is what docker stats shows as memory: without inactive page cache.
func workingSet(m mcontainer.MemoryStats) uint64 {
	for _, k := range []string{"total_inactive_file", "inactive_file"} {
		if v, ok := m.Stats[k]; ok && v < m.Usage {
			return m.Usage - v
		}
	}
	return m.Usage
}

// logMetrics writes how sending logs goes.
func (e *Engine) logMetrics(w io.Writer) {
	if e.cfg.LogShipper == nil {
		return
	}
	s := e.cfg.LogShipper.Status()
	p := func(name, kind, help string, v float64) {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %g\n", name, help, name, kind, name, v)
	}
	var backlog int64
	for _, n := range s.Backlog {
		backlog += n
	}
	p("servin_log_sent_total", "counter", "Log records sent to remotes.", float64(s.Sent))
	p("servin_log_send_failures_total", "counter", "Attempts to send log records that failed.", float64(s.Failures))
	p("servin_log_lost_total", "counter", "Gaps: log records that were rotated away or given up before they could be sent.", float64(s.Lost))
	p("servin_log_backlog_bytes", "gauge", "Bytes of logs that wait to be sent.", float64(backlog))
}
