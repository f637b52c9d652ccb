package native

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/criu"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/runtime/source"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	stageSocket  = "criu.sock"
	stageDir     = "criu"
	stagePatient = 15 * time.Second
)

// restore brings a task back from images: in the place of the start-up stage the
// monitor runs one that becomes CRIU (package criu), so that the processes it makes
// are the monitor's. Mounts, network, limits and streams are made of the spec, as
// for any start; before the processes run they are held against it (audit).
func (s *start) restore(ctx context.Context) (*task, error) {
	d, req := s.d, s.req
	if err := s.check(); err != nil {
		return nil, err
	}
	if s.sb != nil { // a parked one has a stage of the other kind
		s.sb.discard()
		s.sb = nil
	}
	if err := s.restorable(); err != nil {
		return nil, err
	}
	if _, err := criu.Find(); err != nil {
		return nil, fault.New(fault.Unsupported, "cannot restore: %w", err)
	}
	var warnings []string
	s.spec, warnings = d.limits.clamp(req.Spec)
	if err := s.compile(ctx); err != nil {
		return nil, err
	}
	if err := d.tear.wait(ctx, req.ID); err != nil {
		return nil, err
	}
	var err error
	if s.sb, err = d.newSandbox(req.ID, req.Key); err != nil {
		return nil, err
	}
	s.sb.closeTasks()
	if s.sb.netns, err = s.networkNamespace(); err != nil {
		return nil, err
	}
	if ch := s.network(ctx); ch != nil {
		if err := <-ch; err != nil {
			return nil, err
		}
	}
	w, err := s.sb.group.Apply(s.spec.Linux.Resources)
	if err != nil {
		return nil, err
	}
	if s.std, err = newStdio(req.Stdio, s.spec); err != nil {
		return nil, err
	}
	defer s.std.close()
	s.task = newTask(s.sb, s.spec, req)
	s.task.filter = s.filter
	s.task.warnings = append(warnings, w...)
	if err := s.bringBack(ctx); err != nil {
		return nil, err
	}
	return s.task, nil
}

// restorable refuses what CRIU cannot bring back, or not into a container of its own.
func (s *start) restorable() error {
	if s.d.limits.userNS || s.d.cg.Mode == cgroup.None {
		return fault.New(fault.Unsupported, "cannot restore: CRIU needs root and cgroups, which an ordinary user's engine has not")
	}
	if s.req.StopAfterCreate && s.req.Stdio.Attach == nil {
		return fault.New(fault.Unsupported, "cannot restore: the process cannot be held before it runs")
	}
	own := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range s.req.Spec.Linux.Namespaces {
		if ns.Path == "" {
			own[ns.Type] = true
		} else if ns.Type != specs.NetworkNamespace {
			return fault.New(fault.Unsupported, "cannot restore: the %s namespace is another container's", ns.Type)
		}
		if ns.Type == specs.UserNamespace {
			return fault.New(fault.Unsupported, "cannot restore into a user namespace")
		}
	}
	if !own[specs.PIDNamespace] || !own[specs.MountNamespace] {
		return fault.New(fault.Unsupported, "cannot restore: the container has no process namespace of its own")
	}
	binds := bindsOf(s.req.Spec)
	for _, b := range s.req.Images.Binds {
		if !slices.Contains(binds, filepath.Clean(b)) {
			return fault.New(fault.Invalid, "cannot restore: the checkpoint has a mount at %.128s, and the container has none", b)
		}
	}
	for _, n := range s.req.Images.Streams {
		if n != "" && !streamName(n) {
			return fault.New(fault.Invalid, "cannot restore: %.64q is no stream's name", n)
		}
	}
	return nil
}

// networkNamespace makes the container's, or opens the one that it is to share; nil
// is the host's.
func (s *start) networkNamespace() (*os.File, error) {
	for _, ns := range s.spec.Linux.Namespaces {
		if ns.Type != specs.NetworkNamespace {
			continue
		}
		if ns.Path != "" {
			fd, err := source.Namespace(ns.Path)
			if err != nil {
				return nil, err
			}
			return os.NewFile(uintptr(fd), ns.Path), nil
		}
		f, err := newNetwork(s.spec.Linux.Sysctl)
		if err != nil {
			return nil, fault.New(fault.Internal, "cannot make a network namespace: %w", err)
		}
		return f, nil
	}
	return nil, nil
}

// newNetwork makes a network namespace with its loopback link up.
func newNetwork(sysctls map[string]string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		// The thread has left the host's network for good, and ends with this.
		runtime.LockOSThread()
		f, err := func() (*os.File, error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return nil, os.NewSyscallError("unshare", err)
			}
			f, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return nil, err
			}
			if err := loopback(); err != nil {
				f.Close()
				return nil, err
			}
			for k, v := range sysctls {
				k, ok := strings.CutPrefix(strings.ReplaceAll(k, "/", "."), "net.")
				if !ok {
					continue
				}
				if err := writeSysctl(strings.ReplaceAll(k, ".", "/"), v); err != nil {
					f.Close()
					return nil, err
				}
			}
			return f, nil
		}()
		done <- result{f, err}
	}()
	r := <-done
	return r.f, r.err
}

// writeSysctl sets one of the network's, of the thread that calls it.
func writeSysctl(name, value string) error {
	dir, err := unix.Open("/proc/sys/net", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{Flags: unix.O_WRONLY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return &os.PathError{Op: "set", Path: "net/" + name, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return &os.PathError{Op: "set", Path: "net/" + name, Err: err}
	}
	return nil
}

func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("ioctl", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r))
}

// bringBack has the monitor run the stage, tells that its order and CRIU what to
// do, and takes the processes over.
func (s *start) bringBack(ctx context.Context) error {
	t, req, mon := s.task, s.req, s.sb.mon
	l, err := listen(s.sb.dir)
	if err != nil {
		return fault.New(fault.Internal, "cannot listen for the restore's stage: %w", err)
	}
	defer l.Close()
	r := s.startRequest()
	// The engine's own program, also when its file has been replaced.
	r.Command = []string{"/proc/" + strconv.Itoa(os.Getpid()) + "/exe", criu.StageArg, stageSocket}
	r.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "GOMAXPROCS=1"}
	r.Plan.Slots = s.std.inside[:]
	if req.Stdio.Terminal {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return fault.New(fault.Internal, "cannot open the null device: %w", err)
		}
		defer null.Close()
		fd := int(null.Fd())
		r.Plan.Slots = []int{fd, fd, fd}
	}
	if req.Stdio.Attach != nil {
		if t.first, err = s.attachFirst(); err != nil {
			return err
		}
	}
	s.sb.relay.bind(notices{t})
	pend, err := mon.Start(r)
	if err != nil {
		return startError(err)
	}
	s.std.close()
	conn, err := s.accept(ctx, l)
	if err != nil {
		return err
	}
	defer conn.Close()
	o, err := s.order(conn)
	if err != nil {
		return err
	}
	c := criu.On(conn)
	var m criu.Message
	m.Int(1, criu.Restore)
	m.Bytes(2, *o)
	var ours error // what we refused, not CRIU
	err = c.CarryOut(m, func(script string, pid int, fds []int) error {
		ours = s.notified(ctx, script, pid, fds)
		return ours
	})
	_ = c.Close()
	if ours != nil {
		return ours
	}
	if err != nil {
		return criuError("bring the processes back", err, req.Images.Work, restoreLog)
	}
	if err := pend.Done(ctx); err != nil {
		return criuError("bring the processes back", startError(err), req.Images.Work, restoreLog)
	}
	if err := t.save(); err != nil {
		return err
	}
	if pend, err = mon.Release(); err != nil {
		return startError(err)
	}
	st, err := pend.Started(ctx)
	if err != nil {
		return startError(err)
	}
	t.started(st.PID, time.Unix(0, st.At))
	if req.Stdio.Terminal && req.Stdio.Width > 0 && req.Stdio.Height > 0 {
		_ = mon.Resize(ctx, req.Stdio.Width, req.Stdio.Height)
	}
	s.sb.closeFiles()
	s.d.mu.Lock()
	s.d.tasks[t.id] = t
	s.d.mu.Unlock()
	t.mu.Lock()
	t.live = true
	t.mu.Unlock()
	select {
	case <-s.sb.relay.lost: // meanwhile
		t.lost()
	default:
	}
	return nil
}

// listen makes the socket that the stage connects to, in the run directory.
func listen(dir string) (*net.UnixListener, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// By its descriptor: names of sockets are short.
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(fdDir(f), stageSocket), Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // it goes with the directory
	return l, nil
}

// accept waits for the stage and puts it into the container's cgroup.
func (s *start) accept(ctx context.Context, l *net.UnixListener) (*net.UnixConn, error) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	died := make(chan struct{})
	defer close(died)
	go func() {
		select {
		case <-s.sb.mon.Done():
			l.Close()
		case <-died:
		}
	}()
	_ = l.SetDeadline(time.Now().Add(stagePatient))
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot run the restore's stage: %w", err)
	}
	fail := func(err error) (*net.UnixConn, error) {
		conn.Close()
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return fail(err)
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return fail(err)
	}
	if cerr != nil || int(cred.Uid) != os.Geteuid() {
		return fail(fault.New(fault.Forbidden, "cannot run the restore's stage: somebody else has connected"))
	}
	pid := int(cred.Pid)
	s.stage = pid
	if err := s.sb.group.Join(pid); err != nil {
		return fail(err)
	}
	if !s.d.systemd {
		for _, dir := range s.sb.group.Paths() {
			if err := os.WriteFile(dir+"/cgroup.procs", []byte(strconv.Itoa(pid)), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fail(fault.New(fault.Internal, "cannot put the restore into the container's cgroup: %w", err))
			}
		}
	}
	return conn, nil
}

// order tells the stage what to prepare, waits until it has become CRIU, and gives
// the options that CRIU is to be told.
func (s *start) order(conn *net.UnixConn) (*criu.Message, error) {
	im, dir := s.req.Images, filepath.Join(s.sb.dir, stageDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fault.New(fault.Internal, "cannot make the restore's directory: %w", err)
	}
	path, err := criu.Find()
	if err != nil {
		return nil, fault.New(fault.Unsupported, "cannot restore: %w", err)
	}
	var o criu.Message
	o.Int(criu.OptImagesDirFD, int(im.Dir.Fd()))
	// It mounts something where it works: that has to be a place of its own mount
	// namespace, which a descriptor of ours is not.
	conf := filepath.Join(s.sb.dir, "criu.conf")
	if err := os.WriteFile(conf, []byte(fmt.Sprintf("work-dir %q\n", im.Work.Name())), 0o600); err != nil {
		return nil, fault.New(fault.Internal, "cannot write criu's configuration: %w", err)
	}
	o.Str(criu.OptConfigFile, conf)
	o.Int(criu.OptLogLevel, 4)
	o.Str(criu.OptLogFile, restoreLog)
	o.Str(criu.OptRoot, filepath.Join(dir, "root"))
	o.Bool(criu.OptNotifyScripts, true)
	o.Bool(criu.OptManageCgroups, true)
	o.Int(criu.OptManageCgroupMode, criu.CgroupsSoft)
	o.Bool(criu.OptOrphanPtsMaster, true)
	o.Bool(criu.OptEvasiveDevices, true)
	o.Bool(criu.OptRstSibling, true)
	o.Bool(criu.OptTCPEstablished, im.TCPEstablished)
	o.Bool(criu.OptFileLocks, im.FileLocks)
	o.Bool(criu.OptLinkRemap, true)
	order := criu.Order{CRIU: path, Dir: dir}
	root := &plan.Slot{Kind: plan.SlotRoot}
	for i := range s.p.Slots {
		if s.p.Slots[i].Kind == plan.SlotRoot {
			root = &s.p.Slots[i]
		}
	}
	fds := []int{int(s.req.RootFS.Fd())}
	if err := source.SetAttr(fds[0], root); err != nil {
		return nil, &contract.StartError{Step: "prepare the root file system", Err: err}
	}
	var opened []int
	defer func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}()
	slot := 0
	for i := range s.spec.Mounts {
		m := &s.spec.Mounts[i]
		if !isBind(m) {
			order.Places = s.place(order.Places, m.Destination, false)
			continue
		}
		for slot < len(s.p.Slots) && !(s.p.Slots[slot].Kind == plan.SlotMount && s.p.Slots[slot].Source == m.Source) {
			slot++
		}
		if slot == len(s.p.Slots) {
			return nil, fault.New(fault.Internal, "cannot restore: the plan lacks the mount %s", m.Destination)
		}
		fd, err := source.Mount(&s.p.Slots[slot], s.d.exe.Path())
		if err != nil {
			return nil, err
		}
		slot++
		opened, fds = append(opened, fd), append(fds, fd)
		sm := criu.StageMount{Name: "m" + strconv.Itoa(i), File: isFile(fd)}
		order.Mounts = append(order.Mounts, sm)
		order.Places = s.place(order.Places, m.Destination, sm.File)
		o.Pair(criu.OptExtMnt, filepath.Clean("/"+m.Destination), filepath.Join(dir, sm.Name))
	}
	null, err := source.Mount(&plan.Slot{Kind: plan.SlotMount, Source: os.DevNull}, s.d.exe.Path())
	if err != nil {
		return nil, err
	}
	opened, fds = append(opened, null), append(fds, null)
	order.Mounts = append(order.Mounts, criu.StageMount{Name: "null", File: true})
	o.Pair(criu.OptExtMnt, nullKey, filepath.Join(dir, "null"))
	if s.sb.netns != nil {
		order.Network = true
		fds = append(fds, int(s.sb.netns.Fd()))
		o.Inherit(criu.NamespaceKey("net"), criu.StageNetwork)
	}
	if !s.req.Stdio.Terminal {
		for i, name := range im.Streams {
			if name != "" {
				o.Inherit(name, i)
			}
		}
	}
	if err := s.cgroupRoots(&o); err != nil {
		return nil, err
	}
	if len(fds) > 250 {
		return nil, fault.New(fault.Unsupported, "cannot restore: the container has too many mounts (%d)", len(fds))
	}
	b, err := json.Marshal(order)
	if err != nil {
		return nil, err
	}
	if _, _, err := conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil); err != nil {
		return nil, fault.New(fault.Internal, "cannot tell the restore's stage: %w", err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(stagePatient))
	defer conn.SetReadDeadline(time.Time{})
	buf := make([]byte, 4096)
	n, err := conn.Read(buf)
	var rep criu.Report
	if err == nil {
		err = json.Unmarshal(buf[:n], &rep)
	}
	if err == nil && rep.Error != "" {
		err = errors.New(rep.Error)
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot prepare the restore: %w", err)
	}
	return &o, nil
}

// place adds a mount point, unless it lies on a file system that CRIU fills itself.
func (s *start) place(places []criu.Place, path string, file bool) []criu.Place {
	path = filepath.Clean("/" + path)
	for i := range s.spec.Mounts {
		if strings.HasPrefix(path, filepath.Clean("/"+s.spec.Mounts[i].Destination)+"/") {
			return places
		}
	}
	return append(places, criu.Place{Path: path, File: file})
}

func isFile(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR
}

// cgroupRoots tells CRIU where the container's groups are: what it makes comes
// there, whatever the images say.
func (s *start) cgroupRoots(o *criu.Message) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.stage))
	if err != nil {
		return fault.New(fault.Internal, "cannot find the restore's cgroup: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			for _, ctrl := range strings.Split(f[1], ",") {
				o.Pair(criu.OptCgRoot, ctrl, f[2])
			}
		}
	}
	return nil
}

// notified does what CRIU asks for on its way.
func (s *start) notified(ctx context.Context, script string, pid int, fds []int) error {
	switch script {
	case "orphan-pts-master":
		if len(fds) != 1 || !s.req.Stdio.Terminal {
			return fault.New(fault.Invalid, "cannot restore: the images hold a terminal that the container has not")
		}
		if err := s.sb.mon.Terminal(ctx, fds[0]); err != nil {
			return startError(err)
		}
	case "post-restore":
		// The monitor adopts the process by this once CRIU has ended.
		if err := replaceFile(s.sb.dir, "pid", []byte(strconv.Itoa(pid))); err != nil {
			return fault.New(fault.Internal, "cannot tell the monitor of the process: %w", err)
		}
	case "pre-resume":
		if err := s.audit(); err != nil {
			// Nothing of it has run yet, and nothing will.
			_ = s.sb.group.Signal(ctx, int(unix.SIGKILL))
			return err
		}
	}
	return nil
}
