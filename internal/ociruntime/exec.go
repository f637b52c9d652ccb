package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/plan"
	"github.com/cloudos-io/cloudos/internal/shim"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func execFlags(f *flags) {
	f.text("console-socket", "", "path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the console's pseudoterminal")
	f.text("pidfd-socket", "", "path to an AF_UNIX socket which will receive a file descriptor referencing the exec process")
	f.text("cwd", "", "current working directory in the container")
	f.strings("env,e", "set environment variables")
	f.boolean("tty,t", "allocate a pseudo-TTY")
	f.text("user,u", "", "UID (format: <uid>[:<gid>])")
	f.strings("additional-gids,g", "additional gids")
	f.text("process,p", "", "path to the process.json")
	f.boolean("detach,d", "detach from the container's process")
	f.text("pid-file", "", "specify the file to write the process id to")
	f.text("process-label", "", "set the asm process label for the process commonly used with selinux")
	f.text("apparmor", "", "set the apparmor profile for the process")
	f.boolean("no-new-privs", "set the no new privileges value for the process")
	f.strings("cap,c", "add a capability to the bounding set for the process")
	f.number("preserve-fds", "pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)")
	f.strings("cgroup", "run the process in an (existing) sub-cgroup(s). Format is [<controller>:]<cgroup>.")
	f.boolean("ignore-paused", "allow exec in a paused container")
	f.boolean("no-subreaper", "")
}

func (a *app) exec(f *flags) error {
	status, err := a.execProcess(f)
	if err != nil {
		return exitCode{255, fmt.Errorf("exec failed: %w", err)}
	}
	if status != 0 {
		return exitCode{code: status}
	}
	return nil
}

func (a *app) execProcess(f *flags) (int, error) {
	pidFile, err := absolute(*f.str["pid-file"])
	if err != nil {
		return 0, err
	}
	c, err := a.load(f.args[0])
	if err != nil {
		return 0, err
	}
	status, err := c.status()
	switch {
	case err != nil:
		return 0, err
	case status == statusStopped:
		return 0, errors.New("cannot exec in a stopped container")
	case status == statusPaused && !*f.flag["ignore-paused"]:
		return 0, errors.New("cannot exec in a paused container (use --ignore-paused to override)")
	}
	p, err := c.execSpec(f)
	if err != nil {
		return 0, err
	}
	dropUnknownCapabilities(a.log, p, c.rec.Servin.UserNS)
	sub, err := subCgroups(*f.many["cgroup"])
	if err != nil {
		return 0, err
	}
	detach, socket := *f.flag["detach"], *f.str["console-socket"]
	if err := checkTerminal(p, detach, socket); err != nil {
		return 0, err
	}
	x := &execution{container: c, p: p, sub: sub}
	if x.io, err = a.newStreams(p, detach, socket, *f.num["preserve-fds"], 0); err != nil {
		return 0, err
	}
	defer x.io.close()
	var fg *foreground
	if !detach {
		fg = watchSignals()
		defer fg.stop()
	}
	if err := x.launch(); err != nil {
		if x.proc != nil {
			x.proc.kill()
			x.io.drain()
		}
		return 0, fmt.Errorf("unable to start container process: %w", err)
	}
	x.io.connect()
	if s := *f.str["pidfd-socket"]; s != "" {
		if err := sendDescriptor(s, x.proc.pidfd, "setns"); err != nil {
			x.proc.kill()
			return 0, fmt.Errorf("failed to setup pidfd: %w", err)
		}
	}
	if pidFile != "" {
		if err := writePIDFile(pidFile, x.proc.pid); err != nil {
			x.proc.kill()
			return 0, err
		}
	}
	if detach {
		x.proc.release()
		return 0, nil
	}
	return fg.wait(x.proc, x.io)
}

// execSpec is the process that the flags, or a file, describe.
func (c *container) execSpec(f *flags) (*specs.Process, error) {
	if path := *f.str["process"]; path != "" {
		spec, err := c.spec()
		if err != nil {
			return nil, err
		}
		init := spec.Process
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var p specs.Process
		if err := json.Unmarshal(b, &p); err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", path, err)
		}
		// What it does not say is as for the container.
		if p.Capabilities == nil {
			p.Capabilities = init.Capabilities
		}
		if p.ApparmorProfile == "" {
			p.ApparmorProfile = init.ApparmorProfile
		}
		if p.SelinuxLabel == "" {
			p.SelinuxLabel = init.SelinuxLabel
		}
		if len(p.Rlimits) == 0 {
			p.Rlimits = init.Rlimits
		}
		if p.Scheduler == nil {
			p.Scheduler = init.Scheduler
		}
		if p.IOPriority == nil {
			p.IOPriority = init.IOPriority
		}
		if p.User.Umask == nil {
			p.User.Umask = init.User.Umask
		}
		if p.OOMScoreAdj == nil {
			p.OOMScoreAdj = init.OOMScoreAdj
		}
		return &p, checkProcess(&p)
	}
	spec, err := readSpec(filepath.Join(c.rec.Servin.Bundle, configName))
	if err != nil {
		return nil, err
	}
	p := spec.Process
	if len(f.args) < 2 {
		return nil, errors.New("exec args cannot be empty")
	}
	p.Args = f.args[1:]
	for _, o := range []struct {
		flag string
		to   *string
	}{{"cwd", &p.Cwd}, {"apparmor", &p.ApparmorProfile}, {"process-label", &p.SelinuxLabel}} {
		if v := *f.str[o.flag]; v != "" {
			*o.to = v
		}
	}
	if caps := *f.many["cap"]; len(caps) > 0 {
		if p.Capabilities == nil {
			p.Capabilities = &specs.LinuxCapabilities{}
		}
		for _, set := range []*[]string{&p.Capabilities.Bounding, &p.Capabilities.Effective, &p.Capabilities.Permitted} {
			*set = append(slices.Clone(*set), caps...)
		}
		// An ambient capability has to be inheritable, which --cap does not make it.
		if p.Capabilities.Inheritable != nil {
			p.Capabilities.Ambient = append(p.Capabilities.Ambient, caps...)
		}
	}
	p.Env = append(p.Env, *f.many["env"]...)
	p.Terminal = *f.flag["tty"]
	if f.isSet("no-new-privs") {
		p.NoNewPrivileges = *f.flag["no-new-privs"]
	}
	if u := *f.str["user"]; u != "" {
		uid, gid, ok := strings.Cut(u, ":")
		if ok {
			n, err := strconv.ParseUint(gid, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("bad gid: %w", err)
			}
			p.User.GID = uint32(n)
		}
		n, err := strconv.ParseUint(uid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("bad uid: %w", err)
		}
		p.User.UID = uint32(n)
	}
	for _, g := range *f.many["additional-gids"] {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("additional-gids must be a positive number %s", g)
		}
		p.User.AdditionalGids = append(p.User.AdditionalGids, uint32(n))
	}
	return p, checkProcess(p)
}

// subCgroups reads --cgroup: a path below the container's cgroup, on v1 with the
// controllers that it is for.
func subCgroups(args []string) (map[string]string, error) {
	out := map[string]string{}
	for _, arg := range args {
		ctrls, path, ok := strings.Cut(arg, ":")
		if !ok {
			if len(args) != 1 {
				return nil, fmt.Errorf("invalid --cgroup argument: %s (missing <controller>: prefix)", arg)
			}
			out[""] = arg
			continue
		}
		for _, c := range strings.Split(ctrls, ",") {
			if c == "" {
				return nil, fmt.Errorf("invalid --cgroup argument: %s (empty <controller> prefix)", arg)
			}
			if _, twice := out[c]; twice {
				return nil, fmt.Errorf("invalid --cgroup argument(s): controller %s specified multiple times", c)
			}
			out[c] = path
		}
	}
	return out, nil
}

// execution is one further process of a container.
type execution struct {
	*container
	p    *specs.Process
	sub  map[string]string
	io   *streams
	proc *process
	plan *plan.Plan
	dirs map[string]string
}

func (x *execution) launch() error {
	init, err := unix.PidfdOpen(x.rec.InitPID, 0)
	if err != nil {
		return errNotRunning
	}
	defer unix.Close(init)
	if !x.alive() {
		return errNotRunning
	}
	differs, err := x.differingNamespaces()
	if err != nil {
		return err
	}
	spec, err := x.spec()
	if err != nil {
		return err
	}
	joins := differs &^ (unix.CLONE_NEWPID | unix.CLONE_NEWUSER)
	opts := plan.Options{
		ID: x.id, CgroupV2: cgroups.IsCgroup2UnifiedMode(), AppArmor: hasAppArmor(), SELinux: hasSELinux(),
		KeepGroups: x.groupsKept(), UserNS: differs&unix.CLONE_NEWUSER != 0, Namespaces: joins | differs&unix.CLONE_NEWUSER,
		PreserveFDs: len(x.io.extra), Unprivileged: unprivileged(), Lookup: true, AllCPUs: true, PlainOutput: x.io.host != nil,
		Personality: spec.Linux.Personality, MemoryPolicy: spec.Linux.MemoryPolicy, Joined: joins == 0 && differs&unix.CLONE_NEWUSER == 0,
	}
	if x.rec.Config.NoNewKeyring {
		opts.ID = ""
	}
	if err := x.enterPlan(&opts); err != nil {
		return err
	}
	if r := x.rec.Servin.Filter; r != nil {
		if opts.Seccomp, err = os.ReadFile(x.filePath(filterName)); err != nil {
			return fmt.Errorf("cannot read the container's seccomp filter: %w", err)
		}
		opts.SeccompFlags, opts.SeccompNotify = r.Flags, r.Listener != ""
	}
	if x.plan, err = plan.Exec(x.p, opts); err != nil {
		return err
	}
	exe, err := shim.NewExecutable()
	if err != nil {
		return err
	}
	defer exe.Close()
	x.app.log.Debugf("nsexec container setup: join namespaces %#x", differs)
	if a := x.p.ExecCPUAffinity; a != nil && a.Initial != "" {
		x.app.log.Debugf("nsexec container setup: affinity: %#x", plan.CPUMask(a.Initial))
	}
	r := shim.LaunchRequest{Cgroup: -1, PIDNS: -1, UserNS: -1, Stdio: x.io.inside}
	if differs&unix.CLONE_NEWPID != 0 {
		// What init's children are born in is what it is in itself.
		if r.PIDNS, err = unix.Open("/proc/"+strconv.Itoa(x.rec.InitPID)+"/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return errNotRunning
		}
		defer unix.Close(r.PIDNS)
	}
	if differs&unix.CLONE_NEWUSER != 0 && unprivileged() {
		if r.UserNS, err = unix.Open("/proc/"+strconv.Itoa(x.rec.InitPID)+"/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return errNotRunning
		}
		defer unix.Close(r.UserNS)
	}
	member, err := x.membership()
	if err != nil {
		return err
	}
	defer member.close()
	r.Cgroup = member.dir
	st, err := exe.Launch(r, nil)
	if err != nil && r.Cgroup >= 0 && len(x.sub) == 0 && (errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT)) {
		// The container has made groups below its own, which may hold no process
		// now: where init is, its companions may be.
		if fd, e := x.initCgroup(); e == nil {
			r.Cgroup = fd
			st, err = exe.Launch(r, nil)
			unix.Close(fd)
		}
	}
	if err != nil && r.Cgroup >= 0 && x.rec.Config.RootlessCgroups && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
		r.Cgroup = -1 // not delegated; the child stays where it is
		st, err = exe.Launch(r, nil)
	}
	if err != nil {
		return err
	}
	x.proc = &process{pid: st.PID, pidfd: st.PIDFD, stage: st}
	if _, x.proc.start, err = processStat(st.PID); err != nil {
		return err
	}
	if opts.UserNS {
		if err := raiseLimits(st.PID, x.p); err != nil {
			return err
		}
	}
	x.io.giveTo(x.p, x.uidMap())
	return x.carryOut(init, member)
}

// differingNamespaces are those of the container that are not ours.
func (x *execution) differingNamespaces() (uint64, error) {
	var differs uint64
	for _, n := range namespaces {
		theirs, err := os.Readlink("/proc/" + strconv.Itoa(x.rec.InitPID) + "/ns/" + n.file)
		if err != nil {
			if n.kind == specs.TimeNamespace {
				continue // before Linux 5.6
			}
			return 0, fmt.Errorf("cannot look at the container's namespaces: %w", err)
		}
		if ours, _ := os.Readlink("/proc/self/ns/" + n.file); ours != theirs {
			differs |= n.flag
		}
	}
	return differs, nil
}

// enterPlan settles how the child gets into its cgroup.
func (x *execution) enterPlan(o *plan.Options) error {
	dirs, names, err := byHierarchy(x.rec.CgroupPaths)
	if err != nil {
		return err
	}
	every, toAll := x.sub[""]
	for h := range dirs {
		if dirs[h] == "" {
			delete(dirs, h)
			continue
		}
		sub, ok := every, toAll
		for _, c := range strings.Split(h, ",") {
			if s, named := x.sub[c]; named && c != "" {
				sub, ok = s, true
			}
		}
		if ok {
			if dirs[h], err = below(dirs[h], sub); err != nil {
				return err
			}
		}
	}
	for c := range x.sub {
		if c != "" && !slices.ContainsFunc(names, func(h string) bool { return slices.Contains(strings.Split(h, ","), c) }) {
			return fmt.Errorf("unknown controller %s in SubCgroupPaths", c)
		}
	}
	x.dirs, o.V1Controllers = dirs, names
	return nil
}

// below is a directory inside another one.
func below(dir, sub string) (string, error) {
	p := filepath.Join(dir, sub)
	if p != dir && !strings.HasPrefix(p, dir+"/") {
		return "", fmt.Errorf("bad sub cgroup path: %s", sub)
	}
	return p, nil
}

func (x *execution) membership() (*membership, error) {
	if len(x.dirs) == 0 {
		return &membership{dir: -1}, nil
	}
	m, err := openMembership(x.dirs)
	if err == nil {
		return m, nil
	}
	if x.rec.Config.RootlessCgroups || cgroups.IsCgroup2UnifiedMode() && errors.Is(err, os.ErrNotExist) && len(x.sub) == 0 {
		if fd, e := x.initCgroup(); e == nil {
			return &membership{dir: fd}, nil
		}
		if x.rec.Config.RootlessCgroups {
			return &membership{dir: -1}, nil
		}
	}
	return nil, fmt.Errorf("error adding pid to cgroups: %w", err)
}

// initCgroup opens the v2 group that init is in now.
func (x *execution) initCgroup() (int, error) {
	paths, err := cgroups.ParseCgroupFile("/proc/" + strconv.Itoa(x.rec.InitPID) + "/cgroup")
	if err != nil {
		return -1, err
	}
	p, ok := paths[""]
	if !ok || !cgroups.IsCgroup2UnifiedMode() {
		return -1, unix.ENOENT
	}
	return unix.Open(filepath.Join("/sys/fs/cgroup", p), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

func (x *execution) uidMap() (out []specs.LinuxIDMapping) {
	for _, m := range x.rec.Config.UIDMappings {
		out = append(out, specs.LinuxIDMapping{ContainerID: uint32(m.ContainerID), HostID: uint32(m.HostID), Size: uint32(m.Size)})
	}
	return out
}

// groupsKept tells whether setgroups is denied in the container.
func (x *execution) groupsKept() bool {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(x.rec.InitPID) + "/setgroups")
	return strings.TrimSpace(string(b)) == "deny"
}

func (x *execution) carryOut(init int, member *membership) error {
	fds := make([]int, 0, len(x.plan.Slots))
	for i := range x.plan.Slots {
		sl := &x.plan.Slots[i]
		fd := -1
		switch sl.Kind {
		case plan.SlotPidfd:
			fd = init
		case plan.SlotStdio:
			fd = x.io.inside[slices.Index([]string{"stdin", "stdout", "stderr"}, sl.Source)]
		case plan.SlotExtra:
			n, _ := strconv.Atoi(sl.Source)
			fd = x.io.extra[n-3]
		case plan.SlotCgroup:
			if t, ok := member.tasks[sl.Source]; ok {
				fd = t
			} else {
				fd = x.io.null() // no permission over it: it stays where it is
			}
		}
		if fd < 0 {
			return fmt.Errorf("cannot supply descriptor %d (%s) of the plan", i, sl.Source)
		}
		fds = append(fds, fd)
	}
	code, err := x.plan.Encode()
	if err != nil {
		return err
	}
	x.app.log.Debugf("child process in init(): plan of %d operations", len(x.plan.Ops))
	x.app.log.Debugf("setns_init: about to exec")
	if err := x.proc.stage.Run(shim.Plan{Code: code, Slots: fds}); err != nil {
		return err
	}
	done, err := x.proc.converse(x.io, func(fd int) error {
		return sendListener(x.rec.Servin.Filter, x.ociState(specs.StateRunning, x.rec.InitPID), x.proc.pid, fd)
	}, nil)
	var se *shim.StageError
	if errors.As(err, &se) && se.Op >= 0 && se.Op < len(x.plan.Ops) {
		return explain(se, x.plan.Ops[se.Op].Kind, x.p, x.rec.Config.Cgroups.CpusetCpus)
	}
	if err == nil && done {
		err = errors.New("the stage went on without its program")
	}
	x.app.log.Debugf("init: closing the pipe to signal completion")
	return err
}
