package native

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// task is a started container.
type task struct {
	d        *Driver
	id       string
	dir      string
	group    *cgroup.Group
	mon      *shim.Monitor
	terminal bool
	ownPID   bool
	hooks    *specs.Hooks
	bundle   string
	labels   map[string]string
	filter   string // key of the seccomp program, for exec
	userNS   bool
	ids      [2][]specs.LinuxIDMapping
	warnings []string
	created  time.Time
	pidStart uint64
	binds    []string // destinations of mounts that are the host's
	masked   []string

	exited chan struct{}

	mu       sync.Mutex
	pid      int
	pidfd    int
	at       time.Time
	held     bool
	live     bool // the start has succeeded
	exit     contract.Exit
	over     bool
	deleting bool
	deleted  chan struct{}
	first    *contract.Streams
	execs    map[uint32]*exec
	early    map[uint32]shim.Exit // ends that came before the start was known
}

var _ contract.Task = (*task)(nil)
var _ shim.Handler = notices{}

func newTask(sb *sandbox, spec *specs.Spec, req *contract.StartRequest) *task {
	t := &task{
		d: sb.d, id: req.ID, dir: sb.dir, group: sb.group, mon: sb.mon, pid: sb.pid, pidfd: sb.pidfd, pidStart: sb.pidStart,
		terminal: req.Stdio.Terminal, hooks: spec.Hooks, labels: spec.Annotations, created: time.Now(),
		exited: make(chan struct{}), execs: map[uint32]*exec{}, early: map[uint32]shim.Exit{},
	}
	if spec.Root != nil {
		t.bundle = filepath.Dir(spec.Root.Path)
	}
	for _, ns := range spec.Linux.Namespaces {
		switch ns.Type {
		case specs.PIDNamespace:
			t.ownPID = ns.Path == ""
		case specs.UserNamespace:
			t.userNS = true
		}
	}
	t.binds, t.masked = bindsOf(spec), spec.Linux.MaskedPaths
	t.ids = [2][]specs.LinuxIDMapping{spec.Linux.UIDMappings, spec.Linux.GIDMappings}
	// From now on the task closes the process's descriptor and the monitor's
	// notices about another process go to it.
	sb.pidfd = -1
	sb.relay.setBorn(t.reborn)
	return t
}

func (t *task) reborn(pid, pidfd int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
	}
	t.pid, t.pidfd, t.pidStart = pid, pidfd, startTime(pid)
}

func (t *task) started(pid int, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pid, t.at, t.held = pid, at, false
}

// ID implements runtime.Task.
func (t *task) ID() string { return t.id }

// Pid implements runtime.Task.
func (t *task) Pid() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pid
}

// StartedAt implements runtime.Task.
func (t *task) StartedAt() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.at
}

// Warnings tells what was asked for and could not be given.
func (t *task) Warnings() []string { return t.warnings }

// Exited implements runtime.Task.
func (t *task) Exited() <-chan struct{} { return t.exited }

// Exit implements runtime.Task.
func (t *task) Exit() contract.Exit {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.exit
}

// end records how the process ended, once.
func (t *task) end(e contract.Exit) {
	t.mu.Lock()
	if t.over {
		t.mu.Unlock()
		return
	}
	t.over = true
	t.mu.Unlock()
	if !t.ownPID {
		// No namespace took the others along.
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		_ = t.signalAll(ctx, int(unix.SIGKILL))
		cancel()
	}
	e.OOMKilled = t.group.OOMKills() > 0
	t.mu.Lock()
	t.exit = e
	t.mu.Unlock()
	close(t.exited)
}

func exitOf(e shim.Exit) contract.Exit {
	x := contract.Exit{At: time.Unix(0, e.At), Dropped: e.Dropped}
	if e.Status.Signaled() {
		x.Signal = int(e.Status.Signal())
		x.Code = 128 + x.Signal
	} else {
		x.Code = e.Status.ExitStatus()
	}
	return x
}

// notices is the task as its monitor sees it.
type notices struct{ t *task }

// Exited implements shim.Handler.
func (n notices) Exited(e shim.Exit) { n.t.end(exitOf(e)) }

// ExecExited implements shim.Handler.
func (n notices) ExecExited(cookie uint32, e shim.Exit) {
	t := n.t
	t.mu.Lock()
	x := t.execs[cookie]
	if x == nil {
		t.early[cookie] = e
	}
	delete(t.execs, cookie)
	t.mu.Unlock()
	if x != nil {
		x.end(exitOf(e))
	}
}

// Notify implements shim.Handler. Nobody listens to seccomp notifications here:
// closing the descriptor makes the calls fail with ENOSYS.
func (n notices) Notify(fd int) { unix.Close(fd) }

// Reborn implements shim.Handler.
func (n notices) Reborn(pid, pidfd int) { n.t.reborn(pid, pidfd) }

// Gone implements shim.Handler.
func (n notices) Gone() { n.t.lost() }

// lost is called when the monitor has gone: with a record if it ended in
// order, else whatever it watched is killed.
func (t *task) lost() {
	t.mu.Lock()
	live := t.live
	t.mu.Unlock()
	if !live {
		return // whoever starts it sees that, too
	}
	select {
	case <-t.exited:
	default:
		var e shim.Exit
		err := fault.Outwait(context.Background(), func() (err error) { e, _, err = shim.ReadRecord(t.dir); return err })
		if err == nil {
			t.end(exitOf(e))
		} else {
			t.mu.Lock()
			pidfd := t.pidfd
			t.mu.Unlock()
			if pidfd >= 0 {
				_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			_ = t.group.Signal(ctx, int(unix.SIGKILL))
			cancel()
			t.d.log.Error("a container's monitor was killed, so the container was too", "id", t.id)
			t.end(contract.Exit{Code: 137, Signal: int(unix.SIGKILL), At: time.Now(), Error: "the container's monitor (servin-shim) was killed"})
		}
	}
	t.mu.Lock()
	execs := t.execs
	t.execs = map[uint32]*exec{}
	t.mu.Unlock()
	for _, x := range execs {
		x.end(contract.Exit{Code: 137, Signal: int(unix.SIGKILL), At: time.Now()})
	}
}

// requestError makes errors of requests to the monitor speak of the container.
func (t *task) requestError(what string, err error) error {
	select {
	case <-t.exited:
		return fault.New(fault.Conflict, "cannot %s: the container is not running", what)
	default:
	}
	if errors.Is(err, shim.ErrGone) {
		return fault.New(fault.Conflict, "cannot %s: the container is not running", what)
	}
	var se *shim.StageError
	if errors.As(err, &se) {
		return &contract.StartError{Step: se.Name, Err: se.Err}
	}
	return err
}

// leave lets go of everything of a task whose container goes on.
func (t *task) leave() {
	if t.mon != nil {
		t.mon.Leave()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.first != nil {
		t.first.Close()
		t.first = nil
	}
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
		t.pidfd = -1
	}
}

// Release implements runtime.Task.
func (t *task) Release(ctx context.Context) error {
	t.mu.Lock()
	held := t.held
	t.mu.Unlock()
	if !held {
		return fault.New(fault.Conflict, "cannot start: the process is not held")
	}
	p, err := t.mon.Release()
	if err != nil {
		return t.requestError("start", err)
	}
	st, err := p.Started(ctx)
	if err != nil {
		return t.requestError("start", err)
	}
	t.started(st.PID, time.Unix(0, st.At))
	t.poststart(ctx)
	return nil
}

// Signal implements runtime.Task.
func (t *task) Signal(ctx context.Context, sig int, all bool) error {
	if sig < 0 || sig > 64 {
		return fault.New(fault.Invalid, "cannot send signal %d: there is no such signal", sig)
	}
	if all {
		return t.signalAll(ctx, sig)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || t.pidfd < 0 {
		return fault.New(fault.Conflict, "cannot send signal %d: the container is not running", sig)
	}
	err := unix.PidfdSendSignal(t.pidfd, unix.Signal(sig), nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return fault.New(fault.Conflict, "cannot send signal %d: the container is not running", sig)
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot send signal %d: %w", sig, err)
	}
	return nil
}

func (t *task) running(what string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return fault.New(fault.Conflict, "cannot %s: the container is not running", what)
	}
	return nil
}

// Pause implements runtime.Task.
func (t *task) Pause(ctx context.Context) error {
	if err := t.running("pause"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return t.group.Freeze(ctx)
}

// Resume implements runtime.Task.
func (t *task) Resume(ctx context.Context) error {
	if err := t.running("resume"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return t.group.Thaw(ctx)
}

// Resize implements runtime.Task.
func (t *task) Resize(ctx context.Context, width, height uint16) error {
	if !t.terminal {
		return fault.New(fault.Conflict, "cannot resize: the container has no terminal")
	}
	if err := t.mon.Resize(ctx, width, height); err != nil {
		return t.requestError("resize", err)
	}
	return nil
}

// Pids implements runtime.Task.
func (t *task) Pids(context.Context) ([]int, error) {
	if err := t.running("list processes"); err != nil {
		return nil, err
	}
	return t.pids()
}

// pids asks the cgroup, or where there is none the pid namespace.
func (t *task) pids() ([]int, error) {
	if t.d.cg.Mode == cgroup.None && t.ownPID {
		return cgroup.PidsIn(t.Pid())
	}
	return t.group.Pids()
}

func (t *task) signalAll(ctx context.Context, sig int) error {
	if t.d.cg.Mode != cgroup.None || !t.ownPID {
		return t.group.Signal(ctx, sig)
	}
	pids, err := t.pids()
	for _, p := range pids {
		if e := unix.Kill(p, unix.Signal(sig)); e != nil && e != unix.ESRCH {
			err = errors.Join(err, os.NewSyscallError("kill", e))
		}
	}
	return err
}

// Stats implements runtime.Task.
func (t *task) Stats(context.Context) (*contract.Stats, error) {
	if err := t.running("read statistics"); err != nil {
		return nil, err
	}
	return t.group.Stats()
}

// Update implements runtime.Task.
func (t *task) Update(_ context.Context, r *specs.LinuxResources) error {
	if err := t.running("update"); err != nil {
		return err
	}
	w, err := t.group.Apply(r)
	for _, x := range w {
		t.d.log.Warn("cannot set a limit", "id", t.id, "warning", x)
	}
	return err
}

func (t *task) open(name string, flags int) (*os.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || t.pidfd < 0 {
		return nil, fault.New(fault.Conflict, "cannot open %s: the container is not running", name)
	}
	return openProc(t.pid, t.pidfd, name, flags)
}

// Root implements runtime.Task.
func (t *task) Root() (*os.File, error) { return t.open("root", unix.O_PATH|unix.O_DIRECTORY) }

// NetNS implements runtime.Task.
func (t *task) NetNS() (*os.File, error) { return t.open("ns/net", unix.O_RDONLY) }

// ReopenLog implements runtime.Task.
func (t *task) ReopenLog(ctx context.Context) error {
	if err := t.mon.Reopen(ctx, -1); err != nil {
		return t.requestError("open the log again", err)
	}
	return nil
}

// ReplaceLogPipe gives the monitor a new pipe for its records, after the reader
// of the former one ended (log format "pipe").
func (t *task) ReplaceLogPipe(ctx context.Context, pipe *os.File) error {
	if err := t.mon.Reopen(ctx, int(pipe.Fd())); err != nil {
		return t.requestError("replace the log pipe", err)
	}
	return nil
}

// Delete implements runtime.Task.
func (t *task) Delete(ctx context.Context) error {
	select {
	case <-t.exited:
	default:
		return fault.New(fault.Conflict, "cannot delete %s: it is running", t.id)
	}
	t.mu.Lock()
	if t.deleting {
		done := t.deleted
		t.mu.Unlock()
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	t.deleting, t.deleted = true, make(chan struct{})
	first := t.first
	t.first = nil
	t.mu.Unlock()
	defer close(t.deleted)
	if first != nil {
		first.Close()
	}
	t.finishMonitor()
	t.poststop(context.WithoutCancel(ctx))
	t.mu.Lock()
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
		t.pidfd = -1
	}
	t.mu.Unlock()
	// Out of sight at once; what takes time comes later, and after a crash sweep finds it.
	gone := filepath.Join(t.d.dir, ".gone-"+t.id)
	_ = os.RemoveAll(gone)
	if err := os.Rename(t.dir, gone); err != nil {
		gone = t.dir
	}
	group := t.group
	t.d.tear.addFor(t.id, func(ctx context.Context) error {
		if err := group.Remove(ctx); err != nil {
			return err
		}
		return os.RemoveAll(gone)
	})
	t.d.forget(t)
	return nil
}

// finishMonitor waits until the monitor has let the mount namespace go.
func (t *task) finishMonitor() {
	if t.mon == nil {
		return
	}
	_ = t.mon.Quit()
	select {
	case <-t.mon.Done():
		return
	case <-time.After(10 * time.Second):
	}
	t.d.log.Warn("a container's monitor does not end; it is killed", "id", t.id)
	t.mon.Kill()
	<-t.mon.Done()
}
