package image

import (
	"context"
	"errors"
	"sync"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// keyedLock is a set of locks by name that can be waited for with a context.
type keyedLock struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

func (k *keyedLock) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		if k.held == nil {
			k.held = map[string]chan struct{}{}
		}
		wait, taken := k.held[key]
		if !taken {
			free := make(chan struct{})
			k.held[key] = free
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, key)
				k.mu.Unlock()
				close(free)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// flights joins callers that want the same thing at the same time. The work goes
// on until all of them have left.
type flights struct {
	mu  sync.Mutex
	fly map[string]*flight
}

type flight struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error
	refs   int

	mu       sync.Mutex
	watchers map[int]func(Progress)
	serial   int
	// last is the newest line of each id, told to who joins later.
	last  map[string]Progress
	order []string
}

func (f *flight) progress(p Progress) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.ID != "" {
		if _, ok := f.last[p.ID]; !ok {
			f.order = append(f.order, p.ID)
		}
		f.last[p.ID] = p
	}
	for _, w := range f.watchers {
		w(p)
	}
}

func (f *flight) watch(fn func(Progress)) (stop func()) {
	if fn == nil {
		return func() {}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range f.order {
		fn(f.last[id])
	}
	f.serial++
	n := f.serial
	f.watchers[n] = fn
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.watchers, n)
	}
}

// do runs work once for all callers with the key. Work gets a context that ends
// when the last caller's has.
func (fs *flights) do(ctx context.Context, key string, progress func(Progress), work func(ctx context.Context, progress func(Progress)) error) error {
	fs.mu.Lock()
	if fs.fly == nil {
		fs.fly = map[string]*flight{}
	}
	f := fs.fly[key]
	if f == nil {
		wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		f = &flight{cancel: cancel, done: make(chan struct{}), watchers: map[int]func(Progress){}, last: map[string]Progress{}}
		fs.fly[key] = f
		stop := f.watch(progress)
		f.refs++
		fs.mu.Unlock()
		go func() {
			defer cancel()
			f.err = work(wctx, f.progress)
			fs.mu.Lock()
			if fs.fly[key] == f {
				delete(fs.fly, key)
			}
			fs.mu.Unlock()
			close(f.done)
		}()
		return fs.wait(ctx, key, f, stop)
	}
	f.refs++
	fs.mu.Unlock()
	return fs.wait(ctx, key, f, f.watch(progress))
}

func (fs *flights) wait(ctx context.Context, key string, f *flight, stop func()) error {
	defer stop()
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
	}
	fs.mu.Lock()
	f.refs--
	last := f.refs == 0
	if last {
		// Who comes now starts anew instead of joining what is being cancelled.
		if fs.fly[key] == f {
			delete(fs.fly, key)
		}
	}
	fs.mu.Unlock()
	if last {
		f.cancel()
		<-f.done
	}
	return ctx.Err()
}

func diskFault(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.New(fault.Exhausted, "%w (free some disk space, for instance with system prune)", err)
	}
	return err
}
