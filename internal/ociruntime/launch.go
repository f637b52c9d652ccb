package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"

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

// recordSpec puts what may be known of the spec into the record.
func (b *birth) recordSpec() (err error) {
	if b.rec.Servin.Spec == nil {
		b.rec.Servin.Spec, err = recordable(b.spec, b.doc)
	}
	return err
}

// record writes down that there is a container now.
func (b *birth) record() error {
	if err := b.recordSpec(); err != nil {
		return err
	}
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
		// The child needs its time: what only the record wants is done now, and the
		// record's encoder made.
		if err := b.recordSpec(); err != nil {
			return err
		}
		if _, err := json.Marshal(&b.rec); err != nil {
			return err
		}
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

func flagOf(t specs.LinuxNamespaceType) uint64 {
	for _, n := range namespaces {
		if n.kind == t {
			return n.flag
		}
	}
	return 0
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

// filePath is a file of the container's records.
func (c *container) filePath(name string) string { return filepath.Join(c.dir, name) }
