package network

import (
	"context"
	"sync"
	"time"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// raising is what brings the networks up, once: an engine answers before it has made
// any, since only who uses one has to wait.
type raising struct {
	once sync.Once
	quit chan struct{} // closed by never

	mu    sync.Mutex
	begun bool
	then  []func() // what was put off
}

// modulesPatience is how long Ready may take: what it waits for comes by itself when a
// network needs it, only slower.
const modulesPatience = 20 * time.Second

// up brings the networks up, or waits until they are.
func (m *Manager) up() { m.raising.once.Do(m.raiseAll) }

func (m *Manager) raiseAll() {
	if m.cfg.Ready != nil {
		select {
		case <-m.cfg.Ready:
		case <-m.raising.quit:
			return
		case <-time.After(modulesPatience):
			m.log.Warn("it was not said that the modules for networks are there; the kernel is to load them")
		}
	}
	m.raising.mu.Lock()
	m.raising.begun = true
	then := m.raising.then
	m.raising.then = nil
	m.raising.mu.Unlock()
	ctx := context.Background() // whoever came first may leave, the others need them
	if err := m.setUp(ctx); err != nil {
		m.broken = fault.New(fault.Unsupported, "cannot use bridge networks on this host: %w", err)
		m.log.Warn("bridge networks are off", "cause", err)
	}
	if err := m.ensureBuiltin(ctx, network.NetworkBridge); err != nil {
		m.broken = err
		m.log.Error("the default network could not be made", "cause", err)
	}
	for _, f := range then {
		f()
	}
}

// putOff has f done once the networks are up, and tells whether that is to come.
func (m *Manager) putOff(f func()) bool {
	r := &m.raising
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.begun {
		r.then = append(r.then, f)
	}
	return !r.begun
}

// never ends the waiting for networks that are not up yet.
func (r *raising) never() {
	r.mu.Lock()
	select {
	case <-r.quit:
	default:
		close(r.quit)
	}
	r.mu.Unlock()
	r.once.Do(func() {})
}
