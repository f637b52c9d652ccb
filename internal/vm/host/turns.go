package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// start boots the machine, a second time where the first one stood still (stall.go).
// The caller has the turn and the machine is off.
func (h *Host) start(ctx context.Context) (*live, error) {
	begin := time.Now()
	h.mu.Lock()
	silence := h.silence()
	h.mu.Unlock()
	l, err := h.boot(ctx, begin, silence)
	var s *stall
	if !errors.As(err, &s) || ctx.Err() != nil || closed(h.quit) {
		return l, err
	}
	h.log.Warn("the start stands still: starting once more", "error", err)
	h.step(begin, s.Error()+": starting it once more")
	if l, err = h.boot(ctx, begin, 0); err != nil {
		err = fmt.Errorf("%w; a first start was given up, %w", err, s)
	}
	return l, err
}

// boot starts the machine and waits until its engine answers. With a silence, it
// ends a guest that gives no sign of life for so long, and returns a *stall.
func (h *Host) boot(ctx context.Context, begin time.Time, silence time.Duration) (*live, error) {
	h.set(api.VMStarting, "")
	began := time.Now()
	h.mu.Lock()
	c := h.config
	c.Shares = slices.Clone(c.Shares)
	h.mu.Unlock()
	h.step(begin, "checking the image")
	img, err := h.image(c)
	if err != nil {
		return nil, err
	}
	h.step(begin, "probing the computer")
	d, host, why, err := h.choose(ctx, c.Driver, img)
	if err != nil {
		return nil, err
	}
	if why != "" {
		h.log.Info("the driver was chosen", "driver", d.Name(), "others", why)
		h.step(begin, "using "+d.Name()+" ("+why+")")
	}
	spec := h.spec()
	spec.CPUs, spec.Memory, spec.Disk, spec.Image = c.CPUs, int64(c.MemoryMiB)<<20, int64(c.DiskGiB)<<30, img
	for i, s := range c.Shares {
		spec.Shares = append(spec.Shares, vm.Share{VMShare: s, Tag: "share" + strconv.Itoa(i)})
	}
	if err := context.Cause(ctx); err != nil { // a probe that was made before asks nobody
		return nil, err
	}
	// The record comes first: a machine that is not in it would be nobody's.
	if err := vm.WriteJSON(h.file("machine.json"), vm.Record{Driver: d.Name(), Spec: spec}); err != nil {
		return nil, err
	}
	m, err := d.Start(ctx, spec, host, func(s string) { h.step(begin, s) })
	if err != nil {
		return nil, err
	}
	if err := vm.WriteJSON(h.file("machine.json"), m.Record()); err != nil {
		m.Kill(context.WithoutCancel(ctx))
		return nil, err
	}
	if c.Driver == "" && len(h.cfg.Drivers) > 1 {
		if err := vm.WriteJSON(h.file(chosenFile), choice{d.Name()}); err != nil {
			h.log.Warn("cannot keep which driver was chosen", "error", err)
		}
	}
	h.log.Info("machine started", "driver", d.Name(), "accelerator", host.Accelerator, "pid", m.PID(), "image", img.Version)
	l := h.adopt(m, host, spec)
	h.step(begin, "booting CloudOS "+img.Version+" ("+host.Accelerator+")")
	st, err := h.meetAlive(ctx, l, silence)
	if err != nil {
		if kerr := h.end(context.WithoutCancel(ctx), l); kerr != nil {
			return nil, fmt.Errorf("%v%s; and it cannot be ended: %w", err, h.console.hint(), kerr)
		}
		return nil, fmt.Errorf("%w%s", err, h.console.hint())
	}
	took := time.Since(began).Seconds()
	h.mu.Lock()
	h.took = took
	h.mu.Unlock()
	vm.WriteJSON(h.file("last-start.json"), struct{ Seconds float64 }{took})
	h.ready(l, st)
	return l, nil
}

// spec is the machine's, with its places alone.
func (h *Host) spec() vm.Spec {
	return vm.Spec{Name: "vm-" + strconv.Itoa(os.Getuid()), Data: h.file("data.img"), Run: filepath.Join(h.cfg.Place.Run, "machine"), State: h.cfg.Place.State}
}

// image opens the configured image.
func (h *Host) image(c api.VMConfig) (vm.Image, error) {
	dir := c.Image
	if dir == "" {
		dir = h.cfg.Image
	}
	seen := map[string]string{}
	vm.ReadJSON(h.file("verified.json"), &seen)
	before := maps.Clone(seen)
	img, err := vm.OpenImage(dir, h.cfg.ImageKeys, seen)
	if err == nil && !maps.Equal(seen, before) {
		for p := range seen { // what an older image was
			if filepath.Dir(p) != filepath.Clean(dir) {
				delete(seen, p)
			}
		}
		err = vm.WriteJSON(h.file("verified.json"), seen)
	}
	if err == nil {
		err = img.Unpack(h.cfg.Place.State)
	}
	return img, err
}

// adopt takes a machine that runs into the host's care.
func (h *Host) adopt(m vm.Machine, host vm.Host, spec vm.Spec) *live {
	l := &live{machine: m, host: host, spec: spec, hot: map[string]string{}, pending: map[string]bool{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.ports = newPorts(l, h.log)
	l.changes = newChanges(l, h.log)
	h.mu.Lock()
	h.live = l
	h.mu.Unlock()
	h.wg.Add(2)
	go func() { defer h.wg.Done(); h.console.follow(l.ctx, m, l.life.sign) }()
	go func() {
		defer h.wg.Done()
		err := m.Wait(l.ctx)
		if l.ctx.Err() == nil {
			h.fell(l, err)
		}
	}()
	return l
}

// meet begins the conversation with the guest and waits for its engine.
func (h *Host) meet(ctx context.Context, l *live) (vmwire.Status, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.ctx, cancel)() // a machine that ends is waited for no longer
	conn, err := l.machine.Port(ctx)
	if err != nil {
		return vmwire.Status{}, fmt.Errorf("cannot reach the machine's port: %w", err)
	}
	s, err := vmwire.Host(ctx, heard{conn, &l.life})
	if err != nil {
		conn.Close()
		return vmwire.Status{}, err
	}
	l.mu.Lock()
	if old := l.session; old != nil {
		old.Close()
	}
	l.session, l.api, l.ctl = s, s.Client(vmwire.API), s.Client(vmwire.Control)
	l.mu.Unlock()
	var st vmwire.Status
	// Before the engine is there: it starts containers that want the right time and their shares.
	if err := l.call(ctx, "PUT", "/v1/clock", vmwire.Clock{Time: time.Now()}, nil); err != nil {
		h.log.Warn("cannot set the machine's clock", "error", err)
	}
	problems := map[string]string{}
	if r, ok := l.machine.(vm.Reaches); ok {
		problems = r.ShareProblems()
	}
	for _, sh := range l.spec.Shares {
		if problems[sh.Path] != "" {
			h.log.Warn("cannot share a folder", "path", sh.Path, "error", problems[sh.Path])
			continue
		}
		if err := l.mount(ctx, sh); err != nil {
			h.log.Warn("cannot mount a shared folder", "path", sh.Path, "error", err)
			l.mu.Lock()
			l.hot[sh.Path] = err.Error()
			l.mu.Unlock()
		}
	}
	for {
		// Short waits: each answer is a sign of life.
		if err := l.call(ctx, "GET", "/v1/status?wait=10", nil, &st); err != nil {
			return st, err
		}
		if st.State != vmwire.StateStarting {
			break
		}
	}
	l.mu.Lock()
	l.boot = st
	l.mu.Unlock()
	return st, nil
}

func (l *live) mount(ctx context.Context, sh vm.Share) error {
	target, err := l.place(sh.Path)
	if err != nil {
		return err
	}
	return l.call(ctx, "POST", "/v1/mounts", vmwire.Mount{Tag: sh.Tag, Target: target, ReadOnly: sh.ReadOnly}, nil)
}

// ready begins what is done beside a machine that is up.
func (h *Host) ready(l *live, st vmwire.Status) {
	s, _, _ := l.conversation()
	h.used()
	if st.State == vmwire.StateSafe {
		why := "it does not say why"
		if len(st.Problems) > 0 {
			why = bounded(st.Problems[0])
		}
		h.set(api.VMSafe, why)
	} else {
		h.set(api.VMRunning, "")
	}
	h.wg.Add(2)
	go func() { defer h.wg.Done(); h.converse(l, s) }()
	go func() {
		defer h.wg.Done()
		ctx, cancel := context.WithCancel(l.ctx)
		defer cancel()
		go func() {
			select {
			case <-s.Done():
				cancel()
			case <-ctx.Done():
			}
		}()
		h.watchEngine(ctx, l)
	}()
}

// converse notices when the conversation ends while the machine runs, and begins anew.
func (h *Host) converse(l *live, s *vmwire.Session) {
	select {
	case <-l.ctx.Done():
		return
	case <-s.Done():
	}
	for wait := 200 * time.Millisecond; l.ctx.Err() == nil; wait = min(2*wait, 10*time.Second) {
		select {
		case <-l.ctx.Done():
			return
		case <-time.After(wait):
		}
		if h.takeTurn(l.ctx) != nil {
			return
		}
		if state, cur := h.now(); cur != l || (state != api.VMRunning && state != api.VMSafe) {
			h.giveTurn()
			return
		}
		ctx, cancel := context.WithTimeout(l.ctx, h.cfg.BootPatience)
		ctx, done := h.waiting(ctx)
		st, err := h.meet(ctx, l)
		done()
		cancel()
		if err == nil {
			h.ready(l, st)
		}
		h.giveTurn()
		if err == nil {
			return
		}
		h.log.Warn("the conversation with the machine broke off", "error", err)
	}
}

// resume takes over the machine that a record tells of. The caller has the turn.
func (h *Host) resume(ctx context.Context) error {
	var r vm.Record
	ok, err := vm.ReadJSON(h.file("machine.json"), &r)
	if err != nil || !ok {
		h.set(api.VMOff, "")
		return err
	}
	d, err := h.driver(r.Driver)
	if err != nil {
		return err
	}
	m, err := d.Attach(ctx, r)
	if err != nil || m == nil {
		h.set(api.VMOff, "")
		return err
	}
	r = m.Record()
	host := vm.Host{}
	if p, err := d.Probe(ctx, r.Spec.Image, h.cfg.Place.State); err == nil {
		host = p
	}
	h.log.Info("machine taken over", "driver", r.Driver, "pid", m.PID())
	l := h.adopt(m, host, r.Spec)
	vm.WriteJSON(h.file("machine.json"), r)
	if p, ok := m.(vm.Pauser); ok {
		if paused, err := p.Paused(ctx); err == nil && paused {
			h.set(api.VMSleeping, "")
			return nil
		}
	}
	h.set(api.VMStarting, "")
	ctx, cancel := context.WithTimeout(ctx, h.cfg.BootPatience)
	defer cancel()
	ctx, done := h.waiting(ctx)
	defer done()
	st, err := h.meet(ctx, l)
	if err != nil {
		h.end(context.WithoutCancel(ctx), l)
		return err
	}
	h.ready(l, st)
	return nil
}

// sleep pauses a machine that nobody uses. The caller has the turn.
func (h *Host) sleep(ctx context.Context, l *live) error {
	p, ok := l.machine.(vm.Pauser)
	if !ok {
		return errors.New("this driver cannot pause machines")
	}
	if err := l.call(ctx, "POST", "/v1/sleep", vmwire.Sleep{Memory: true}, nil); err != nil {
		return err
	}
	// Free page reporting needs the guest to run for a moment.
	select {
	case <-time.After(3 * time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	if h.lastUse.Load() > time.Now().Add(-3*time.Second).UnixNano() {
		return l.call(ctx, "POST", "/v1/wake", vmwire.Clock{Time: time.Now()}, nil)
	}
	if err := p.Pause(ctx); err != nil {
		return err
	}
	h.set(api.VMSleeping, "")
	h.log.Info("machine sleeps")
	return nil
}

// wake lets it go on. The caller has the turn.
func (h *Host) wake(ctx context.Context, l *live) (err error) {
	p, ok := l.machine.(vm.Pauser)
	if !ok {
		return errors.New("this driver cannot resume machines")
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	ctx, done := h.waiting(ctx)
	defer done()
	defer func() {
		if err != nil && errors.Is(context.Cause(ctx), errForced) {
			err = errForced
		}
	}()
	if err := p.Resume(ctx); err != nil {
		return err
	}
	if s, _, _ := l.conversation(); s == nil || closed(s.Done()) {
		st, err := h.meet(ctx, l)
		if err != nil {
			return err
		}
		h.ready(l, st)
		return nil
	}
	if err := l.call(ctx, "POST", "/v1/wake", vmwire.Clock{Time: time.Now()}, nil); err != nil {
		return err
	}
	h.used()
	h.set(api.VMRunning, "")
	h.log.Info("machine awake")
	return nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// stop ends the machine in order, or at once with force. The caller has the turn.
func (h *Host) stop(ctx context.Context, force bool) error {
	begin := time.Now()
	state, l := h.now()
	if l == nil {
		h.set(api.VMOff, "")
		return nil
	}
	h.set(api.VMStopping, "")
	if force {
		h.step(begin, "pulling the plug")
		return h.end(ctx, l)
	}
	h.step(begin, "stopping containers and the machine")
	orderly, cancel := context.WithTimeout(ctx, vm.StopPatience)
	defer cancel()
	orderly, done := h.waiting(orderly)
	defer done()
	err := func() error {
		if state == api.VMSleeping {
			if err := h.wake(orderly, l); err != nil {
				return err
			}
			h.set(api.VMStopping, "")
		}
		if err := l.call(orderly, "POST", "/v1/shutdown", vmwire.Shutdown{Action: "poweroff", TimeoutSeconds: 15}, nil); err != nil {
			return err
		}
		return l.machine.Wait(orderly)
	}()
	if err != nil {
		h.log.Warn("the machine did not stop in order", "error", err)
		h.step(begin, "the machine does not stop in order: pulling the plug")
	}
	return h.end(ctx, l)
}

// end makes sure that the machine is gone. The caller has the turn.
func (h *Host) end(ctx context.Context, l *live) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer cancel()
	l.cancel()
	err := l.machine.Kill(ctx)
	h.gone(l)
	return err
}

// gone forgets a machine that has ended.
func (h *Host) gone(l *live) {
	l.leave()
	if err := os.Remove(h.file("machine.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.log.Warn("cannot remove the machine's record", "error", err)
	}
	h.mu.Lock()
	if h.live == l {
		h.live = nil
		h.state, h.since, h.fail = api.VMOff, time.Now(), ""
	}
	h.mu.Unlock()
}

// fell is told when the machine ended without being asked to. One that ran
// containers is started again, up to three times in ten minutes.
func (h *Host) fell(l *live, why error) {
	l.mu.Lock()
	had := l.containers
	l.mu.Unlock()
	l.cancel()
	h.wg.Add(1)
	go func() {
		defer h.wg.Done()
		if h.takeTurn(context.Background()) != nil {
			return
		}
		defer h.giveTurn()
		if _, cur := h.now(); cur != l {
			return // a turn has ended it
		}
		h.gone(l)
		if why == nil {
			h.log.Info("the machine stopped by itself")
			return
		}
		h.log.Error("the machine fell", "error", why, "containers", had)
		h.set(api.VMOff, why.Error())
		h.mu.Lock()
		h.falls = slices.DeleteFunc(h.falls, func(t time.Time) bool { return time.Since(t) > 10*time.Minute })
		again := restartAfterFall(had, len(h.falls))
		if again {
			h.falls = append(h.falls, time.Now())
		}
		h.mu.Unlock()
		if again && !closed(h.quit) {
			h.up(context.Background())
		}
	}()
}

// reset destroys the data disk. The caller has the turn.
func (h *Host) reset(ctx context.Context) error {
	begin := time.Now()
	if err := h.stop(ctx, true); err != nil {
		return err
	}
	h.step(begin, "removing the data disk")
	for _, k := range h.keepers() {
		if err := k.Destroy(ctx, h.spec()); err != nil {
			return err
		}
	}
	// The driver's remains (a virtual disk of another form) lie beside it.
	for _, name := range []string{"data.img", "data.vhdx", "probe.json", "verified.json", "last-start.json", chosenFile} {
		if err := os.Remove(h.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove the data disk: %w", err)
		}
	}
	h.mu.Lock()
	h.took = 0
	h.mu.Unlock()
	return durable.SyncDir(h.cfg.Place.State)
}
