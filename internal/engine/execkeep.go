package engine

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// An exec that runs is noted in a file below the run root, CONTAINER.EXEC.json, so
// that a new daemon can tell of it and learn of its end. What it was given to run
// with may be secret and is not noted.

// noteAfter is how long an exec runs before it is noted: most are over sooner.
const noteAfter = 20 * time.Millisecond

// lostExecCode is the exit code of an exec whose end nobody saw.
const lostExecCode = 255

// execNote is what a file holds.
type execNote struct {
	Token   string
	Request mcontainer.ExecCreateRequest
}

func (e *Engine) execDir() string { return filepath.Join(e.cfg.RunRoot, "execs") }

func (e *Engine) execFile(x *execution) string {
	return filepath.Join(e.execDir(), x.u.id+"."+x.id+".json")
}

// awaitExec processes the end of an exec. noted tells that there is a file of it.
func (e *Engine) awaitExec(x *execution, proc runtime.Exec, t runtime.Task, noted bool) {
	tm := time.NewTimer(noteAfter)
	defer tm.Stop()
	if noted {
		tm.Stop()
	}
wait:
	for {
		select {
		case <-proc.Exited():
			break wait
		case <-e.ctx.Done():
			return
		case <-tm.C:
			noted = e.noteExec(x, proc, t)
		}
	}
	if noted {
		_ = os.Remove(e.execFile(x))
	}
	e.execEnded(x, proc)
}

func (e *Engine) execEnded(x *execution, proc runtime.Exec) {
	x.mu.Lock()
	x.doneAt = time.Now()
	x.mu.Unlock()
	e.publish(x.u, events.ActionExecDie, map[string]string{"execID": x.id, "exitCode": itoa(proc.Exit().Code)})
}

// noteExec notes an exec; it tells whether it did.
func (e *Engine) noteExec(x *execution, proc runtime.Exec, t runtime.Task) bool {
	k, ok := t.(runtime.ExecKeeper)
	if !ok {
		return false
	}
	n := execNote{Token: k.ExecToken(proc), Request: x.req}
	n.Request.Env = nil
	b, err := json.Marshal(n)
	if err == nil {
		err = durable.WriteFile(e.execFile(x), b, 0o600, durable.Nothing)
	}
	if err != nil {
		e.log.Warn("cannot note an exec; the next daemon will not know it", "exec", x.id, "cause", err)
		return false
	}
	return true
}

// restoreExecs takes the execs of a running container over from a former daemon.
func (e *Engine) restoreExecs(ctx context.Context, u *unit, t runtime.Task) {
	k, ok := t.(runtime.ExecKeeper)
	if !ok {
		return
	}
	files, _ := filepath.Glob(filepath.Join(e.execDir(), u.id+".*.json"))
	for _, f := range files {
		var n execNote
		b, err := os.ReadFile(f)
		if err == nil {
			err = json.Unmarshal(b, &n)
		}
		id := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), u.id+"."), ".json")
		if err != nil || len(n.Request.Cmd) == 0 || !isHex(id) {
			e.log.Warn("cannot read the note of an exec", "exec", id, "cause", err)
			_ = os.Remove(f)
			continue
		}
		x := &execution{id: id, u: u, task: t, req: n.Request, started: true}
		proc, err := k.RestoreExec(ctx, id, n.Token)
		if err != nil {
			if !fault.Is(err, fault.NotFound) {
				e.log.Warn("cannot take an exec over", "exec", id, "cause", err)
			}
			code := lostExecCode
			x.failed, x.doneAt = &code, time.Now()
			_ = os.Remove(f)
			e.execs.add(x)
			continue
		}
		x.proc = proc
		u.mu.Lock()
		if u.execs == nil {
			u.execs = map[string]struct{}{}
		}
		u.execs[id] = struct{}{}
		u.mu.Unlock()
		e.execs.add(x)
		e.spawn(func() { e.awaitExec(x, proc, t, true) })
	}
}

// dropExecNotes removes notes of execs whose container does not run any more.
func (e *Engine) dropExecNotes() {
	list, err := os.ReadDir(e.execDir())
	if err != nil {
		return
	}
	for _, f := range list {
		id, _, _ := strings.Cut(f.Name(), ".")
		if u := e.units[id]; u == nil || u.running() == nil {
			_ = os.Remove(filepath.Join(e.execDir(), f.Name()))
		}
	}
}
