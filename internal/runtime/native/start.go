package native

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/source"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// start is one Start under way.
type start struct {
	d      *Driver
	req    *contract.StartRequest
	spec   *specs.Spec
	sb     *sandbox
	p      *plan.Plan
	task   *task
	std    *stdio
	filter string // key of the seccomp program
	stage  int    // the process that became CRIU, of a restore
}

// Start implements runtime.Driver.
func (d *Driver) Start(ctx context.Context, req contract.StartRequest) (contract.Task, error) {
	d.pool.enter()
	defer d.pool.leave()
	if req.RootFS != nil {
		defer req.RootFS.Close()
	}
	sb := d.pool.take(req.ID)
	s := &start{d: d, req: &req, sb: sb}
	run := s.run
	if req.Images != nil {
		run = s.restore
	}
	t, err := run(ctx)
	if err != nil {
		if s.sb != nil {
			s.sb.relay.bind(nil)
			if t := s.task; t != nil {
				t.mu.Lock()
				s.sb.pidfd, t.pidfd = t.pidfd, -1
				if t.first != nil {
					t.first.Close()
				}
				t.mu.Unlock()
			}
			s.sb.discard()
		}
		return nil, err
	}
	return t, nil
}

func (s *start) check() error {
	r := s.req
	switch {
	case !validID(r.ID):
		return fault.New(fault.Invalid, "container id %.64q is not a plain name", r.ID)
	case r.Spec == nil || r.Spec.Process == nil || r.Spec.Linux == nil:
		return fault.New(fault.Invalid, "cannot start %s: its spec lacks process or linux", r.ID)
	case r.RootFS == nil:
		return fault.New(fault.Invalid, "cannot start %s: it has no root file system", r.ID)
	case r.Spec.Process.Terminal != r.Stdio.Terminal:
		return fault.New(fault.Invalid, "cannot start %s: spec and stdio disagree about a terminal", r.ID)
	}
	switch r.Log.Format {
	case "json-file", "k8s-file":
		if !filepath.IsAbs(r.Log.Path) {
			return fault.New(fault.Invalid, "cannot start %s: log path %q is not absolute", r.ID, r.Log.Path)
		}
	case "", "none":
	case "pipe":
		if r.Log.Pipe == nil {
			return fault.New(fault.Invalid, "cannot start %s: the log has no pipe", r.ID)
		}
	default:
		return fault.New(fault.Invalid, "cannot start %s: log format %q is unknown", r.ID, r.Log.Format)
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if s.d.closed {
		return fault.New(fault.Unavailable, "cannot start %s: the driver is closed", r.ID)
	}
	if s.d.tasks[r.ID] != nil {
		return fault.New(fault.Conflict, "cannot start %s: it has been started", r.ID)
	}
	return nil
}

func (s *start) run(ctx context.Context) (*task, error) {
	d, req := s.d, s.req
	if err := s.check(); err != nil {
		return nil, err
	}
	var warnings []string
	s.spec, warnings = d.limits.clamp(req.Spec)
	if io := req.Stdio; io.Terminal && io.Width > 0 && io.Height > 0 && s.spec.Process.ConsoleSize == nil {
		// In the plan, so that the process never sees a terminal without a size.
		spec, process := *s.spec, *s.spec.Process
		process.ConsoleSize = &specs.Box{Width: uint(io.Width), Height: uint(io.Height)}
		spec.Process = &process
		s.spec = &spec
	}
	if !slices.ContainsFunc(s.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace }) {
		p, err := d.limits.permits(s.spec.Process)
		if err != nil {
			return nil, err
		}
		if p != s.spec.Process {
			c := *s.spec
			c.Process, s.spec = p, &c
		}
	}
	if err := s.compile(ctx); err != nil {
		return nil, err
	}
	var err error
	if s.std, err = newStdio(req.Stdio, s.spec); err != nil {
		return nil, err
	}
	defer s.std.close()

	// What needs no sandbox is done while a cold one is made.
	src := slotSources{root: int(req.RootFS.Fd()), stdio: s.std.inside, pidfd: -1}
	type opened struct {
		fds  []int
		done func()
		err  error
	}
	var o opened
	var network chan error
	if s.sb == nil {
		if err := d.tear.wait(ctx, req.ID); err != nil {
			return nil, err
		}
		if s.sb, err = d.newSandbox(req.ID, req.Key); err != nil {
			return nil, err
		}
		src.tasks = s.sb.tasks
		if src.tasks == nil {
			src.tasks = []int{}
		}
		slots := make(chan opened, 1)
		go func() {
			var o opened
			o.fds, o.done, o.err = d.openSlots(s.p, src)
			slots <- o
		}()
		err = s.sb.clone(ctx, s.p.CloneFlags, s.p.PIDNamespace, s.p.UserNamespace, s.p.UIDMap, s.p.GIDMap)
		if err == nil {
			network = s.network(ctx)
		}
		o = <-slots
		err = errors.Join(err, o.err)
	} else {
		network = s.network(ctx)
		o.fds, o.done, err = d.openSlots(s.p, src)
	}
	defer o.done()
	if err == nil {
		var w []string
		w, err = s.sb.group.Apply(s.spec.Linux.Resources)
		warnings = append(warnings, w...)
		d.pool.learn(req.Key, s.spec)
	}
	if err != nil {
		if network != nil {
			<-network
		}
		return nil, err
	}
	s.task = newTask(s.sb, s.spec, req)
	s.task.filter = s.filter
	s.task.warnings = warnings
	if err := s.launch(ctx, o.fds, network); err != nil {
		return nil, err
	}
	return s.task, nil
}

// compile makes the plan; a reserved sandbox that does not fit is given up.
func (s *start) compile(ctx context.Context) error {
	d, req := s.d, s.req
	opts := d.planOptions(req.ID)
	opts.Init = req.Init
	opts.Parked = s.sb != nil
	if s.sb != nil {
		opts.Prepare = s.sb.prepared
	}
	var err error
	if s.filter, err = d.filter.fill(&opts, s.spec); err != nil {
		return err
	}
	if opts.Seccomp == nil {
		s.filter = ""
	}
	if s.sb == nil {
		opts.CgroupPaths = d.cgroupPaths(req.Key, req.ID)
	}
	p, err := plan.Compile(s.spec, opts)
	if s.sb != nil && (err != nil || p.CloneFlags != s.sb.flags) {
		s.sb.discard()
		s.sb = nil
		opts.Parked = false
		opts.CgroupPaths = d.cgroupPaths(req.Key, req.ID)
		p, err = plan.Compile(s.spec, opts)
	}
	s.p = p
	return err
}

func (s *start) network(ctx context.Context) chan error {
	if s.req.Network == nil {
		return nil
	}
	ch := make(chan error, 1)
	sb := contract.Sandbox{ID: s.req.ID, NetNS: s.sb.netns, Link: s.sb.link}
	s.sb.link = nil // the network's own from now on
	go func() { ch <- s.req.Network(ctx, sb) }()
	return ch
}

// launch sends the plan and waits until the process runs, or is held.
func (s *start) launch(ctx context.Context, fds []int, network chan error) (err error) {
	t, req, mon := s.task, s.req, s.sb.mon
	awaitNetwork := func() error {
		if network == nil {
			return nil
		}
		err := <-network
		network = nil
		return err
	}
	defer func() { _ = awaitNetwork() }()

	first, rest := s.p, (*plan.Plan)(nil)
	hooks := s.spec.Hooks
	early := hooks != nil && len(hooks.Prestart)+len(hooks.CreateRuntime)+len(hooks.CreateContainer) > 0
	late := hooks != nil && len(hooks.StartContainer) > 0
	if early {
		// Hooks of the creation want to see the network and the mounts.
		if err := awaitNetwork(); err != nil {
			return err
		}
		before, after := s.p.SplitPivot()
		if err := s.runPlan(ctx, before, fds); err != nil {
			return err
		}
		if err := s.earlyHooks(ctx); err != nil {
			return err
		}
		first, fds = after, nil
	}
	// A network still being set up does not keep the stage from working.
	hold := req.StopAfterCreate || late
	if network != nil {
		select {
		case nerr := <-network:
			network = nil
			if nerr != nil {
				return nerr
			}
		default:
			hold = true
		}
	}
	r := s.startRequest()
	if hold {
		first, rest = first.SplitExec()
		if r.Hold, err = rest.Encode(); err != nil {
			return err
		}
	}
	if r.Plan.Code, err = first.Encode(); err != nil {
		return err
	}
	r.Plan.Slots = fds
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
	// While the stage works:
	s.std.close()
	if err := t.save(); err != nil {
		return err
	}
	if hold {
		if err := pend.Done(ctx); err != nil {
			return startError(err)
		}
		if err := awaitNetwork(); err != nil {
			return err
		}
		if late {
			if err := s.stageHooks(ctx, hooks.StartContainer, specs.StateCreated); err != nil {
				return err
			}
		}
	}
	if req.StopAfterCreate {
		t.held = true
	} else {
		if hold {
			if pend, err = mon.Release(); err != nil {
				return startError(err)
			}
		}
		st, err := pend.Started(ctx)
		if err != nil {
			return startError(err)
		}
		t.started(st.PID, time.Unix(0, st.At))
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
	if !t.held {
		t.poststart(ctx)
	}
	return nil
}

func (s *start) runPlan(ctx context.Context, p *plan.Plan, fds []int) error {
	code, err := p.Encode()
	if err != nil {
		return err
	}
	pend, err := s.sb.mon.Run(shim.Plan{Code: code, Slots: fds})
	if err == nil {
		err = pend.Done(ctx)
	}
	return startError(err)
}

func (s *start) startRequest() shim.StartRequest {
	l, io := s.req.Log, s.req.Stdio
	r := shim.StartRequest{
		Stdin: s.std.outside[0], Stdout: s.std.outside[1], Stderr: s.std.outside[2], LogPipe: -1,
		Terminal: io.Terminal, StdinOnce: io.StdinOnce, NonBlock: l.NonBlocking, Ephemeral: s.req.Ephemeral,
		OwnPIDNamespace: s.task.ownPID, LogPath: l.Path, LogSize: l.MaxSize, LogFiles: l.MaxFiles, LogBuffer: l.BufferSize,
		Width: io.Width, Height: io.Height,
	}
	switch l.Format {
	case "json-file":
		r.Format = shim.LogJSON
	case "k8s-file":
		r.Format = shim.LogK8s
	case "pipe":
		r.Format = shim.LogPipe
		r.LogPipe = int(l.Pipe.Fd())
	}
	return r
}

// stdio are the ends of the standard streams: inside for the container,
// outside for the monitor; -1 none.
type stdio struct {
	inside, outside [3]int
	own             []int
}

func newStdio(o contract.Stdio, spec *specs.Spec) (*stdio, error) {
	s := &stdio{inside: [3]int{-1, -1, -1}, outside: [3]int{-1, -1, -1}}
	if o.Terminal {
		return s, nil
	}
	for i := range 3 {
		if i == 0 && !o.Stdin {
			fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				s.close()
				return nil, fault.New(fault.Internal, "cannot open /dev/null: %w", err)
			}
			s.inside[0], s.own = fd, append(s.own, fd)
			continue
		}
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			s.close()
			return nil, fault.New(fault.Exhausted, "cannot make a pipe: %w", err)
		}
		s.own = append(s.own, p[0], p[1])
		if i == 0 {
			s.inside[i], s.outside[i] = p[0], p[1]
		} else {
			s.inside[i], s.outside[i] = p[1], p[0]
		}
		s.giveTo(i, spec)
	}
	return s, nil
}

// giveTo lets the container's user open /dev/stdout and its kind again.
func (s *stdio) giveTo(i int, spec *specs.Spec) {
	uid := spec.Process.User.UID
	var m []specs.LinuxIDMapping
	if spec.Linux != nil {
		m = spec.Linux.UIDMappings
	}
	if id := source.HostID(uid, m); id > 0 {
		_ = unix.Fchown(s.inside[i], id, -1)
	}
}

func (s *stdio) close() {
	for _, fd := range s.own {
		unix.Close(fd)
	}
	s.own = nil
}

func (d *Driver) cgroupPaths(key contract.SandboxKey, id string) map[string]string {
	g, err := d.cg.Open(filepath.Join(d.cgroupParent(key), id))
	if d.systemd {
		g, err = d.cg.Scope(key.CgroupParent, id)
	}
	if err != nil {
		return nil
	}
	return g.Paths()
}
