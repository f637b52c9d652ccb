package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/plan"
	"github.com/cloudos-io/cloudos/internal/runtime/source"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// process is a child that runs, or is about to run, in a container.
type process struct {
	pid, pidfd int
	start      uint64
	stage      *shim.Stage
}

// kill ends the process and buries it.
func (p *process) kill() {
	if p.stage != nil {
		p.stage.Close()
	}
	if p.pidfd >= 0 {
		_ = unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0)
	}
	for {
		if _, err := unix.Wait4(p.pid, nil, 0, nil); err != unix.EINTR {
			break
		}
	}
	p.release()
}

// release forgets a process that goes on without us.
func (p *process) release() {
	if p.stage != nil {
		p.stage.Close()
	}
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
		p.pidfd = -1
	}
}

// launch makes the process and takes it as far as it is to go: to its gate, or to
// the program itself.
func (b *birth) launch() error {
	if err := b.clone(); err != nil {
		return err
	}
	if b.rec.Config.Cgroups.Systemd {
		if err := b.cg.Apply(b.proc.pid); err != nil {
			return fmt.Errorf("unable to apply cgroup configuration: %w", err)
		}
		if err := b.applyLimits(); err != nil {
			return err
		}
	}
	if err := b.mapIDs(); err != nil {
		return err
	}
	if err := b.record(); err != nil {
		return err
	}
	if err := b.moveDevices(); err != nil {
		return err
	}
	return b.carryOut()
}

// record writes down that there is a container now.
func (b *birth) record() error {
	b.rec.InitPID, b.rec.InitStart = b.proc.pid, b.proc.start
	b.rec.CgroupPaths = b.cg.GetPaths()
	b.rec.NamespacePaths = map[string]string{}
	for _, n := range namespaces {
		b.rec.NamespacePaths[namespaceName(n.kind)] = "/proc/" + strconv.Itoa(b.proc.pid) + "/ns/" + n.file
	}
	for i := range b.io.inside {
		target, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(b.io.inside[i]))
		b.rec.Descriptors = append(b.rec.Descriptors, target)
	}
	if err := b.save(); err != nil {
		return err
	}
	os.Remove(b.filePath(draftName))
	return nil
}

func (b *birth) applyLimits() error {
	if err := b.cg.Set(b.rec.Config.Cgroups.Resources); err != nil {
		return fmt.Errorf("unable to apply cgroup configuration: %w", err)
	}
	return nil
}

// namespaces are those of a container, with their files' names under /proc/PID/ns.
var namespaces = []struct {
	kind specs.LinuxNamespaceType
	file string
	flag uint64
}{
	{specs.CgroupNamespace, "cgroup", unix.CLONE_NEWCGROUP}, {specs.IPCNamespace, "ipc", unix.CLONE_NEWIPC},
	{specs.NetworkNamespace, "net", unix.CLONE_NEWNET}, {specs.PIDNamespace, "pid", unix.CLONE_NEWPID},
	{specs.TimeNamespace, "time", unix.CLONE_NEWTIME}, {specs.UserNamespace, "user", unix.CLONE_NEWUSER},
	{specs.UTSNamespace, "uts", unix.CLONE_NEWUTS}, {specs.MountNamespace, "mnt", unix.CLONE_NEWNS},
}

// compile makes the plan; pid is what startContainer hooks are told.
func (b *birth) compile(pid int) error {
	var err error
	b.hookAt, b.opts.RootPath = nil, ""
	//nolint:staticcheck // prestart is deprecated, not gone
	if h := b.hooks(); len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer) > 0 {
		b.opts.RootPath = b.spec.Root.Path
	}
	if h := b.hooks().StartContainer; len(h) > 0 {
		b.opts.StartHooks = h
		if b.opts.StartState, err = json.Marshal(b.ociState(specs.StateCreated, pid)); err != nil {
			return err
		}
	}
	if b.p, err = plan.Compile(b.spec, b.opts); err != nil {
		return err
	}
	b.hookAt = map[int]int{}
	for i, op := range b.p.Ops {
		if op.Kind == plan.OpHook {
			b.hookAt[i] = len(b.hookAt)
		}
	}
	return nil
}

// clone makes the stage, in all its namespaces.
func (b *birth) clone() error {
	pid := 1
	pidPath, ownPID := findNamespace(b.spec, specs.PIDNamespace)
	userPath, _ := findNamespace(b.spec, specs.UserNamespace)
	joined := userPath != "" && len(b.spec.Linux.UIDMappings)+len(b.spec.Linux.GIDMappings) == 0
	if joined {
		// Its mappings can be read once there is a process inside.
		any := []specs.LinuxIDMapping{{Size: math.MaxUint32}}
		b.spec.Linux.UIDMappings, b.spec.Linux.GIDMappings = any, any
	}
	if err := b.compile(pid); err != nil {
		return err
	}
	r := shim.LaunchRequest{Namespaces: b.p.CloneFlags, Cgroup: -1, PIDNS: -1, UserNS: -1, Stdio: b.io.inside}
	var opened []int
	defer func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}()
	for _, n := range b.spec.Linux.Namespaces {
		if n.Path == "" {
			continue
		}
		fd, err := source.Namespace(n.Path)
		if err != nil {
			return err
		}
		opened = append(opened, fd)
		if typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || uint64(uint32(typ)) != flagOf(n.Type) {
			return fmt.Errorf("namespace path %s is not that of a %s namespace", n.Path, n.Type)
		}
		switch n.Type {
		case specs.PIDNamespace:
			r.PIDNS = fd
		case specs.UserNamespace:
			r.UserNS = fd
		default:
			r.Join = append(r.Join, fd)
		}
	}
	if dir, ok := b.dirs[""]; ok && dir != "" && !b.rec.Config.Cgroups.Systemd {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			opened = append(opened, fd)
			r.Cgroup = fd
		} else if !b.rec.Config.Cgroups.Rootless {
			return &os.PathError{Op: "open", Path: dir, Err: err}
		}
	}
	// Known words, for who reads runc's log.
	b.app.log.Debugf("runc exeseal: using /proc/self/exe clone: a sealed memory file, in the place of \"runc exeseal: using overlayfs for sealed /proc/self/exe\"")
	b.app.log.Debugf("nsexec container setup: clone with namespaces %#x", r.Namespaces)
	st, err := b.exe.Launch(r, func() error {
		if b.rec.Config.Cgroups.Systemd {
			return nil // there is no cgroup yet
		}
		return b.applyLimits()
	})
	if err != nil && r.Cgroup >= 0 && b.rec.Config.Cgroups.Rootless && errors.Is(err, unix.EACCES) {
		r.Cgroup = -1 // not delegated; the child stays where it is
		st, err = b.exe.Launch(r, b.applyLimits)
	}
	if err != nil {
		return err
	}
	b.proc = &process{pid: st.PID, pidfd: st.PIDFD, stage: st}
	if _, b.proc.start, err = processStat(st.PID); err != nil {
		return err
	}
	again := joined
	if joined {
		l := b.spec.Linux
		if l.UIDMappings, err = readMappings(st.PID, "uid_map"); err != nil {
			return err
		}
		if l.GIDMappings, err = readMappings(st.PID, "gid_map"); err != nil {
			return err
		}
		b.rec.Config.UIDMappings, b.rec.Config.GIDMappings = idMaps(l.UIDMappings), idMaps(l.GIDMappings)
	}
	b.io.giveTo(b.spec.Process, b.spec.Linux.UIDMappings)
	if (!ownPID || pidPath != "") && len(b.opts.StartHooks) > 0 {
		pid, again = pidInside(st.PID), true // it is not 1 there
	}
	if again {
		return b.compile(pid)
	}
	return nil
}

// readMappings reads the mapping of ids that a process lives with.
func readMappings(pid int, file string) ([]specs.LinuxIDMapping, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/" + file)
	if err != nil {
		return nil, err
	}
	var out []specs.LinuxIDMapping
	for line := range strings.Lines(string(data)) {
		var m specs.LinuxIDMapping
		if _, err := fmt.Sscan(line, &m.ContainerID, &m.HostID, &m.Size); err != nil {
			return nil, fmt.Errorf("cannot parse %s: %w", file, err)
		}
		out = append(out, m)
	}
	return out, nil
}

func flagOf(t specs.LinuxNamespaceType) uint64 {
	for _, n := range namespaces {
		if n.kind == t {
			return n.flag
		}
	}
	return 0
}

// pidInside is the process's number in its own pid namespace.
func pidInside(pid int) int {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(v)
			if len(f) > 0 {
				n, _ := strconv.Atoi(f[len(f)-1])
				return n
			}
		}
	}
	return pid
}

// mapIDs maps the ids of a new user namespace, and sets what takes privileges over
// the host that the process will not have in there.
func (b *birth) mapIDs() error {
	if b.p.CloneFlags&unix.CLONE_NEWUSER == 0 {
		return nil
	}
	var err error
	if unprivileged() {
		err = mapUnprivileged(b.proc.pid, b.p.UIDMap, b.p.GIDMap)
	} else {
		err = source.WriteIDMaps(b.proc.pid, b.p.UIDMap, b.p.GIDMap)
	}
	if err != nil {
		return err
	}
	if err := raiseLimits(b.proc.pid, b.spec.Process); err != nil {
		return err
	}
	return b.proc.stage.Mapped()
}

// raiseLimits sets limits and scores of a process in a user namespace from outside.
func raiseLimits(pid int, p *specs.Process) error {
	if p.OOMScoreAdj != nil {
		// Where it is not permitted the stage will say so, or has nothing to lower.
		_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(strconv.Itoa(*p.OOMScoreAdj)), 0)
	}
	for _, l := range p.Rlimits {
		n, ok := rlimits[l.Type]
		if !ok {
			return fmt.Errorf("invalid rlimit type: %s", l.Type)
		}
		var now unix.Rlimit
		if err := unix.Prlimit(pid, n, nil, &now); err != nil || l.Hard <= now.Max {
			continue // lowering takes no privilege, and would bind the stage too early
		}
		if err := unix.Prlimit(pid, n, &unix.Rlimit{Cur: max(l.Soft, now.Cur), Max: l.Hard}, nil); err != nil && !unprivileged() {
			return fmt.Errorf("error setting rlimit type %d: %w", n, err)
		}
	}
	return nil
}

var rlimits = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}

// mapUnprivileged maps ids as an ordinary user may: one's own, or through the
// setuid programs that know which others one has.
func mapUnprivileged(pid int, uids, gids []specs.LinuxIDMapping) error {
	proc := "/proc/" + strconv.Itoa(pid) + "/"
	for _, m := range []struct {
		file, program string
		ids           []specs.LinuxIDMapping
		own           int
	}{{"gid_map", "newgidmap", gids, os.Getegid()}, {"uid_map", "newuidmap", uids, os.Geteuid()}} {
		if len(m.ids) == 1 && m.ids[0].Size == 1 && int(m.ids[0].HostID) == m.own {
			if m.file == "gid_map" {
				if err := os.WriteFile(proc+"setgroups", []byte("deny"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
			}
			line := fmt.Sprintf("%d %d 1\n", m.ids[0].ContainerID, m.ids[0].HostID)
			if err := os.WriteFile(proc+m.file, []byte(line), 0); err != nil {
				return err
			}
			continue
		}
		args := []string{strconv.Itoa(pid)}
		for _, l := range m.ids {
			args = append(args, fmt.Sprint(l.ContainerID), fmt.Sprint(l.HostID), fmt.Sprint(l.Size))
		}
		if out, err := osexec.Command(m.program, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("cannot map ids with %s: %w: %s", m.program, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// carryOut sends the plan, with the hooks of the creation in between.
func (b *birth) carryOut() error {
	fds, done, err := b.openSlots()
	defer done()
	if err != nil {
		return err
	}
	first, from := b.p, 0
	h := b.hooks()
	//nolint:staticcheck // prestart is deprecated, not gone
	prestart := h.Prestart
	if len(prestart)+len(h.CreateRuntime)+len(h.CreateContainer) > 0 {
		before, after := b.p.SplitPivot()
		if err := b.runPlan(before, fds, 0, true); err != nil {
			return err
		}
		if err := b.runHooks("prestart", prestart, specs.StateCreating); err != nil {
			return err
		}
		if err := b.runHooks("createRuntime", h.CreateRuntime, specs.StateCreating); err != nil {
			return err
		}
		if err := b.stageHooks(h.CreateContainer); err != nil {
			return err
		}
		first, from, fds = after, len(before.Ops), nil
	}
	b.app.log.Debugf("child process in init(): plan of %d operations", len(first.Ops))
	if err := b.runPlan(first, fds, from, false); err != nil {
		return err
	}
	b.app.log.Debugf("init: closing the pipe to signal completion")
	return nil
}

// stageHooks has the stage run hooks where it stands, inside the container.
func (b *birth) stageHooks(hooks []specs.Hook) error {
	state, err := json.Marshal(b.ociState(specs.StateCreating, b.proc.pid))
	if err != nil {
		return err
	}
	for i, h := range hooks {
		p, err := plan.Hooks([]specs.Hook{h}, state)
		if err == nil {
			err = b.runPlan(p, nil, len(b.p.Ops), true)
		}
		if err != nil {
			return fmt.Errorf("error running createContainer hook #%d: %w", i, hookError(err))
		}
	}
	return nil
}

func hookError(err error) error {
	se := (*shim.StageError)(nil)
	switch {
	case !errors.As(err, &se):
		return err
	case se.Err == unix.ECHILD && se.Hook.Signaled():
		return fmt.Errorf("signal: %v", se.Hook.Signal())
	case se.Err == unix.ECHILD:
		return fmt.Errorf("exit status %d", se.Hook.ExitStatus())
	}
	return se.Err
}

// runPlan sends one plan and waits for what comes of it. The plan's operations are
// those of the whole one counted from from.
func (b *birth) runPlan(p *plan.Plan, fds []int, from int, more bool) error {
	code, err := p.Encode()
	if err != nil {
		return err
	}
	if err := b.proc.stage.Run(shim.Plan{Code: code, Slots: fds}); err != nil {
		return err
	}
	done, err := b.proc.converse(b.io, b.notifyAgent, b.openLate)
	switch {
	case err != nil:
		return b.explain(err, from)
	case done == (more || b.hold):
		return nil
	case done:
		return errors.New("the stage went on without its program")
	case processAlive(b.proc.pid, b.proc.start) || !more && !b.hold:
		return nil
	}
	return errors.New("the container's process died while it was being set up")
}

// converse reads what the stage has to say until it is done, fails, or has become
// the program (done is false then).
func (p *process) converse(io_ *streams, agent func(fd int) error, late func(slot int) (int, error)) (done bool, err error) {
	for {
		ev, err := p.stage.Next()
		switch {
		case errors.Is(err, io.EOF):
			return false, nil
		case err != nil:
			return false, err
		case ev.Done:
			return true, nil
		case ev.Want && late != nil:
			var fd int
			if fd, err = late(ev.Slot); err == nil {
				err = p.stage.Give(fd)
				unix.Close(fd)
			}
		case ev.What == shim.StageTerminal:
			err = io_.terminal(ev.FD)
		case ev.What == shim.StageSeccomp && agent != nil:
			err = agent(ev.FD)
			unix.Close(ev.FD)
		default:
			unix.Close(ev.FD)
		}
		if err != nil {
			return false, err
		}
	}
}

// explain turns the failure of an operation into words that callers know.
func (b *birth) explain(err error, from int) error {
	var se *shim.StageError
	if !errors.As(err, &se) {
		return err
	}
	i := se.Op + from
	if se.Op < 0 || i >= len(b.p.Ops) {
		return fmt.Errorf("error during container init: %w", err)
	}
	if n, ok := b.hookAt[i]; ok {
		return fmt.Errorf("error during container init: error running startContainer hook #%d: %w", n, hookError(err))
	}
	return fmt.Errorf("error during container init: %w", explain(se, b.p.Ops[i].Kind, b.spec.Process, b.rec.Config.Cgroups.CpusetCpus))
}

func explain(se *shim.StageError, kind plan.Kind, p *specs.Process, cpus string) error {
	switch kind {
	case plan.OpLookup, plan.OpExec:
		return execError(p.Args[0], se.Err, kind == plan.OpExec)
	case plan.OpCwd:
		return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", p.Cwd, se.Err)
	case plan.OpMount, plan.OpMove, plan.OpReceive, plan.OpSource:
		if kind == plan.OpMount && se.Err == unix.ELOOP {
			return fmt.Errorf("error mounting: %w: it must be mounted on ordinary directory", se)
		}
		return fmt.Errorf("error mounting: %w", se)
	case plan.OpScheduler:
		if se.Err == unix.EPERM && p.Scheduler != nil && cpus != "" {
			return fmt.Errorf("process scheduler can't be used together with AllowedCPUs: %w", se.Err)
		}
	case plan.OpRlimits:
		return fmt.Errorf("error setting rlimits: %w", se.Err)
	case plan.OpCreds:
		if errors.Is(se.Err, unix.EINVAL) {
			return fmt.Errorf("cannot %s: %w (is the id mapped in the container's user namespace?)", se.Name, se.Err)
		}
	}
	return se
}

// notExecuted: a program was found, and the kernel would not run it.
type notExecuted struct {
	name  string
	errno syscall.Errno
}

func (e *notExecuted) Error() string { return "exec " + e.name + ": " + e.errno.Error() }
func (e *notExecuted) Unwrap() error { return e.errno }

func execError(name string, errno syscall.Errno, ran bool) error {
	switch {
	case ran:
		return &notExecuted{name, errno}
	case !strings.Contains(name, "/"):
		return fmt.Errorf("exec: %q: %w", name, osexec.ErrNotFound)
	case errno == unix.ENOENT || errno == unix.ENOTDIR:
		return fmt.Errorf("exec: %q: stat %s: %w", name, name, errno)
	}
	return fmt.Errorf("exec: %q: %w", name, errno)
}

// openSlots supplies the descriptors of the plan.
func (b *birth) openSlots() (fds []int, done func(), err error) {
	var opened []int
	done = func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}
	_, ownMounts := findNamespace(b.spec, specs.MountNamespace)
	var m *membership
	for i := range b.p.Slots {
		sl := &b.p.Slots[i]
		fd := -1
		switch sl.Kind {
		case plan.SlotStdio:
			fd = b.io.inside[slices.Index([]string{"stdin", "stdout", "stderr"}, sl.Source)]
		case plan.SlotExtra:
			n, _ := strconv.Atoi(sl.Source)
			fd = b.io.extra[n-3]
		case plan.SlotGate:
			fd = b.gate
		case plan.SlotCgroup:
			if m == nil {
				if m, err = openMembership(b.dirs); err != nil {
					return nil, done, err
				}
				for _, fd := range m.tasks {
					opened = append(opened, fd)
				}
			}
			fd = m.tasks[sl.Source]
		case plan.SlotRoot, plan.SlotMount, plan.SlotDevice:
			switch {
			case b.opts.Unprivileged || sl.Late:
				fd, err = unix.Open("/dev/null", unix.O_PATH|unix.O_CLOEXEC, 0)
			case sl.Kind == plan.SlotRoot && !ownMounts:
				fd, err = b.sharedRoot()
			default:
				fd, err = source.Mount(sl, b.exe.Path())
			}
			if err != nil {
				return nil, done, fmt.Errorf("error during container init: error mounting: %w", err)
			}
			opened = append(opened, fd)
		}
		if fd < 0 {
			return nil, done, fmt.Errorf("cannot supply descriptor %d (%s) of the plan", i, sl.Source)
		}
		fds = append(fds, fd)
	}
	return fds, done, nil
}

// openLate opens a source that lies on one of the container's own mounts.
func (b *birth) openLate(slot int) (int, error) {
	if slot >= len(b.p.Slots) || !b.p.Slots[slot].Late {
		return -1, errors.New("the stage asks for a descriptor that is none of its own")
	}
	ns, err := os.Open("/proc/" + strconv.Itoa(b.proc.pid) + "/ns/mnt")
	if err != nil {
		return -1, err
	}
	defer ns.Close()
	fd, err := source.Late(&b.p.Slots[slot], ns, b.spec.Root.Path, b.opts.RootPath, b.exe.Path())
	if err != nil {
		return -1, fmt.Errorf("error during container init: error mounting: %w", err)
	}
	return fd, nil
}

// sharedRoot makes the root a mount of the host's, for a container that shares the
// host's mount namespace, and opens it.
func (b *birth) sharedRoot() (int, error) {
	root := b.spec.Root.Path
	if err := unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return -1, &os.PathError{Op: "bind", Path: root, Err: err}
	}
	return unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// unprivileged tells whether mounts and ids are beyond us.
func unprivileged() bool { return os.Geteuid() != 0 }

func inUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && !slices.Equal(strings.Fields(string(b)), []string{"0", "0", "4294967295"})
}

// setgroupsDenied tells whether the container's processes cannot set groups.
func setgroupsDenied(spec *specs.Spec) bool {
	if unprivileged() {
		g := spec.Linux.GIDMappings
		return len(g) == 1 && g[0].Size == 1
	}
	b, _ := os.ReadFile("/proc/self/setgroups")
	return strings.TrimSpace(string(b)) == "deny"
}

// filePath is a file of the container's records.
func (c *container) filePath(name string) string { return filepath.Join(c.dir, name) }
