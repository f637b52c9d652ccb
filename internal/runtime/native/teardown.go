package native

import (
	"context"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// teardown does what nobody waits for, a few at a time.
type teardown struct {
	d       *Driver
	mu      sync.Mutex
	queue   []func(context.Context) error
	pending int
	byID    map[string]chan struct{}
	wake    chan struct{}
}

func newTeardown(d *Driver) *teardown {
	return &teardown{d: d, byID: map[string]chan struct{}{}, wake: make(chan struct{}, 1)}
}

// add queues what can be repeated: nobody does it later.
func (t *teardown) add(f func(context.Context) error) {
	t.enqueue(func(ctx context.Context) error { return fault.Outwait(ctx, func() error { return f(ctx) }) })
}

func (t *teardown) enqueue(f func(context.Context) error) {
	t.mu.Lock()
	t.queue = append(t.queue, f)
	t.pending++
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// addFor queues, like add, the removal of something that a later start of the same
// id must wait for.
func (t *teardown) addFor(id string, f func(context.Context) error) {
	ch := make(chan struct{})
	t.mu.Lock()
	t.byID[id] = ch
	t.mu.Unlock()
	t.enqueue(func(ctx context.Context) error {
		err := fault.Outwait(ctx, func() error { return f(ctx) })
		t.mu.Lock()
		if t.byID[id] == ch {
			delete(t.byID, id)
		}
		t.mu.Unlock()
		close(ch)
		return err
	})
}

// wait returns when nothing of the id is queued any more, doing it itself if
// nobody runs the queue.
func (t *teardown) wait(ctx context.Context, id string) error {
	t.mu.Lock()
	ch := t.byID[id]
	t.mu.Unlock()
	for ch != nil {
		select {
		case <-ch:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		default:
			if !t.one(ctx) {
				select {
				case <-ch:
					return nil
				case <-ctx.Done():
					return context.Cause(ctx)
				case <-time.After(time.Millisecond):
				}
			}
		}
	}
	return nil
}

func (t *teardown) one(ctx context.Context) bool {
	t.mu.Lock()
	if len(t.queue) == 0 {
		t.mu.Unlock()
		return false
	}
	f := t.queue[0]
	t.queue = t.queue[1:]
	t.mu.Unlock()
	// What has begun is finished, daemon going down or not.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second+fault.ShortageFor)
	defer cancel()
	if err := f(ctx); err != nil {
		t.d.log.Warn("cannot clear away after a container", "error", err)
	}
	t.mu.Lock()
	t.pending--
	t.mu.Unlock()
	return true
}

// run works the queue off while the foreground is idle, and anyway when it has
// grown long.
func (t *teardown) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
		}
		for waited := 0; t.d.pool.busy.Load() > 0 && t.length() < 64 && waited < 20; waited++ {
			select {
			case <-ctx.Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
		for ctx.Err() == nil && t.one(ctx) {
		}
	}
}

func (t *teardown) length() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.queue)
}

func (t *teardown) flush() {
	for t.one(context.Background()) {
	}
}

func (t *teardown) idle() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pending == 0
}
