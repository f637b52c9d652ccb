package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// starter is a driver whose machines are threads of this test: guests says what the
// guest of each start is like.
type starter struct {
	guests []guest
	mu     sync.Mutex
	starts []*fakeMachine
	attach chan struct{} // Attach waits for it
}

// begun are the machines that were started so far.
func (d *starter) begun() []*fakeMachine {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.starts)
}

// guest is how a guest behaves.
type guest struct {
	// talks is how often it says something on its console; 0 is never.
	talks time.Duration
	// converses: its first process answers the port; greets: it answers the greeting, and then stands still.
	converses, greets bool
	// after is how long its engine takes.
	after time.Duration
}

func (d *starter) Name() string { return "fake" }

func (d *starter) Probe(context.Context, vm.Image, string) (vm.Host, error) {
	return vm.Host{Accelerator: "none"}, nil
}

func (d *starter) Attach(ctx context.Context, _ vm.Record) (vm.Machine, error) {
	if d.attach != nil {
		<-d.attach
	}
	return nil, nil
}

func (d *starter) Start(_ context.Context, s vm.Spec, _ vm.Host, report func(string)) (vm.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.starts); n > 0 && !closed(d.starts[n-1].ended) {
		return nil, errors.New("two machines on one disk")
	}
	report("starting the machine")
	m := &fakeMachine{spec: s, guest: d.guests[min(len(d.starts), len(d.guests)-1)], begin: time.Now(), ended: make(chan struct{})}
	d.starts = append(d.starts, m)
	return m, nil
}

type fakeMachine struct {
	spec  vm.Spec
	guest guest
	begin time.Time
	once  sync.Once
	ended chan struct{}
}

func (m *fakeMachine) Record() vm.Record { return vm.Record{Driver: "fake", Spec: m.spec} }
func (m *fakeMachine) PID() int          { return 0 }
func (m *fakeMachine) Close() error      { return nil }

func (m *fakeMachine) Kill(context.Context) error {
	m.once.Do(func() { close(m.ended) })
	return nil
}

func (m *fakeMachine) Wait(ctx context.Context) error {
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *fakeMachine) Console(context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		for m.guest.talks > 0 && !closed(m.ended) {
			if _, err := theirs.Write([]byte("rcu: INFO: rcu_sched self-detected stall on CPU\n")); err != nil {
				return
			}
			time.Sleep(m.guest.talks)
		}
		<-m.ended
	}()
	return ours, nil
}

func (m *fakeMachine) Port(context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		switch {
		case m.guest.greets || m.guest.converses:
			s, err := vmwire.Guest(theirs)
			if err != nil {
				return
			}
			for m.guest.converses {
				in, err := s.Accept()
				if err != nil {
					return
				}
				go m.answer(in)
			}
		default: // what is said to it is swallowed
			b := make([]byte, 4096)
			for {
				if _, err := theirs.Read(b); err != nil {
					return
				}
			}
		}
		<-m.ended
	}()
	return ours, nil
}

// answer is the control API of a guest whose engine takes a while.
func (m *fakeMachine) answer(in *vmwire.Incoming) {
	if p, err := in.Purpose(time.Second); err != nil || p.Kind != vmwire.Control || in.Answer(nil) != nil {
		in.Answer(errors.New("there is no engine"))
		in.Close()
		return
	}
	served := make(chan net.Conn, 1)
	served <- in
	http.Serve(once{served, m.ended}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		st := vmwire.Status{State: vmwire.StateStarting}
		if wait := m.guest.after - time.Since(m.begin); wait > 0 {
			time.Sleep(min(wait, 50*time.Millisecond)) // as long as a guest waits until it says that there is no change
		} else {
			st.State = vmwire.StateReady
		}
		json.NewEncoder(w).Encode(st)
	}))
}

type once struct {
	conn  chan net.Conn
	ended chan struct{}
}

func (o once) Accept() (net.Conn, error) {
	select {
	case c := <-o.conn:
		return c, nil
	case <-o.ended:
		return nil, net.ErrClosed
	}
}
func (o once) Close() error   { return nil }
func (o once) Addr() net.Addr { return nil }

// fakeImage is an image as far as it is looked at before a start.
func fakeImage(t *testing.T) string {
	t.Helper()
	dir, files := t.TempDir(), map[string]vmwire.File{}
	for _, name := range []string{"kernel", "initrd", "root"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(name))
		files[name] = vmwire.File{Name: name, Size: int64(len(name)), SHA256: hex.EncodeToString(sum[:])}
	}
	raw, err := json.Marshal(vmwire.Image{FormatVersion: vmwire.FormatVersion, Format: "vm", Version: "1", Arch: runtime.GOARCH, Kernel: "6", CommandLine: "quiet", Files: files})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, vmwire.Manifest), raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestStall: a start that gives no sign of life is given up and made once more, and
// only once; one that is slow but alive is waited for.
func TestStall(t *testing.T) {
	const silence = 500 * time.Millisecond
	dead, well := guest{}, guest{converses: true}
	for name, c := range map[string]struct {
		guests []guest
		took   float64 // of the last start, in seconds
		starts int
		fails  bool
	}{
		"well":                            {guests: []guest{well}, starts: 1},
		"hangs once":                      {guests: []guest{dead, well}, starts: 2},
		"hangs behind the greeting":       {guests: []guest{{greets: true}, well}, starts: 2},
		"complains on its console":        {guests: []guest{{talks: 100 * time.Millisecond}, well}, starts: 2},
		"hangs always":                    {guests: []guest{dead}, starts: 2, fails: true},
		"slow but alive":                  {guests: []guest{{converses: true, after: 5 * silence}}, starts: 1},
		"a computer known to be slow":     {guests: []guest{dead, well}, took: 1e6, starts: 2},
		"slow the second time, and quiet": {guests: []guest{dead, {converses: true, after: 3 * silence}}, starts: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("", "stall")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			var out bytes.Buffer
			d := &starter{guests: c.guests}
			h, err := New(Config{Place: api.VMPlace{State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run")}, Drivers: []vm.Driver{d},
				Computer: vm.Computer{CPUs: 2, MemoryMiB: 4096, Home: dir}, Image: fakeImage(t), Log: slog.New(slog.NewTextHandler(&out, nil)),
				BootPatience: 8 * silence, Silence: silence})
			if err != nil {
				t.Fatal(err)
			}
			h.took = c.took
			steps := make(chan api.VMProgress, 100)
			h.steps[steps] = true
			l, err := h.awake(t.Context())
			if (err != nil) != c.fails {
				t.Errorf("the start: %v", err)
			}
			if len(d.starts) != c.starts {
				t.Errorf("started %d times, want %d", len(d.starts), c.starts)
			}
			for _, m := range d.starts[:len(d.starts)-1] {
				if !closed(m.ended) {
					t.Error("the machine that stood still was not ended")
				}
			}
			again := 0
			for len(steps) > 0 {
				if p := <-steps; strings.Contains(p.Step, "starting it once more") {
					again++
				}
			}
			if again != c.starts-1 {
				t.Errorf("who waits was told %d times of a further start", again)
			}
			if c.fails {
				for _, want := range []string{"no sign of life for", h.file("console.log")} {
					if err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("the error does not tell %q: %v", want, err)
					}
				}
				if !closed(d.starts[len(d.starts)-1].ended) {
					t.Error("a machine is left that nobody can use")
				}
			} else if err == nil {
				if state, _ := h.now(); state != api.VMRunning {
					t.Errorf("the machine is %s", state)
				}
				h.end(t.Context(), l)
			}
			h.wg.Wait()
			if told := strings.Contains(out.String(), "stands still"); told != (c.starts > 1) {
				t.Errorf("the log: %s", out.String())
			}
		})
	}
}

// TestSilence: how long a start may be silent follows what starts take here, within bounds.
func TestSilence(t *testing.T) {
	for took, want := range map[float64]time.Duration{0: 90 * time.Second, 2: 45 * time.Second, 12: time.Minute, 100: 150 * time.Second, 1e300: 150 * time.Second, -1: 90 * time.Second} {
		h := &Host{took: took, cfg: Config{BootPatience: 5 * time.Minute, Silence: 45 * time.Second}}
		if got := h.silence(); got != want {
			t.Errorf("after a start of %v s: %v, want %v", took, got, want)
		}
	}
}

// TestPatience: only time in which somebody looked counts, and the console alone
// is not believed for ever.
func TestPatience(t *testing.T) {
	for name, c := range map[string]struct {
		passed []time.Duration // between looks
		signs  func(l *life)   // before each look
		want   int             // the look at which it is enough, from 1; 0 is never
	}{
		"silent":             {[]time.Duration{4, 4, 4, 4, 4}, func(*life) {}, 4},
		"alive":              {[]time.Duration{4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4}, func(l *life) { l.sign(); l.answered.Store(true) }, 0},
		"on its console":     {[]time.Duration{4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4}, func(l *life) { l.sign() }, 10},
		"the computer slept": {[]time.Duration{4, 4, 1000}, func(*life) {}, 0},
	} {
		p, l, got := patience{silence: 16, most: 40}, &life{}, 0
		for i, d := range c.passed {
			if c.signs(l); p.over(l, d) && got == 0 {
				got = i + 1
			}
		}
		if got != c.want {
			t.Errorf("%s: at look %d, want %d", name, got, c.want)
		}
	}
}

// TestTakingOver: while a machine of before is looked for, nobody is told that it is off.
func TestTakingOver(t *testing.T) {
	dir, err := os.MkdirTemp("", "take")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &starter{attach: make(chan struct{})}
	place := api.VMPlace{State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run")}
	h, err := New(Config{Place: place, Drivers: []vm.Driver{d}, Computer: vm.Computer{CPUs: 2, MemoryMiB: 4096, Home: dir}, Log: quietLog()})
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.WriteJSON(h.file("machine.json"), vm.Record{Driver: "fake"}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", place.Control())
	}}}
	state := func() (st api.VMStatus, err error) {
		resp, err := c.Get("http://vmd/v1/status")
		if err != nil {
			return st, err
		}
		defer resp.Body.Close()
		return st, json.NewDecoder(resp.Body).Decode(&st)
	}
	await := func(want string) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			st, err := state()
			if err == nil && st.State == want {
				return
			}
			if err == nil && want == api.VMStarting || time.Now().After(end) {
				t.Fatalf("the machine is said to be %q (%v), want %q", st.State, err, want)
			}
		}
	}
	await(api.VMStarting)
	close(d.attach)
	await(api.VMOff)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
