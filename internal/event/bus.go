// Package event is the engine's event bus: typed messages (the Docker API's),
// bounded subscribers and a ring of the recent ones so that a client can ask
// for what happened since. The engine publishes; the API and the engine's own
// watchers subscribe.
package event

import (
	"context"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
)

// Config of a Bus. Zero values take the defaults.
type Config struct {
	// Ring is how many messages are kept for replay, 1024 by default.
	Ring int
	// Backlog is how far a subscriber may lag behind before it is cut off, 1024.
	Backlog int
}

// Bus distributes messages. Publishing never blocks: a subscriber that does not
// keep up is ended, and its reader told so.
type Bus struct {
	backlog int

	mu   sync.Mutex
	ring []events.Message
	next int // where the next message goes
	subs map[*Subscription]struct{}
}

// NewBus makes a bus.
func NewBus(c Config) *Bus {
	if c.Ring <= 0 {
		c.Ring = 1024
	}
	if c.Backlog <= 0 {
		c.Backlog = 1024
	}
	// The ring grows as messages come: an idle engine holds none.
	return &Bus{backlog: c.Backlog, ring: make([]events.Message, 0, c.Ring), subs: map[*Subscription]struct{}{}}
}

// Publish stamps the message and hands it to every subscriber.
func (b *Bus) Publish(m events.Message) {
	m.Scope = "local"
	b.mu.Lock()
	defer b.mu.Unlock()
	if m.TimeNano == 0 {
		m.TimeNano = time.Now().UnixNano()
	}
	m.Time = m.TimeNano / int64(time.Second)
	if len(b.ring) < cap(b.ring) {
		b.ring = append(b.ring, m)
	} else {
		b.ring[b.next] = m
		b.next = (b.next + 1) % len(b.ring)
	}
	for s := range b.subs {
		select {
		case s.ch <- m:
		default:
			s.lagged = true
			delete(b.subs, s)
			close(s.ch)
		}
	}
}

// Subscription receives messages from the moment it was made.
type Subscription struct {
	bus    *Bus
	ch     chan events.Message
	lagged bool
}

// Subscribe starts a subscription and returns what the ring still holds from
// since on; a zero since returns nothing old. No message is missed or doubled
// between the two.
func (b *Bus) Subscribe(since time.Time) (*Subscription, []events.Message) {
	s := &Subscription{bus: b, ch: make(chan events.Message, b.backlog)}
	b.mu.Lock()
	defer b.mu.Unlock()
	var old []events.Message
	if !since.IsZero() {
		from := since.UnixNano()
		for i := range len(b.ring) {
			if m := b.ring[(b.next+i)%len(b.ring)]; m.TimeNano >= from {
				old = append(old, m)
			}
		}
	}
	b.subs[s] = struct{}{}
	return s, old
}

// Next waits for a message. ok is false when ctx ended, the subscription was
// closed or it lagged too far behind.
func (s *Subscription) Next(ctx context.Context) (m events.Message, ok bool) {
	select {
	case m, ok = <-s.ch:
		return m, ok
	case <-ctx.Done():
		return events.Message{}, false
	}
}

// Lagged reports whether the subscription was ended because its reader was slow.
func (s *Subscription) Lagged() bool {
	s.bus.mu.Lock()
	defer s.bus.mu.Unlock()
	return s.lagged
}

// Close ends the subscription; idempotent.
func (s *Subscription) Close() {
	s.bus.mu.Lock()
	defer s.bus.mu.Unlock()
	if _, live := s.bus.subs[s]; live {
		delete(s.bus.subs, s)
		close(s.ch)
	}
}

// Listeners is how many subscriptions there are.
func (b *Bus) Listeners() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.subs)
}
