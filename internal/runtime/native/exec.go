package native

import (
	"context"
	"errors"
	"os"
	"sync"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// exec is another process in a container. Its streams are pipes (or a
// terminal) of ours, with no monitor in between: they end with the daemon, as
// does the client that reads them.
type exec struct {
	id      string
	t       *task
	cookie  uint32
	pid     int
	pty     *os.File
	streams contract.Streams
	exited  chan struct{}
	mu      sync.Mutex
	exit    contract.Exit
}

// Exec implements runtime.Task.
func (t *task) Exec(ctx context.Context, req contract.ExecRequest) (contract.Exec, error) {
	if req.Process == nil {
		return nil, fault.New(fault.Invalid, "cannot exec: there is no process")
	}
	if err := t.running("exec"); err != nil {
		return nil, err
	}
	t.d.pool.enter()
	defer t.d.pool.leave()
	opts := t.d.planOptions(t.id)
	opts.UserNS = t.userNS
	if err := t.d.filter.load(&opts, t.filter); err != nil {
		return nil, err
	}
	proc := t.d.limits.clampProcess(req.Process)
	if !t.userNS {
		var err error
		if proc, err = t.d.limits.permits(proc); err != nil {
			return nil, err
		}
	}
	p, err := plan.Exec(proc, opts)
	if err != nil {
		return nil, err
	}
	spec := &specs.Spec{Process: proc, Linux: &specs.Linux{UIDMappings: t.ids[0], GIDMappings: t.ids[1]}}
	var std *stdio
	if req.Detach && !proc.Terminal {
		std, err = nullStdio()
	} else {
		std, err = newStdio(contract.Stdio{Terminal: proc.Terminal, Stdin: req.Stdin}, spec)
	}
	if err != nil {
		return nil, err
	}
	defer std.close()
	tasks, err := t.group.Tasks()
	if err != nil {
		return nil, t.requestError("exec", err)
	}
	defer func() {
		for _, fd := range tasks {
			unix.Close(fd)
		}
	}()
	cgdir, err := t.group.Dir()
	if err != nil {
		return nil, t.requestError("exec", err)
	}
	if cgdir >= 0 {
		defer unix.Close(cgdir)
	}
	t.mu.Lock()
	pidfd := -1
	if !t.over && t.pidfd >= 0 {
		pidfd, err = unix.FcntlInt(uintptr(t.pidfd), unix.F_DUPFD_CLOEXEC, 3)
	}
	t.mu.Unlock()
	if err != nil || pidfd < 0 {
		return nil, fault.New(fault.Conflict, "cannot exec: the container is not running")
	}
	defer unix.Close(pidfd)
	fds, done, err := t.d.openSlots(p, slotSources{root: -1, stdio: std.inside, pidfd: pidfd, tasks: tasks})
	defer done()
	if err != nil {
		return nil, err
	}
	code, err := p.Encode()
	if err != nil {
		return nil, err
	}
	pend, err := t.mon.Exec(shim.Plan{Code: code, Slots: fds}, cgdir, proc.Terminal)
	if err != nil {
		return nil, t.requestError("exec", err)
	}
	x := &exec{id: req.ID, t: t, cookie: pend.Cookie(), exited: make(chan struct{})}
	st, err := pend.Started(ctx)
	if err != nil {
		// It may have been started all the same: when nobody waits any more, or
		// when its terminal found no room here.
		if ended := (*shim.StageError)(nil); !errors.As(err, &ended) && !errors.Is(err, shim.ErrGone) {
			_ = t.mon.Signal(context.WithoutCancel(ctx), x.cookie, int(unix.SIGKILL))
		}
		return nil, t.requestError("exec", err)
	}
	x.pid = st.PID
	if err := x.connect(std, st.PTY, req); err != nil {
		_ = t.mon.Signal(ctx, x.cookie, int(unix.SIGKILL))
		return nil, err
	}
	t.mu.Lock()
	e, early := t.early[x.cookie]
	delete(t.early, x.cookie)
	if !early && !t.over {
		t.execs[x.cookie] = x
	}
	over := t.over
	t.mu.Unlock()
	if early {
		x.end(exitOf(e))
	} else if over {
		x.end(contract.Exit{Code: 137, Signal: int(unix.SIGKILL)})
	}
	return x, nil
}

// connect makes the streams from our ends of the pipes or the terminal.
func (x *exec) connect(std *stdio, pty int, req contract.ExecRequest) error {
	var files []*os.File
	file := func(fd int, name string) (*os.File, error) {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(fd), name)
		files = append(files, f)
		return f, nil
	}
	var once sync.Once
	x.streams.Close = func() error {
		once.Do(func() {
			for _, f := range files {
				f.Close()
			}
		})
		return nil
	}
	if req.Process.Terminal {
		if pty < 0 {
			return fault.New(fault.Internal, "cannot exec: the monitor sent no terminal")
		}
		f, err := file(pty, "pty")
		if err != nil {
			return err
		}
		x.pty = f
		x.streams.Stdout = ptyFile{f}
		if req.Stdin {
			x.streams.Stdin = keepOpen{f}
		}
		return nil
	}
	for i, fd := range std.outside {
		if fd < 0 {
			continue
		}
		f, err := file(fd, "stdio")
		if err != nil {
			return err
		}
		std.disown(fd)
		switch i {
		case 0:
			x.streams.Stdin = f
		case 1:
			x.streams.Stdout = f
		case 2:
			x.streams.Stderr = f
		}
	}
	return nil
}

// keepOpen is a terminal as standard input: its end is not the terminal's.
type keepOpen struct{ f *os.File }

func (k keepOpen) Write(p []byte) (int, error) { return k.f.Write(p) }
func (k keepOpen) Close() error                { return nil }

func (s *stdio) disown(fd int) {
	for i, x := range s.own {
		if x == fd {
			s.own = append(s.own[:i], s.own[i+1:]...)
			return
		}
	}
}

func nullStdio() (*stdio, error) {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open /dev/null: %w", err)
	}
	return &stdio{inside: [3]int{fd, fd, fd}, outside: [3]int{-1, -1, -1}, own: []int{fd}}, nil
}

func (x *exec) end(e contract.Exit) {
	x.mu.Lock()
	x.exit = e
	x.mu.Unlock()
	close(x.exited)
}

// ID implements runtime.Exec.
func (x *exec) ID() string { return x.id }

// Pid implements runtime.Exec.
func (x *exec) Pid() int { return x.pid }

// Streams implements runtime.Exec.
func (x *exec) Streams() contract.Streams { return x.streams }

// Exited implements runtime.Exec.
func (x *exec) Exited() <-chan struct{} { return x.exited }

// Exit implements runtime.Exec.
func (x *exec) Exit() contract.Exit {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.exit
}

// Resize implements runtime.Exec.
func (x *exec) Resize(_ context.Context, width, height uint16) error {
	if x.pty == nil {
		return fault.New(fault.Conflict, "cannot resize: the process has no terminal")
	}
	raw, err := x.pty.SyscallConn()
	if err != nil {
		return err
	}
	var rerr error
	err = raw.Control(func(fd uintptr) {
		rerr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width})
	})
	if err == nil {
		err = rerr
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot resize: %w", err)
	}
	return nil
}

// Signal implements runtime.Exec.
func (x *exec) Signal(ctx context.Context, sig int) error {
	select {
	case <-x.exited:
		return fault.New(fault.Conflict, "cannot send signal %d: the process has ended", sig)
	default:
	}
	if err := x.t.mon.Signal(ctx, x.cookie, sig); err != nil {
		return x.t.requestError("send signal", err)
	}
	return nil
}
