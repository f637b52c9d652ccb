// Package criu speaks to CRIU, which writes the processes of containers down and
// brings them back. It is run as a service on one socket ("criu swrk") and spoken
// to as its rpc.proto has it.
//
// Vocabulary. A *session* is one such service; it carries out one request. While
// it does, it *notifies*: its caller does something and lets it go on. The *stage*
// is the process that a restore begins as (Main): it is born in the container's
// cgroup as its monitor's child, puts the container's mounts where CRIU finds
// them, in a mount namespace of its own, and becomes CRIU. The native runtime
// driver and the OCI command import this package.
package criu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Requests and answers (enum criu_req_type).
const (
	Dump        = 1
	Restore     = 2
	PreDump     = 4
	notify      = 6
	featureKind = 9
	versionKind = 10
)

// Fields of criu_opts.
const (
	OptImagesDirFD      = 1
	OptPID              = 2
	OptLeaveRunning     = 3
	OptExtUnixSk        = 4
	OptTCPEstablished   = 5
	OptEvasiveDevices   = 6
	OptShellJob         = 7
	OptFileLocks        = 8
	OptLogLevel         = 9
	OptLogFile          = 10
	OptPageServer       = 11
	OptNotifyScripts    = 12
	OptRoot             = 13
	OptParentImg        = 14
	OptTrackMem         = 15
	OptAutoDedup        = 16
	OptWorkDirFD        = 17
	OptLinkRemap        = 18
	OptExtMnt           = 23
	OptManageCgroups    = 24
	OptCgRoot           = 25
	OptRstSibling       = 26
	OptInheritFD        = 27
	OptManageCgroupMode = 34
	OptExternal         = 37
	OptEmptyNS          = 38
	OptJoinNS           = 39
	OptFreezeCgroup     = 44
	OptTCPSkipInFlight  = 46
	OptLazyPages        = 48
	OptOrphanPtsMaster  = 50
	OptConfigFile       = 51
	OptLSMProfile       = 53
	OptLSMMountContext  = 63
)

// Modes of OptManageCgroupMode.
const (
	CgroupsIgnore = 0
	CgroupsSoft   = 3
	CgroupsFull   = 4
	CgroupsStrict = 5
)

// NamespaceKey names a namespace that is given from outside: "net" or "pid".
func NamespaceKey(ns string) string {
	return "extRoot" + strings.ToUpper(ns[:1]) + ns[1:] + "NS"
}

// ErrMissing says that there is no CRIU and where it comes from.
var ErrMissing = errors.New("criu is not installed (Debian: apt-get install criu)")

// Find finds the program.
func Find() (string, error) {
	p, err := osexec.LookPath("criu")
	if err != nil {
		return "", ErrMissing
	}
	return filepath.Abs(p)
}

// Session is one conversation with the service.
type Session struct {
	cmd  *osexec.Cmd // nil where somebody else waits for it
	conn *net.UnixConn
	// Debug, if set, is told of notifications.
	Debug func(format string, args ...any)
}

// Start runs the service. Standard streams are what a restored process gets;
// further files are its descriptors from 4 on.
func Start(std [3]*os.File, extra []*os.File) (*Session, error) {
	path, err := Find()
	if err != nil {
		return nil, fmt.Errorf("cannot checkpoint or restore: %w", err)
	}
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(sp[0]), "criu"), os.NewFile(uintptr(sp[1]), "criu")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	s := &Session{cmd: osexec.Command(path, "swrk", "3"), conn: conn.(*net.UnixConn)}
	s.cmd.ExtraFiles = append([]*os.File{theirs}, extra...)
	// A signal for whoever runs us is not for it: what it has begun it must end.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if std[0] != nil {
		s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = std[0], std[1], std[2]
	}
	if err := s.cmd.Start(); err != nil {
		s.conn.Close()
		return nil, err
	}
	return s, nil
}

// On speaks to a service that a stage has become; Close does not wait for it.
func On(conn *net.UnixConn) *Session { return &Session{conn: conn} }

// PID is the service's process, 0 where somebody else runs it.
func (s *Session) PID() int {
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

// Close ends the service, which is idle or of no more use.
func (s *Session) Close() error {
	s.conn.Close()
	if s.cmd == nil {
		return nil
	}
	return s.cmd.Wait()
}

// answer is what came back: its type, the whole, and descriptors.
type answer struct {
	kind int
	*Fields
	fds []int
}

func (s *Session) ask(req Message) (*answer, error) {
	if _, err := s.conn.Write(req); err != nil {
		return nil, err
	}
	return s.read()
}

// RefusedError is a request that CRIU could not carry out; its log says why.
type RefusedError struct {
	Request int
	Errno   int
	Text    string
}

func (e *RefusedError) Error() string {
	text := e.Text
	if text != "" {
		text = ": " + text
	}
	return fmt.Sprintf("criu failed: request %d, errno %d%s", e.Request, e.Errno, text)
}

func (s *Session) read() (*answer, error) {
	buf, oob := make([]byte, 64<<10), make([]byte, 256)
	n, oobn, _, _, err := s.conn.ReadMsgUnix(buf, oob)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	a := &answer{}
	if cms, perr := unix.ParseSocketControlMessage(oob[:oobn]); perr == nil {
		for i := range cms {
			if fds, e := unix.ParseUnixRights(&cms[i]); e == nil {
				a.fds = append(a.fds, fds...)
			}
		}
	}
	if n == 0 {
		closeAll(a.fds)
		return nil, errors.New("criu ended without an answer")
	}
	if a.Fields, err = ReadFields(buf[:n]); err != nil {
		closeAll(a.fds)
		return nil, err
	}
	a.kind = int(a.Num[1])
	if a.Num[2] == 0 {
		closeAll(a.fds)
		return nil, &RefusedError{Request: a.kind, Errno: int(int32(a.Num[7])), Text: string(a.Data[9])}
	}
	return a, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// CarryOut sends a request and goes through its notifications until it is done.
// Descriptors are closed after the call.
func (s *Session) CarryOut(req Message, notified func(script string, pid int, fds []int) error) error {
	a, err := s.ask(req)
	for err == nil && a.kind == notify {
		n, nerr := ReadFields(a.Data[5])
		if nerr == nil {
			if s.Debug != nil {
				s.Debug("criu notifies: %s", n.Data[1])
			}
			nerr = notified(string(n.Data[1]), int(int32(n.Num[2])), a.fds)
		}
		closeAll(a.fds)
		if nerr != nil {
			return nerr
		}
		var ok Message
		ok.Uint(1, notify)
		ok.Bool(3, true)
		a, err = s.ask(ok)
	}
	return err
}

// Version asks which one it is: 31701 is 3.17.1.
func Version() (int, error) {
	s, err := Start([3]*os.File{}, nil)
	if err != nil {
		return 0, err
	}
	var req Message
	req.Uint(1, versionKind)
	a, err := s.ask(req)
	cerr := s.Close()
	if err != nil {
		return 0, fmt.Errorf("cannot ask criu for its version: %w", err)
	}
	v, err := ReadFields(a.Data[10])
	if err != nil {
		return 0, err
	}
	if cerr != nil && v.Num[1] == 0 {
		return 0, cerr
	}
	return int(v.Num[1])*10000 + int(v.Num[2])*100 + int(v.Num[4]), nil
}

// TracksMemory asks whether kernel and CRIU can tell which memory has changed since
// a pre-dump.
func TracksMemory() bool {
	s, err := Start([3]*os.File{}, nil)
	if err != nil {
		return false
	}
	var f, req Message
	f.Bool(1, true)
	req.Uint(1, featureKind)
	req.Bytes(8, f)
	a, err := s.ask(req)
	_ = s.Close()
	if err != nil {
		return false
	}
	got, err := ReadFields(a.Data[8])
	return err == nil && got.Num[1] == 1
}

// Usable tells whether CRIU knows this kernel; if not, the error holds its words.
func Usable(ctx context.Context) error {
	path, err := Find()
	if err != nil {
		return err
	}
	out, err := osexec.CommandContext(ctx, path, "check").CombinedOutput()
	if err == nil {
		return nil
	}
	last := ""
	for l := range strings.Lines(string(out)) {
		if strings.Contains(l, "Error") {
			last = strings.TrimSpace(l)
		}
	}
	if last == "" {
		last = err.Error()
	}
	return fmt.Errorf("criu does not know this kernel: %s", last)
}

// Errors gives the lines of CRIU's own log that tell of errors, at most n; the
// error is that the log cannot be read.
func Errors(dir, file string, n int) (lines []string, err error) {
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sc := bufio.NewScanner(io.LimitReader(f, 256<<20))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() && len(lines) < n {
		if strings.Contains(sc.Text(), "Error") {
			lines = append(lines, sc.Text())
		}
	}
	return lines, nil
}

// Reason is the line of the log that says why a request failed: the first error.
func Reason(dir, file string) string {
	lines, err := Errors(dir, file, 1)
	if err != nil || len(lines) == 0 {
		return ""
	}
	text := strings.TrimSpace(lines[0])
	if _, rest, ok := strings.Cut(text, ") "); ok && strings.HasPrefix(text, "(") {
		text = rest // without the time
	}
	if len(text) > 300 {
		text = text[:300]
	}
	return text
}
