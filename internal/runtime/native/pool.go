package native

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	reserveFor = 2 * time.Second
	// quiet is how long the foreground must have been idle before the pool is
	// filled: parking takes the same kernel locks as starting.
	quiet = 15 * time.Millisecond
	// starve bounds how long a busy foreground may keep an empty pool waiting.
	starve = 300 * time.Millisecond
	// forgetKey drops the sandboxes of a kind that nobody asks for any more.
	forgetKey = 10 * time.Minute
)

// shelf holds the parked sandboxes of one kind.
type shelf struct {
	ready    []*sandbox
	want     int
	used     time.Time
	devices  []specs.LinuxDeviceCgroup // what containers of this kind last asked for
	mounts   []specs.Mount             // likewise
	failures int
	retry    time.Time
}

// pool keeps parked sandboxes. A sandbox serves once.
type pool struct {
	d        *Driver
	mu       sync.Mutex
	shelves  map[contract.SandboxKey]*shelf
	reserved map[string]*sandbox
	timers   map[string]*time.Timer
	wake     chan struct{}
	closed   bool
	parking  sync.WaitGroup
	busy     atomic.Int64 // starts under way
	last     atomic.Int64 // when the last one ended
}

func newPool(d *Driver) *pool {
	p := &pool{d: d, shelves: map[contract.SandboxKey]*shelf{}, reserved: map[string]*sandbox{}, timers: map[string]*time.Timer{}, wake: make(chan struct{}, 1)}
	if d.cfg.PoolSize > 0 {
		if d.cfg.PrepareLink != nil {
			p.shelves[contract.SandboxKey{Network: "bridge"}] = &shelf{want: d.cfg.PoolSize}
		}
		p.shelves[contract.SandboxKey{Network: "none"}] = &shelf{want: max(1, d.cfg.PoolSize/4)}
	}
	return p
}

func (p *pool) parkable(key contract.SandboxKey) bool {
	return p.d.cfg.PoolSize > 0 && key.UserNS == "" && (key.Network == "none" || key.Network == "bridge" && p.d.cfg.PrepareLink != nil)
}

func (p *pool) reserve(key contract.SandboxKey) string {
	if !p.parkable(key) {
		return newID()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shelf(key)
	s.used, s.want = time.Now(), p.d.cfg.PoolSize
	if p.closed || len(s.ready) == 0 {
		p.poke()
		return newID()
	}
	sb := s.ready[0]
	s.ready = s.ready[1:]
	p.reserved[sb.id] = sb
	// What is held for too long is discarded: its id has been given away.
	p.timers[sb.id] = time.AfterFunc(reserveFor, func() { p.release(sb.id) })
	return sb.id
}

func (p *pool) shelf(key contract.SandboxKey) *shelf {
	s := p.shelves[key]
	if s == nil {
		s = &shelf{}
		p.shelves[key] = s
	}
	return s
}

// take gives the sandbox reserved for the id, or nil.
func (p *pool) take(id string) *sandbox {
	p.mu.Lock()
	defer p.mu.Unlock()
	sb := p.reserved[id]
	if sb == nil {
		return nil
	}
	delete(p.reserved, id)
	p.timers[id].Stop()
	delete(p.timers, id)
	select {
	case <-sb.relay.lost: // died while parked
		p.drop(sb)
		return nil
	default:
		return sb
	}
}

// release gives up a sandbox that was reserved for too long.
func (p *pool) release(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if sb := p.reserved[id]; sb != nil {
		delete(p.reserved, id)
		p.timers[id].Stop()
		delete(p.timers, id)
		p.drop(sb)
	}
}

// drop discards a reserved sandbox; p.mu is held. Its id has been given away: a
// start that does not find it any more must find its removal.
func (p *pool) drop(sb *sandbox) {
	p.d.tear.addFor(sb.id, func(context.Context) error { sb.discard(); return nil })
}

func (p *pool) has(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reserved[id] != nil {
		return true
	}
	for _, s := range p.shelves {
		for _, sb := range s.ready {
			if sb.id == id {
				return true
			}
		}
	}
	return false
}

// likely is what the next container of this kind probably asks for.
func (p *pool) likely(key contract.SandboxKey) ([]specs.LinuxDeviceCgroup, []specs.Mount) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shelf(key)
	return s.devices, s.mounts
}

// learn remembers the device rules and file systems that containers of this kind
// get, so that the next sandboxes are parked with them.
func (p *pool) learn(key contract.SandboxKey, spec *specs.Spec) {
	if !p.parkable(key) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shelf(key)
	if r := spec.Linux.Resources; r != nil && len(r.Devices) > 0 {
		s.devices = r.Devices
	}
	s.mounts = spec.Mounts
}

// enter and leave bracket what the user waits for.
func (p *pool) enter() { p.busy.Add(1) }

func (p *pool) leave() {
	p.last.Store(time.Now().UnixNano())
	p.busy.Add(-1)
	p.poke()
}

func (p *pool) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *pool) full() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.shelves {
		if len(s.ready) < s.want && s.retry.IsZero() {
			return false
		}
	}
	return true
}

// next tells what to park now, or how long to wait.
func (p *pool) next() (key contract.SandboxKey, ok bool, wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	wait = time.Minute
	best := 0
	for k, s := range p.shelves {
		if !s.used.IsZero() && now.Sub(s.used) > forgetKey && s.want > 1 {
			s.want = 1
			for len(s.ready) > s.want {
				sb := s.ready[len(s.ready)-1]
				s.ready = s.ready[:len(s.ready)-1]
				p.d.tear.add(func(context.Context) error { sb.discard(); return nil })
			}
		}
		missing := s.want - len(s.ready)
		if missing <= 0 {
			continue
		}
		if now.Before(s.retry) {
			wait = min(wait, s.retry.Sub(now))
			continue
		}
		if missing > best {
			key, ok, best = k, true, missing
		}
	}
	return key, ok, wait
}

// run fills the pool from a thread of low priority, whose children inherit it.
func (p *pool) run(ctx context.Context) {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 10)
	var hungry time.Time
	for ctx.Err() == nil {
		key, ok, wait := p.next()
		if ok {
			if hungry.IsZero() {
				hungry = time.Now()
			}
			idle := time.Duration(time.Now().UnixNano() - p.last.Load())
			if (p.busy.Load() > 0 || idle < quiet) && time.Since(hungry) < starve {
				wait = quiet
			} else {
				hungry = time.Time{}
				p.fill(ctx, key)
				continue
			}
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-p.wake:
			if ok { // a start ended: let things settle first
				select {
				case <-t.C:
				case <-ctx.Done():
				}
			}
		case <-t.C:
		}
		t.Stop()
	}
}

func (p *pool) fill(ctx context.Context, key contract.SandboxKey) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.parking.Add(1)
	p.mu.Unlock()
	defer p.parking.Done()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	sb, err := p.d.newSandbox(newID(), key)
	if err == nil {
		if err = sb.park(ctx); err != nil {
			sb.discard()
		}
	}
	p.mu.Lock()
	s := p.shelf(key)
	if err != nil {
		s.failures++
		s.retry = time.Now().Add(min(time.Minute, time.Second<<min(s.failures, 6)))
		first := s.failures == 1
		p.mu.Unlock()
		if first && ctx.Err() == nil {
			p.d.log.Warn("cannot park a sandbox; containers start without the pool", "network", key.Network, "error", err)
		}
		return
	}
	s.failures, s.retry = 0, time.Time{}
	if p.closed {
		p.mu.Unlock()
		sb.discard()
		return
	}
	s.ready = append(s.ready, sb)
	p.mu.Unlock()
	go p.watch(key, sb)
}

// watch takes a sandbox off its shelf should it die there.
func (p *pool) watch(key contract.SandboxKey, sb *sandbox) {
	<-sb.relay.lost
	p.mu.Lock()
	found := false
	s := p.shelf(key)
	for i, x := range s.ready {
		if x == sb {
			s.ready = append(s.ready[:i:i], s.ready[i+1:]...)
			found = true
			break
		}
	}
	p.mu.Unlock()
	if found {
		sb.discard()
		p.poke()
	}
}

func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	var all []*sandbox
	for _, s := range p.shelves {
		all = append(all, s.ready...)
		s.ready, s.want = nil, 0
	}
	for id, sb := range p.reserved {
		p.timers[id].Stop()
		all = append(all, sb)
	}
	clear(p.reserved)
	clear(p.timers)
	p.mu.Unlock()
	p.parking.Wait()
	var wg sync.WaitGroup
	for _, sb := range all {
		wg.Go(sb.discard)
	}
	wg.Wait()
}
