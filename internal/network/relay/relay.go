// Package relay runs and speaks to the relay of an engine: one process
// (servin-shim relay, see shim/relay.h) that carries TCP connections made to
// published ports over IPv6 to containers, where the kernel cannot translate
// them: from ::1, and to containers that have IPv4 alone. The process outlives
// the engine; the next one finds it by its socket. Package network imports this
// package.
package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Config makes a Relay.
type Config struct {
	// Dir holds the socket by which the process is found.
	Dir string
	// Program opens the static program that has the mode "relay".
	Program func() (*os.File, error)
	// Lost is told when the process ended while it was needed and a new one
	// could not be had; may be nil.
	Lost func(error)
}

// Port is a published port and where its connections go.
type Port struct {
	Host, To netip.AddrPort
}

// Relay is the engine's end. It runs the process when there is a first port
// and ends it some time after the last one went. It is safe for concurrent use.
type Relay struct {
	cfg Config

	mu     sync.Mutex // one request at a time: the process answers in order
	fd     int        // control connection, -1 if there is none
	dead   chan struct{}
	ports  map[netip.AddrPort]port
	closed bool
	idle   *time.Timer
	tasks  sync.WaitGroup
}

type port struct {
	to     netip.AddrPort
	socket int // a copy, for the process that may have to follow
}

// idleFor is how long the process is kept for a next port.
const idleFor = 30 * time.Second

const (
	version              = 1
	opAdd, opTake, opDel = 1, 2, 3
	opSweep, opQuit      = 4, 5
	messageLen           = 2 + 2 + 16 + 16 + 2 + 2
	sock                 = "relay.sock"
	patience             = 2 // seconds for an answer
)

// New makes a Relay; nothing runs yet.
func New(cfg Config) *Relay {
	return &Relay{cfg: cfg, fd: -1, ports: map[netip.AddrPort]port{}}
}

// Add has connections to the bound socket carried to p.To. The socket stays the
// caller's.
func (r *Relay) Add(p Port, socket int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	copied, err := unix.FcntlInt(uintptr(socket), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	if err = r.ensure(); err == nil {
		_, err = r.ask(opAdd, p, copied)
	}
	if err != nil {
		unix.Close(copied)
		return fmt.Errorf("cannot relay %s: %w", p.Host, err)
	}
	r.ports[p.Host] = port{p.To, copied}
	return nil
}

// Take finds a port that a former engine had relayed, and gives its socket.
// os.ErrNotExist says that there is none.
func (r *Relay) Take(p Port) (socket int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.dial(); err != nil {
		return -1, os.ErrNotExist
	}
	s, err := r.ask(opTake, p, -1)
	if errors.Is(err, unix.ENOENT) {
		return -1, os.ErrNotExist
	} else if err != nil {
		return -1, fmt.Errorf("cannot take back %s: %w", p.Host, err)
	}
	copied, err := unix.FcntlInt(uintptr(s), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		unix.Close(s)
		return -1, os.NewSyscallError("fcntl", err)
	}
	r.ports[p.Host] = port{p.To, copied}
	return s, nil
}

// Delete ends a port and its connections.
func (r *Relay) Delete(host netip.AddrPort) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.ports[host]
	if !ok {
		return nil
	}
	delete(r.ports, host)
	unix.Close(p.socket)
	var err error
	if r.fd >= 0 {
		if _, err = r.ask(opDel, Port{Host: host, To: p.to}, -1); errors.Is(err, unix.ENOENT) {
			err = nil
		}
	}
	if len(r.ports) == 0 && r.fd >= 0 && !r.closed {
		if r.idle != nil {
			r.idle.Stop()
		}
		r.idle = time.AfterFunc(idleFor, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			if len(r.ports) == 0 && !r.closed {
				r.quit()
			}
		})
	}
	if err != nil {
		return fmt.Errorf("cannot end the relay of %s: %w", host, err)
	}
	return nil
}

// Sweep ends what a former engine had relayed and nobody took back.
func (r *Relay) Sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dial() != nil {
		return
	}
	if len(r.ports) == 0 {
		r.quit()
	} else {
		_, _ = r.ask(opSweep, Port{}, -1)
	}
}

// Destroy ends the process, whoever started it, and closes the Relay.
func (r *Relay) Destroy() {
	r.mu.Lock()
	if !r.closed && r.dial() == nil {
		r.quit()
	}
	r.mu.Unlock()
	os.Remove(filepath.Join(r.cfg.Dir, sock))
	r.Close()
}

// Close leaves the process to the next engine.
func (r *Relay) Close() {
	r.mu.Lock()
	r.closed = true
	if r.idle != nil {
		r.idle.Stop()
	}
	for _, p := range r.ports {
		unix.Close(p.socket)
	}
	r.ports = map[netip.AddrPort]port{}
	r.hangUp()
	r.mu.Unlock()
	r.tasks.Wait()
}

// quit asks the process to end. The caller holds mu.
func (r *Relay) quit() {
	_, _ = r.ask(opQuit, Port{}, -1)
	r.hangUp()
}

func (r *Relay) hangUp() {
	if r.fd >= 0 {
		unix.Close(r.fd)
		close(r.dead)
		r.fd = -1
	}
}

// ensure makes sure that a process runs and knows all ports. The caller holds mu.
func (r *Relay) ensure() error {
	if r.closed {
		return errors.New("the engine is shutting down")
	}
	if r.fd >= 0 {
		return nil
	}
	if r.dial() == nil {
		return nil
	}
	if err := r.spawn(); err != nil {
		return err
	}
	if err := r.dial(); err != nil {
		return err
	}
	for host, p := range r.ports {
		if _, err := r.ask(opAdd, Port{host, p.to}, p.socket); err != nil {
			return fmt.Errorf("port %s: %w", host, err)
		}
	}
	return nil
}

// address is the socket's. The way over a descriptor is short, run directories
// have long names.
func (r *Relay) address() (dir int, sa *unix.SockaddrUnix, err error) {
	dir, err = unix.Open(r.cfg.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, nil, &os.PathError{Op: "open", Path: r.cfg.Dir, Err: err}
	}
	return dir, &unix.SockaddrUnix{Name: "/proc/self/fd/" + strconv.Itoa(dir) + "/" + sock}, nil
}

// dial connects to a process that runs, if there is no connection yet.
func (r *Relay) dial() error {
	if r.fd >= 0 {
		return nil
	}
	fd, err := r.connect()
	if err != nil {
		return err
	}
	// A second connection says when the process ends.
	guard, err := r.connect()
	if err != nil {
		unix.Close(fd)
		return err
	}
	r.fd, r.dead = fd, make(chan struct{})
	f := os.NewFile(uintptr(guard), "relay")
	r.tasks.Add(2)
	given := r.dead
	go func() {
		defer r.tasks.Done()
		<-given
		f.SetReadDeadline(time.Unix(1, 0))
	}()
	go func() {
		defer r.tasks.Done()
		var b [1]byte
		_, _ = f.Read(b[:])
		f.Close()
		select {
		case <-given: // we hung up
		default:
			r.again(given)
		}
	}()
	return nil
}

// again follows the end of a process.
func (r *Relay) again(of chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dead != of || r.fd < 0 {
		return
	}
	r.hangUp()
	if r.closed || len(r.ports) == 0 {
		return
	}
	if err := r.ensure(); err != nil && r.cfg.Lost != nil {
		r.cfg.Lost(err)
	}
}

func (r *Relay) connect() (int, error) {
	dir, sa, err := r.address()
	if err != nil {
		return -1, err
	}
	defer unix.Close(dir)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, sa); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("connect", err)
	}
	cr, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || int(cr.Uid) != os.Geteuid() {
		unix.Close(fd)
		return -1, errors.New("the relay's socket is another user's")
	}
	return fd, nil
}

// spawn runs a process.
func (r *Relay) spawn() error {
	program, err := r.cfg.Program()
	if err != nil {
		return err
	}
	defer program.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	dir, sa, err := r.address()
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	// Nobody listens there: dial has found out.
	if err := unix.Unlinkat(dir, sock, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return os.NewSyscallError("unlink", err)
	}
	ln, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(ln)
	if err := unix.Fchmod(ln, 0o600); err != nil {
		return os.NewSyscallError("fchmod", err)
	}
	if err := unix.Bind(ln, sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(ln, 8); err != nil {
		return os.NewSyscallError("listen", err)
	}
	n := null.Fd()
	pid, err := syscall.ForkExec("/proc/self/fd/"+strconv.Itoa(int(program.Fd())), []string{"servin-shim", "relay"}, &syscall.ProcAttr{
		Dir: "/", Env: []string{}, Files: []uintptr{n, n, n, uintptr(ln)}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("cannot run the relay: %w", err)
	}
	go func() { // ends with the process, which may be after us
		for {
			if _, err := syscall.Wait4(pid, nil, 0, nil); err != syscall.EINTR {
				return
			}
		}
	}()
	return nil
}

// ask sends a request and waits for its answer. The caller holds mu.
func (r *Relay) ask(op uint16, p Port, socket int) (got int, err error) {
	b := make([]byte, 0, messageLen)
	le := binary.LittleEndian
	b = le.AppendUint16(b, version)
	b = le.AppendUint16(b, op)
	host, to := p.Host.Addr().As16(), p.To.Addr().As16()
	b = append(append(b, host[:]...), to[:]...)
	b = le.AppendUint16(b, p.Host.Port())
	b = le.AppendUint16(b, p.To.Port())
	var oob []byte
	if socket >= 0 {
		oob = unix.UnixRights(socket)
	}
	broken := func(err error) (int, error) {
		r.hangUp()
		return -1, fmt.Errorf("the relay does not answer: %w", err)
	}
	if err := unix.Sendmsg(r.fd, b, oob, nil, unix.MSG_NOSIGNAL); err != nil {
		return broken(err)
	}
	deadline := time.Now().Add(patience * time.Second)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return broken(context.DeadlineExceeded)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}}, int(left/time.Millisecond)+1)
		if n > 0 {
			break
		} else if err != nil && !errors.Is(err, unix.EINTR) {
			return broken(err)
		}
	}
	var buf [8]byte
	ctrl := make([]byte, unix.CmsgSpace(4))
	n, cn, _, _, err := unix.Recvmsg(r.fd, buf[:], ctrl, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return broken(err)
	}
	got = -1
	if cs, err := unix.ParseSocketControlMessage(ctrl[:cn]); err == nil {
		for _, c := range cs {
			if fds, err := unix.ParseUnixRights(&c); err == nil && len(fds) == 1 {
				got = fds[0]
			}
		}
	}
	if n != 4 {
		return broken(errors.New("an answer is malformed"))
	}
	if e := int32(le.Uint32(buf[:])); e != 0 {
		return got, syscall.Errno(e)
	}
	if op == opTake && got < 0 {
		return broken(errors.New("an answer lacks its socket"))
	}
	return got, nil
}
