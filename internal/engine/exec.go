package engine

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// execution is one exec of a container. It lives in memory; one that runs is noted
// for the next daemon too (execkeep.go).
type execution struct {
	id   string
	u    *unit
	task runtime.Task // the run of the container that it belongs to
	req  mcontainer.ExecCreateRequest

	mu      sync.Mutex
	started bool
	proc    runtime.Exec
	failed  *int // exit code of one that could not be started
	doneAt  time.Time
	size    [2]uint // height, width asked for before the start
}

// execTable holds the executions of all containers.
type execTable struct {
	mu sync.Mutex
	m  map[string]*execution
}

func (t *execTable) get(id string) (*execution, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x, ok := t.m[id]; ok {
		return x, nil
	}
	return nil, noExec(id)
}

func noExec(id string) error { return fault.New(fault.NotFound, "No such exec instance: %s", id) }

// forget drops the executions of a container that is removed.
func (t *execTable) forget(u *unit) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, x := range t.m {
		if x.u == u {
			delete(t.m, id)
		}
	}
}

// executions that ended are kept for inspect this long, and at most so many.
const (
	execKeep    = 5 * time.Minute
	execKeepMax = 4096
)

// add stores x and drops what ended long ago.
func (t *execTable) add(x *execution) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.m[x.id] = x
	if len(t.m) < 64 || len(t.m)%64 != 0 {
		return
	}
	now := time.Now()
	for id, o := range t.m {
		o.mu.Lock()
		old := !o.doneAt.IsZero() && (now.Sub(o.doneAt) > execKeep || len(t.m) > execKeepMax)
		o.mu.Unlock()
		if old {
			delete(t.m, id)
			o.u.mu.Lock()
			delete(o.u.execs, id)
			o.u.mu.Unlock()
		}
	}
}

// dropExecs lets go of the executions of a container that ended. Clients still
// ask for their exit codes: add drops them later.
func (e *Engine) dropExecs(u *unit) {
	u.mu.Lock()
	ids := u.execs
	u.execs = nil
	u.mu.Unlock()
	now := time.Now()
	for id := range ids {
		if x, err := e.execs.get(id); err == nil {
			x.mu.Lock()
			if x.doneAt.IsZero() {
				x.doneAt = now
			}
			x.mu.Unlock()
		}
	}
}

// execsOf lists the executions of a container that have not ended.
func (e *Engine) execsOf(u *unit) []string {
	u.mu.Lock()
	ids := slices.Sorted(maps.Keys(u.execs))
	u.mu.Unlock()
	if len(ids) == 0 {
		return nil
	}
	ids = slices.DeleteFunc(ids, func(id string) bool {
		x, err := e.execs.get(id)
		if err != nil {
			return true
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		return !x.doneAt.IsZero()
	})
	if len(ids) == 0 {
		return nil
	}
	return ids
}

// ExecCreate notes what is to be executed.
func (e *Engine) ExecCreate(ctx context.Context, name string, req mcontainer.ExecCreateRequest) (string, error) {
	u, err := e.lookup(name)
	if err != nil {
		return "", err
	}
	if len(req.Cmd) == 0 || req.Cmd[0] == "" {
		return "", fault.New(fault.Invalid, "No exec command specified")
	}
	t, err := u.needTask()
	if err != nil {
		return "", err
	}
	if err := e.executable(u, strings.TrimPrefix(name, "/")); err != nil {
		return "", err
	}
	if e.policed() {
		if err := e.mayExec(ctx, u.rec.Load(), req.User, req.Privileged); err != nil {
			return "", err
		}
	}
	x := &execution{id: newID(), u: u, task: t, req: req}
	if req.ConsoleSize != nil {
		x.size = *req.ConsoleSize
	}
	u.mu.Lock()
	if u.execs == nil {
		u.execs = map[string]struct{}{}
	}
	u.execs[x.id] = struct{}{}
	u.mu.Unlock()
	e.execs.add(x)
	e.publish(u, events.Action(string(events.ActionExecCreate)+": "+execLine(req.Cmd)), map[string]string{"execID": x.id})
	return x.id, nil
}

// ExecUser tells whether a running container has a user, before an exec as that
// user is created; the exec's start looks again.
func (e *Engine) ExecUser(_ context.Context, name, user string) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	t, err := u.needTask()
	if err != nil {
		return err
	}
	root, err := t.Root()
	if err != nil {
		return err
	}
	defer root.Close()
	_, _, err = oci.LookupUser(root, user, u.rec.Load().HostConfig.GroupAdd)
	return err
}

// execLine is a command as events name it: with a blank even where no argument
// follows, which clients cut at.
func execLine(cmd []string) string { return cmd[0] + " " + strings.Join(cmd[1:], " ") }

// executable refuses an exec where the state forbids it.
func (e *Engine) executable(u *unit, name string) error {
	switch st := u.rec.Load().State.Status; st {
	case mcontainer.StateRunning:
		return nil
	case mcontainer.StatePaused:
		return fault.New(fault.Conflict, "Container %s is paused, unpause the container before exec", name)
	case mcontainer.StateRestarting:
		return fault.New(fault.Conflict, "Container %s is restarting, wait until the container is running", u.id)
	default:
		return fault.New(fault.Conflict, "container %s is not running", u.id)
	}
}

// ExecStart runs it. The streams are connected before the process begins.
func (e *Engine) ExecStart(ctx context.Context, id string, req mcontainer.ExecStartRequest) (Attached, error) {
	x, err := e.execs.get(id)
	if err != nil {
		return Attached{}, err
	}
	u := x.u
	x.mu.Lock()
	over := !x.started && u.running() != x.task
	x.mu.Unlock()
	if over { // it was for a run that has ended
		return Attached{}, noExec(id)
	}
	t, err := u.needTask()
	if err != nil {
		return Attached{}, err
	}
	if err := e.executable(u, u.id); err != nil {
		return Attached{}, err
	}
	x.mu.Lock()
	if x.started {
		x.mu.Unlock()
		return Attached{}, fault.New(fault.Conflict, "exec command %s has already run", id)
	}
	x.started = true
	if req.ConsoleSize != nil {
		x.size = *req.ConsoleSize
	}
	x.mu.Unlock()

	proc, err := e.runExec(context.WithoutCancel(ctx), u, t, x, req.Detach)
	if err != nil && (gone(t) || errors.Is(err, unix.ESRCH)) {
		err = fault.New(fault.Conflict, "container %s is not running", u.id) // it ended meanwhile
	}
	if err != nil {
		code := execExitCode(err)
		if c := fault.ExitCode(err); c != 125 { // the cause says otherwise
			code = c
		}
		x.mu.Lock()
		x.failed, x.doneAt = &code, time.Now()
		x.mu.Unlock()
		return Attached{}, explainExec(x.req.Cmd[0], err)
	}
	x.mu.Lock()
	x.proc = proc
	x.mu.Unlock()
	e.publish(u, events.Action(string(events.ActionExecStart)+": "+execLine(x.req.Cmd)), map[string]string{"execID": x.id})
	e.spawn(func() { e.awaitExec(x, proc, t, false) })
	if req.Detach {
		return Attached{}, nil
	}
	s := newExecStreams(proc)
	a := Attached{Terminal: x.req.Tty, DetachKeys: x.req.DetachKeys, Close: func() error { return s.leave(e.ctx, e.spawn) }}
	in := stdinFor{Writer: io.Discard}
	if w := s.streams.Stdin; w != nil {
		in.Writer, in.end = w, w.Close
		if x.req.Tty {
			in.end = nil // a terminal's input ends with its end-of-file character
		}
	}
	a.Stdin = in
	if s.out != nil {
		a.Stdout = s.out
	}
	if s.err != nil {
		a.Stderr = s.err
	}
	if !x.req.AttachStdout && !x.req.Tty {
		a.Stdout = nil
	}
	if !x.req.AttachStderr {
		a.Stderr = nil
	}
	return a, nil
}

// ContainerExec is ExecCreate, ExecStart and the wait for its end in one.
func (e *Engine) ContainerExec(ctx context.Context, name string, req mcontainer.ExecCreateRequest) (RunningContainer, error) {
	id, err := e.ExecCreate(ctx, name, req)
	if err != nil {
		return RunningContainer{}, err
	}
	at, err := e.ExecStart(ctx, id, mcontainer.ExecStartRequest{Tty: req.Tty})
	if err != nil {
		return RunningContainer{ID: id}, err
	}
	x, err := e.execs.get(id)
	if err != nil {
		return RunningContainer{ID: id}, errors.Join(err, at.Close())
	}
	wait := make(chan mcontainer.WaitResponse, 1)
	e.spawn(func() {
		select {
		case <-x.proc.Exited():
			wait <- mcontainer.WaitResponse{StatusCode: int64(x.proc.Exit().Code)}
		case <-e.ctx.Done():
		}
	})
	return RunningContainer{ID: id, Streams: at, Wait: wait}, nil
}

// runExec starts the process.
func (e *Engine) runExec(ctx context.Context, u *unit, t runtime.Task, x *execution, detach bool) (_ runtime.Exec, err error) {
	ctx, end := e.span(ctx, "container.exec")
	defer end(&err)
	r := u.rec.Load()
	ofContainer(ctx, r)
	init, err := e.initProcess(ctx, u, t, r)
	if err != nil {
		return nil, err
	}
	in := oci.ExecInput{Init: init, Config: r.Config, Request: x.req, User: init.User, Home: homeOf(init), Host: e.cfg.Host}
	if e.hooks != nil && r.Pod != nil {
		// Plugins may have changed the variables.
		c := *r.Config
		c.Env = init.Env
		in.Config = &c
	}
	in.Request.ConsoleSize = nil
	if x.size != [2]uint{} {
		in.Request.ConsoleSize = &x.size
	}
	if x.req.User != "" {
		root, err := t.Root()
		if err != nil {
			return nil, err
		}
		in.User, in.Home, err = oci.LookupUser(root, x.req.User, r.HostConfig.GroupAdd)
		root.Close()
		if err != nil {
			return nil, fault.WithExitCode(126, err)
		}
	}
	p, err := oci.GenerateExec(in)
	if err != nil {
		return nil, err
	}
	return t.Exec(ctx, runtime.ExecRequest{ID: x.id, Process: p, Stdin: x.req.AttachStdin && !detach, Detach: detach})
}

// homeOf finds the home that a process was given.
func homeOf(p *specs.Process) string {
	for _, v := range p.Env {
		if h, ok := strings.CutPrefix(v, "HOME="); ok {
			return h
		}
	}
	return ""
}

// initProcess is the container's own process as its spec had it. A daemon that
// took the container over generates it again.
func (e *Engine) initProcess(ctx context.Context, u *unit, t runtime.Task, r *container.Record) (*specs.Process, error) {
	u.mu.Lock()
	p := u.process
	u.mu.Unlock()
	if p != nil {
		return p, nil
	}
	root, err := t.Root()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	bare := r.Clone()
	bare.Mounts, bare.Extra.Secrets = nil, nil // only the process is wanted
	hc := *r.HostConfig
	if hc.IpcMode.IsShareable() {
		hc.IpcMode = mcontainer.IPCModePrivate
	}
	hc.NetworkMode, hc.PidMode = "none", ""
	if hc.IpcMode.IsContainer() {
		hc.IpcMode = mcontainer.IPCModePrivate
	}
	hc.Links = nil
	bare.HostConfig = &hc
	var s scope
	defer s.close()
	in, err := e.specInput(ctx, u, bare, root, labels{process: e.labelOf(t)}, &s)
	if err != nil {
		return nil, err
	}
	spec, _, err := oci.Generate(in)
	if err != nil {
		return nil, err
	}
	if r.Pod != nil {
		finishMember(r, spec)
	}
	u.mu.Lock()
	u.process = spec.Process
	u.mu.Unlock()
	return spec.Process, nil
}

// explainExec says why a command could not be executed, in words clients know.
func explainExec(cmd string, err error) error {
	code := execExitCode(err)
	if code == 128 {
		code = 125
	}
	return fault.WithExitCode(code, explainStart("OCI runtime exec failed: exec failed: ", cmd, err))
}

// ExecInspect describes an exec.
func (e *Engine) ExecInspect(_ context.Context, id string) (mcontainer.ExecInspectResponse, error) {
	x, err := e.execs.get(id)
	if err != nil {
		return mcontainer.ExecInspectResponse{}, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	priv := x.req.Privileged
	out := mcontainer.ExecInspectResponse{
		ID: x.id, ContainerID: x.u.id,
		OpenStdin: x.req.AttachStdin, OpenStdout: x.req.AttachStdout, OpenStderr: x.req.AttachStderr,
		ProcessConfig: &mcontainer.ExecProcessConfig{Tty: x.req.Tty, Entrypoint: x.req.Cmd[0], Arguments: x.req.Cmd[1:], Privileged: &priv, User: x.req.User},
		DetachKeys:    []byte{},
	}
	if x.failed != nil {
		out.ExitCode, out.CanRemove = x.failed, true
	}
	if x.proc == nil {
		return out, nil
	}
	out.Pid = x.proc.Pid()
	select {
	case <-x.proc.Exited():
		code := x.proc.Exit().Code
		out.ExitCode, out.CanRemove = &code, true // the pid stays told, as Docker does
	default:
		out.Running = true
	}
	return out, nil
}

// ExecResize sets the size of its terminal.
func (e *Engine) ExecResize(ctx context.Context, id string, width, height uint16) error {
	x, err := e.execs.get(id)
	if err != nil {
		return err
	}
	if _, err := x.u.needTask(); err != nil {
		return err
	}
	x.mu.Lock()
	p := x.proc
	if p == nil {
		x.size = [2]uint{uint(height), uint(width)}
	}
	x.mu.Unlock()
	if p == nil || !x.req.Tty {
		return nil
	}
	return p.Resize(ctx, width, height)
}
