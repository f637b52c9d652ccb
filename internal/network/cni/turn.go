package cni

import (
	"context"

	"golang.org/x/sync/semaphore"
)

// lock makes operations on one container take turns.
type lock struct {
	turn  chan struct{}
	users int
}

// lock waits for the turn of a container.
func (s *Service) lock(ctx context.Context, id string) (unlock func(), err error) {
	s.mu.Lock()
	l := s.locks[id]
	if l == nil {
		l = &lock{turn: make(chan struct{}, 1)}
		s.locks[id] = l
	}
	l.users++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		if l.users--; l.users == 0 {
			delete(s.locks, id)
		}
		s.mu.Unlock()
	}
	select {
	case l.turn <- struct{}{}:
		return func() { <-l.turn; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

const gateWidth = 1 << 30

// gate lets many ADD and DEL of a network through, or one GC.
func (s *Service) gate(network string) *semaphore.Weighted {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.gates[network]
	if g == nil {
		g = semaphore.NewWeighted(gateWidth)
		s.gates[network] = g
	}
	return g
}

func (s *Service) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}
