package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Config tells Gather what it cannot find out.
type Config struct {
	Root, RunRoot string
	Rootless      bool
	// Capabilities the engine has, all there are, and what AppArmor and SELinux
	// say, as probed by packages oci and apparmor.
	Capabilities, AllCapabilities []string
	AppArmor, SELinux             string
	SubordinateIDs                string
	// Built is when the engine was built, zero if unknown.
	Built time.Time
}

// Gather probes the host. It changes nothing: what it mounts is attached nowhere
// and gone with its descriptor, and its one directory is removed.
func Gather(ctx context.Context, cfg Config) Facts {
	f := Facts{
		Syscalls: syscalls(), Rootless: cfg.Rootless, AppArmor: cfg.AppArmor, SELinux: cfg.SELinux, SubordinateIDs: cfg.SubordinateIDs,
		KeysMax: sysctl("kernel/keys/maxkeys"), KeysRootMax: sysctl("kernel/keys/root_maxkeys"),
		InotifyInstances: sysctl("fs/inotify/max_user_instances"), InotifyWatches: sysctl("fs/inotify/max_user_watches"),
		PidMax: sysctl("kernel/pid_max"), ThreadsMax: sysctl("kernel/threads-max"),
		MaxUserNS: sysctl("user/max_user_namespaces"), MaxNetNS: sysctl("user/max_net_namespaces"), MaxMntNS: sysctl("user/max_mnt_namespaces"),
		UnprivilegedUserNS: sysctl("kernel/unprivileged_userns_clone"), AppArmorUserNS: sysctl("kernel/apparmor_restrict_unprivileged_userns"),
		IPv4Forward: sysctl("net/ipv4/ip_forward"), IPv6Forward: sysctl("net/ipv6/conf/all/forwarding"),
		BridgeNF: map[string]int64{}, Seccomp: seccompFilter(),
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		f.Kernel = unix.ByteSliceToString(uts.Release[:])
		f.Major, f.Minor = version(f.Kernel)
	}
	for _, v := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		f.BridgeNF[v] = sysctl("net/bridge/" + v)
	}
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		f.NoFileSoft, f.NoFileHard = lim.Cur, lim.Max
	}
	for _, c := range cfg.AllCapabilities {
		if !slices.Contains(cfg.Capabilities, c) {
			f.MissingCaps = append(f.MissingCaps, c)
		}
	}
	f.Cgroup = cgroupLayout(cfg.Rootless)
	f.Root, f.RunRoot = disk(cfg.Root), disk(cfg.RunRoot)
	f.Overlay, f.IDMap, f.UserNS = mounts(ctx, cfg.Root)

	var tx unix.Timex
	if state, err := unix.Adjtimex(&tx); err == nil {
		f.ClockUnsynced = state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0
	}
	f.ClockBeforeBuild = !cfg.Built.IsZero() && time.Now().Before(cfg.Built.Add(-24*time.Hour))
	return f
}

// sysctl reads a number, -1 where there is none.
func sysctl(name string) int64 {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return -1
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return -1
	}
	return n
}

func version(release string) (major, minor int) {
	a, rest, _ := strings.Cut(release, ".")
	b, _, _ := strings.Cut(rest, ".")
	major, _ = strconv.Atoi(a)
	if i := strings.IndexFunc(b, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		b = b[:i]
	}
	minor, _ = strconv.Atoi(b)
	return major, minor
}

func why(err error) string {
	if err == nil {
		return ""
	}
	var e unix.Errno
	if errors.As(err, &e) {
		return e.Error()
	}
	return err.Error()
}

// syscalls tries each call in a way that has no effect.
func syscalls() map[string]string {
	out := map[string]string{}
	// with gives the probe's error unless it is the one that proves the call is there.
	with := func(name string, err error, proof ...unix.Errno) {
		for _, p := range proof {
			if errors.Is(err, p) {
				err = nil
			}
		}
		out[name] = why(err)
	}
	closing := func(fd int, err error) error {
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_CLONE3, 0, 0, 0)
	with("clone3", errOf(errno), unix.EINVAL, unix.EFAULT)
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	with("openat2", closing(fd, err))
	fd, err = unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLOEXEC)
	with("open_tree", closing(fd, err))
	with("move_mount", unix.MoveMount(-1, "", -1, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH), unix.EBADF)
	fd, err = unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	with("fsopen", closing(fd, err))
	with("mount_setattr", unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}), unix.EBADF)
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	with("pidfd_open", err)
	if err == nil {
		fd, err = unix.PidfdGetfd(pidfd, 0, 0)
		with("pidfd_getfd", closing(fd, err), unix.EBADF)
		unix.Close(pidfd)
	}
	// A range that holds nothing.
	with("close_range", unix.CloseRange(^uint(0)-1, ^uint(0), 0), unix.EINVAL)
	return out
}

func errOf(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// seccompFilter asks for the action every filter has; the call knows no other effect.
func seccompFilter() bool {
	action := uint32(unix.SECCOMP_RET_ALLOW)
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	return e == 0
}

func disk(path string) Disk {
	d := Disk{Path: path}
	if path == "" {
		return d
	}
	var st unix.Statfs_t
	at := path
	for unix.Statfs(at, &st) != nil {
		up := filepath.Dir(at)
		if up == at {
			return d
		}
		at = up // not made yet: what it will be made on
	}
	d.Type = fsName(int64(st.Type))
	d.Free, d.Total = uint64(st.Bavail)*uint64(st.Bsize), uint64(st.Blocks)*uint64(st.Bsize)
	d.InodesFree, d.InodesTotal = st.Ffree, st.Files
	d.ReadOnly = st.Flags&unix.ST_RDONLY != 0
	if st.Type == unix.XFS_SUPER_MAGIC {
		d.NoDType = noDType(at)
	}
	return d
}

func fsName(magic int64) string {
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "nfs", unix.FUSE_SUPER_MAGIC: "fuse", unix.F2FS_SUPER_MAGIC: "f2fs",
		unix.RAMFS_MAGIC: "ramfs", 0x2fc12fc1: "zfs", 0xca451a4e: "bcachefs",
	}
	if n, ok := names[magic]; ok {
		return n
	}
	return fmt.Sprintf("0x%x", magic)
}

// noDType tells whether reading a directory leaves out the entries' types.
func noDType(dir string) bool {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	n, err := unix.Getdents(fd, buf)
	if err != nil || n < int(unsafe.Offsetof(unix.Dirent{}.Name)) {
		return false
	}
	// The first entry is "." or "..", which every file system knows to be a directory.
	return buf[unsafe.Offsetof(unix.Dirent{}.Type)] == unix.DT_UNKNOWN
}

func cgroupLayout(rootless bool) Cgroup {
	var c Cgroup
	v1, v2 := map[string]bool{}, ""
	info, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.SplitSeq(string(info), "\n") {
		before, after, ok := strings.Cut(line, " - ")
		fields, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(super) < 3 {
			continue
		}
		switch super[0] {
		case "cgroup":
			for o := range strings.SplitSeq(super[2], ",") {
				v1[o] = true
			}
		case "cgroup2":
			if v2 == "" || fields[4] == "/sys/fs/cgroup" {
				v2 = fields[4]
			}
		}
	}
	known := []string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "net_cls", "net_prio", "perf_event", "pids", "rdma", "misc"}
	for _, k := range known {
		if v1[k] {
			c.Controllers = append(c.Controllers, k)
		}
	}
	own := ""
	if v2 != "" {
		own = filepath.Join(v2, ownGroup())
	}
	switch {
	case len(c.Controllers) > 0 && v2 != "":
		c.Mode = "hybrid"
	case len(c.Controllers) > 0:
		c.Mode = "v1"
	case v2 != "":
		c.Mode = "v2"
		at := v2
		if rootless {
			at = own
		}
		b, _ := os.ReadFile(filepath.Join(at, "cgroup.controllers"))
		c.Controllers = strings.Fields(string(b))
		if t, err := os.ReadFile(filepath.Join(own, "cgroup.type")); err == nil && bytes.Contains(t, []byte("threaded")) {
			c.NoDomain = "it is of type " + strings.TrimSpace(string(t))
		}
		if rootless && unix.Access(own, unix.W_OK) != nil {
			c.Controllers, c.Mode = nil, "none"
		}
	default:
		c.Mode = "none"
	}
	if rootless && c.Mode != "v2" {
		c.Mode, c.Controllers = "none", nil
	}
	switch c.Mode {
	case "v2":
		_, err := os.Stat(filepath.Join(own, "memory.swap.max"))
		c.SwapAccounting = err == nil || ownGroup() == "/" // the root group lacks the file
	default:
		_, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
		c.SwapAccounting = err == nil
	}
	return c
}

// ownGroup is the path of this process's v2 group.
func ownGroup() string {
	b, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.SplitSeq(string(b), "\n") {
		if p, ok := strings.CutPrefix(line, "0::"); ok {
			return p
		}
	}
	return "/"
}

const probePrefix = ".doctor-"

// mounts tries an overlay and an idmapped mount on the root's file system, as
// detached mounts, and a user namespace.
func mounts(ctx context.Context, root string) (overlay, idmap, userns string) {
	ns, err := userNamespace(ctx)
	userns = why(err)
	if ns != nil {
		defer ns.Close()
	}
	if root == "" {
		return "", "", userns
	}
	// A probe that was killed leaves its directory to the next one.
	old, _ := filepath.Glob(filepath.Join(root, probePrefix+"*"))
	for _, o := range old {
		if st, err := os.Lstat(o); err == nil && st.IsDir() && time.Since(st.ModTime()) > time.Hour {
			_ = os.RemoveAll(o)
		}
	}
	dir, err := os.MkdirTemp(root, probePrefix)
	if err != nil {
		return why(err), why(err), userns
	}
	defer os.RemoveAll(dir)
	for _, d := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return why(err), why(err), userns
		}
	}
	overlay = why(tryOverlay(dir))
	if ns == nil {
		return overlay, "no user namespace to map by", userns
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
		unix.Close(tree)
	}
	return overlay, why(err), userns
}

func tryOverlay(dir string) error {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fs)
	for _, o := range []string{"lower", "upper", "work"} {
		if err := unix.FsconfigSetString(fs, o+"dir", filepath.Join(dir, o)); err != nil {
			return err
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return err
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(mnt)
}

// userNamespace makes one and returns it. A namespace needs a process: ours is
// stopped by ptrace before its first instruction and killed.
func userNamespace(ctx context.Context) (*os.File, error) {
	type result struct {
		ns  *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		// The tracer is a thread, and the child dies with it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
		if u := os.Geteuid(); u != 0 {
			ids[0].HostID = u
		}
		gids := slices.Clone(ids)
		gids[0].HostID = os.Getegid()
		p, err := os.StartProcess("/proc/self/exe", []string{"userns"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: gids,
			Ptrace: true, Pdeathsig: syscall.SIGKILL,
		}})
		if err != nil {
			done <- result{nil, err}
			return
		}
		ns, err := os.Open("/proc/" + strconv.Itoa(p.Pid) + "/ns/user")
		_ = p.Kill()
		_, _ = p.Wait()
		done <- result{ns, err}
	}()
	select {
	case r := <-done:
		return r.ns, r.err
	case <-ctx.Done():
		go func() { // whatever comes of it is closed
			if r := <-done; r.ns != nil {
				r.ns.Close()
			}
		}()
		return nil, ctx.Err()
	}
}
