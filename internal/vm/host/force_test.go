package host

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// TestForce: who pulls the plug waits for no start, and neither it nor a command that waits behind it
// leaves a machine that runs.
func TestForce(t *testing.T) {
	for name, c := range map[string]struct {
		guest guest
		path  string
	}{
		"a guest that says nothing":      {guest{}, "/v1/stop?force=1"},
		"a guest behind the greeting":    {guest{greets: true}, "/v1/stop?force=1"},
		"a guest that talks for ever":    {guest{talks: 10 * time.Millisecond}, "/v1/stop?force=1"},
		"an engine that never answers":   {guest{converses: true, after: time.Hour}, "/v1/stop?force=1"},
		"a machine that is to be forgot": {guest{converses: true, after: time.Hour}, "/v1/reset"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, d := patientHost(t, c.guest)
			api1 := httptest.NewServer(h.routes())
			defer api1.Close()
			post := func(path string) api.VMProgress {
				resp, err := http.Post(api1.URL+path, "", nil)
				if err != nil {
					t.Error(err)
					return api.VMProgress{}
				}
				defer resp.Body.Close()
				var last api.VMProgress
				for dec := json.NewDecoder(resp.Body); dec.More(); {
					if err := dec.Decode(&last); err != nil {
						t.Error(err)
						break
					}
				}
				return last
			}
			start := make(chan api.VMProgress, 1)
			go func() { start <- post("/v1/start") }()
			awaitStart(t, d, 1)
			behind := make(chan error, 1)
			go func() { _, err := h.awake(t.Context()); behind <- err }()
			begin := time.Now()
			if last := post(c.path); !last.Done {
				t.Errorf("%s: %s", c.path, last.Error)
			}
			// Nobody's patience is over yet: they are all half an hour.
			if took := time.Since(begin); took > 10*time.Minute {
				t.Errorf("it took %v", took)
			}
			if last := <-start; last.Done || last.Status != http.StatusConflict || !strings.Contains(last.Error, "cannot start the virtual machine: it was stopped meanwhile") {
				t.Errorf("the start that was ended says %+v", last)
			}
			// The one behind it had its turn before the plug was pulled, or after: then it starts the machine again.
			select {
			case err := <-behind:
				if fault.Of(err) != fault.Conflict {
					t.Errorf("the one behind it: %v", err)
				}
			case <-started(t, d, 2):
				if last := post("/v1/stop?force=1"); !last.Done {
					t.Errorf("once more: %s", last.Error)
				}
				if err := <-behind; fault.Of(err) != fault.Conflict {
					t.Errorf("the one behind it: %v", err)
				}
			}
			for i, m := range d.begun() {
				if !closed(m.ended) {
					t.Errorf("machine %d runs on", i)
				}
			}
			if st := h.status(t.Context()); st.State != api.VMOff || st.Error != "" {
				t.Errorf("the machine is %s: %s", st.State, st.Error)
			}
			h.mu.Lock()
			if h.interrupt != nil || h.forced != 0 {
				t.Error("something is left over")
			}
			h.mu.Unlock()
			h.wg.Wait()
		})
	}
}

// TestForceOverStop: a stop in order that takes its time is a pulled plug once that is asked for.
func TestForceOverStop(t *testing.T) {
	h, d := patientHost(t, guest{converses: true})
	if _, err := h.awake(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.takeTurn(t.Context()); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	go func() { // the double says that it stops, and does not
		defer h.giveTurn()
		stopped <- h.stop(t.Context(), false)
	}()
	for state, _ := h.now(); state != api.VMStopping; state, _ = h.now() {
		time.Sleep(time.Millisecond)
	}
	done := h.force()
	err := h.takeTurn(t.Context())
	if err == nil {
		err = h.stop(t.Context(), true)
		h.giveTurn()
	}
	done()
	if err := errors.Join(err, <-stopped); err != nil {
		t.Error(err)
	}
	if m := d.begun(); len(m) != 1 || !closed(m[0].ended) {
		t.Error("the machine runs on")
	}
	h.wg.Wait()
}

// patientHost is a host with a patience that no test waits for.
func patientHost(t *testing.T, g guest) (*Host, *starter) {
	dir, err := os.MkdirTemp("", "force")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &starter{guests: []guest{g}}
	h, err := New(Config{Place: api.VMPlace{State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run")}, Drivers: []vm.Driver{d},
		Computer: vm.Computer{CPUs: 2, MemoryMiB: 4096, Home: dir}, Image: fakeImage(t), Log: quietLog(), BootPatience: 30 * time.Minute, Silence: 30 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return h, d
}

// started is closed when the driver has started so many machines.
func started(t *testing.T, d *starter, n int) <-chan struct{} {
	c := make(chan struct{})
	go func() {
		defer close(c)
		for len(d.begun()) < n && t.Context().Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return c
}

func awaitStart(t *testing.T, d *starter, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	select {
	case <-started(t, d, n):
	case <-ctx.Done():
		t.Fatal("no machine was started")
	}
}
