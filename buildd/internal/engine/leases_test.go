package engine

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

// slow is a lease manager whose deletions wait.
type slow struct {
	leases.Manager
	have map[string]bool
	let  chan struct{}
}

func (s *slow) Create(_ context.Context, opts ...leases.Opt) (leases.Lease, error) {
	var l leases.Lease
	for _, o := range opts {
		_ = o(&l)
	}
	if s.have[l.ID] {
		return l, errdefs.ErrAlreadyExists
	}
	s.have[l.ID] = true
	return l, nil
}

func (s *slow) Delete(_ context.Context, l leases.Lease, _ ...leases.DeleteOpt) error {
	<-s.let
	if !s.have[l.ID] {
		return errdefs.ErrNotFound
	}
	delete(s.have, l.ID)
	return nil
}

// TestLeisurely gives temporary leases back without waiting, and others with; a name
// that is used again is not taken from who has it now.
func TestLeisurely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slow{have: map[string]bool{}, let: make(chan struct{})}
		m := newLeisurely(s)
		brief := leases.WithLabel(temporary, "now")
		if _, err := m.Create(t.Context(), leases.WithID("a"), brief); err != nil {
			t.Fatal(err)
		}
		if err := m.Delete(t.Context(), leases.Lease{ID: "a"}); err != nil {
			t.Fatal(err)
		}
		made := make(chan error)
		go func() {
			_, err := m.Create(t.Context(), leases.WithID("a"), brief)
			made <- err
		}()
		synctest.Wait()
		close(s.let)
		if err := <-made; err != nil || !s.have["a"] {
			t.Error("the second lease of the name is gone: ", err)
		}
		if err := m.Delete(t.Context(), leases.Lease{ID: "b"}); !errors.Is(err, errdefs.ErrNotFound) {
			t.Error(err)
		}
		if err := m.Delete(t.Context(), leases.Lease{ID: "a"}, leases.SynchronousDelete); err != nil || s.have["a"] {
			t.Error("was not waited for: ", err)
		}
		m.wg.Wait()
	})
}
