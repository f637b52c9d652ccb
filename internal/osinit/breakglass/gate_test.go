package breakglass

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// world is an engine with containers, and a log.
type world struct {
	mu       sync.Mutex
	lines    []string
	gone     map[string]chan struct{}
	recorded []string
	deaf     bool // the engine records nothing
	gate     *Gate
}

func newWorld() *world {
	w := &world{gone: map[string]chan struct{}{}}
	w.gate = New(Config{
		Log: func(format string, args ...any) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.lines = append(w.lines, fmt.Sprintf(format, args...))
		},
		Changed: func() {},
		Wait: func(ctx context.Context, id string) {
			select {
			case <-w.container(id):
			case <-ctx.Done():
			}
		},
		Kill: func(_ context.Context, id string) error { close(w.container(id)); return nil },
		Record: func(ctx context.Context, id string) error {
			w.mu.Lock()
			deaf := w.deaf
			w.mu.Unlock()
			if deaf {
				return fmt.Errorf("no engine")
			}
			w.mu.Lock()
			w.recorded = append(w.recorded, id)
			w.mu.Unlock()
			return w.gate.End(ctx, id)
		},
	})
	return w
}

func (w *world) container(id string) chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.gone[id] == nil {
		w.gone[id] = make(chan struct{})
	}
	return w.gone[id]
}

func (w *world) said(t *testing.T, texts ...string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	all := strings.Join(w.lines, "\n")
	for _, text := range texts {
		if !strings.Contains(all, text) {
			t.Fatalf("the log does not say %q:\n%s", text, all)
		}
	}
}

// run runs f with an open world; time is the test's.
func run(t *testing.T, f func(w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); w.gate.Run(ctx) }()
		synctest.Wait()
		f(w)
		cancel()
		<-done
		if err := w.gate.Begin(debugshell.Session{ID: "ee"}); err == nil {
			t.Fatal("a session began after the end")
		}
	})
}

func TestGate(t *testing.T) {
	hour := debugshell.Request{For: "1h", Reason: "disk is full", By: "ada"}
	t.Run("off at first", func(t *testing.T) {
		run(t, func(w *world) {
			if err := w.gate.Begin(debugshell.Session{ID: "aa", By: "eve"}); !fault.Is(err, fault.Forbidden) {
				t.Fatalf("%v", err)
			}
			w.said(t, "refused to eve")
		})
	})
	t.Run("a session opened and left", func(t *testing.T) {
		run(t, func(w *world) {
			if s, err := w.gate.Enable(hour); err != nil || !s.On || s.By != "ada" || s.Until.Sub(s.Since) != time.Hour {
				t.Fatalf("%+v, %v", s, err)
			}
			if err := w.gate.Begin(debugshell.Session{ID: "aa", By: "bob"}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			close(w.container("aa"))
			synctest.Wait()
			if s := w.gate.Status(); len(s.Sessions) != 0 || !s.On || !slices.Equal(w.recorded, []string{"aa"}) {
				t.Fatalf("%+v, recorded %v", s, w.recorded)
			}
			w.said(t, "switched ON until", "by ada: disk is full", "session aa OPENED by bob", "session aa of bob CLOSED after 1m0s")
		})
	})
	t.Run("the time is over", func(t *testing.T) {
		run(t, func(w *world) {
			w.gate.Enable(hour)
			w.gate.Begin(debugshell.Session{ID: "aa", By: "bob"})
			time.Sleep(time.Hour + 2*glance)
			synctest.Wait()
			if s := w.gate.Status(); s.On || len(s.Sessions) != 0 || !slices.Equal(w.recorded, []string{"aa"}) {
				t.Fatalf("%+v", s)
			}
			if err := w.gate.Begin(debugshell.Session{ID: "bb"}); !fault.Is(err, fault.Forbidden) {
				t.Fatalf("%v", err)
			}
			w.said(t, "switched off, its time is over", "CLOSED after 1h0m")
		})
	})
	t.Run("switched off", func(t *testing.T) {
		run(t, func(w *world) {
			w.gate.Open(time.Time{}, "the configuration", "x")
			w.gate.Begin(debugshell.Session{ID: "aa", By: "bob"})
			time.Sleep(100 * time.Hour)
			if s := w.gate.Status(); !s.On || len(s.Sessions) != 1 || !s.Until.IsZero() {
				t.Fatalf("%+v", s)
			}
			w.gate.Disable(t.Context(), "ada")
			synctest.Wait()
			if s := w.gate.Status(); s.On || len(s.Sessions) != 0 {
				t.Fatalf("%+v", s)
			}
			w.said(t, "until the machine starts again", "switched off, by ada")
		})
	})
	t.Run("ended by hand", func(t *testing.T) {
		run(t, func(w *world) {
			w.gate.Enable(hour)
			w.gate.Begin(debugshell.Session{ID: "aa", By: "bob"})
			w.gate.Begin(debugshell.Session{ID: "aa", By: "bob"}) // a start that is tried again
			if err := w.gate.End(t.Context(), "aa"); err != nil { // it is killed, not forgotten
				t.Fatal(err)
			}
			synctest.Wait()
			if s := w.gate.Status(); len(s.Sessions) != 0 || !slices.Equal(w.recorded, []string{"aa"}) {
				t.Fatalf("%+v, %v", s, w.recorded)
			}
			if err := w.gate.End(t.Context(), "aa"); !fault.Is(err, fault.NotFound) {
				t.Fatal(err)
			}
		})
	})
	t.Run("no engine to record", func(t *testing.T) {
		run(t, func(w *world) {
			w.deaf = true
			w.gate.Enable(hour)
			w.gate.Begin(debugshell.Session{ID: "aa", By: "bob"})
			close(w.container("aa"))
			synctest.Wait()
			if s := w.gate.Status(); len(s.Sessions) != 0 {
				t.Fatalf("%+v", s)
			}
			w.said(t, "is not in the audit log: no engine", "CLOSED")
		})
	})
	t.Run("a time that is over", func(t *testing.T) {
		run(t, func(w *world) {
			w.gate.Open(time.Now().Add(-time.Second), "the configuration", "x")
			if s := w.gate.Status(); s.On {
				t.Fatalf("%+v", s)
			}
			w.said(t, "stays off")
		})
	})
	t.Run("what is refused", func(t *testing.T) {
		run(t, func(w *world) {
			for _, r := range []debugshell.Request{{Reason: "x"}, {For: "-1h", Reason: "x"}, {For: "25h", Reason: "x"}, {For: "1h"}, {For: "1h", Reason: " "},
				{For: "1h", Reason: "two\nlines"}, {For: "1h", Reason: "\x1b[2J"}, {For: "1h", Reason: strings.Repeat("x", 300)}} {
				if _, err := w.gate.Enable(r); !fault.Is(err, fault.Invalid) {
					t.Errorf("%+v: %v", r, err)
				}
			}
			w.gate.Enable(hour)
			for _, id := range []string{"", "../x", "AA", strings.Repeat("a", 65)} {
				if err := w.gate.Begin(debugshell.Session{ID: id}); !fault.Is(err, fault.Invalid) {
					t.Errorf("%q: %v", id, err)
				}
			}
			for i := range maxSessions {
				if err := w.gate.Begin(debugshell.Session{ID: fmt.Sprintf("%02x", i)}); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.gate.Begin(debugshell.Session{ID: "ff"}); !fault.Is(err, fault.Conflict) {
				t.Fatalf("%v", err)
			}
		})
	})
}
