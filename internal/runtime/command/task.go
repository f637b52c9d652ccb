package command

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// task is a container that the runtime made.
type task struct {
	d        *Driver
	id, dir  string
	group    *cgroup.Group
	mon      *shim.Monitor
	terminal bool
	ownPID   bool
	uids     []specs.LinuxIDMapping
	exited   chan struct{}

	mu      sync.Mutex
	pid     int
	pidfd   int
	at      time.Time
	held    bool
	live    bool
	over    bool
	exit    contract.Exit
	first   *contract.Streams
	deleted bool
	del     sync.Mutex
}

var (
	_ contract.Task = (*task)(nil)
	_ shim.Handler  = notices{}
)

func newTask(d *Driver, id string) *task {
	return &task{d: d, id: id, dir: filepath.Join(d.dir, id), pidfd: -1, exited: make(chan struct{})}
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
type notices struct{ *task }

// Exited implements shim.Handler.
func (n notices) Exited(e shim.Exit) { n.end(exitOf(e)) }

// Exited implements runtime.Task.
func (t *task) Exited() <-chan struct{} { return t.exited }

// Reborn implements shim.Handler: the runtime has made init.
func (t *task) Reborn(pid, pidfd int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
	}
	t.pid, t.pidfd = pid, pidfd
}

// Notify implements shim.Handler.
func (t *task) Notify(fd int) { unix.Close(fd) }

// ExecExited implements shim.Handler; execs are the runtime's here.
func (t *task) ExecExited(uint32, shim.Exit) {}

// Gone implements shim.Handler.
func (t *task) Gone() {
	t.mu.Lock()
	live, over := t.live, t.over
	t.mu.Unlock()
	if !live || over {
		return
	}
	if e, _, err := shim.ReadRecord(t.dir); err == nil {
		t.end(exitOf(e))
		return
	}
	t.monitorKilled()
}

func (t *task) monitorKilled() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_ = t.d.call(ctx, t.dir, nil, "kill", t.id, "KILL")
	if t.group != nil {
		_ = t.group.Signal(ctx, int(unix.SIGKILL))
	}
	t.d.log.Error("a container's monitor was killed, so the container was too", "id", t.id)
	t.end(contract.Exit{Code: 137, Signal: int(unix.SIGKILL), At: time.Now(), Error: "the container's monitor (servin-shim) was killed"})
}

func (t *task) end(e contract.Exit) {
	t.mu.Lock()
	if t.over {
		t.mu.Unlock()
		return
	}
	t.over = true
	t.mu.Unlock()
	if t.group != nil {
		if !t.ownPID {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			_ = t.group.Signal(ctx, int(unix.SIGKILL))
			cancel()
		}
		e.OOMKilled = t.group.OOMKills() > 0
	}
	t.mu.Lock()
	t.exit = e
	t.mu.Unlock()
	close(t.exited)
}

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

func (t *task) requestError(what string, err error) error {
	if errors.Is(err, shim.ErrGone) {
		return fault.New(fault.Conflict, "cannot %s: the container is not running", what)
	}
	var se *shim.StageError
	if errors.As(err, &se) {
		return &contract.StartError{Step: se.Name, Err: se.Err}
	}
	return err
}

func (t *task) running(what string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return fault.New(fault.Conflict, "cannot %s: the container is not running", what)
	}
	return nil
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

// Exit implements runtime.Task.
func (t *task) Exit() contract.Exit {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.exit
}

// Release implements runtime.Task.
func (t *task) Release(ctx context.Context) error {
	t.mu.Lock()
	held := t.held
	t.mu.Unlock()
	if !held {
		return fault.New(fault.Conflict, "cannot start: the process is not held")
	}
	return t.release(ctx)
}

// Signal implements runtime.Task.
func (t *task) Signal(ctx context.Context, sig int, all bool) error {
	if sig < 0 || sig > 64 {
		return fault.New(fault.Invalid, "cannot send signal %d: there is no such signal", sig)
	}
	if all {
		return t.group.Signal(ctx, sig)
	}
	if err := t.running("send signal"); err != nil {
		return err
	}
	// The runtime knows where its process is: in a virtual machine, perhaps.
	return t.d.call(ctx, t.dir, nil, "kill", t.id, strconv.Itoa(sig))
}

// Pause implements runtime.Task.
func (t *task) Pause(ctx context.Context) error {
	if err := t.running("pause"); err != nil {
		return err
	}
	return t.d.call(ctx, t.dir, nil, "pause", t.id)
}

// Resume implements runtime.Task.
func (t *task) Resume(ctx context.Context) error {
	if err := t.running("resume"); err != nil {
		return err
	}
	return t.d.call(ctx, t.dir, nil, "resume", t.id)
}

// Update implements runtime.Task.
func (t *task) Update(ctx context.Context, r *specs.LinuxResources) error {
	if err := t.running("update"); err != nil {
		return err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return t.d.call(ctx, t.dir, b, "update", "--resources", "-", t.id)
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
	return t.group.Pids()
}

// Stats implements runtime.Task.
func (t *task) Stats(context.Context) (*contract.Stats, error) {
	if err := t.running("read statistics"); err != nil {
		return nil, err
	}
	return t.group.Stats()
}

func (t *task) open(name string, flags int) (*os.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || t.pidfd < 0 {
		return nil, fault.New(fault.Conflict, "cannot open %s: the container is not running", name)
	}
	p := "/proc/" + strconv.Itoa(t.pid) + "/" + name
	fd, err := unix.Open(p, flags|unix.O_CLOEXEC, 0)
	if err == nil {
		if err = unix.PidfdSendSignal(t.pidfd, 0, nil, 0); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return nil, fault.New(fault.NotFound, "cannot open %s of the container: %w", name, err)
	}
	return os.NewFile(uintptr(fd), p), nil
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

func (t *task) client(o contract.AttachOptions) (*shim.Client, contract.Streams, error) {
	c, err := shim.NewClient(o.Stdin, o.Stdout || t.terminal && o.Stderr, o.Stderr && !t.terminal)
	if err != nil {
		return nil, contract.Streams{}, err
	}
	s := contract.Streams{Close: c.Close}
	if c.Stdin != nil {
		s.Stdin = c.Stdin
	}
	if c.Stdout != nil {
		s.Stdout = c.Stdout
	}
	if c.Stderr != nil {
		s.Stderr = c.Stderr
	}
	return c, s, nil
}

func (t *task) attachFirst(o contract.AttachOptions) error {
	c, s, err := t.client(o)
	if err != nil {
		return err
	}
	defer c.Sent()
	c.Theirs.Lossless = true
	if _, err := t.mon.Attach(c.Theirs); err != nil {
		c.Close()
		return err
	}
	t.first = &s
	return nil
}

// Attach implements runtime.Task.
func (t *task) Attach(ctx context.Context, o contract.AttachOptions) (contract.Streams, error) {
	t.mu.Lock()
	first := t.first
	t.first = nil
	t.mu.Unlock()
	if first != nil {
		return *first, nil
	}
	if err := t.running("attach"); err != nil {
		return contract.Streams{}, err
	}
	c, s, err := t.client(o)
	if err != nil {
		return s, err
	}
	defer c.Sent()
	p, err := t.mon.Attach(c.Theirs)
	if err == nil {
		err = p.Done(ctx)
	}
	if err != nil {
		c.Close()
		return contract.Streams{}, t.requestError("attach", err)
	}
	return s, nil
}

// Delete implements runtime.Task.
func (t *task) Delete(ctx context.Context) error {
	select {
	case <-t.exited:
	default:
		return fault.New(fault.Conflict, "cannot delete %s: it is running", t.id)
	}
	t.del.Lock()
	defer t.del.Unlock()
	if t.deleted {
		return nil
	}
	if err := t.clear(ctx); err != nil {
		return err
	}
	t.deleted = true
	t.mu.Lock()
	if t.first != nil {
		t.first.Close()
		t.first = nil
	}
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
		t.pidfd = -1
	}
	t.mu.Unlock()
	t.d.mu.Lock()
	if t.d.tasks[t.id] == t {
		delete(t.d.tasks, t.id)
	}
	t.d.mu.Unlock()
	return nil
}

// clear removes everything there is of the container: idempotent.
func (t *task) clear(ctx context.Context) error {
	if t.mon != nil {
		_ = t.mon.Quit()
		wait := 10 * time.Second
		t.mu.Lock()
		if !t.live {
			wait = 2 * time.Second // one that is held goes when its container is deleted
		}
		t.mu.Unlock()
		select {
		case <-t.mon.Done():
		case <-time.After(wait):
			defer func() {
				t.mon.Kill()
				<-t.mon.Done()
			}()
		}
	}
	if exists(filepath.Join(t.d.dir, "state", t.id)) {
		if err := t.d.call(ctx, t.dir, nil, "delete", "--force", t.id); err != nil && exists(filepath.Join(t.d.dir, "state", t.id)) {
			return err
		}
	}
	if t.group != nil {
		_ = t.group.Signal(ctx, int(unix.SIGKILL))
		if err := t.group.Remove(ctx); err != nil {
			return err
		}
	}
	if err := unix.Unmount(t.rootfs(), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fault.New(fault.Internal, "cannot unmount the root file system of %s: %w", t.id, err)
	}
	if err := unix.Rmdir(t.rootfs()); err != nil && !errors.Is(err, unix.ENOENT) {
		return fault.New(fault.Internal, "cannot remove the mount point of %s: %w", t.id, err)
	}
	return os.RemoveAll(t.dir)
}

// rootfs is where the root is mounted: apart from the run directory, since the
// root of a user namespace has to get there.
func (t *task) rootfs() string { return filepath.Join(t.d.dir, "roots", t.id) }

func exists(p string) bool {
	_, err := os.Lstat(p)
	return err == nil
}
