// Package host is the host's side of VM mode: it owns one user's virtual machine.
// servin-vmd runs it.
//
// A *turn* is one change of the machine's state (start, wake, sleep, stop, reset):
// turns follow one another, everything else runs beside them. The engine's API is
// served on a socket of the host (proxy.go): a command that comes while the machine
// is off or asleep takes a turn first. What containers publish is published here
// (ports.go), what changes in folders that they mount is told to the guest
// (changes.go). decide.go says, without touching anything, when a machine that nobody uses sleeps
// and stops.
//
// What is done is in records first (state folder, vm.WriteJSON), so that a host
// that was killed finds its machine again. Everything that comes from the guest is hostile:
// answers are bounded, and it chooses neither paths nor addresses outside of what its user
// published.
package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Config is what a Host is made of.
type Config struct {
	Place api.VMPlace
	// Drivers of this platform, the preferred one first.
	Drivers  []vm.Driver
	Computer vm.Computer
	// Image is the installed image's folder, for who configured none.
	Image string
	// ImageKeys are keys one of which has to have signed an image; none takes any image.
	ImageKeys []release.Key
	Log       *slog.Logger
	// LogFile is where Log goes, for GET /v1/logs.
	LogFile string
	// BootPatience bounds a start; a translated guest on a busy computer is slow.
	BootPatience time.Duration
	// Silence is the least time without a sign of life after which a start is given
	// up and made once more (stall.go); 0 is 45 seconds.
	Silence time.Duration
	// Leave ends Run after so long with the machine off and nobody asking; 0 is never.
	Leave time.Duration
}

// Host owns the machine.
type Host struct {
	cfg  Config
	log  *slog.Logger
	turn chan struct{} // holds a token while no turn is taken

	lastUse atomic.Int64 // Unix nanoseconds
	console *console

	mu     sync.Mutex
	config api.VMConfig
	state  string
	since  time.Time
	fail   string // why the last start failed
	live   *live  // nil while off
	steps  map[chan api.VMProgress]bool
	took   float64 // seconds of the last start
	falls  []time.Time
	// force.go: who waits to pull the plug, and what ends the waiting of the turn under way; nil while none waits.
	forced    int
	interrupt context.CancelCauseFunc

	quit chan struct{} // closed by POST /v1/quit
	once sync.Once
	wg   sync.WaitGroup
}

// live is a machine that runs and the conversation with it.
type live struct {
	machine vm.Machine
	host    vm.Host
	spec    vm.Spec
	ctx     context.Context // ends with the machine
	cancel  context.CancelFunc
	ports   *ports
	changes *changes
	life    life

	mu         sync.Mutex
	session    *vmwire.Session
	api, ctl   *http.Client
	containers int
	busy       bool // containers is known
	boot       vmwire.Status
	hot        map[string]string // shares that came since the start, with their problems
	pending    map[string]bool   // settings that wait for a restart
}

// record names files of the state folder.
func (h *Host) file(name string) string { return filepath.Join(h.cfg.Place.State, name) }

// New reads the configuration; Run does the rest.
func New(cfg Config) (*Host, error) {
	if cfg.BootPatience == 0 {
		cfg.BootPatience = 5 * time.Minute
	}
	if cfg.Silence == 0 {
		cfg.Silence = 45 * time.Second
	}
	for _, dir := range []string{cfg.Place.State, cfg.Place.Run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("cannot make the machine's folder: %w", err)
		}
	}
	c, err := vm.LoadConfig(cfg.Place.State, cfg.Computer)
	if err != nil {
		return nil, err
	}
	h := &Host{cfg: cfg, log: cfg.Log, turn: make(chan struct{}, 1), config: c, state: api.VMOff, since: time.Now(),
		steps: map[chan api.VMProgress]bool{}, quit: make(chan struct{})}
	h.turn <- struct{}{}
	h.used()
	var last struct{ Seconds float64 }
	if ok, err := vm.ReadJSON(h.file("last-start.json"), &last); ok && err == nil {
		h.took = last.Seconds
	}
	h.console, err = newConsole(h.file("console.log"))
	return h, err
}

// Run serves until ctx ends or POST /v1/quit. The machine runs on.
func (h *Host) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	engine, err := listenPrivate(h.cfg.Place.Engine())
	if err != nil {
		return err
	}
	defer os.Remove(h.cfg.Place.Engine())
	control, err := listenPrivate(h.cfg.Place.Control())
	if err != nil {
		engine.Close()
		return err
	}
	defer os.Remove(h.cfg.Place.Control())
	// Errors of connections are the clients' to know.
	quiet := slog.NewLogLogger(slog.NewTextHandler(io.Discard, nil), slog.LevelError)
	servers := []*http.Server{{Handler: h.proxy(), ErrorLog: quiet}, {Handler: h.routes(), ErrorLog: quiet}}
	failed := make(chan error, 2)
	// A machine of an earlier servin-vmd is taken over first: requests wait for the turn.
	if err := h.takeTurn(ctx); err != nil {
		return err
	}
	// Who asks meanwhile is not told that it is off: 'vm stop' would leave it running.
	if _, err := os.Lstat(h.file("machine.json")); err == nil {
		h.set(api.VMStarting, "")
	}
	for i, s := range servers {
		l := engine
		if i == 1 {
			l = control
		}
		h.wg.Add(1)
		go func() { defer h.wg.Done(); failed <- s.Serve(l) }()
	}
	if err := h.resume(ctx); err != nil {
		h.log.Error("cannot take over the machine that runs", "error", err)
		h.set(api.VMOff, err.Error())
	}
	h.giveTurn()
	h.wg.Add(1)
	go func() { defer h.wg.Done(); h.idle(ctx) }()
	select {
	case <-ctx.Done():
	case <-h.quit:
	case err = <-failed:
	}
	cancel()
	h.leave() // what waits for it ends, too
	for _, s := range servers {
		s.Close()
	}
	h.mu.Lock()
	l := h.live
	h.mu.Unlock()
	if l != nil {
		l.leave()
	}
	// A turn under way is not waited for long: its machine is in the records, and the
	// next servin-vmd takes it over.
	done := make(chan struct{})
	go func() { h.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
	}
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return err
}

// leave ends the conversation; the machine runs on.
func (l *live) leave() {
	l.cancel()
	l.ports.close()
	l.mu.Lock()
	s := l.session
	l.mu.Unlock()
	if s != nil {
		s.Close()
	}
	l.machine.Close()
}

func (h *Host) used() { h.lastUse.Store(time.Now().UnixNano()) }

func (h *Host) takeTurn(ctx context.Context) error {
	select {
	case <-h.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *Host) giveTurn() { h.turn <- struct{}{} }

// set notes a state.
func (h *Host) set(state, fail string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state != state {
		h.since = time.Now()
	}
	h.state, h.fail = state, fail
}

// now gives the state and the machine.
func (h *Host) now() (string, *live) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state, h.live
}

// step tells those who watch what is being done.
func (h *Host) step(begin time.Time, text string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := api.VMProgress{Step: text, Seconds: time.Since(begin).Seconds(), Expected: h.took}
	for c := range h.steps {
		select {
		case c <- p:
		default: // who is slow misses a step
		}
	}
}

// session gives the conversation with a machine that is awake.
func (l *live) conversation() (*vmwire.Session, *http.Client, *http.Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session, l.api, l.ctl
}

// awake makes sure that the machine runs and its engine can be asked.
func (h *Host) awake(ctx context.Context) (*live, error) {
	h.used()
	if state, l := h.now(); state == api.VMRunning && l.ctx.Err() == nil {
		return l, nil
	}
	if err := h.takeTurn(ctx); err != nil {
		return nil, err
	}
	defer h.giveTurn()
	return h.up(ctx)
}

// up brings the machine up from whatever state it is in. The caller has the turn.
func (h *Host) up(ctx context.Context) (*live, error) {
	state, l := h.now()
	if l != nil && l.ctx.Err() != nil {
		h.gone(l)
		state, l = h.now()
	}
	switch {
	case state == api.VMRunning:
		return l, nil
	case state == api.VMSafe:
		return nil, fault.New(fault.Unavailable, "the machine is up, but not its engine: %s; see 'servin vm logs', then 'servin vm restart'", h.failure())
	case state == api.VMSleeping:
		if err := h.wake(ctx, l); err != nil {
			return nil, fmt.Errorf("cannot wake the virtual machine: %w", err)
		}
		return l, nil
	}
	// A start goes on when who asked for it leaves: the next one wants it, too.
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), h.cfg.BootPatience)
	defer cancel()
	sctx, done := h.waiting(sctx)
	defer done()
	err := context.Cause(sctx)
	if err == nil {
		l, err = h.start(sctx)
	}
	if errors.Is(context.Cause(sctx), errForced) {
		if err == nil {
			err = h.end(sctx, l)
		}
		h.log.Info("the start was ended", "error", err)
		h.set(api.VMOff, "")
		return nil, fmt.Errorf("cannot start the virtual machine: %w", errForced)
	}
	if err != nil {
		err = fmt.Errorf("cannot start the virtual machine: %w", err)
		h.log.Error("start failed", "error", err)
		h.set(api.VMOff, err.Error())
		return nil, err
	}
	if state, _ := h.now(); state == api.VMSafe {
		return nil, fault.New(fault.Unavailable, "the machine is up, but not its engine: %s; see 'servin vm logs'", h.failure())
	}
	return l, nil
}

func (h *Host) failure() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fail
}

// driver picks the driver of the configuration, or the platform's best.
func (h *Host) driver(name string) (vm.Driver, error) {
	for _, d := range h.cfg.Drivers {
		if name == "" || d.Name() == name {
			return d, nil
		}
	}
	return nil, fault.New(fault.Unsupported, "there is no driver %q on this platform", name)
}
