package command

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"golang.org/x/sys/unix"
)

// exec is a process run by the runtime's own exec, which stays its parent and
// hands its status on.
type exec struct {
	id      string
	t       *task
	dir     string
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
	dir, err := os.MkdirTemp(t.dir, "exec-")
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot exec: %w", err)
	}
	x := &exec{id: req.ID, t: t, dir: dir, exited: make(chan struct{})}
	if err := x.run(ctx, req); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return x, nil
}

func (x *exec) run(ctx context.Context, req contract.ExecRequest) error {
	b, err := json.Marshal(req.Process)
	if err != nil {
		return err
	}
	proc, pidFile, logFile := filepath.Join(x.dir, "process.json"), filepath.Join(x.dir, "pid"), filepath.Join(x.dir, "log")
	if err := os.WriteFile(proc, b, 0o600); err != nil {
		return fault.New(fault.Internal, "cannot exec: %w", err)
	}
	args := x.t.d.args(logFile, "exec", "--process", proc, "--pid-file", pidFile, x.t.id)
	cmd := osexec.Command(args[0], args[1:]...)
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	closeTheirs, err := x.connect(cmd, req)
	if err != nil {
		return err
	}
	err = cmd.Start()
	closeTheirs()
	if err != nil {
		x.streams.Close()
		return &contract.StartError{Step: "run " + x.t.d.cfg.Name, Err: err}
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	// The pid file is there once the process has been executed.
	for wait := time.Millisecond; ; wait = min(2*wait, 10*time.Millisecond) {
		if b, err := os.ReadFile(pidFile); err == nil && len(b) > 0 {
			x.pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
			break
		}
		select {
		case err := <-ended:
			if _, serr := os.Stat(pidFile); serr == nil {
				ended <- err
				continue
			}
			x.streams.Close()
			return x.t.d.reason("exec", logFile, 0, err)
		case <-ctx.Done():
			_ = cmd.Process.Kill()
			<-ended
			x.streams.Close()
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
	go func() {
		err := <-ended
		e := contract.Exit{At: time.Now()}
		var ee *osexec.ExitError
		if errors.As(err, &ee) {
			e.Code = ee.ExitCode()
			if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				e.Code, e.Signal = 128+int(ws.Signal()), int(ws.Signal())
			} else if e.Code > 128 && e.Code < 128+65 {
				e.Signal = e.Code - 128
			}
		}
		os.RemoveAll(x.dir)
		x.mu.Lock()
		x.exit = e
		x.mu.Unlock()
		close(x.exited)
	}()
	return nil
}

// connect makes the streams; the returned function closes the runtime's ends.
func (x *exec) connect(cmd *osexec.Cmd, req contract.ExecRequest) (func(), error) {
	var ours, theirs []*os.File
	x.streams.Close = func() error {
		for _, f := range ours {
			f.Close()
		}
		return nil
	}
	done := func() {
		for _, f := range theirs {
			f.Close()
		}
	}
	fail := func(err error) (func(), error) {
		x.streams.Close()
		done()
		return nil, fault.New(fault.Exhausted, "cannot exec: %w", err)
	}
	if req.Process.Terminal {
		master, slave, err := openPTY()
		if err != nil {
			return fail(err)
		}
		ours, theirs = append(ours, master), append(theirs, slave)
		if c := req.Process.ConsoleSize; c != nil {
			_ = setSize(master, uint16(c.Width), uint16(c.Height))
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		cmd.SysProcAttr.Setctty = true
		x.pty = master
		x.streams.Stdout = ptyReader{master}
		if req.Stdin {
			x.streams.Stdin = keepOpen{master}
		}
		return done, nil
	}
	if req.Detach {
		return done, nil
	}
	for i := range 3 {
		if i == 0 && !req.Stdin {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		in, out := w, r // theirs, ours
		if i == 0 {
			in, out = r, w
		}
		if id := hostID(req.Process.User.UID, x.t.uids); id > 0 {
			_ = in.Chown(id, -1)
		}
		ours, theirs = append(ours, out), append(theirs, in)
		switch i {
		case 0:
			cmd.Stdin, x.streams.Stdin = in, out
		case 1:
			cmd.Stdout, x.streams.Stdout = in, out
		case 2:
			cmd.Stderr, x.streams.Stderr = in, out
		}
	}
	return done, nil
}

func openPTY() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		unix.Close(fd)
		return nil, nil, err
	}
	// From the master itself: no name is looked up.
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY)
	if errno != 0 {
		unix.Close(fd)
		return nil, nil, errno
	}
	return os.NewFile(uintptr(fd), "pty"), os.NewFile(r, "tty"), nil
}

func setSize(f *os.File, width, height uint16) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = raw.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width})
	})
	return errors.Join(err, ierr)
}

// ptyReader makes the end of a terminal look like the end of a file.
type ptyReader struct{ *os.File }

func (p ptyReader) Read(b []byte) (int, error) {
	n, err := p.File.Read(b)
	if errors.Is(err, syscall.EIO) {
		err = io.EOF
	}
	return n, err
}

type keepOpen struct{ f *os.File }

func (k keepOpen) Write(p []byte) (int, error) { return k.f.Write(p) }
func (k keepOpen) Close() error                { return nil }

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
	if err := setSize(x.pty, width, height); err != nil {
		return fault.New(fault.Internal, "cannot resize: %w", err)
	}
	return nil
}

// Signal implements runtime.Exec.
func (x *exec) Signal(_ context.Context, sig int) error {
	select {
	case <-x.exited:
		return fault.New(fault.Conflict, "cannot send signal %d: the process has ended", sig)
	default:
	}
	if err := unix.Kill(x.pid, unix.Signal(sig)); err != nil {
		return fault.New(fault.Conflict, "cannot send signal %d: %w", sig, err)
	}
	return nil
}
