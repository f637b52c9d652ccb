package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// nobody owns nothing.
const nobody = 65534

// slack is what a Go program maps beyond what it counts, tables and stacks.
const slack = 768 << 20

// confine gives the child namespaces of its own. As root it stays in ours for users
// and drops to nobody; else it is root of a user namespace for as long as it takes
// to change its root directory.
func confine(cmd *exec.Cmd, scratch string) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL, Setsid: true,
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(scratch, nobody, nobody); err != nil {
			return fmt.Errorf("cannot hand the scratch directory over: %w", err)
		}
		return nil
	}
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	return nil
}

// enterRoot leaves the host's files behind: the new root is a small read-only tmpfs
// with the scratch directory and the database.
func enterRoot(in *Inside) error {
	mount := func(src, dst, kind string, flags uintptr, data string) error {
		if err := unix.Mount(src, dst, kind, flags, data); err != nil {
			return fmt.Errorf("cannot mount %s for the stage: %w", dst, err)
		}
		return nil
	}
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	root := filepath.Join(filepath.Dir(in.Scratch), rootName)
	if err := mount("tmpfs", root, "tmpfs", quiet, "size=64k,mode=0755"); err != nil {
		return err
	}
	for _, d := range []string{ScratchDir, DatabaseDir} {
		if err := os.Mkdir(root+d, 0o755); err != nil {
			return err
		}
	}
	if err := bind(in.Scratch, root+ScratchDir, quiet); err != nil {
		return err
	}
	if in.Database != "" {
		if err := os.WriteFile(root+DatabasePath, nil, 0o644); err != nil {
			return err
		}
		if err := bind(in.Database, root+DatabasePath, quiet|unix.MS_RDONLY); err != nil {
			return err
		}
		in.Database = DatabasePath
	}
	if err := mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY|quiet, "size=64k,mode=0755"); err != nil {
		return err
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot change the root of the stage: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot leave the host's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	in.Scratch = ScratchDir
	return drop()
}

func bind(src, dst string, flags uintptr) error {
	if err := unix.Mount(src, dst, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot mount %s for the stage: %w", filepath.Base(src), err)
	}
	// What the host's mount forbids must be kept in a user namespace: asked for, too.
	var st unix.Statfs_t
	if err := unix.Statfs(dst, &st); err != nil {
		return err
	}
	for _, f := range [][2]uintptr{{unix.ST_NOATIME, unix.MS_NOATIME}, {unix.ST_RELATIME, unix.MS_RELATIME}, {unix.ST_NODIRATIME, unix.MS_NODIRATIME}, {unix.ST_RDONLY, unix.MS_RDONLY}} {
		if uintptr(st.Flags)&f[0] != 0 {
			flags |= f[1]
		}
	}
	if err := unix.Mount("", dst, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
		return fmt.Errorf("cannot restrict the mount of %s: %w", filepath.Base(src), err)
	}
	return nil
}

// drop gives every privilege up, in all threads.
func drop() error {
	var st unix.Stat_t
	if err := unix.Stat(ScratchDir, &st); err != nil {
		return err
	}
	if st.Uid == nobody {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(nobody, nobody, nobody), syscall.Setresuid(nobody, nobody, nobody)); err != nil {
			return fmt.Errorf("cannot become nobody: %w", err)
		}
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); e != 0 {
		return fmt.Errorf("cannot forbid new privileges: %w", e)
	}
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&none[0])), 0); e != 0 {
		return fmt.Errorf("cannot drop the capabilities: %w", e)
	}
	return nil
}

// limit sets the system's own limits and, last, the filter of system calls.
func limit(memory, disk int64, filter bool) error {
	for _, l := range []struct {
		what int
		most uint64
	}{
		{unix.RLIMIT_DATA, uint64(memory) + slack}, {unix.RLIMIT_FSIZE, uint64(disk)}, {unix.RLIMIT_CORE, 0}, {unix.RLIMIT_NOFILE, 1024},
	} {
		var now unix.Rlimit
		if err := unix.Getrlimit(l.what, &now); err == nil {
			l.most = min(l.most, now.Max)
		}
		if err := unix.Setrlimit(l.what, &unix.Rlimit{Cur: l.most, Max: l.most}); err != nil {
			return fmt.Errorf("cannot limit the stage: %w", err)
		}
	}
	if !filter {
		return nil
	}
	return filterSyscalls()
}

func fileTooLarge(err error) bool { return errors.Is(err, unix.EFBIG) || errors.Is(err, unix.ENOSPC) }

// refused are the system calls that no parser needs and an intruder would.
var refused = [...]uint32{
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4,
	unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_SENDMMSG,
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
	unix.SYS_PIDFD_GETFD, unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_KCMP, unix.SYS_KILL,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE,
	unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_FSCONFIG, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_SETHOSTNAME,
	unix.SYS_QUOTACTL, unix.SYS_ACCT, unix.SYS_SYSLOG,
}

const (
	retAllow = 0x7fff0000
	retKill  = 0x80000000
	retErrno = 0x00050000
	// x32 calls carry this bit on amd64.
	x32Bit = 0x40000000
)

func filterSyscalls() error {
	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 4}, // seccomp_data.arch
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipTrue: 1},
		bpf.RetConstant{Val: retKill},
		bpf.LoadAbsolute{Off: 0, Size: 4}, // seccomp_data.nr
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: x32Bit, SkipFalse: 1},
		bpf.RetConstant{Val: retKill},
	}
	for _, nr := range refused {
		prog = append(prog, bpf.JumpIf{Cond: bpf.JumpEqual, Val: nr, SkipFalse: 1}, bpf.RetConstant{Val: retErrno | uint32(unix.EPERM)})
	}
	raw, err := bpf.Assemble(append(prog, bpf.RetConstant{Val: retAllow}))
	if err != nil {
		return fmt.Errorf("cannot assemble the filter of system calls: %w", err)
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	p := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	const setModeFilter, tsync = 1, 1
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, setModeFilter, tsync, uintptr(unsafe.Pointer(&p))); e != 0 {
		return fmt.Errorf("cannot filter system calls: %w", e)
	}
	return nil
}
