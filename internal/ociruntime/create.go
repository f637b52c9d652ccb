package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/plan"
	"github.com/cloudos-io/cloudos/internal/seccomp"
	"github.com/cloudos-io/cloudos/internal/shim"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func bundleFlags(f *flags) {
	f.text("bundle,b", "", "path to the root of the bundle directory, defaults to the current directory")
	f.text("console-socket", "", "path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the console's pseudoterminal")
	f.text("pidfd-socket", "", "path to an AF_UNIX socket which will receive a file descriptor referencing the init process")
	f.text("pid-file", "", "specify the file to write the process id to")
	f.boolean("no-pivot", "(refused: the root is always entered by pivot_root)")
	f.boolean("no-new-keyring", "do not create a new session keyring for the container")
	f.number("preserve-fds", "pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)")
}

func createFlags(f *flags) { bundleFlags(f) }

func runFlags(f *flags) {
	bundleFlags(f)
	f.boolean("detach,d", "detach from the container's process")
	f.boolean("keep", "do not delete the container after it exits")
	f.boolean("no-subreaper", "disable the use of the subreaper used to reap reparented processes")
}

func (a *app) create(f *flags) error {
	_, err := a.launchContainer(f, true)
	if err != nil {
		return fmt.Errorf("%s create failed: %w", a.name, err)
	}
	return nil
}

func (a *app) runContainer(f *flags) error {
	status, err := a.launchContainer(f, false)
	if code := (exitCode{}); errors.As(err, &code) {
		return code
	}
	if err != nil {
		return fmt.Errorf("%s run failed: %w", a.name, err)
	}
	if status != 0 {
		return exitCode{code: status}
	}
	return nil
}

// birth is one container being created.
type birth struct {
	*container
	spec *specs.Spec
	doc  []byte // the spec's text
	opts plan.Options
	p    *plan.Plan
	io   *streams
	proc *process
	exe  *shim.Executable
	gate int // of create, -1 for run
	hold bool
	dirs map[string]string // of the cgroup, by hierarchy
	made bool              // the directory of records is ours

	locked *os.File // the directory, until there is a container

	hookAt map[int]int // operation to startContainer hook
}

func (a *app) launchContainer(f *flags, hold bool) (status int, err error) {
	if *f.flag["no-pivot"] {
		return 0, errors.New("--no-pivot is refused: without pivot_root the host's mounts stay within reach; give the container a root that is a mount of its own")
	}
	pidFile, err := absolute(*f.str["pid-file"])
	if err != nil {
		return 0, err
	}
	if dir := *f.str["bundle"]; dir != "" {
		if err := os.Chdir(dir); err != nil {
			return 0, err
		}
	}
	spec, doc, err := readRawSpec(configName)
	if err != nil {
		return 0, err
	}
	id := f.args[0]
	if err := validID(id); err != nil {
		return 0, err
	}
	detach := hold || *f.flag0("detach")
	socket := *f.str["console-socket"]
	if err := checkTerminal(spec.Process, detach, socket); err != nil {
		return 0, err
	}
	b := &birth{spec: spec, doc: doc, hold: hold, gate: -1, container: &container{app: a, id: id, dir: filepath.Join(a.root, id)}}
	defer func() {
		if err != nil {
			b.undo()
		}
	}()
	defer b.unlock()
	notify := a.newNotify(b.dir, os.Getenv("NOTIFY_SOCKET"))
	if notify != nil {
		notify.mount(spec)
	}
	if err := b.prepare(*f.flag["no-new-keyring"]); err != nil {
		return 0, err
	}
	if notify != nil {
		if err := notify.prepare(!hold); err != nil {
			return 0, err
		}
	}
	if b.io, err = a.newStreams(spec.Process, detach, socket, *f.num["preserve-fds"], listenFDs()); err != nil {
		return 0, err
	}
	defer b.io.close()
	if b.exe, err = shim.NewExecutable(); err != nil {
		return 0, err
	}
	defer b.exe.Close()
	b.opts.PreserveFDs, b.opts.PlainOutput = len(b.io.extra), b.io.host != nil
	if n := b.io.listen; n > 0 {
		spec.Process.Env = append(spec.Process.Env, fmt.Sprintf("LISTEN_FDS=%d", n), "LISTEN_PID=1")
	}
	if !detach && !*f.flag0("no-subreaper") {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return 0, os.NewSyscallError("prctl", err)
		}
	}
	var fg *foreground
	if !detach {
		fg = watchSignals()
		defer fg.stop()
	}
	if err := b.launch(); err != nil {
		if b.proc != nil {
			b.proc.kill()
			b.io.drain() // what a hook inside had to say
		}
		if ran := (*notExecuted)(nil); errors.As(err, &ran) && !detach {
			// The process had begun, as far as anybody else can tell.
			fmt.Fprintln(a.stderr, ran)
			return 0, exitCode{code: 255}
		}
		return 0, fmt.Errorf("unable to start container process: %w", err)
	}
	b.unlock()
	b.io.connect()
	if s := *f.str["pidfd-socket"]; s != "" {
		if err := sendDescriptor(s, b.proc.pidfd, "standard"); err != nil {
			return 0, fmt.Errorf("failed to setup pidfd: %w", err)
		}
	}
	if pidFile != "" {
		if err := writePIDFile(pidFile, b.proc.pid); err != nil {
			return 0, err
		}
	}
	if !hold {
		if err := b.runHooks("poststart", b.hooks().Poststart, specs.StateRunning); err != nil {
			return 0, err
		}
	}
	if detach {
		b.proc.release()
		if !hold && notify != nil {
			return 0, notify.relay(b.proc.pid)
		}
		return 0, nil
	}
	if notify != nil {
		go notify.relay(b.proc.pid) //nolint:errcheck // best effort beside the wait, which ends the program
	}
	status, err = fg.wait(b.proc, b.io)
	if err == nil && !*f.flag["keep"] {
		if derr := b.destroy(); derr != nil {
			a.log.Warnf("%v", derr)
		}
	}
	return status, err
}

// flag0 is a flag that not every command has.
func (f *flags) flag0(name string) *bool {
	if v := f.flag[name]; v != nil {
		return v
	}
	return new(bool)
}

func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

func checkTerminal(p *specs.Process, detach bool, socket string) error {
	if detach && p.Terminal && socket == "" {
		return errors.New("cannot allocate tty if runc will detach without setting console socket")
	}
	if (!detach || !p.Terminal) && socket != "" {
		return errors.New("cannot use console socket if runc will not detach or allocate tty")
	}
	return nil
}

// hooks gives the spec's hooks, none where there are none.
func (b *birth) hooks() *specs.Hooks {
	if b.spec.Hooks == nil {
		return &specs.Hooks{}
	}
	return b.spec.Hooks
}

// prepare checks everything, takes the id, and makes the cgroup and the plan.
func (b *birth) prepare(keepKeyring bool) error {
	a, spec := b.app, b.spec
	if err := a.check(spec); err != nil {
		return err
	}
	_, user := findNamespace(spec, specs.UserNamespace)
	dropUnknownCapabilities(a.log, spec.Process, user)
	cfg, err := a.cgroupConfig(b.id, spec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.root, 0o700); err != nil {
		return err
	}
	if _, err := os.Lstat(b.dir); err == nil {
		return errExist
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if b.cg, err = openCgroup(cfg, nil); err != nil {
		return err
	}
	if err := checkCgroup(b.cg); err != nil {
		return err
	}
	if err := os.Mkdir(b.dir, 0o711); errors.Is(err, fs.ErrExist) {
		return errExist
	} else if err != nil {
		return err
	}
	b.made = true
	bundle, err := os.Getwd()
	if err != nil {
		return err
	}
	b.describe(bundle, cfg, keepKeyring)
	// Whoever finds the draft when we have been killed knows what to remove.
	b.rec.CgroupPaths = b.cg.GetPaths()
	if b.locked, err = b.lock(); err != nil {
		return err
	}
	if err := b.saveDraft(); err != nil {
		return err
	}
	if !cfg.Systemd {
		// The child enters by itself, at a fraction of what moving it costs.
		if err := b.cg.Apply(-1); err != nil && !errors.Is(err, cgroups.ErrRootless) {
			return fmt.Errorf("unable to apply cgroup configuration: %w", err)
		}
	}
	var names []string
	if b.dirs, names, err = byHierarchy(b.cg.GetPaths()); err != nil {
		return err
	}
	if cfg.Rootless {
		// Those that we may not make are not there.
		for h, dir := range b.dirs {
			if _, err := os.Stat(dir); err != nil {
				delete(b.dirs, h)
			}
		}
		names = slices.DeleteFunc(names, func(h string) bool { return b.dirs[h] == "" })
	}
	b.opts = plan.Options{
		ID: b.id, CgroupV2: cgroups.IsCgroup2UnifiedMode(), V1Controllers: names, CgroupPaths: b.dirs, CgroupEntered: cfg.Systemd,
		AppArmor: hasAppArmor(), SELinux: hasSELinux(), BindDevices: inUserNamespace(), KeepGroups: setgroupsDenied(spec),
		Joined: true, SharedMounts: true, Unprivileged: unprivileged(), Lookup: true, Gate: b.hold, AllCPUs: true,
		OpenLate: !unprivileged(), HostRoot: spec.Root.Path,
	}
	if keepKeyring {
		b.opts.ID = ""
	}
	if err := b.filter(); err != nil {
		return err
	}
	if b.hold {
		path := filepath.Join(b.dir, gateName)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return &os.PathError{Op: "mkfifo", Path: path, Err: err}
		}
		// Both ends, so that opening does not wait; it is a reader until it runs.
		if b.gate, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0); err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
	return nil
}

// filter compiles the seccomp profile and keeps the program for exec.
func (b *birth) filter() error {
	if b.spec.Linux.Seccomp == nil {
		return nil
	}
	p, err := seccomp.Compile(b.spec.Linux.Seccomp)
	if err != nil {
		return err
	}
	if p == nil {
		return nil
	}
	cfg := b.spec.Linux.Seccomp
	for _, c := range cfg.Syscalls {
		if c.Action == specs.ActNotify && slices.Contains(c.Names, "write") {
			// The way to the agent itself needs it.
			return errors.New("SCMP_ACT_NOTIFY cannot be used for the write syscall")
		}
	}
	if cfg.DefaultAction == specs.ActNotify {
		return errors.New("SCMP_ACT_NOTIFY cannot be used as default action")
	}
	b.app.log.Debugf("seccomp filter flags: %d", p.Flags|listenerFlag(p.Notify))
	if p.Notify && cfg.ListenerPath == "" {
		return errors.New("seccomp listenerPath is not set")
	}
	if !p.Notify && cfg.ListenerMetadata != "" && cfg.ListenerPath == "" {
		return errors.New("seccomp listenerMetadata is set, but listenerPath is not")
	}
	b.opts.Seccomp, b.opts.SeccompFlags, b.opts.SeccompNotify = p.Filter, p.Flags, p.Notify
	r := &filterRecord{Flags: p.Flags}
	if p.Notify {
		r.Listener, r.Metadata = cfg.ListenerPath, cfg.ListenerMetadata
	}
	b.rec.Servin.Filter = r
	return os.WriteFile(filepath.Join(b.dir, filterName), p.Filter, 0o600)
}

func listenerFlag(notify bool) uint32 {
	if notify {
		return unix.SECCOMP_FILTER_FLAG_NEW_LISTENER
	}
	return 0
}

// describe fills the record as far as it is known before there is a process.
func (b *birth) describe(bundle string, cfg *cgroups.Cgroup, keepKeyring bool) {
	spec, l := b.spec, b.spec.Linux
	b.rec = record{
		ID: b.id, Created: time.Now().UTC(), Rootless: os.Geteuid() != 0,
		Config: config{
			Rootfs: spec.Root.Path, Readonlyfs: spec.Root.Readonly, Hostname: spec.Hostname, Domainname: spec.Domainname,
			Cgroups: cfg, OOMScoreAdj: spec.Process.OOMScoreAdj, UIDMappings: idMaps(l.UIDMappings), GIDMappings: idMaps(l.GIDMappings),
			MaskPaths: l.MaskedPaths, ReadonlyPaths: l.ReadonlyPaths, NoNewPrivileges: spec.Process.NoNewPrivileges,
			Version: spec.Version, NoNewKeyring: keepKeyring, RootlessEUID: os.Geteuid() != 0, RootlessCgroups: cfg.Rootless,
			Capabilities: spec.Process.Capabilities, AppArmor: spec.Process.ApparmorProfile, Label: spec.Process.SelinuxLabel,
		},
		Servin: own{Version: 1, Bundle: bundle, Annotations: spec.Annotations, CgroupsPath: l.CgroupsPath},
	}
	if b.rec.Config.Version == "" {
		b.rec.Config.Version = specs.Version
	}
	c := &b.rec.Config
	for k, v := range spec.Annotations {
		c.Labels = append(c.Labels, k+"="+v)
	}
	c.Labels = append(c.Labels, "bundle="+bundle)
	for _, n := range l.Namespaces {
		c.Namespaces = append(c.Namespaces, namespace{Type: namespaceName(n.Type), Path: n.Path})
	}
	for name, d := range l.NetDevices {
		if c.NetDevices == nil {
			c.NetDevices = map[string]netDeviceRecord{}
		}
		c.NetDevices[name] = netDeviceRecord{Name: d.Name}
	}
	_, b.rec.Servin.UserNS = findNamespace(spec, specs.UserNamespace)
}

func idMaps(list []specs.LinuxIDMapping) (out []idMap) {
	for _, m := range list {
		out = append(out, idMap{int64(m.ContainerID), int64(m.HostID), int64(m.Size)})
	}
	return out
}

// namespaceName is the name that runc's records have for a namespace.
func namespaceName(t specs.LinuxNamespaceType) string {
	switch t {
	case specs.NetworkNamespace:
		return "NEWNET"
	case specs.MountNamespace:
		return "NEWNS"
	}
	return "NEW" + strings.ToUpper(string(t))
}

func (b *birth) unlock() {
	if b.locked != nil {
		b.locked.Close()
		b.locked = nil
	}
}

// undo takes back what a failed creation has left.
func (b *birth) undo() {
	if b.proc != nil {
		b.proc.kill()
	}
	if !b.made {
		return
	}
	if err := b.destroyFiles(); err != nil {
		b.app.log.Warnf("%v", err)
	}
}

func writePIDFile(path string, pid int) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(f, pid)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}

// runHooks runs hooks in the host's namespaces.
func (c *container) runHooks(name string, hooks []specs.Hook, status specs.ContainerState) error {
	if len(hooks) == 0 {
		return nil
	}
	pid := c.rec.InitPID
	if status == specs.StateStopped {
		pid = 0
	}
	state, err := json.Marshal(c.ociState(status, pid))
	if err != nil {
		return err
	}
	for i, h := range hooks {
		c.app.log.Debugf("run %s hook %s", name, h.Path)
		if err := runHook(h, state); err != nil {
			return fmt.Errorf("error running %s hook #%d: %w", name, i, err)
		}
	}
	return nil
}
