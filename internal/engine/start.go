package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/cdi"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/store"
)

// ContainerStart starts a container; fault.NotModified if it runs already.
func (e *Engine) ContainerStart(ctx context.Context, name string, o StartOptions) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	u.mu.Lock()
	if u.restart != nil { // a pending restart happens now
		u.restart()
		u.restart = nil
	}
	u.lastDelay = 0
	u.mu.Unlock()
	r := u.rec.Load()
	switch r.State.Status {
	case mcontainer.StateRunning:
		return fault.New(fault.NotModified, "container %s is already running", r.Name)
	case mcontainer.StatePaused:
		return fault.New(fault.Conflict, "cannot start a paused container, try unpause instead")
	case mcontainer.StateRemoving, mcontainer.StateDead:
		return fault.New(fault.Conflict, "container is marked for removal and cannot be started")
	}
	var l launch
	if o.Checkpoint != "" {
		done, err := e.fromCheckpoint(ctx, r, o, &l)
		if err != nil {
			return err
		}
		defer done()
	}
	p, err := e.launch(ctx, u, l)
	if err == nil {
		return p.Wait()
	}
	if r.Ephemeral {
		if rerr := e.remove(context.WithoutCancel(ctx), u, true); rerr != nil {
			e.log.Warn("cannot remove a container that could not be started", "container", u.id, "cause", rerr)
		}
	}
	return err
}

// launch says how a start differs from the ordinary one.
type launch struct {
	// attach is the first client, for ContainerRun.
	attach *attachment
	// restart: the policy starts it, not a user.
	restart bool
	// create: the record was not stored yet, and its "create" not published.
	create bool
	// warnings, if set, is told what the container does not get.
	warnings *[]string
	// user is who a pod's container runs as, once it was found out.
	user *container.MemberUser
	// images are what its processes are brought back from.
	images *runtime.Images
}

// restricted tells what a container does not get of what was asked for: to who
// asked, if anybody does, and to the log.
func (e *Engine) restricted(u *unit, warnings []string, o *launch) {
	for _, w := range warnings {
		e.log.Warn("container starts with a restriction", "container", u.id, "warning", w)
	}
	if o.warnings != nil {
		*o.warnings = append(*o.warnings, warnings...)
	}
}

// launch starts the container's process; the operation token is held. The
// change of the record is on its way to the disk when it returns.
func (e *Engine) launch(ctx context.Context, u *unit, o launch) (p store.Pending, err error) {
	begin := time.Now()
	ctx, end := e.span(ctx, "container.start")
	defer end(&err)
	if e.closed.Load() || e.noRestarts.Load() {
		return p, fault.New(fault.Unavailable, "cannot start container: the engine is shutting down")
	}
	// A client that goes away does not leave half a container behind: a start
	// once begun is finished, or undone as a whole.
	ctx = context.WithoutCancel(ctx)
	if err := u.settled(ctx); err != nil {
		return p, err
	}
	r := u.rec.Load()
	ofContainer(ctx, r)
	if _, err := container.Next(r.State.Status, container.EventStart); err != nil {
		return p, err
	}
	var back scope
	defer back.close()
	var task runtime.Task
	var spec *specs.Process
	var att attached
	pend := e.takePending(u, o.attach)
	defer func() {
		if err != nil {
			back.run(ctx)
			pend.fail(err)
			e.startFailed(u, err, o)
			err = explain(r, err)
		}
	}()

	drv, err := e.driver(r.HostConfig.Runtime)
	if err != nil {
		return p, err
	}
	req, files, err := e.prepare(ctx, u, r, &o, &back)
	if err != nil {
		return p, err
	}
	req.Stdio.Attach = pend.first
	req.StopAfterCreate = pend.more() && o.images == nil
	req.Images = o.images
	if !r.HostConfig.NetworkMode.IsContainer() && !r.HostConfig.NetworkMode.IsHost() && len(r.Endpoints) > 0 && !r.Config.NetworkDisabled {
		parent := ctx
		req.Network = func(ctx context.Context, sb runtime.Sandbox) error {
			var err error
			ctx, end := e.span(trace.ContextWithSpan(ctx, trace.SpanFromContext(parent)), "network.attach")
			defer end(&err)
			att, err = e.connect(ctx, u, r, sb, files)
			return err
		}
		if !r.HostConfig.NetworkMode.IsNone() {
			back.add(func(ctx context.Context) { _ = e.cfg.Networks.Release(ctx, r.ID) })
		}
	}
	if req.Network == nil && !r.HostConfig.NetworkMode.IsContainer() {
		if err := e.fill(files, r, attached{}); err != nil {
			return p, err
		}
	}
	spec = req.Spec.Process
	sctx, started := e.span(ctx, "runtime.start")
	task, err = drv.Start(sctx, req)
	started(&err)
	if err != nil {
		return p, err
	}
	if w, ok := task.(runtime.Warner); ok {
		e.restricted(u, w.Warnings(), &o)
	}
	if err := pend.connect(ctx, task); err != nil {
		e.log.Warn("cannot attach a waiting client", "container", u.id, "cause", err)
	}
	if req.StopAfterCreate {
		if err := task.Release(ctx); err != nil {
			_ = task.Signal(ctx, int(unix.SIGKILL), true)
			_ = task.Delete(ctx)
			return p, err
		}
	}

	u.mu.Lock()
	u.task, u.process, u.noRestart = task, spec, false
	u.label = spec.SelinuxLabel
	u.ended = make(chan struct{})
	nr, p, cerr := e.changeLocked(u, func(n *container.Record) {
		if serr := step(n, container.EventStart); serr != nil {
			e.log.Error("unexpected state", "container", u.id, "cause", serr)
		}
		n.State = container.State{
			Status: n.State.Status, Pid: task.Pid(), StartedAt: task.StartedAt().UTC(), BootID: e.bootID,
			FinishedAt: n.State.FinishedAt,
		}
		if _, ok := container.NewHealthCheck(n.Config.Healthcheck); ok {
			n.State.Health = &mcontainer.Health{Status: mcontainer.Starting, Log: []*mcontainer.HealthcheckResult{}}
		}
		n.Attached, n.Ports, n.DNS = att.endpoints, att.ports, att.dns
		if n.Pod != nil {
			m := *n.Pod
			m.User = o.user
			n.Pod = &m
		}
		if o.restart {
			n.RestartCount++
		} else {
			n.RestartCount = 0
		}
	})
	u.mu.Unlock()
	if cerr != nil {
		e.log.Error("cannot encode a container's record", "container", u.id, "cause", cerr)
	}
	if o.create {
		e.publish(u, events.ActionCreate, nil)
		if o.attach != nil {
			e.publish(u, events.ActionAttach, nil)
		}
	}
	e.publishMounts(r, events.ActionMount)
	e.publishEndpoints(r, att.endpoints, events.ActionConnect)
	e.publish(u, events.ActionStart, nil)
	e.hookContainer(r, func(h PodHooks, ctx context.Context, p *container.Pod) []LimitChange {
		h.ContainerStarted(ctx, p, nr)
		return nil
	})
	e.logStarted(r)
	e.meters.started(time.Since(begin))
	e.spawn(func() { e.await(u, task) })
	e.startHealth(u, nr, task)
	return p, nil
}

// prepare makes everything ready that a start needs but its network.
func (e *Engine) prepare(ctx context.Context, u *unit, r *container.Record, o *launch, back *scope) (req runtime.StartRequest, g generated, err error) {
	ctx, end := e.span(ctx, "container.prepare")
	defer end(&err)
	hc := r.HostConfig
	lab, err := e.allotLabels(r, back)
	if err != nil {
		return req, g, err
	}
	root, err := e.cfg.Snapshots.MountLabelled(ctx, r.ID, idMap(r), lab.mount)
	if err != nil {
		return req, g, fmt.Errorf("cannot mount the container's file system: %w", err)
	}
	keep := false
	defer func() {
		if !keep {
			root.Close()
		}
	}()
	log, err := e.logSettings(hc.LogConfig)
	if err != nil {
		return req, g, err
	}
	log.Path = u.log
	if err := e.prepareLog(r); err != nil {
		return req, g, err
	}
	if err := os.Mkdir(u.dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return req, g, fmt.Errorf("cannot make the container's directory: %w", err)
	}
	if !hc.NetworkMode.IsContainer() {
		if g, err = e.openFiles(ctx, u, r, lab.mount, back); err != nil {
			return req, g, err
		}
	}
	if wd := r.Config.WorkingDir; wd != "" && wd != "/" {
		if err := ensureDir(root, wd, r); err != nil {
			return req, g, err
		}
	}
	in, err := e.specInput(ctx, u, r, root, lab, back)
	if err != nil {
		return req, g, err
	}
	devices, plain := cdi.Wanted(hc)
	if len(devices) > 0 {
		if e.cfg.CDI == nil {
			return req, g, fault.New(fault.Unsupported, "cannot add devices: this engine has no CDI")
		}
		without := *in.HostConfig
		without.Devices = plain
		in.HostConfig = &without
	}
	spec, warnings, err := oci.Generate(in)
	if err == nil && len(devices) > 0 {
		err = e.cfg.CDI.Inject(ctx, spec, devices)
	}
	if err != nil {
		return req, g, err
	}
	if r.Pod != nil {
		o.user = finishMember(r, spec)
		if err := e.hookCreate(ctx, r, spec); err != nil {
			return req, g, err
		}
	}
	e.restricted(u, warnings, o)
	keep = true
	req = runtime.StartRequest{
		ID: r.ID, Key: e.sandboxKey(r.Config, hc), Spec: spec, RootFS: root, Log: log, Ephemeral: r.Ephemeral,
		Init: oci.InitWanted(hc, e.cfg.Init),
		Stdio: runtime.Stdio{
			Terminal: r.Config.Tty, Stdin: r.Config.OpenStdin, StdinOnce: r.Config.StdinOnce,
			Width: uint16(min(hc.ConsoleSize[1], 1<<16-1)), Height: uint16(min(hc.ConsoleSize[0], 1<<16-1)),
		},
	}
	return req, g, nil
}

// specInput gathers what the spec depends on. Things that must stay until the
// start are undone by back.
func (e *Engine) specInput(ctx context.Context, u *unit, r *container.Record, root *os.File, lab labels, back *scope) (in oci.Input, err error) {
	hc := r.HostConfig
	in = oci.Input{
		ID: r.ID, Name: r.Name, Config: r.Config, HostConfig: hc, Files: e.filePaths(u, r), IDMap: idMap(r),
		CgroupPath: e.cgroupPath(r), CgroupV2: e.cfg.CgroupV2, Rootless: e.cfg.Rootless,
		Devices: oci.DevicesAt, Host: e.cfg.Host, Seccomp: e.cfg.Profiles, AppArmorProfile: e.cfg.AppArmorProfile,
		NoNewPrivileges: e.cfg.NoNewPrivileges, ProcessLabel: lab.process, MountLabel: lab.mount,
	}
	if !e.native(hc.Runtime) {
		// Runtimes of some age refuse specs that use these.
		in.Host.TimeNamespace, in.Host.RecursiveReadonly = false, false
	}
	if in.User, in.Home, err = lookupUser(root, r); err != nil {
		return in, err
	}
	if in.Mounts, err = e.startMounts(ctx, u, r, lab.mount, back); err != nil {
		return in, err
	}
	if hc.Privileged {
		if in.AllDevices, err = e.devices.get(); err != nil {
			return in, err
		}
	}
	if r.Extra.Debug != "" {
		m, err := e.debugTarget(ctx, u, r, root, back)
		if err != nil {
			return in, err
		}
		in.Mounts = append(in.Mounts, m...)
	}
	if err := e.ownMounts(ctx, u, r, in.Mounts, in.User, in.MountLabel, back); err != nil {
		return in, err
	}
	if in.Mounts, err = e.secretMounts(u, r, in.Mounts, lab.mount, back); err != nil {
		return in, err
	}
	if in.LinkEnv, err = e.linkEnv(r); err != nil {
		return in, err
	}
	if hc.IpcMode.IsHost() {
		in.ShmSource = "/dev/shm"
	}
	if hc.IpcMode.IsShareable() {
		if in.ShmSource, err = e.sharedShm(u, r, lab.mount); err != nil {
			return in, err
		}
		back.add(func(context.Context) { _ = e.dropHostMounts(u) })
	}
	if r.Pod != nil {
		err = e.joinPod(r, &in, back)
	} else {
		err = e.join(r, &in, back)
	}
	return in, err
}

// ensureDir makes the working directory inside the root, if it is missing.
func ensureDir(root *os.File, dir string, r *container.Record) error {
	f, err := openIn(root, dir, unix.O_PATH, 0)
	if err == nil {
		defer f.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return fault.New(fault.Invalid, "Cannot mkdir: %s is not a directory", dir)
		}
		return nil
	}
	if !errors.Is(err, unix.ENOENT) {
		return fault.New(fault.Invalid, "cannot use working directory %s: %w", dir, err)
	}
	if r.UserNS.Size != 0 {
		return nil // the runtime makes it, with ids that are mapped
	}
	h, err := pathrs.MkdirAllHandle(root, strings.TrimPrefix(path.Clean(dir), "/"), 0o755)
	if err != nil {
		return fault.New(fault.Invalid, "cannot make working directory %s: %w", dir, err)
	}
	return h.Close()
}

// cgroupPath is where the container's cgroup is made.
func (e *Engine) cgroupPath(r *container.Record) string {
	if e.cfg.NoCgroups {
		return ""
	}
	parent := r.HostConfig.CgroupParent
	if parent == "" {
		parent = e.cfg.CgroupParent
	}
	if e.cfg.CgroupDriver == "systemd" {
		if parent == "" || strings.Contains(parent, "/") {
			parent = "system.slice"
		}
		return parent + ":servin:" + r.ID
	}
	return path.Join("/", parent, r.ID)
}
