package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"

	"github.com/cloudos-io/cloudos/internal/runtime/source"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// streams are the standard streams and further descriptors of one process.
type streams struct {
	inside [3]int // what the process gets, unless it has a terminal
	extra  []int  // 3 and up
	listen int    // how many of those are LISTEN_FDS

	opened  []int
	console net.Conn // gets the terminal's master, nil where we keep it
	master  *os.File
	host    *terminal // ours, in raw mode
	out     []*os.File
	in      *os.File
	copying sync.WaitGroup
}

// newStreams settles what the process reads and writes. Detached it has our own
// descriptors. In the foreground it has them too, but never a terminal of ours:
// that it could read from and push characters into.
func (a *app) newStreams(p *specs.Process, detach bool, socket string, preserve, listen int) (*streams, error) {
	s := &streams{inside: [3]int{0, 1, 2}, listen: listen}
	fail := func(err error) (*streams, error) {
		s.close()
		return nil, err
	}
	if preserve < 0 || preserve > 1000 {
		return fail(fmt.Errorf("cannot preserve %d descriptors", preserve))
	}
	for i := range listen + preserve {
		if _, err := unix.FcntlInt(uintptr(3+i), unix.F_GETFD, 0); err != nil {
			return fail(fmt.Errorf("unable to stat preserved-fd %d (of %d): %w", i-listen, preserve, err))
		}
		s.extra = append(s.extra, 3+i)
	}
	if p.Terminal {
		null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fail(&os.PathError{Op: "open", Path: "/dev/null", Err: err})
		}
		s.opened = append(s.opened, null)
		s.inside = [3]int{null, null, null}
		if detach {
			if s.console, err = net.Dial("unix", socket); err != nil {
				return fail(err)
			}
			return s, nil
		}
		if s.host, err = hostTerminal(); err != nil {
			return fail(err)
		}
		if p.ConsoleSize == nil {
			if ws, err := unix.IoctlGetWinsize(s.host.fd(), unix.TIOCGWINSZ); err == nil && ws.Col > 0 && ws.Row > 0 {
				p.ConsoleSize = &specs.Box{Width: uint(ws.Col), Height: uint(ws.Row)}
			}
		}
		return s, nil
	}
	if detach {
		return s, nil
	}
	for i := range 3 {
		if !isTerminal(i) {
			continue
		}
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return fail(os.NewSyscallError("pipe", err))
		}
		if i == 0 {
			s.inside[0], s.in = fds[0], os.NewFile(uintptr(fds[1]), "stdin")
			s.opened = append(s.opened, fds[0])
		} else {
			s.inside[i] = fds[1]
			s.opened = append(s.opened, fds[1])
			s.out = append(s.out, os.NewFile(uintptr(fds[0]), strconv.Itoa(i)))
		}
	}
	return s, nil
}

// giveTo lets the process's user open its standard streams again by name, unless
// one is /dev/null, which is everybody's.
func (s *streams) giveTo(p *specs.Process, uids []specs.LinuxIDMapping) {
	if p.Terminal {
		return
	}
	id := source.HostID(p.User.UID, uids)
	for _, fd := range s.inside {
		var st unix.Stat_t
		if id < 0 || unix.Fstat(fd, &st) != nil || int(st.Uid) == id ||
			st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3) {
			continue
		}
		// Files of somebody else's stay so.
		_ = unix.Fchown(fd, id, int(st.Gid))
	}
}

// terminal takes the master of the process's terminal.
func (s *streams) terminal(fd int) error {
	if s.console != nil {
		defer unix.Close(fd)
		return sendOver(s.console, []byte("/dev/ptmx"), fd)
	}
	if s.host == nil {
		unix.Close(fd)
		return nil
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return err
	}
	s.master = os.NewFile(uintptr(fd), "/dev/ptmx")
	if err := s.host.raw(); err != nil {
		return fmt.Errorf("failed to set the terminal from the stdin: %w", err)
	}
	s.resize()
	go func() { _, _ = io.Copy(s.master, os.Stdin) }()
	s.copying.Go(func() { _, _ = io.Copy(os.Stdout, s.master) })
	return nil
}

// connect lets go of what the process has, and begins to carry data between our
// streams and its.
func (s *streams) connect() {
	for _, fd := range s.opened {
		unix.Close(fd)
	}
	s.opened = nil
	if s.console != nil {
		s.console.Close()
		s.console = nil
	}
	if s.in != nil {
		go func() {
			_, _ = io.Copy(s.in, os.Stdin)
			s.in.Close()
		}()
	}
	for _, f := range s.out {
		to := os.Stdout
		if f.Name() == "2" {
			to = os.Stderr
		}
		s.copying.Go(func() {
			_, _ = io.Copy(to, f)
			f.Close()
		})
	}
	s.out = nil
}

// resize gives the process's terminal the size of ours.
func (s *streams) resize() {
	if s.master == nil || s.host == nil {
		return
	}
	if ws, err := unix.IoctlGetWinsize(s.host.fd(), unix.TIOCGWINSZ); err == nil {
		control(s.master, func(fd int) { _ = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, ws) })
	}
}

// drain waits until what the ended process has written has been passed on.
func (s *streams) drain() { s.copying.Wait() }

func (s *streams) close() {
	for _, fd := range s.opened {
		unix.Close(fd)
	}
	s.opened = nil
	if s.console != nil {
		s.console.Close()
	}
	for _, f := range s.out {
		f.Close()
	}
	if s.host != nil {
		s.host.restore()
	}
}

func control(f *os.File, do func(fd int)) {
	if raw, err := f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { do(int(fd)) })
	}
}

// terminal is our own, whose mode is given back at the end.
type terminal struct {
	f   *os.File
	old *unix.Termios
}

func isTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// hostTerminal finds it on one of the standard streams, or as the controlling one.
func hostTerminal() (*terminal, error) {
	for _, f := range []*os.File{os.Stderr, os.Stdout, os.Stdin} {
		if isTerminal(int(f.Fd())) {
			return &terminal{f: f}, nil
		}
	}
	f, err := os.Open("/dev/tty")
	if err != nil {
		return nil, err
	}
	return &terminal{f: f}, nil
}

func (t *terminal) fd() int { return int(t.f.Fd()) }

func (t *terminal) raw() error {
	old, err := unix.IoctlGetTermios(t.fd(), unix.TCGETS)
	if err != nil {
		return err
	}
	r := *old
	r.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	r.Oflag &^= unix.OPOST
	r.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	r.Cflag = r.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	r.Cc[unix.VMIN], r.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(t.fd(), unix.TCSETS, &r); err != nil {
		return err
	}
	t.old = old
	return nil
}

func (t *terminal) restore() {
	if t.old != nil {
		_ = unix.IoctlSetTermios(t.fd(), unix.TCSETS, t.old)
		t.old = nil
	}
}

// sendOver sends a descriptor with a little text over a unix socket.
func sendOver(c net.Conn, text []byte, fd int) error {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return errors.New("not a unix socket")
	}
	_, _, err := u.WriteMsgUnix(text, unix.UnixRights(fd), nil)
	return err
}

// sendDescriptor sends one to whoever listens on the socket.
func sendDescriptor(path string, fd int, text string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	return sendOver(c, []byte(text), fd)
}

// listenFDs counts the descriptors of systemd's socket activation that are meant
// for us; they are passed on.
func listenFDs() int {
	defer func() {
		os.Unsetenv("LISTEN_PID")
		os.Unsetenv("LISTEN_FDS")
		os.Unsetenv("LISTEN_FDNAMES")
	}()
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return 0
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 1000 {
		return 0
	}
	return n
}

// notifyAgent sends the seccomp listener to the agent that the spec names, as the
// runtime spec has it (config-linux, seccomp).
func (b *birth) notifyAgent(fd int) error {
	r := b.rec.Servin.Filter
	if r == nil {
		return errors.New("a seccomp listener came without a filter")
	}
	return sendListener(r, b.ociState(specs.StateCreating, b.proc.pid), b.proc.pid, fd)
}

func sendListener(r *filterRecord, st *specs.State, pid, fd int) error {
	state, err := json.Marshal(specs.ContainerProcessState{
		Version: specs.Version, Fds: []string{specs.SeccompFdName}, Pid: pid, Metadata: r.Metadata, State: *st})
	if err != nil {
		return err
	}
	c, err := net.Dial("unix", r.Listener)
	if err != nil {
		return fmt.Errorf("failed to connect with seccomp agent specified in the seccomp profile: %w", err)
	}
	defer c.Close()
	if err := sendOver(c, state, fd); err != nil {
		return fmt.Errorf("cannot send seccomp fd to %s: %w", r.Listener, err)
	}
	return nil
}

// null is a descriptor of /dev/null, to write to.
func (s *streams) null() int {
	fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	s.opened = append(s.opened, fd)
	return fd
}
