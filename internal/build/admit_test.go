package build

import (
	"context"
	"errors"
	"testing"

	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
)

var errUID = errors.New("not for this user")

// only is rules that allow one user alone.
type only uint32

func (only) Active() bool { return true }

func (o only) AdmitBase(_ context.Context, who caller.Caller, _, _, manifest string) (bool, error) {
	if who.UID != uint32(o) {
		return false, errUID
	}
	return manifest == "", nil
}

// TestAdmit asks for every caller of a build, and refuses one that has none.
func TestAdmit(t *testing.T) {
	b := &Builder{}
	s := &services{cfg: Config{Rules: only(7)}, callers: &b.callers}
	seven, gone := b.callers.add(caller.Caller{Local: true, UID: 7})
	eight, _ := b.callers.add(caller.Caller{Local: true, UID: 8})
	if seven == eight || seven == "" {
		t.Fatal("names of callers can be guessed")
	}
	ask := func(manifest string, who ...string) (bool, error) {
		r, err := s.Admit(t.Context(), contract.AdmitRequest{Callers: who, Ref: "a", Manifest: manifest})
		return r.More, err
	}
	if more, err := ask("", seven); err != nil || !more {
		t.Error(more, err)
	}
	if more, err := ask("sha256:1", seven); err != nil || more {
		t.Error(more, err)
	}
	if _, err := ask("", seven, eight); !errors.Is(err, errUID) {
		t.Error("one of two callers was not asked for: ", err)
	}
	gone()
	for _, who := range [][]string{nil, {seven}, {"made up"}} {
		if _, err := ask("", who...); !fault.Is(err, fault.Forbidden) {
			t.Errorf("%v: %v", who, err)
		}
	}
	s.cfg.Rules = nil
	if more, err := ask(""); err != nil || more {
		t.Error(more, err)
	}
}
