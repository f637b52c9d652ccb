package event

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/moby/moby/api/types/events"
)

func msg(i int) events.Message {
	return events.Message{Type: events.ContainerEventType, Action: events.Action(strconv.Itoa(i)), TimeNano: int64(i+1) * int64(time.Second)}
}

func TestReplayThenFollow(t *testing.T) {
	b := NewBus(Config{Ring: 4})
	for i := range 7 {
		b.Publish(msg(i))
	}
	s, old := b.Subscribe(time.Unix(6, 0))
	if len(old) != 2 || old[0].Action != "5" || old[1].Action != "6" || old[1].Time != 7 {
		t.Fatalf("replay: %+v", old)
	}
	b.Publish(msg(7))
	m, ok := s.Next(context.Background())
	if !ok || m.Action != "7" || m.Scope != "local" {
		t.Fatalf("follow: %+v, %v", m, ok)
	}
	_, old = b.Subscribe(time.Unix(1, 0))
	if len(old) != 4 || old[0].Action != "4" || old[3].Action != "7" {
		t.Fatalf("the ring keeps %+v", old)
	}
	if _, old = b.Subscribe(time.Time{}); old != nil {
		t.Fatalf("no since, yet %d old ones", len(old))
	}
	s.Close()
	s.Close()
	if _, ok := s.Next(context.Background()); ok || s.Lagged() {
		t.Error("a closed subscription goes on")
	}
}

func TestSlowSubscriberIsCutOff(t *testing.T) {
	b := NewBus(Config{Backlog: 2})
	slow, _ := b.Subscribe(time.Time{})
	quick, _ := b.Subscribe(time.Time{})
	for i := range 3 {
		b.Publish(msg(i))
		if m, ok := quick.Next(context.Background()); !ok || m.Action != events.Action(strconv.Itoa(i)) {
			t.Fatalf("quick one got %+v, %v", m, ok)
		}
	}
	n := 0
	for {
		if _, ok := slow.Next(context.Background()); !ok {
			break
		}
		n++
	}
	if n != 2 || !slow.Lagged() || quick.Lagged() || b.Listeners() != 1 {
		t.Errorf("slow got %d, lagged %v; %d listeners", n, slow.Lagged(), b.Listeners())
	}
}

func TestNextEndsWithContext(t *testing.T) {
	s, _ := NewBus(Config{}).Subscribe(time.Time{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, ok := s.Next(ctx); ok {
		t.Error("got a message")
	}
}
