package plan

import (
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cloudos-io/cloudos/internal/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestSeccompNotify: the listener's descriptor arrives even if the filter asks
// about the very calls that could send it.
func TestSeccompNotify(t *testing.T) {
	needStage(t)
	prog, err := seccomp.Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"mkdir", "mkdirat", "sendmsg", "sendto"}, Action: specs.ActNotify}}})
	if err != nil || !prog.Notify {
		t.Fatalf("%+v: %v", prog, err)
	}
	for _, nnp := range []bool{false, true} {
		spec := defaultSpec(t, rootfs(t), "sh", "-c", "mkdir /tmp/x; ls /proc/self/fd")
		spec.Process.NoNewPrivileges = nnp
		s := start(t, spec, Options{Seccomp: prog.Filter, SeccompFlags: prog.Flags, SeccompNotify: true})
		f := s.fds[2]
		if f == nil {
			t.Fatal("no descriptor came back")
		}
		if err := answer(int(f.Fd()), unix.EBADMSG); err != nil {
			t.Fatal(err)
		}
		out, _ := s.wait()
		if !strings.Contains(out, "Bad message") || !strings.HasSuffix(out, "0\n1\n2\n3\n") {
			t.Fatalf("no_new_privs %v: %s", nnp, out)
		}
	}
}

// answer lets one call fail with the error.
func answer(fd int, e unix.Errno) error {
	type notif struct {
		id         uint64
		pid, flags uint32
		data       [64]byte
	}
	type resp struct {
		id         uint64
		val        int64
		err, flags uint32
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		if n, err := unix.Poll(poll, 1000); n == 1 {
			break
		} else if err != nil && err != unix.EINTR {
			return err
		}
	}
	var n notif
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno != 0 {
		return errno
	}
	r := resp{id: n.id, err: uint32(-int32(e))}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}
