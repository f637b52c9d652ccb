package engine

import (
	"context"
	"sync"

	"github.com/containerd/containerd/v2/core/leases"
)

// temporary marks leases that hold something for as long as BuildKit works on it; it
// removes those that a builder left when the next one begins.
const temporary = "buildkit/lease.temporary"

// leisurely gives temporary leases back in the background: each is a transaction of
// the engine's that reaches the disk, and nobody has use for waiting. What a lease
// held goes a moment later, as if it had been given back then.
type leisurely struct {
	leases.Manager
	wg sync.WaitGroup

	mu    sync.Mutex
	brief map[string]struct{}      // temporary ones that were made
	going map[string]chan struct{} // being given back
}

func newLeisurely(m leases.Manager) *leisurely {
	return &leisurely{Manager: m, brief: map[string]struct{}{}, going: map[string]chan struct{}{}}
}

// Create makes a lease. One of a name that is being given back waits for that.
func (m *leisurely) Create(ctx context.Context, opts ...leases.Opt) (leases.Lease, error) {
	var l leases.Lease
	for _, o := range opts {
		if err := o(&l); err != nil {
			return l, err
		}
	}
	m.mu.Lock()
	gone := m.going[l.ID]
	m.mu.Unlock()
	if gone != nil {
		<-gone
	}
	got, err := m.Manager.Create(ctx, func(x *leases.Lease) error {
		*x = l
		return nil
	})
	if _, ok := l.Labels[temporary]; ok && err == nil {
		m.mu.Lock()
		m.brief[got.ID] = struct{}{}
		m.mu.Unlock()
	}
	return got, err
}

// Delete gives a lease back.
func (m *leisurely) Delete(ctx context.Context, l leases.Lease, opts ...leases.DeleteOpt) error {
	var o leases.DeleteOptions
	for _, f := range opts {
		if err := f(ctx, &o); err != nil {
			return err
		}
	}
	m.mu.Lock()
	_, ok := m.brief[l.ID]
	if !ok || o.Synchronous {
		m.mu.Unlock()
		return m.Manager.Delete(ctx, l, opts...)
	}
	delete(m.brief, l.ID)
	gone := make(chan struct{})
	m.going[l.ID] = gone
	m.mu.Unlock()
	m.wg.Go(func() {
		// One that stays ends by itself: it has a time.
		_ = m.Manager.Delete(context.WithoutCancel(ctx), l)
		m.mu.Lock()
		delete(m.going, l.ID)
		m.mu.Unlock()
		close(gone)
	})
	return nil
}
