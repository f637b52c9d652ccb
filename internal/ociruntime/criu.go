package ociruntime

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CRIU does the work of a checkpoint. It is run as a service on one socket (criu
// swrk), and spoken to as its rpc.proto has it.

// Requests and answers (enum criu_req_type).
const (
	criuDump    = 1
	criuRestore = 2
	criuPreDump = 4
	criuNotify  = 6
	criuFeature = 9
	criuVersion = 10
)

// Fields of criu_opts.
const (
	optImagesDirFD      = 1
	optPID              = 2
	optLeaveRunning     = 3
	optExtUnixSk        = 4
	optTCPEstablished   = 5
	optEvasiveDevices   = 6
	optShellJob         = 7
	optFileLocks        = 8
	optLogLevel         = 9
	optLogFile          = 10
	optPageServer       = 11
	optNotifyScripts    = 12
	optRoot             = 13
	optParentImg        = 14
	optTrackMem         = 15
	optAutoDedup        = 16
	optWorkDirFD        = 17
	optLinkRemap        = 18
	optExtMnt           = 23
	optManageCgroups    = 24
	optCgRoot           = 25
	optRstSibling       = 26
	optInheritFD        = 27
	optManageCgroupMode = 34
	optExternal         = 37
	optEmptyNS          = 38
	optJoinNS           = 39
	optFreezeCgroup     = 44
	optTCPSkipInFlight  = 46
	optLazyPages        = 48
	optOrphanPtsMaster  = 50
	optConfigFile       = 51
	optLSMProfile       = 53
	optLSMMountContext  = 63
)

// criu is one conversation with the service.
type criu struct {
	cmd  *osexec.Cmd
	conn *net.UnixConn
	log  *logger
}

// startCRIU runs the service. Standard streams are what a restored process gets;
// further files are its descriptors from 4 on.
func startCRIU(log *logger, std [3]*os.File, extra []*os.File) (*criu, error) {
	path, err := osexec.LookPath("criu")
	if err != nil {
		return nil, errors.New("cannot checkpoint or restore: criu is not installed (Debian: apt-get install criu)")
	}
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(sp[0]), "criu"), os.NewFile(uintptr(sp[1]), "criu")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, err
	}
	c := &criu{cmd: osexec.Command(path, "swrk", "3"), conn: conn.(*net.UnixConn), log: log}
	c.cmd.ExtraFiles = append([]*os.File{theirs}, extra...)
	if std[0] != nil {
		c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = std[0], std[1], std[2]
	}
	err = c.cmd.Start()
	theirs.Close()
	if err != nil {
		c.conn.Close()
		return nil, err
	}
	return c, nil
}

// close ends the service, which is idle or of no more use.
func (c *criu) close() error {
	c.conn.Close()
	return c.cmd.Wait()
}

// answer is what came back: its type, the whole, and descriptors.
type answer struct {
	kind int
	*fields
	fds []int
}

// ask sends a request and reads one answer.
func (c *criu) ask(req pb) (*answer, error) {
	if _, err := c.conn.Write(req); err != nil {
		return nil, err
	}
	return c.read()
}

func (c *criu) read() (*answer, error) {
	buf, oob := make([]byte, 64<<10), make([]byte, 256)
	n, oobn, _, _, err := c.conn.ReadMsgUnix(buf, oob)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if n == 0 {
		return nil, errors.New("criu ended without an answer")
	}
	a := &answer{}
	if a.fields, err = readFields(buf[:n]); err != nil {
		return nil, err
	}
	if cms, perr := unix.ParseSocketControlMessage(oob[:oobn]); perr == nil {
		for i := range cms {
			if fds, e := unix.ParseUnixRights(&cms[i]); e == nil {
				a.fds = append(a.fds, fds...)
			}
		}
	}
	a.kind = int(a.num[1])
	if a.num[2] == 0 {
		text := ""
		if msg := a.data[9]; len(msg) > 0 {
			text = ": " + string(msg)
		}
		return nil, fmt.Errorf("criu failed: request %d, errno %d%s", a.kind, int32(a.num[7]), text)
	}
	return a, nil
}

// carryOut sends a request and goes through its notifications until it is done.
func (c *criu) carryOut(req pb, notified func(script string, pid int, fds []int) error) error {
	a, err := c.ask(req)
	for err == nil && a.kind == criuNotify {
		n, nerr := readFields(a.data[5])
		if nerr == nil {
			c.log.Debugf("criu notifies: %s", n.data[1])
			nerr = notified(string(n.data[1]), int(int32(n.num[2])), a.fds)
		}
		for _, fd := range a.fds {
			unix.Close(fd)
		}
		if nerr != nil {
			return nerr
		}
		var ok pb
		ok.uint(1, criuNotify)
		ok.bool(3, true)
		a, err = c.ask(ok)
	}
	return err
}

// version asks which one it is: 31701 is 3.17.1.
func version(log *logger) (int, error) {
	c, err := startCRIU(log, [3]*os.File{}, nil)
	if err != nil {
		return 0, err
	}
	var req pb
	req.uint(1, criuVersion)
	a, err := c.ask(req)
	cerr := c.close()
	if err != nil {
		return 0, fmt.Errorf("cannot ask criu for its version: %w", err)
	}
	v, err := readFields(a.data[10])
	if err != nil {
		return 0, err
	}
	if cerr != nil && v.num[1] == 0 {
		return 0, cerr
	}
	return int(v.num[1])*10000 + int(v.num[2])*100 + int(v.num[4]), nil
}

// quoteErrors logs what criu's own log says of errors.
func quoteErrors(log *logger, dir, file string) {
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		log.Warnf("%v; criu check may tell what this kernel lacks", err)
		return
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for n := 0; s.Scan() && n < 20; {
		if strings.Contains(s.Text(), "Error") {
			log.Warnf("criu: %s", s.Text())
			n++
		}
	}
}
