package shim

import (
	"encoding/binary"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Sizes and limits of the wire format; shim.h has the same.
const (
	ctlVersion = 1
	maxMsg     = 65536 + 8192
	maxFDs     = 250
	// InlinePlan is the longest plan that goes inside a message; a longer one
	// comes in a sealed memory file.
	InlinePlan = 60000
	hdrLen     = 12
)

type msgType uint16

const (
	ctlClone   msgType = 1
	ctlPlan    msgType = 2
	ctlMore    msgType = 3
	ctlStart   msgType = 4
	ctlRelease msgType = 5
	ctlExec    msgType = 6
	ctlSignal  msgType = 7
	ctlResize  msgType = 8
	ctlAttach  msgType = 9
	ctlReopen  msgType = 10
	ctlState   msgType = 11
	ctlQuit    msgType = 12

	ctlTerminal msgType = 13

	ctlCloned     msgType = 32
	ctlDone       msgType = 33
	ctlFailed     msgType = 34
	ctlStarted    msgType = 35
	ctlExited     msgType = 36
	ctlExecExited msgType = 37
	ctlStateIs    msgType = 38
	ctlFD         msgType = 39
)

const (
	cloneHasCgroup uint32 = 1
	cloneHasPIDNS  uint32 = 2
	cloneHasUserNS uint32 = 4

	startStdin     uint32 = 1
	startStdout    uint32 = 2
	startStderr    uint32 = 4
	startLogPipe   uint32 = 8
	startTerminal  uint32 = 16
	startStdinOnce uint32 = 32
	startNonBlock  uint32 = 64
	startEphemeral uint32 = 128
	startHold      uint32 = 256
	startPIDNS     uint32 = 512
	startCommand   uint32 = 1024
	startHoldFile  uint32 = 2048

	execHasCgroup uint32 = 1
	execTerminal  uint32 = 2

	attachStdin    uint32 = 1
	attachStdout   uint32 = 2
	attachStderr   uint32 = 4
	attachLossless uint32 = 8
)

// LogFormat tells how the monitor frames output.
type LogFormat uint8

// The formats.
const (
	LogNone LogFormat = 0
	LogJSON LogFormat = 1
	LogK8s  LogFormat = 2
	LogPipe LogFormat = 3
)

// Phase tells how far a monitor's container has come.
type Phase uint32

// The phases.
const (
	Empty    Phase = 0
	Parked   Phase = 1
	Starting Phase = 2
	Held     Phase = 3
	Running  Phase = 4
	Exited   Phase = 5
)

// Started tells that a process has been executed.
type Started struct {
	PID int
	At  int64 // nanoseconds since 1970
	PTY int   // master of an exec's terminal, -1 none
}

// Exit tells how a process ended.
type Exit struct {
	Status  syscall.WaitStatus
	At      int64
	Dropped uint64
}

// State is a monitor's answer to what it is doing.
type State struct {
	Phase     Phase
	PID       int
	StartedAt int64
	Dropped   uint64
	Terminal  bool
	Ephemeral bool
	Clients   int
}

// StageError is a failure of one operation of a plan, or with Op -1 of the
// monitor itself.
type StageError struct {
	Op   int
	Name string
	Err  syscall.Errno
	// Hook is how a hook ended that failed; Err is ECHILD then.
	Hook syscall.WaitStatus
}

func (e *StageError) Error() string { return "cannot " + e.Name + ": " + e.Err.Error() }
func (e *StageError) Unwrap() error { return e.Err }

type message struct {
	typ    msgType
	cookie uint32
	body   []byte
	fds    []int
	lost   bool // it came with descriptors that could not be taken in
}

var le = binary.LittleEndian

func header(t msgType, cookie uint32, n int) []byte {
	b := make([]byte, 0, hdrLen+32)
	b = le.AppendUint16(b, ctlVersion)
	b = le.AppendUint16(b, uint16(t))
	b = le.AppendUint32(b, cookie)
	return le.AppendUint32(b, uint32(n))
}

func malformed(what string) error {
	return fault.New(fault.Internal, "cannot read %s from the monitor: malformed", what)
}

func decode(b []byte) (message, error) {
	if len(b) < hdrLen {
		return message{}, malformed("a message")
	}
	if v := le.Uint16(b); v != ctlVersion {
		return message{}, fault.New(fault.Unsupported, "cannot speak version %d of the monitor's protocol", v)
	}
	m := message{typ: msgType(le.Uint16(b[2:])), cookie: le.Uint32(b[4:]), body: b[hdrLen:]}
	if int(le.Uint32(b[8:])) != len(m.body) {
		return message{}, malformed("a message")
	}
	return m, nil
}

func decodeStarted(b []byte) (Started, error) {
	if len(b) != 12 {
		return Started{}, malformed("a start")
	}
	return Started{PID: int(le.Uint32(b)), At: int64(le.Uint64(b[4:])), PTY: -1}, nil
}

func decodeExit(b []byte) (Exit, error) {
	if len(b) != 20 {
		return Exit{}, malformed("an exit")
	}
	return Exit{Status: syscall.WaitStatus(le.Uint32(b)), At: int64(le.Uint64(b[4:])), Dropped: le.Uint64(b[12:])}, nil
}

func decodeState(b []byte) (State, error) {
	if len(b) < 32 {
		return State{}, malformed("a state")
	}
	flags := le.Uint32(b[24:])
	return State{
		Phase: Phase(le.Uint32(b)), PID: int(le.Uint32(b[4:])), StartedAt: int64(le.Uint64(b[8:])),
		Dropped: le.Uint64(b[16:]), Terminal: flags&startTerminal != 0, Ephemeral: flags&startEphemeral != 0,
		Clients: int(le.Uint32(b[28:])),
	}, nil
}

func decodeFailure(b []byte) error {
	if len(b) < 9 || len(b) != 9+int(b[8]) {
		return malformed("a failure")
	}
	// Numbers over 4095 are no errno, and 0 would be success.
	raw := le.Uint32(b[4:])
	if raw>>16 == 1 {
		return &StageError{Op: int(int32(le.Uint32(b))), Name: string(b[9:]), Err: syscall.ECHILD, Hook: syscall.WaitStatus(raw & 0xffff)}
	}
	errno := syscall.Errno(raw)
	if errno == 0 || errno > 4095 {
		errno = syscall.EPROTO
	}
	return &StageError{Op: int(int32(le.Uint32(b))), Name: string(b[9:]), Err: errno}
}
