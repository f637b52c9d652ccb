package native

import (
	"context"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/runtimetest"
)

func benchDriver(b *testing.B, pool int) (*Driver, *runtimetest.Root) {
	root := runtimetest.NewRoot(b)
	d := maker(pool)(b, b.TempDir()).(*Driver)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = d.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-done; d.Close() })
	return d, root
}

func benchStart(b *testing.B, pool int, key contract.SandboxKey) {
	d, root := benchDriver(b, pool)
	ctx := context.Background()
	var start, exit []time.Duration
	for i := range b.N + 3 {
		if err := d.Drained(ctx, true); err != nil {
			b.Fatal(err)
		}
		time.Sleep(3 * time.Millisecond)
		rootfs := root.Mount(b)
		spec := runtimetest.Spec("/bin/true")
		id := d.Reserve(key)
		begin := time.Now()
		t, err := d.Start(ctx, contract.StartRequest{ID: id, Key: key, Spec: spec, RootFS: rootfs, Ephemeral: true, Log: contract.Log{Format: "json-file", Path: b.TempDir() + "/log"}})
		if err != nil {
			b.Fatal(err)
		}
		started := time.Since(begin)
		<-t.Exited()
		if i >= 3 {
			start, exit = append(start, started), append(exit, time.Since(begin))
		}
		if err := t.Delete(ctx); err != nil {
			b.Fatal(err)
		}
	}
	report(b, "start", start)
	report(b, "exit", exit)
}

// report gives the best tenth, which says more than a mean on a busy machine,
// and the median.
func report(b *testing.B, name string, d []time.Duration) {
	slices.Sort(d)
	b.ReportMetric(float64(d[len(d)/10].Microseconds()), "us-"+name+"-p10")
	b.ReportMetric(float64(d[len(d)/2].Microseconds()), "us-"+name+"-p50")
}

func BenchmarkStartParked(b *testing.B) {
	benchStart(b, 2, contract.SandboxKey{Network: "none"})
}

func BenchmarkStartCold(b *testing.B) { benchStart(b, 0, contract.SandboxKey{Network: "none"}) }

func BenchmarkExec(b *testing.B) {
	d, root := benchDriver(b, 0)
	ctx := context.Background()
	key := contract.SandboxKey{Network: "none"}
	t, err := d.Start(ctx, contract.StartRequest{ID: d.Reserve(key), Key: key, Spec: runtimetest.Spec("/bin/sleep", "1000"), RootFS: root.Mount(b)})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = t.Signal(ctx, 9, false); <-t.Exited(); _ = t.Delete(ctx) }()
	var all []time.Duration
	for b.Loop() {
		begin := time.Now()
		x, err := t.Exec(ctx, contract.ExecRequest{ID: "x", Process: runtimetest.Process("/bin/true")})
		if err != nil {
			b.Fatal(err)
		}
		s := x.Streams()
		_, _ = io.Copy(io.Discard, s.Stdout)
		_, _ = io.Copy(io.Discard, s.Stderr)
		<-x.Exited()
		all = append(all, time.Since(begin))
		s.Close()
	}
	report(b, "exec", all)
}

// BenchmarkSustained starts, waits and deletes two at a time; the clock stops
// when nothing is left to tear down and the pool is full again.
func BenchmarkSustained(b *testing.B) {
	d, root := benchDriver(b, 8)
	ctx := context.Background()
	if err := d.Drained(ctx, true); err != nil {
		b.Fatal(err)
	}
	key := contract.SandboxKey{Network: "none"}
	log := b.TempDir() + "/"
	var next atomic.Int64
	b.ResetTimer()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for next.Add(1) <= int64(b.N) {
				id := d.Reserve(key)
				t, err := d.Start(ctx, contract.StartRequest{ID: id, Key: key, Spec: runtimetest.Spec("/bin/true"), RootFS: root.Mount(b), Ephemeral: true, Log: contract.Log{Format: "json-file", Path: log + id}})
				if err != nil {
					b.Error(err)
					return
				}
				<-t.Exited()
				if err := t.Delete(ctx); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := d.Drained(ctx, true); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "containers/s")
}
