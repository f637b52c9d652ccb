package shim

import (
	"context"
	"errors"
	"os"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

// Plan is an encoded plan with the descriptors of its slots, in order. The
// sender keeps the descriptors.
type Plan struct {
	Code  []byte
	Slots []int
}

// request sends a message whose payload is head, and the plan if there is one;
// fds go before the plan's slots.
func (m *Monitor) request(t msgType, head []byte, fds []int, plan *Plan) (*Pending, error) {
	p, err := m.expect()
	if err != nil {
		return nil, err
	}
	if err := m.transmit(p.cookie, t, head, fds, plan); err != nil {
		p.forget()
		if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			err = ErrGone
		}
		return nil, err
	}
	return p, nil
}

func (m *Monitor) transmit(cookie uint32, t msgType, head []byte, fds []int, plan *Plan) error {
	if plan == nil {
		return m.c.send([][]byte{header(t, cookie, len(head)), head}, fds)
	}
	pl := le.AppendUint32(le.AppendUint32(nil, uint32(len(plan.Code))), uint32(len(plan.Slots)))
	code := plan.Code
	all := append(append(make([]int, 0, len(fds)+1+len(plan.Slots)), fds...), -1)[:len(fds)]
	if len(head)+len(code) > InlinePlan {
		fd, err := planFile(code)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		all, code = append(all, fd), nil
	}
	all = append(all, plan.Slots...)
	first := all[:min(len(all), maxFDs)]
	if err := m.c.send([][]byte{header(t, cookie, len(head)+len(pl)+len(code)), head, pl, code}, first); err != nil {
		return err
	}
	for rest := all[len(first):]; len(rest) > 0; {
		part := rest[:min(len(rest), maxFDs)]
		rest = rest[len(part):]
		n := le.AppendUint32(nil, uint32(len(part)))
		if err := m.c.send([][]byte{header(ctlMore, cookie, len(n)), n}, part); err != nil {
			return err
		}
	}
	return nil
}

func planFile(code []byte) (int, error) {
	fd, err := unix.MemfdCreate("plan", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	for off := 0; off < len(code); {
		n, err := unix.Pwrite(fd, code[off:], int64(off))
		if err != nil {
			unix.Close(fd)
			return -1, os.NewSyscallError("write", err)
		}
		off += n
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("fcntl", err)
	}
	return fd, nil
}

// CloneRequest makes the stage child.
type CloneRequest struct {
	Namespaces uint64 // CLONE_NEW*
	Cgroup     int    // v2 directory to be born in, -1 none
	PIDNS      int    // pid namespace to be born in, -1 none
	UserNS     int    // user namespace that owns what is created, -1 none
	Nice       int    // what the process is to have once started
}

// Cloned is the stage child. PIDFD is the caller's to close.
type Cloned struct{ PID, PIDFD int }

// Clone makes the stage child and waits for it.
func (m *Monitor) Clone(ctx context.Context, r CloneRequest) (Cloned, error) {
	var fds []int
	var flags uint32
	if r.Cgroup >= 0 {
		flags |= cloneHasCgroup
		fds = append(fds, r.Cgroup)
	}
	if r.PIDNS >= 0 {
		flags |= cloneHasPIDNS
		fds = append(fds, r.PIDNS)
	}
	if r.UserNS >= 0 {
		flags |= cloneHasUserNS
		fds = append(fds, r.UserNS)
	}
	b := le.AppendUint64(nil, r.Namespaces)
	b = le.AppendUint32(le.AppendUint32(b, flags), uint32(int32(r.Nice)))
	p, err := m.request(ctlClone, b, fds, nil)
	if err != nil {
		return Cloned{PIDFD: -1}, err
	}
	msg, err := p.wait(ctx, ctlCloned)
	if err != nil {
		return Cloned{PIDFD: -1}, err
	}
	if len(msg.fds) != 1 || len(msg.body) != 4 {
		closeAll(msg.fds)
		return Cloned{PIDFD: -1}, malformed("a clone")
	}
	return Cloned{PID: int(le.Uint32(msg.body)), PIDFD: msg.fds[0]}, nil
}

// Run has the stage carry a plan out that does not end in exec.
func (m *Monitor) Run(p Plan) (*Pending, error) { return m.request(ctlPlan, nil, nil, &p) }

// StartRequest is everything the monitor needs to know about the container.
type StartRequest struct {
	Plan Plan
	// Hold, if not nil, is the plan that ends in exec; the first one then does not.
	Hold []byte
	// Stdin is the write end of a pipe, Stdout and Stderr are read ends, LogPipe
	// is a write end; -1 none.
	Stdin, Stdout, Stderr, LogPipe           int
	Terminal, StdinOnce, NonBlock, Ephemeral bool
	OwnPIDNamespace                          bool
	// Command, if not nil, makes the container instead of a plan; Plan.Slots are
	// its three standard descriptors. No Clone comes before.
	Command, Env  []string
	Format        LogFormat
	LogPath       string
	LogSize       int64
	LogFiles      int
	LogBuffer     int64
	Width, Height uint16
}

// Start begins the start; Pending.Started, or with Hold Pending.Done, waits for it.
func (m *Monitor) Start(r StartRequest) (*Pending, error) {
	if len(r.LogPath) > 4000 {
		return nil, fault.New(fault.Invalid, "cannot start: the log's path is too long")
	}
	var flags uint32
	var fds []int
	for _, f := range []struct {
		fd  int
		bit uint32
	}{{r.Stdin, startStdin}, {r.Stdout, startStdout}, {r.Stderr, startStderr}, {r.LogPipe, startLogPipe}} {
		if f.fd >= 0 {
			flags |= f.bit
			fds = append(fds, f.fd)
		}
	}
	for _, f := range []struct {
		on  bool
		bit uint32
	}{{r.Terminal, startTerminal}, {r.StdinOnce, startStdinOnce}, {r.NonBlock, startNonBlock}, {r.Ephemeral, startEphemeral}, {r.Hold != nil, startHold}, {r.OwnPIDNamespace, startPIDNS}} {
		if f.on {
			flags |= f.bit
		}
	}
	if r.Command != nil {
		flags |= startCommand
		r.Plan.Code = commandBlock(r.Command, r.Env)
	}
	var held []byte
	if r.Hold != nil {
		held = le.AppendUint32(le.AppendUint32(nil, uint32(len(r.Hold))), 0)
		if len(r.Hold) <= InlinePlan/2 { // the other plan has to fit as well
			held = append(held, r.Hold...)
		} else {
			fd, err := planFile(r.Hold)
			if err != nil {
				return nil, err
			}
			defer unix.Close(fd)
			flags |= startHoldFile
			fds = append(fds, fd)
		}
	}
	b := make([]byte, 0, 64+len(r.LogPath)+len(held))
	b = le.AppendUint32(b, flags)
	b = append(b, byte(r.Format), byte(min(max(r.LogFiles, 1), 255)))
	b = le.AppendUint16(b, uint16(len(r.LogPath)))
	b = le.AppendUint64(b, uint64(max(r.LogSize, 0)))
	b = le.AppendUint64(b, uint64(max(r.LogBuffer, 0)))
	b = le.AppendUint16(le.AppendUint16(b, r.Width), r.Height)
	b = le.AppendUint32(b, uint32(len(held)))
	b = append(append(b, r.LogPath...), held...)
	return m.request(ctlStart, b, fds, &r.Plan)
}

func commandBlock(args, env []string) []byte {
	var b []byte
	for _, list := range [][]string{args, env} {
		for _, s := range list {
			b = append(append(b, s...), 0)
		}
		b = append(b, 0)
	}
	return b
}

// Terminal gives the monitor the master of the terminal of a container that a
// command made.
func (m *Monitor) Terminal(ctx context.Context, master int) error {
	p, err := m.request(ctlTerminal, nil, []int{master}, nil)
	if err != nil {
		return err
	}
	return p.Done(ctx)
}

// Release lets a held start go on; Pending.Started waits for it.
func (m *Monitor) Release() (*Pending, error) { return m.request(ctlRelease, nil, nil, nil) }

// Exec runs a plan that enters the container and ends in exec. The handler's
// ExecExited gets the request's cookie. cgroup is a v2 directory or -1.
func (m *Monitor) Exec(p Plan, cgroup int, terminal bool) (*Pending, error) {
	var flags uint32
	var fds []int
	if cgroup >= 0 {
		flags |= execHasCgroup
		fds = append(fds, cgroup)
	}
	if terminal {
		flags |= execTerminal
	}
	return m.request(ctlExec, le.AppendUint32(nil, flags), fds, &p)
}

// Signal sends a signal to an exec, or with cookie 0 to init.
func (m *Monitor) Signal(ctx context.Context, cookie uint32, sig int) error {
	p, err := m.request(ctlSignal, le.AppendUint32(le.AppendUint32(nil, cookie), uint32(int32(sig))), nil, nil)
	if err != nil {
		return err
	}
	return p.Done(ctx)
}

// Resize sets the size of the container's terminal.
func (m *Monitor) Resize(ctx context.Context, width, height uint16) error {
	p, err := m.request(ctlResize, le.AppendUint16(le.AppendUint16(nil, width), height), nil, nil)
	if err != nil {
		return err
	}
	return p.Done(ctx)
}

// AttachRequest connects a client: Stdin is a SEQPACKET socket (see Input),
// Stdout and Stderr are write ends of pipes; -1 none. The caller keeps them.
type AttachRequest struct {
	Stdin, Stdout, Stderr int
	// Lossless makes the container wait for a slow client instead of dropping it.
	Lossless bool
}

// Attach connects a client. Sent before Start it misses no output.
func (m *Monitor) Attach(r AttachRequest) (*Pending, error) {
	var flags uint32
	var fds []int
	for _, f := range []struct {
		fd  int
		bit uint32
	}{{r.Stdin, attachStdin}, {r.Stdout, attachStdout}, {r.Stderr, attachStderr}} {
		if f.fd >= 0 {
			flags |= f.bit
			fds = append(fds, f.fd)
		}
	}
	if r.Lossless {
		flags |= attachLossless
	}
	return m.request(ctlAttach, le.AppendUint32(nil, flags), fds, nil)
}

// Reopen makes the monitor open its log path again, or use a new pipe.
func (m *Monitor) Reopen(ctx context.Context, pipe int) error {
	var fds []int
	if pipe >= 0 {
		fds = []int{pipe}
	}
	p, err := m.request(ctlReopen, nil, fds, nil)
	if err != nil {
		return err
	}
	return p.Done(ctx)
}

// State asks how far the container has come. A monitor whose container has
// ended also repeats the Exited notice.
func (m *Monitor) State(ctx context.Context) (State, error) {
	p, err := m.request(ctlState, nil, nil, nil)
	if err != nil {
		return State{}, err
	}
	msg, err := p.wait(ctx, ctlStateIs)
	if err != nil {
		return State{}, err
	}
	return decodeState(msg.body)
}

// Quit makes the monitor of an ended or parked container drop its clients and end.
func (m *Monitor) Quit() error {
	return m.c.send([][]byte{header(ctlQuit, 0, 0)}, nil)
}
