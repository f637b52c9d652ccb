// Package vmtest is the suite that every driver of machines passes: what package
// vm promises of them, tried on whatever the driver runs, a real emulator or a simulated host.
package vmtest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/vm"
)

// Suite is a driver and what it is tried with.
type Suite struct {
	Driver vm.Driver
	// Spec makes a spec with folders of its own. Its guest need not come up.
	Spec func(t *testing.T) vm.Spec
	Host vm.Host
	// Lost is true for drivers that cannot start without the record's detail.
	Lost bool
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func (s Suite) start(t *testing.T, spec vm.Spec) vm.Machine {
	t.Helper()
	steps := 0
	m, err := s.Driver.Start(within(t), spec, s.Host, func(string) { steps++ })
	if err != nil {
		t.Fatalf("cannot start: %v", err)
	}
	if steps == 0 {
		t.Error("the start reported no step")
	}
	return m
}

func end(t *testing.T, m vm.Machine) {
	t.Helper()
	if err := m.Kill(within(t)); err != nil {
		t.Fatalf("cannot kill: %v", err)
	}
	if err := m.Wait(within(t)); errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("a killed machine is still waited for")
	}
	m.Close()
}

// Run runs the suite.
func (s Suite) Run(t *testing.T) {
	t.Run("Nothing", func(t *testing.T) {
		m, err := s.Driver.Attach(within(t), vm.Record{Driver: s.Driver.Name(), Spec: s.Spec(t)})
		if err != nil || m != nil {
			t.Fatalf("attached to a machine that never was: %v %v", m, err)
		}
	})
	t.Run("Life", func(t *testing.T) {
		spec := s.Spec(t)
		m := s.start(t, spec)
		r := m.Record()
		if r.Driver != s.Driver.Name() || r.Spec.Data != spec.Data {
			t.Errorf("record: %+v", r)
		}
		for range 2 { // a new connection ends the one before
			c, err := m.Port(within(t))
			if err != nil {
				t.Fatalf("cannot dial the port: %v", err)
			}
			c.Close()
		}
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if err := m.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a running machine was waited for: %v", err)
		}
		cancel()
		if second, err := s.Driver.Start(within(t), spec, s.Host, func(string) {}); err == nil {
			second.Kill(within(t))
			t.Error("two machines on one disk")
		}
		if c, err := m.Port(within(t)); err != nil {
			t.Errorf("the second start harmed the first: %v", err)
		} else {
			c.Close()
		}
		end(t, m)
		if again, err := s.Driver.Attach(within(t), r); err != nil || again != nil {
			t.Errorf("attached to a machine that has ended: %v %v", again, err)
		}
		end(t, s.start(t, spec)) // the same disk once more
	})
	t.Run("Attach", func(t *testing.T) {
		spec := s.Spec(t)
		m := s.start(t, spec)
		r, pid := m.Record(), m.PID()
		m.Close()
		records := []vm.Record{r}
		if !s.Lost {
			records = append(records, vm.Record{Driver: r.Driver, Spec: spec}) // as written before the start
		}
		for _, r := range records {
			again, err := s.Driver.Attach(within(t), r)
			if err != nil || again == nil {
				t.Fatalf("cannot attach: %v %v", again, err)
			}
			if again.PID() != pid {
				t.Errorf("process %d, was %d", again.PID(), pid)
			}
			c, err := again.Port(within(t))
			if err != nil {
				t.Fatalf("cannot dial the port: %v", err)
			}
			c.Close()
			again.Close()
		}
		again, err := s.Driver.Attach(within(t), r)
		if err != nil {
			t.Fatal(err)
		}
		end(t, again)
	})
	t.Run("Pause", func(t *testing.T) {
		m := s.start(t, s.Spec(t))
		defer end(t, m)
		p, ok := m.(vm.Pauser)
		if !ok {
			t.Skip("SKIP: this driver cannot pause")
		}
		for _, want := range []bool{false, true, false} {
			if want {
				if err := p.Pause(within(t)); err != nil {
					t.Fatal(err)
				}
			} else if err := p.Resume(within(t)); err != nil {
				t.Fatal(err)
			}
			if got, err := p.Paused(within(t)); err != nil || got != want {
				t.Fatalf("paused: %v %v, want %v", got, err, want)
			}
		}
	})
	t.Run("Grow", func(t *testing.T) {
		spec := s.Spec(t)
		m := s.start(t, spec)
		defer end(t, m)
		g, ok := m.(vm.Resizer)
		if !ok {
			t.Skip("SKIP: this driver cannot grow a disk in use")
		}
		if err := g.GrowDisk(within(t), spec.Disk+1<<20); err != nil {
			t.Fatal(err)
		}
		if b, ok := m.(vm.Balloon); ok {
			if err := b.SetMemory(within(t), spec.Memory*2); err == nil {
				t.Error("more memory than the machine has")
			}
		}
	})
	t.Run("NoImage", func(t *testing.T) {
		spec := s.Spec(t)
		spec.Image.Kernel += ".none"
		if spec.Image.Disk != "" {
			spec.Image.Disk += ".none"
		}
		if spec.Image.Tar != "" {
			spec.Image.Tar += ".none"
		}
		if m, err := s.Driver.Start(within(t), spec, s.Host, func(string) {}); err == nil {
			end(t, m)
			t.Fatal("started without a kernel")
		}
		if m, err := s.Driver.Attach(within(t), vm.Record{Driver: s.Driver.Name(), Spec: spec}); err != nil || m != nil {
			t.Errorf("a failed start left something: %v %v", m, err)
		}
	})
}
