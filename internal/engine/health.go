package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// startHealth begins to probe a started container, if it has a health check.
func (e *Engine) startHealth(u *unit, r *container.Record, t runtime.Task) {
	check, ok := container.NewHealthCheck(r.Config.Healthcheck)
	if !ok {
		return
	}
	ctx, cancel := context.WithCancel(e.ctx)
	u.mu.Lock()
	if u.task != t {
		u.mu.Unlock()
		cancel()
		return
	}
	if u.health != nil {
		u.health()
	}
	u.health = cancel
	u.mu.Unlock()
	e.spawn(func() {
		defer cancel()
		e.probe(ctx, u, t, check)
	})
}

// probe runs the check at its intervals until ctx ends.
func (e *Engine) probe(ctx context.Context, u *unit, t runtime.Task, check container.HealthCheck) {
	// From here on by the monotonic clock: the other may be set meanwhile, or
	// have been since the start.
	started := time.Now().Add(-max(0, time.Since(t.StartedAt())))
	for {
		status := mcontainer.Starting
		if h := u.rec.Load().State.Health; h != nil {
			status = h.Status
		}
		tm := time.NewTimer(check.Delay(status, time.Since(started)))
		select {
		case <-tm.C:
		case <-t.Exited():
			tm.Stop()
			return
		case <-ctx.Done():
			tm.Stop()
			return
		}
		if u.rec.Load().State.Status == mcontainer.StatePaused {
			continue
		}
		res := e.probeOnce(ctx, u, t, check)
		if ctx.Err() != nil {
			return
		}
		if e.judge(u, t, check, res, time.Since(started)) {
			return
		}
	}
}

// judge takes a result into account; true ends the probing.
func (e *Engine) judge(u *unit, t runtime.Task, check container.HealthCheck, res mcontainer.HealthcheckResult, up time.Duration) bool {
	u.mu.Lock()
	if u.task != t {
		u.mu.Unlock()
		return true
	}
	before := mcontainer.Starting
	if h := u.rec.Load().State.Health; h != nil {
		before = h.Status
	}
	next := check.Judge(u.rec.Load().State.Health, res, up)
	r := u.rec.Load().Clone()
	r.State.Health = next
	changed := next.Status != before
	if !changed {
		// Results are not worth the disk: only a new verdict is stored.
		u.rec.Store(r)
		u.mu.Unlock()
		return false
	}
	_, p, err := e.changeLocked(u, func(n *container.Record) { n.State.Health = next })
	u.mu.Unlock()
	e.saved(u, p, err)
	e.publish(u, events.Action(string(events.ActionHealthStatus)+": "+string(next.Status)), nil)
	e.cfg.Networks.SetHealthy(u.id, next.Status != mcontainer.Unhealthy)
	if next.Status == mcontainer.Unhealthy && r.Extra.RestartUnhealthy {
		e.spawn(func() { e.restartUnhealthy(u, t) })
		return true
	}
	return false
}

// restartUnhealthy ends an unhealthy container and starts it again.
func (e *Engine) restartUnhealthy(u *unit, t runtime.Task) {
	if u.acquire(e.ctx) != nil {
		return
	}
	defer u.release()
	if u.running() != t || e.noRestarts.Load() {
		return
	}
	r := u.rec.Load()
	sig, err := stopSignal(r, "")
	if err == nil {
		err = e.halt(e.ctx, u, sig, stopTimeout(r, nil), false)
	}
	if err == nil && !r.Ephemeral {
		p, lerr := e.launch(e.ctx, u, launch{restart: true})
		if err = lerr; err == nil {
			e.saved(u, p, nil)
			e.publish(u, events.ActionRestart, nil)
		}
	}
	if err != nil {
		e.log.Warn("cannot restart an unhealthy container", "container", u.id, "cause", err)
	}
}

// probeOnce runs the check's command once.
func (e *Engine) probeOnce(ctx context.Context, u *unit, t runtime.Task, check container.HealthCheck) mcontainer.HealthcheckResult {
	r := u.rec.Load()
	cmd := check.Test[1:]
	if check.Test[0] == "CMD-SHELL" {
		shell := r.Config.Shell
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		cmd = append(append(make([]string, 0, len(shell)+1), shell...), check.Test[1])
	}
	res := mcontainer.HealthcheckResult{Start: time.Now(), ExitCode: -1}
	failed := func(err error) mcontainer.HealthcheckResult {
		res.End, res.Output = time.Now(), err.Error()
		return res
	}
	x := &execution{id: newID(), u: u, req: mcontainer.ExecCreateRequest{Cmd: cmd, AttachStdout: true, AttachStderr: true}}
	p, err := e.runExec(ctx, u, t, x, false)
	if err != nil {
		return failed(explainExec(cmd[0], err))
	}
	s := p.Streams()
	if s.Close != nil {
		defer s.Close()
	}
	out := &limited{max: container.HealthOutputSize}
	var copies sync.WaitGroup
	for _, from := range []io.Reader{s.Stdout, s.Stderr} {
		if from != nil {
			copies.Go(func() { _, _ = io.Copy(out, from) })
		}
	}
	tm := time.NewTimer(check.Timeout)
	defer tm.Stop()
	select {
	case <-p.Exited():
		// A grandchild may hold the streams open: do not wait for it long.
		done := make(chan struct{})
		go func() { copies.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(time.Second):
		}
		res.End, res.ExitCode, res.Output = time.Now(), p.Exit().Code, out.String()
		return res
	case <-tm.C:
		_ = p.Signal(context.WithoutCancel(ctx), int(unix.SIGKILL))
		text := fmt.Sprintf("Health check exceeded timeout (%s)", check.Timeout) // Docker's words, shown by inspect
		if o := out.String(); o != "" {
			text += ": " + o
		}
		return failed(errors.New(text))
	case <-ctx.Done():
		_ = p.Signal(context.WithoutCancel(ctx), int(unix.SIGKILL))
		return failed(ctx.Err())
	}
}

// limited keeps the beginning of what is written and drops the rest.
type limited struct {
	mu  sync.Mutex
	buf bytes.Buffer
	max int
	cut bool
}

func (l *limited) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := l.max - l.buf.Len()
	if room < len(p) {
		l.cut = true
	}
	l.buf.Write(p[:min(len(p), max(room, 0))])
	return len(p), nil
}

func (l *limited) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		return l.buf.String() + "..."
	}
	return l.buf.String()
}
