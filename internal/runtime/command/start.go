package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

// Start implements runtime.Driver.
func (d *Driver) Start(ctx context.Context, req contract.StartRequest) (contract.Task, error) {
	if req.RootFS != nil {
		defer req.RootFS.Close()
	}
	switch {
	case !validID(req.ID):
		return nil, fault.New(fault.Invalid, "container id %.64q is not a plain name", req.ID)
	case req.Spec == nil || req.Spec.Process == nil || req.Spec.Linux == nil:
		return nil, fault.New(fault.Invalid, "cannot start %s: its spec lacks process or linux", req.ID)
	case req.Spec.Process.Terminal != req.Stdio.Terminal:
		return nil, fault.New(fault.Invalid, "cannot start %s: spec and stdio disagree about a terminal", req.ID)
	case req.Images != nil:
		return nil, fault.New(fault.Unsupported, "cannot restore %s: runtime %s starts nothing from a checkpoint", req.ID, d.cfg.Name)
	case req.Init:
		return nil, fault.New(fault.Unsupported, "cannot start %s: runtime %s has no built-in init", req.ID, d.cfg.Name)
	}
	d.mu.Lock()
	closed, twice := d.closed, d.tasks[req.ID] != nil
	d.mu.Unlock()
	if closed || twice {
		return nil, fault.New(fault.Conflict, "cannot start %s: it has been started, or the driver is closed", req.ID)
	}
	t := newTask(d, req.ID)
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return nil, fault.New(fault.Conflict, "cannot make the run directory: %w", err)
	}
	if err := t.start(ctx, &req); err != nil {
		t.abort()
		return nil, err
	}
	return t, nil
}

// bundle writes config.json and mounts the root.
func (t *task) bundle(req *contract.StartRequest) error {
	spec := *req.Spec
	root := specs.Root{}
	if spec.Root != nil {
		root = *spec.Root
	}
	rootfs := t.rootfs()
	if req.RootFS != nil {
		if err := os.Mkdir(rootfs, 0o755); err != nil {
			return err
		}
		if err := unix.MoveMount(int(req.RootFS.Fd()), "", unix.AT_FDCWD, rootfs, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return &contract.StartError{Step: "mount root file system", Err: err}
		}
		// The runtime may set propagation as it likes; nothing comes back to the host.
		if err := unix.MountSetattr(unix.AT_FDCWD, rootfs, unix.AT_RECURSIVE, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
			return &contract.StartError{Step: "mount root file system", Err: err}
		}
		root.Path = rootfs
	}
	spec.Root = &root
	linux := *spec.Linux
	parent := req.Key.CgroupParent
	if parent == "" {
		parent = t.d.parent
	}
	linux.CgroupsPath = filepath.Join("/", parent, t.id)
	if t.d.cfg.SystemdCgroup {
		linux.CgroupsPath = fmt.Sprintf("%s:servin:%s", filepath.Base(parent), t.id)
	}
	spec.Linux = &linux
	group, err := t.d.cg.Open(filepath.Join("/", parent, t.id))
	if err != nil {
		return err
	}
	t.group = group
	// Some runtimes refuse a minor version they do not know, though what is new
	// in it is not used or is passed over.
	spec.Version = "1.0.2"
	b, err := json.Marshal(&spec)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(t.dir, "config.json"), b, 0o600, durable.Nothing)
}

func (t *task) start(ctx context.Context, req *contract.StartRequest) error {
	d := t.d
	if err := t.bundle(req); err != nil {
		return err
	}
	t.terminal = req.Stdio.Terminal
	for _, ns := range req.Spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			t.ownPID = ns.Path == ""
		}
	}
	t.uids = req.Spec.Linux.UIDMappings
	std, err := newStdio(req.Stdio, req.Spec.Process.User.UID, t.uids)
	if err != nil {
		return err
	}
	defer std.close()
	if t.mon, err = d.exe.Spawn(t.dir, notices{t}); err != nil {
		return err
	}
	logFile := filepath.Join(t.dir, "runtime.log")
	args := []string{"create", "--bundle", t.dir, "--pid-file", filepath.Join(t.dir, "pid")}
	var console *console
	if t.terminal {
		if console, err = listenConsole(t.dir); err != nil {
			return err
		}
		defer console.close()
		args = append(args, "--console-socket", console.path)
	}
	r, err := request(req, std)
	if err != nil {
		return err
	}
	r.OwnPIDNamespace = t.ownPID
	r.Command, r.Env = d.args(logFile, append(args, t.id)...), environment()
	if req.Stdio.Attach != nil {
		if err := t.attachFirst(*req.Stdio.Attach); err != nil {
			return err
		}
	}
	pend, err := t.mon.Start(r)
	if err != nil {
		return t.requestError("start", err)
	}
	std.close()
	if console != nil {
		// Before the command ends: it waits until its terminal was taken.
		master, err := console.accept(ctx, t.mon.Done())
		if err == nil {
			err = t.mon.Terminal(ctx, master)
			unix.Close(master)
		}
		if err != nil {
			if perr := pend.Done(ctx); perr != nil {
				err = perr
			}
			return t.createError(logFile, err)
		}
		if req.Stdio.Width > 0 && req.Stdio.Height > 0 {
			_ = t.mon.Resize(ctx, req.Stdio.Width, req.Stdio.Height)
		}
	}
	if err := pend.Done(ctx); err != nil {
		return t.createError(logFile, err)
	}
	if err := t.save(); err != nil {
		return err
	}
	if req.Network != nil {
		ns, err := t.NetNS()
		if err != nil {
			return err
		}
		sb := contract.Sandbox{ID: t.id}
		if ownNet(req.Spec) {
			sb.NetNS = ns
		}
		err = req.Network(ctx, sb)
		ns.Close()
		if err != nil {
			return err
		}
	}
	t.held = true
	if !req.StopAfterCreate {
		if err := t.release(ctx); err != nil {
			return err
		}
	}
	d.mu.Lock()
	d.tasks[t.id] = t
	d.mu.Unlock()
	t.mu.Lock()
	t.live = true
	t.mu.Unlock()
	select {
	case <-t.mon.Done():
		t.Gone()
	default:
	}
	return nil
}

// createError says why create failed: its log knows more than its status.
func (t *task) createError(logFile string, err error) error {
	var se *shim.StageError
	if errors.As(err, &se) && se.Name == "create container" {
		return t.d.reason("create", logFile, 0, se.Err)
	}
	return t.requestError("create", err)
}

func ownNet(spec *specs.Spec) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path == ""
		}
	}
	return false
}

func (t *task) release(ctx context.Context) error {
	p, err := t.mon.Release()
	if err != nil {
		return t.requestError("start", err)
	}
	st, err := p.Started(ctx)
	if err != nil {
		return t.requestError("start", err)
	}
	if err := t.d.call(ctx, t.dir, nil, "start", t.id); err != nil {
		return err
	}
	t.mu.Lock()
	t.at, t.held = time.Unix(0, st.At), false
	t.mu.Unlock()
	return nil
}

func (t *task) save() error {
	b, err := json.Marshal(state{
		Version: stateVersion, ID: t.id, PID: t.Pid(), Cgroup: t.group.Path(), Terminal: t.terminal, OwnPID: t.ownPID, UIDs: t.uids, Created: time.Now(),
	})
	if err == nil {
		err = durable.WriteFile(filepath.Join(t.dir, "state.json"), b, 0o600, durable.Nothing)
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot write the container's state: %w", err)
	}
	return nil
}

// abort undoes a start that failed.
func (t *task) abort() {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	if t.mon != nil {
		t.mu.Lock() // one that was created ends, and its monitor with it
		if t.pidfd >= 0 {
			_ = unix.PidfdSendSignal(t.pidfd, unix.SIGKILL, nil, 0)
		}
		t.mu.Unlock()
	}
	if err := t.clear(ctx); err != nil {
		t.d.log.Warn("cannot clear away after a failed start", "id", t.id, "error", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.first != nil {
		t.first.Close()
	}
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
		t.pidfd = -1
	}
}

// request is what the monitor needs to know.
func request(req *contract.StartRequest, std *stdio) (shim.StartRequest, error) {
	l := req.Log
	r := shim.StartRequest{
		Plan: shim.Plan{Slots: std.inside[:]}, Stdin: std.outside[0], Stdout: std.outside[1], Stderr: std.outside[2], LogPipe: -1,
		Terminal: req.Stdio.Terminal, StdinOnce: req.Stdio.StdinOnce, NonBlock: l.NonBlocking, Ephemeral: req.Ephemeral,
		LogPath: l.Path, LogSize: l.MaxSize, LogFiles: l.MaxFiles, LogBuffer: l.BufferSize, Width: req.Stdio.Width, Height: req.Stdio.Height,
	}
	switch l.Format {
	case "", "none":
	case "json-file":
		r.Format = shim.LogJSON
	case "k8s-file":
		r.Format = shim.LogK8s
	case "pipe":
		if l.Pipe == nil {
			return r, fault.New(fault.Invalid, "cannot start %s: the log has no pipe", req.ID)
		}
		r.Format, r.LogPipe = shim.LogPipe, int(l.Pipe.Fd())
	default:
		return r, fault.New(fault.Invalid, "cannot start %s: log format %q is unknown", req.ID, l.Format)
	}
	return r, nil
}
