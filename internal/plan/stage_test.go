package plan

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var builtDir atomic.Pointer[string]

// stageBinary builds the start-up stage alone.
var stageBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "stage-test-")
	if err != nil {
		return "", err
	}
	builtDir.Store(&dir)
	if err := os.Chmod(dir, 0o755); err != nil { // root of a user namespace runs it too
		return "", err
	}
	src, err := filepath.Glob("../../shim/stage*.c")
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, "stage")
	args := append([]string{"-std=c11", "-Os", "-static", "-Wall", "-Wextra", "-Werror", "-o", out, "../../shim/testdata/stage_driver.c"}, src...)
	if msg, err := exec.Command("musl-gcc", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, msg)
	}
	return out, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir := builtDir.Load(); dir != nil {
		os.RemoveAll(*dir)
	}
	os.Exit(code)
}

// sandbox drives one stage child as the monitor does.
type sandbox struct {
	t    testing.TB
	cmd  *exec.Cmd
	sync int
	fds  map[uint32]*os.File // what came back in FD messages
	log  *os.File
	done bool
}

func needStage(t testing.TB) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: plans are carried out as root")
	}
	if _, err := exec.LookPath("musl-gcc"); err != nil {
		t.Skip("SKIP: musl-gcc is not installed")
	}
	bin, err := stageBinary()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

func startStage(t testing.TB, p *Plan) *sandbox {
	t.Helper()
	bin := needStage(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	remote := os.NewFile(uintptr(pair[1]), "sync")
	s := &sandbox{t: t, sync: pair[0], fds: map[uint32]*os.File{}}
	s.log, err = os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	s.cmd = exec.Command(bin)
	s.cmd.Env = []string{}
	s.cmd.ExtraFiles = []*os.File{remote}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: uintptr(p.CloneFlags)}
	for _, m := range p.UIDMap {
		s.cmd.SysProcAttr.UidMappings = append(s.cmd.SysProcAttr.UidMappings, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	for _, m := range p.GIDMap {
		s.cmd.SysProcAttr.GidMappings = append(s.cmd.SysProcAttr.GidMappings, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	s.cmd.SysProcAttr.GidMappingsEnableSetgroups = true
	if len(p.UIDMap) > 0 {
		// the monitor's child does not exec, so it keeps its capabilities
		s.cmd.SysProcAttr.Credential = &syscall.Credential{}
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	remote.Close()
	t.Cleanup(s.close)
	return s
}

func (s *sandbox) close() {
	if !s.done {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.done = true
	}
	if s.sync >= 0 {
		unix.Close(s.sync)
		s.sync = -1
	}
	for _, f := range s.fds {
		f.Close()
	}
	s.log.Close()
}

func detached(path string, recursive bool, prop uint64) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, flags)
	if err != nil || prop == 0 {
		return fd, err
	}
	at := uint(unix.AT_EMPTY_PATH)
	if prop&unix.MS_REC != 0 {
		at |= unix.AT_RECURSIVE
	}
	return fd, unix.MountSetattr(fd, "", at, &unix.MountAttr{Propagation: prop &^ unix.MS_REC})
}

// slots opens what the plan asks for.
func (s *sandbox) slots(p *Plan, initPid int) []int {
	s.t.Helper()
	var fds []int
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(null) })
	for _, sl := range p.Slots {
		fd, err := -1, error(nil)
		switch sl.Kind {
		case SlotRoot, SlotMount, SlotDevice:
			fd, err = detached(sl.Source, sl.Recursive, sl.Propagation)
			if err == nil && sl.AttrSet|sl.AttrClear != 0 {
				at := uint(unix.AT_EMPTY_PATH)
				if sl.RecursiveAttr {
					at |= unix.AT_RECURSIVE
				}
				err = unix.MountSetattr(fd, "", at, &unix.MountAttr{Attr_set: sl.AttrSet, Attr_clr: sl.AttrClear})
			}
		case SlotCgroup:
			fd, err = unix.Open(sl.Source, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		case SlotNamespace:
			fd, err = unix.Open(sl.Source, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		case SlotPidfd:
			fd, err = unix.PidfdOpen(initPid, 0)
		case SlotStdio:
			if fd = null; sl.Source != "stdin" {
				fd, err = unix.Dup(int(s.log.Fd()))
			}
		case SlotExtra:
			fd, err = unix.Dup(int(s.log.Fd()))
		}
		if err != nil {
			s.t.Fatalf("slot %+v: %v", sl, err)
		}
		if fd != null {
			s.t.Cleanup(func() { unix.Close(fd) })
		}
		fds = append(fds, fd)
	}
	return fds
}

type stageError struct {
	op   uint32
	err  unix.Errno
	name string
}

func (e *stageError) Error() string { return fmt.Sprintf("%s: %v (operation %d)", e.name, e.err, e.op) }
func (e *stageError) Unwrap() error { return e.err }

// run sends the plan and waits for its answer. Started tells that the process
// was executed.
func (s *sandbox) run(p *Plan, initPid int) (started bool, err error) {
	s.t.Helper()
	raw, err := p.Encode()
	if err != nil {
		return false, err
	}
	if back, err := Decode(raw); err != nil || len(back.Ops) != len(p.Ops) {
		s.t.Fatalf("decode: %v", err)
	}
	return s.send(raw, s.slots(p, initPid))
}

func (s *sandbox) send(raw []byte, fds []int) (bool, error) {
	total := len(fds)
	head := binary.LittleEndian.AppendUint16(nil, 1)
	head = binary.LittleEndian.AppendUint16(head, 1)
	body := binary.LittleEndian.AppendUint32(nil, uint32(len(raw)))
	body = binary.LittleEndian.AppendUint32(body, uint32(total))
	if len(raw) <= 60000 {
		body = append(body, raw...)
	} else {
		fd, err := unix.MemfdCreate("plan", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			return false, err
		}
		f := os.NewFile(uintptr(fd), "plan")
		defer f.Close()
		if _, err := f.Write(raw); err != nil {
			return false, err
		}
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL); err != nil {
			return false, err
		}
		fds = append([]int{fd}, fds...)
	}
	msg := append(binary.LittleEndian.AppendUint32(head, uint32(len(body))), body...)
	n := min(len(fds), 250)
	if err := unix.Sendmsg(s.sync, msg, unix.UnixRights(fds[:n]...), nil, 0); err != nil {
		return false, err
	}
	for fds = fds[n:]; len(fds) > 0; fds = fds[n:] {
		n = min(len(fds), 250)
		more := []byte{1, 0, 2, 0, 4, 0, 0, 0}
		more = binary.LittleEndian.AppendUint32(more, uint32(n))
		if err := unix.Sendmsg(s.sync, more, unix.UnixRights(fds[:n]...), nil, 0); err != nil {
			return false, err
		}
	}
	for {
		buf, oob := make([]byte, 1024), make([]byte, 128)
		n, oobn, _, _, err := unix.Recvmsg(s.sync, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err != nil {
			return false, err
		}
		if n == 0 {
			return true, nil
		}
		le := binary.LittleEndian
		switch typ := le.Uint16(buf[2:]); typ {
		case 3:
			return false, nil
		case 4:
			return false, &stageError{le.Uint32(buf[8:]), unix.Errno(le.Uint32(buf[12:])), string(buf[17:n])}
		case 5:
			msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil || len(msgs) != 1 {
				return false, fmt.Errorf("FD message without a descriptor: %v", err)
			}
			got, err := unix.ParseUnixRights(&msgs[0])
			if err != nil {
				return false, err
			}
			unix.SetNonblock(got[0], true)
			s.fds[le.Uint32(buf[8:])] = os.NewFile(uintptr(got[0]), "fd")
		default:
			return false, fmt.Errorf("message of type %d", typ)
		}
	}
}

// wait lets the process end and gives its output and exit code.
func (s *sandbox) wait() (string, int) {
	s.t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { s.cmd.Process.Kill() })
	defer timer.Stop()
	s.cmd.Wait()
	s.done = true
	if _, err := s.log.Seek(0, io.SeekStart); err != nil {
		s.t.Fatal(err)
	}
	out, err := io.ReadAll(s.log)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(out), s.cmd.ProcessState.ExitCode()
}

// rootfs makes a root with busybox in it.
func rootfs(t testing.TB) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("SKIP: busybox is not installed")
	}
	dir := t.TempDir()
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "root"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), raw, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, a := range strings.Fields("sh cat ls true id stat stty mount umask echo hostname sleep env pwd touch tty kill ip readlink grep ulimit false mkdir head") {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// defaultSpec is what `runc spec` gives, with Docker's masks.
func defaultSpec(t testing.TB, root string, args ...string) *specs.Spec {
	t.Helper()
	raw, err := os.ReadFile("testdata/spec.json")
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(&s); err != nil {
		t.Fatal(err)
	}
	s.Root.Path = root
	s.Process.Args = args
	return &s
}

// start runs the spec to exec.
func start(t testing.TB, spec *specs.Spec, o Options) *sandbox {
	t.Helper()
	p, err := Compile(spec, o)
	if err != nil {
		t.Fatal(err)
	}
	s := startStage(t, p)
	started, err := s.run(p, 0)
	if err != nil || !started {
		t.Fatalf("started %v: %v", started, err)
	}
	return s
}

func TestDefaultContainer(t *testing.T) {
	needStage(t)
	spec := defaultSpec(t, rootfs(t), "sh", "-c", "cat /proc/self/mountinfo /proc/self/status; ls -l /dev; id; hostname; pwd; env; ls /proc/self/fd; cat /proc/kcore; ls /proc/acpi; echo 1 > /proc/sysrq-trigger; ip addr")
	out, code := start(t, spec, Options{ID: "t1"}).wait()
	t.Logf("exit %d\n%s", code, out)
}
