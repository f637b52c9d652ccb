package cli

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// statsRow is the latest reading of a container.
type statsRow struct {
	asked string // the name it was asked by
	s     *container.StatsResponse
	err   error
}

// statsBoard holds the rows of a live table. Every watcher is waited for.
type statsBoard struct {
	mu      sync.Mutex
	rows    map[string]*statsRow
	order   []string
	watched sync.WaitGroup
	client  *client.Client
}

func (b *statsBoard) watch(ctx context.Context, name string, stream bool) {
	b.mu.Lock()
	if b.rows[name] != nil {
		b.mu.Unlock()
		return
	}
	r := &statsRow{asked: name}
	b.rows[name] = r
	b.order = append(b.order, name)
	b.mu.Unlock()
	b.watched.Add(1)
	go func() {
		defer b.watched.Done()
		err := b.client.ContainerStats(ctx, name, stream, false, func(s *container.StatsResponse) error {
			b.mu.Lock()
			r.s = s
			b.mu.Unlock()
			return nil
		})
		b.mu.Lock()
		r.err = err
		if stream && ctx.Err() == nil && (err == nil || client.IsNotFound(err)) {
			delete(b.rows, name) // it ended
			b.order = slices.DeleteFunc(b.order, func(n string) bool { return n == name })
		}
		b.mu.Unlock()
	}()
}

func (b *statsBoard) snapshot() []statsRow {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]statsRow, 0, len(b.order))
	for _, n := range b.order {
		out = append(out, *b.rows[n])
	}
	return out
}

func (a *App) cmdStats() *command.Command {
	var o listFlags
	var all, noStream bool
	return &command.Command{Name: "stats", Args: "[CONTAINER...]", Short: "Show what containers use of the machine, live", Max: -1, Complete: []string{"running"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&all, "all", "a", "Show stopped containers too")
			f.Bool(&noStream, "no-stream", "", "Show one reading and leave")
			f.Bool(&o.noTrunc, "no-trunc", "", "Do not shorten")
			o.declareFormat(f)
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if o.format == "" {
				if f, err := a.file(); err == nil {
					o.fromFile = f.StatsFormat
				}
			}
			return a.stats(ctx, c, args, &o, all, noStream)
		}}
}

func (a *App) stats(ctx context.Context, c *client.Client, names []string, o *listFlags, all, once bool) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	b := &statsBoard{rows: map[string]*statsRow{}, client: c}
	defer b.watched.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	follow := len(names) == 0
	if follow {
		list, err := c.ContainerList(ctx, client.ContainerListOptions{All: all})
		if err != nil {
			return err
		}
		slices.SortFunc(list, func(x, y container.Summary) int { return cmp.Compare(x.Created, y.Created) })
		for _, x := range list {
			names = append(names, x.ID)
		}
	}
	for _, n := range names {
		b.watch(ctx, n, !once)
	}
	if once {
		b.watched.Wait()
		rows := b.snapshot()
		var errs []error
		for _, r := range rows {
			if r.err != nil {
				errs = append(errs, r.err)
			}
		}
		rows = slices.DeleteFunc(rows, func(r statsRow) bool { return r.s == nil })
		return joined(append([]error{a.printStats(rows, o)}, errs...))
	}
	if follow {
		b.watched.Add(1)
		go func() {
			defer b.watched.Done()
			f := client.Filters{"type": {"container"}, "event": {"start"}}
			c.Events(ctx, client.EventsOptions{Filters: f}, func(m events.Message) error {
				b.watch(ctx, m.Actor.ID, true)
				return nil
			})
		}()
	}
	return a.liveStats(ctx, b, o, follow)
}

// liveStats redraws the table twice a second until interrupted, or until no
// container of those named is left.
func (a *App) liveStats(ctx context.Context, b *statsBoard, o *listFlags, follow bool) error {
	tty := a.outIsTerminal()
	if tty {
		defer terminal.EnableVT(a.stdoutFile())()
		fmt.Fprint(a.Stdout, "\x1b[?25l\x1b[2J")
		defer fmt.Fprint(a.Stdout, "\x1b[?25h\n")
	}
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		rows := b.snapshot()
		for _, r := range rows {
			if r.err != nil && ctx.Err() == nil {
				return r.err
			}
		}
		if len(rows) == 0 && !follow {
			return nil
		}
		var buf bytes.Buffer
		if err := a.renderStats(&buf, rows, o); err != nil {
			return err
		}
		if tty {
			fmt.Fprintf(a.Stdout, "\x1b[H%s\x1b[J", strings.ReplaceAll(buf.String(), "\n", "\x1b[K\n"))
		} else if _, err := a.Stdout.Write(buf.Bytes()); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *App) printStats(rows []statsRow, o *listFlags) error {
	var buf bytes.Buffer
	if err := a.renderStats(&buf, rows, o); err != nil {
		return err
	}
	_, err := buf.WriteTo(a.out)
	return err
}

func (a *App) renderStats(w *bytes.Buffer, rows []statsRow, o *listFlags) error {
	if o.json {
		var list []*container.StatsResponse
		for _, r := range rows {
			if r.s != nil {
				list = append(list, r.s)
			}
		}
		return format.JSONLines(w, list)
	}
	return statsColumns(o.noTrunc).Print(w, rows, o.options())
}

func statsColumns(noTrunc bool) *format.List[statsRow] {
	type R = statsRow
	known := func(fn func(s *container.StatsResponse) string) func(R) string {
		return func(r R) string {
			if r.s == nil {
				return "--"
			}
			return fn(r.s)
		}
	}
	return &format.List[R]{
		Quiet: "ID", Table: []string{"ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs"},
		Columns: []format.Column[R]{
			{Name: "Container", Heading: "CONTAINER", Text: func(r R) string { return r.asked }},
			{Name: "ID", Heading: "CONTAINER ID", Text: func(r R) string {
				if r.s == nil || r.s.ID == "" {
					return trunc(r.asked, noTrunc)
				}
				return trunc(r.s.ID, noTrunc)
			}},
			{Name: "Name", Heading: "NAME", Text: known(func(s *container.StatsResponse) string { return strings.TrimPrefix(s.Name, "/") })},
			{Name: "CPUPerc", Heading: "CPU %", Text: known(func(s *container.StatsResponse) string { return format.Percent(cpuPercent(s)) })},
			{Name: "MemUsage", Heading: "MEM USAGE / LIMIT", Text: known(func(s *container.StatsResponse) string {
				return format.BinarySize(memUsed(&s.MemoryStats)) + " / " + format.BinarySize(s.MemoryStats.Limit)
			})},
			{Name: "MemPerc", Heading: "MEM %", Text: known(func(s *container.StatsResponse) string {
				if s.MemoryStats.Limit == 0 {
					return format.Percent(0)
				}
				return format.Percent(float64(memUsed(&s.MemoryStats)) / float64(s.MemoryStats.Limit) * 100)
			})},
			{Name: "NetIO", Heading: "NET I/O", Text: known(func(s *container.StatsResponse) string {
				var rx, tx uint64
				for _, n := range s.Networks {
					rx, tx = rx+n.RxBytes, tx+n.TxBytes
				}
				return format.Size(int64(rx)) + " / " + format.Size(int64(tx))
			})},
			{Name: "BlockIO", Heading: "BLOCK I/O", Text: known(func(s *container.StatsResponse) string {
				var rd, wr uint64
				for _, e := range s.BlkioStats.IoServiceBytesRecursive {
					switch strings.ToLower(e.Op) {
					case "read":
						rd += e.Value
					case "write":
						wr += e.Value
					}
				}
				return format.Size(int64(rd)) + " / " + format.Size(int64(wr))
			})},
			{Name: "PIDs", Heading: "PIDS", Text: known(func(s *container.StatsResponse) string { return strconv.FormatUint(s.PidsStats.Current, 10) })},
		}}
}

// cpuPercent is the share of one processor in the time between two readings.
func cpuPercent(s *container.StatsResponse) float64 {
	cpu := float64(s.CPUStats.CPUUsage.TotalUsage) - float64(s.PreCPUStats.CPUUsage.TotalUsage)
	sys := float64(s.CPUStats.SystemUsage) - float64(s.PreCPUStats.SystemUsage)
	n := float64(s.CPUStats.OnlineCPUs)
	if n == 0 {
		n = float64(len(s.CPUStats.CPUUsage.PercpuUsage))
	}
	if cpu <= 0 || sys <= 0 {
		return 0
	}
	return cpu / sys * n * 100
}

// memUsed leaves out file cache that the kernel would give up at once; the
// counter's name differs between cgroup v1 and v2.
func memUsed(m *container.MemoryStats) uint64 {
	for _, k := range []string{"total_inactive_file", "inactive_file"} {
		if v, ok := m.Stats[k]; ok && v < m.Usage {
			return m.Usage - v
		}
	}
	return m.Usage
}
