package shim

import (
	"errors"
	"io"
	"os"
	"syscall"
	"unsafe"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// LaunchRequest makes a stage child without a monitor (see launch.c).
type LaunchRequest struct {
	Namespaces uint64 // CLONE_NEW*
	Cgroup     int    // v2 directory to be born in, -1 none
	PIDNS      int    // pid namespace to be born in, -1 none
	UserNS     int    // user namespace that owns what is created, -1 none
	Join       []int  // other namespaces to enter
	Stdio      [3]int // what the child has at first
}

// Stage is a start-up stage that this process speaks to directly. It is a child
// of this process, and of its subreaper when this process ends.
type Stage struct {
	PID, PIDFD int
	sock       int
}

// Launch runs the launcher and waits until it has made the stage. What there is to
// do meanwhile is done by while.
func (e *Executable) Launch(r LaunchRequest, while func() error) (*Stage, error) {
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	s := &Stage{PIDFD: -1, sock: sp[0]}
	var fds []int
	var flags uint32
	for _, f := range []struct {
		fd   int
		flag uint32
	}{{r.Cgroup, cloneHasCgroup}, {r.PIDNS, cloneHasPIDNS}, {r.UserNS, cloneHasUserNS}} {
		if f.fd >= 0 {
			flags |= f.flag
			fds = append(fds, f.fd)
		}
	}
	fds = append(fds, r.Join...)
	head := le.AppendUint32(le.AppendUint64(nil, r.Namespaces), flags)
	head = le.AppendUint32(head, 0)
	// It waits in the socket when the launcher begins.
	err = s.sendmsg(append(header(ctlClone, 0, len(head)), head...), fds)
	var pid int
	if err == nil {
		pid, err = syscall.ForkExec(e.path, []string{"servin-shim", "launch"}, &syscall.ProcAttr{
			Env: []string{}, Files: []uintptr{uintptr(r.Stdio[0]), uintptr(r.Stdio[1]), uintptr(r.Stdio[2]), uintptr(sp[1])}})
		if err != nil {
			err = fault.New(fault.Internal, "cannot run servin-shim: %w", err)
		}
	}
	unix.Close(sp[1])
	if err != nil {
		s.Close()
		return nil, err
	}
	if while != nil {
		err = while()
	}
	b, got, rerr := s.recv()
	err = errors.Join(err, rerr)
	for {
		if _, werr := syscall.Wait4(pid, nil, 0, nil); werr != syscall.EINTR {
			break
		}
	}
	var m message
	if rerr == nil {
		var derr error
		m, derr = decode(b)
		err = errors.Join(err, derr)
	}
	switch {
	case err == nil && m.typ == ctlFailed:
		err = decodeFailure(m.body)
	case err == nil && (m.typ != ctlCloned || len(m.body) != 4 || len(got) != 1):
		err = malformed("the launcher's answer")
	}
	if err != nil {
		closeAll(got)
		s.Close() // a stage that was made ends by that
		if m.typ == ctlCloned && len(m.body) == 4 {
			_, _ = syscall.Wait4(int(le.Uint32(m.body)), nil, 0, nil)
		}
		return nil, err
	}
	s.PID, s.PIDFD = int(le.Uint32(m.body)), got[0]
	return s, nil
}

// Mapped tells a stage in a new user namespace that its ids have been mapped.
func (s *Stage) Mapped() error { return s.sendmsg([]byte{1}, nil) }

// Run sends a plan. What comes of it is read with Next.
func (s *Stage) Run(p Plan) error {
	all, code := p.Slots, p.Code
	if len(code) > InlinePlan {
		fd, err := planFile(code)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		all, code = append([]int{fd}, all...), nil
	}
	b := le.AppendUint16(nil, syncVersion)
	b = le.AppendUint16(b, syncPlan)
	b = le.AppendUint32(b, uint32(8+len(code)))
	b = le.AppendUint32(b, uint32(len(p.Code)))
	b = le.AppendUint32(b, uint32(len(p.Slots)))
	first := all[:min(len(all), maxFDs)]
	if err := s.sendmsg(append(b, code...), first); err != nil {
		return err
	}
	for rest := all[len(first):]; len(rest) > 0; {
		part := rest[:min(len(rest), maxFDs)]
		rest = rest[len(part):]
		b := le.AppendUint16(nil, syncVersion)
		b = le.AppendUint16(b, syncMore)
		b = le.AppendUint32(b, 4)
		if err := s.sendmsg(le.AppendUint32(b, uint32(len(part))), part); err != nil {
			return err
		}
	}
	return nil
}

const (
	syncVersion = 1
	syncPlan    = 1
	syncMore    = 2
	syncDone    = 3
	syncFail    = 4
	syncFD      = 5
	syncWant    = 7
)

// What a descriptor that comes from a stage is.
const (
	StageTerminal = 1
	StageSeccomp  = 2
)

// StageEvent is one message of a stage.
type StageEvent struct {
	// Done: the plan has been carried out, or the process waits at its gate.
	Done bool
	// What tells what FD is; 0 and -1 where none came. FD is the caller's to close.
	What int
	FD   int
	// Want: the stage waits for the descriptor of Slot (see Give).
	Want bool
	Slot int
}

// Next waits for the stage's next message. A failure is a *StageError, io.EOF the
// end of the conversation: the plan ended in exec, or the stage has died.
func (s *Stage) Next() (StageEvent, error) {
	ev := StageEvent{FD: -1}
	b, fds, err := s.recv()
	if err != nil {
		return ev, err
	}
	if len(b) < 8 || le.Uint16(b) != syncVersion || int(le.Uint32(b[4:])) != len(b)-8 {
		closeAll(fds)
		return ev, malformed("the stage's message")
	}
	switch typ := le.Uint16(b[2:]); {
	case typ == syncDone:
		ev.Done = true
	case typ == syncWant && len(b) == 12:
		ev.Want, ev.Slot = true, int(le.Uint32(b[8:]))
	case typ == syncFail:
		closeAll(fds)
		return ev, decodeFailure(b[8:])
	case typ == syncFD && len(b) == 12 && len(fds) == 1:
		ev.What, ev.FD = int(le.Uint32(b[8:])), fds[0]
		return ev, nil
	default:
		closeAll(fds)
		return ev, malformed("the stage's message")
	}
	closeAll(fds)
	return ev, nil
}

// Give answers a stage that waits for a slot's descriptor, which stays the caller's.
func (s *Stage) Give(fd int) error {
	b := le.AppendUint16(nil, syncVersion)
	b = le.AppendUint16(b, syncMore)
	b = le.AppendUint32(b, 4)
	return s.sendmsg(le.AppendUint32(b, 1), []int{fd})
}

// Close ends the conversation; a stage that still takes plans ends by it.
func (s *Stage) Close() {
	if s.sock >= 0 {
		unix.Close(s.sock)
		s.sock = -1
	}
}

func (s *Stage) sendmsg(b []byte, fds []int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(s.sock, b, oob, nil, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("sendmsg", err)
		}
	}
}

// await waits for something to read without letting the Go scheduler know: there
// is nothing else to do meanwhile, and handing the processor from one thread to
// another and back takes longer than what is waited for.
func (s *Stage) await() {
	p := unix.PollFd{Fd: int32(s.sock), Events: unix.POLLIN}
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, 0, 0, 0, 0)
}

func (s *Stage) recv() ([]byte, []int, error) {
	var buf [1024]byte
	var oob [64]byte
	for {
		s.await()
		n, oobn, flags, _, err := unix.Recvmsg(s.sock, buf[:], oob[:], unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ECONNRESET {
			// It ended with something of ours unread.
			return nil, nil, io.EOF
		}
		if err != nil {
			return nil, nil, os.NewSyscallError("recvmsg", err)
		}
		var fds []int
		if cms, perr := unix.ParseSocketControlMessage(oob[:oobn]); perr == nil {
			for i := range cms {
				if f, e := unix.ParseUnixRights(&cms[i]); e == nil {
					fds = append(fds, f...)
				}
			}
		}
		if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			closeAll(fds)
			return nil, nil, errors.New("message is too long")
		}
		if n == 0 {
			closeAll(fds)
			return nil, nil, io.EOF
		}
		return buf[:n], fds, nil
	}
}
