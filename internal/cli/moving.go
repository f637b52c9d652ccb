package cli

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/moby/moby/api/types/jsonstream"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/progress"
)

// moving shows how far a checkpoint on its way is.
type moving struct {
	mu     sync.Mutex
	p      *progress.Writer
	stage  string
	n      int64 // bytes of this stage
	shown  time.Time
	since  time.Time
	frozen time.Duration
}

// showMove shows it on a terminal, unless it is to be quiet.
func (a *App) showMove(quiet bool) *moving {
	m := &moving{}
	if !quiet && a.errIsTerminal() {
		m.p = a.progress(a.Stderr)
	}
	return m
}

// tell takes what the engine says.
func (m *moving) tell(ev api.CheckpointEvent) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !ev.Frozen.IsZero() {
		m.since = time.Now()
	}
	if ev.Ready && m.since.IsZero() {
		m.since = time.Now()
	}
	if ev.Stage == "" {
		return
	}
	m.draw("done")
	m.stage, m.n = ev.Stage, 0
	if ev.Round > 0 {
		m.stage = fmt.Sprintf("%s, round %d", ev.Stage, ev.Round)
	}
	m.draw("Copying")
}

func (m *moving) draw(status string) {
	if m.p == nil || m.stage == "" {
		return
	}
	m.shown = time.Now()
	_ = m.p.Show(client.Progress{ID: m.stage, Status: status, Progress: &jsonstream.Progress{Current: m.n}})
}

// count counts what passes.
func (m *moving) count(r io.Reader) io.Reader { return &passing{m, r} }

type passing struct {
	m *moving
	r io.Reader
}

func (p *passing) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	p.m.n += int64(n)
	if time.Since(p.m.shown) > 100*time.Millisecond {
		p.m.draw("Copying")
	}
	return n, err
}

// end leaves the terminal as it is to be.
func (m *moving) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.since.IsZero() && m.frozen == 0 {
		m.frozen = time.Since(m.since)
	}
	if m.p != nil {
		m.draw("done")
		_ = m.p.Flush()
		m.p = nil
	}
}
