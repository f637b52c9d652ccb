package shim

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// ErrGone is returned by requests to a monitor that has ended.
var ErrGone = errors.New("the container's monitor is gone")

// Handler is told what happens without having been asked for. Its methods are
// called one after another and must not block.
type Handler interface {
	// Exited: the container's process has ended and its output is in the log.
	Exited(Exit)
	// ExecExited: the exec with the cookie has ended.
	ExecExited(cookie uint32, e Exit)
	// Reborn: the container's init is now this process (see CHILD in PROTOCOL.md).
	Reborn(pid, pidfd int)
	// Notify: a seccomp notification descriptor, to be closed by the handler.
	Notify(fd int)
	// Gone: the monitor has closed the connection; nothing follows.
	Gone()
}

// Monitor is a control connection to a running servin-shim.
type Monitor struct {
	c    *conn
	h    Handler
	pid  int // of the monitor, where it is our child
	peer int // of the monitor, where another process started it

	mu      sync.Mutex
	next    uint32
	waiting map[uint32]chan message
	gone    bool
	left    bool
	done    chan struct{}
}

// Spawn runs a monitor whose working directory is dir.
func (e *Executable) Spawn(dir string, h Handler) (*Monitor, error) {
	rd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(rd)
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	null := e.null.Fd()
	pid, err := syscall.ForkExec(e.path, []string{"servin-shim", "monitor"}, &syscall.ProcAttr{
		Env:   []string{},
		Files: []uintptr{null, null, null, uintptr(sp[1]), uintptr(rd)},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	unix.Close(sp[1])
	if err != nil {
		unix.Close(sp[0])
		return nil, fault.New(fault.Internal, "cannot run servin-shim: %w", err)
	}
	c, err := newConn(sp[0])
	if err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(pid, nil, 0, nil)
		return nil, err
	}
	return newMonitor(c, pid, h), nil
}

// Dial connects to the monitor that listens in dir. A socket without a
// listener is fault.NotFound.
func Dial(dir string, h Handler) (*Monitor, error) {
	rd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fault.As(fault.NotFound, &os.PathError{Op: "open", Path: dir, Err: err})
	}
	defer unix.Close(rd)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// Run directories have long names; the way over the descriptor is short.
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(procFD(rd), "shim.sock")}); err != nil {
		unix.Close(fd)
		return nil, fault.New(fault.NotFound, "cannot reach the monitor in %s: %w", dir, err)
	}
	cr, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || int(cr.Uid) != os.Geteuid() {
		unix.Close(fd)
		return nil, fault.New(fault.Forbidden, "cannot trust the monitor in %s: it is another user's", dir)
	}
	c, err := newConn(fd)
	if err != nil {
		return nil, err
	}
	m := newMonitor(c, 0, h)
	m.mu.Lock()
	m.peer = int(cr.Pid)
	// A former daemon's execs may still run under its low numbers.
	m.next = 1<<16 + rand.Uint32N(1<<30)
	m.mu.Unlock()
	return m, nil
}

func newMonitor(c *conn, pid int, h Handler) *Monitor {
	m := &Monitor{c: c, h: h, pid: pid, waiting: map[uint32]chan message{}, done: make(chan struct{})}
	go m.read()
	return m
}

// PID is the monitor's process id if it is our child, else 0.
func (m *Monitor) PID() int { return m.pid }

// Kill ends the monitor by force, and its container with it.
func (m *Monitor) Kill() {
	select {
	case <-m.done:
	default:
		if pid := max(m.pid, m.peer); pid > 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// Done is closed when the monitor has closed the connection. Its mount
// namespace is gone then.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// Close gives the connection up; the monitor of a running container goes on,
// one that has started nothing ends.
func (m *Monitor) Close() error { return m.c.close() }

// Leave is Close without any further notice, for a daemon that goes down and
// leaves the container to the next one.
func (m *Monitor) Leave() {
	m.mu.Lock()
	m.left = true
	m.mu.Unlock()
	m.c.close()
}

func (m *Monitor) read() {
	var buf [1024]byte
	for {
		n, fds, lost, err := m.c.recv(buf[:])
		if err != nil {
			break
		}
		msg, err := decode(buf[:n])
		if err != nil {
			closeAll(fds)
			break
		}
		msg.fds, msg.lost = fds, lost
		m.dispatch(msg)
	}
	m.mu.Lock()
	left := m.left
	m.gone = true
	for k, ch := range m.waiting {
		close(ch)
		delete(m.waiting, k)
	}
	m.mu.Unlock()
	m.c.close()
	if left {
		close(m.done)
		if m.pid > 0 {
			_, _ = syscall.Wait4(m.pid, nil, 0, nil)
		}
		return
	}
	if m.pid > 0 {
		// Ends right after it closed its sockets.
		for {
			if _, err := syscall.Wait4(m.pid, nil, 0, nil); err != syscall.EINTR {
				break
			}
		}
	}
	close(m.done)
	m.h.Gone()
}

func (m *Monitor) dispatch(msg message) {
	switch {
	case msg.typ == ctlExited:
		if e, err := decodeExit(msg.body); err == nil {
			m.h.Exited(e)
		}
	case msg.typ == ctlExecExited:
		if e, err := decodeExit(msg.body); err == nil {
			m.h.ExecExited(msg.cookie, e)
		}
	case msg.typ == ctlFD && len(msg.fds) == 1:
		m.h.Notify(msg.fds[0])
		return
	case msg.typ == ctlCloned && msg.cookie == 0 && len(msg.fds) == 1 && len(msg.body) == 4:
		m.h.Reborn(int(le.Uint32(msg.body)), msg.fds[0])
		return
	default:
		m.mu.Lock()
		ch := m.waiting[msg.cookie]
		delete(m.waiting, msg.cookie)
		m.mu.Unlock()
		if ch != nil {
			msg.body = append([]byte(nil), msg.body...)
			ch <- msg
			return
		}
	}
	closeAll(msg.fds)
}

// Pending is a request under way.
type Pending struct {
	m      *Monitor
	cookie uint32
	ch     chan message
}

// Cookie names the request.
func (p *Pending) Cookie() uint32 { return p.cookie }

func (m *Monitor) expect() (*Pending, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gone {
		return nil, ErrGone
	}
	m.next++
	if m.next == 0 {
		m.next++
	}
	p := &Pending{m: m, cookie: m.next, ch: make(chan message, 1)}
	m.waiting[p.cookie] = p.ch
	return p, nil
}

func (p *Pending) forget() {
	p.m.mu.Lock()
	delete(p.m.waiting, p.cookie)
	p.m.mu.Unlock()
	select {
	case msg, ok := <-p.ch:
		if ok {
			closeAll(msg.fds)
		}
	default:
	}
}

func (p *Pending) wait(ctx context.Context, want msgType) (message, error) {
	select {
	case msg, ok := <-p.ch:
		switch {
		case !ok:
			return message{}, ErrGone
		case msg.typ == ctlFailed:
			closeAll(msg.fds)
			return message{}, decodeFailure(msg.body)
		case msg.lost:
			return message{}, os.NewSyscallError("recvmsg", syscall.EMFILE)
		case msg.typ != want:
			closeAll(msg.fds)
			return message{}, malformed("an answer")
		}
		return msg, nil
	case <-ctx.Done():
		p.forget()
		return message{}, context.Cause(ctx)
	}
}

// Done waits for a plain answer.
func (p *Pending) Done(ctx context.Context) error {
	msg, err := p.wait(ctx, ctlDone)
	closeAll(msg.fds)
	return err
}

// Started waits until the process has been executed.
func (p *Pending) Started(ctx context.Context) (Started, error) {
	msg, err := p.wait(ctx, ctlStarted)
	if err != nil {
		return Started{PTY: -1}, err
	}
	s, err := decodeStarted(msg.body)
	if err == nil && len(msg.fds) == 1 {
		s.PTY = msg.fds[0]
		return s, nil
	}
	closeAll(msg.fds)
	return s, err
}
