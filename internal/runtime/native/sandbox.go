package native

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/runtime/source"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sandbox is a monitor with a stage child in its namespaces and cgroup.
type sandbox struct {
	// prepared are the file systems made when it was parked, nil the usual ones.
	prepared []specs.Mount

	d        *Driver
	id       string
	key      contract.SandboxKey
	dir      string
	group    *cgroup.Group
	tasks    []int // cgroup v1 tasks files, while they are needed
	cgdir    int   // cgroup v2 directory
	mon      *shim.Monitor
	pid      int
	pidfd    int
	pidStart uint64
	netns    *os.File
	link     any
	flags    uint64 // CLONE_NEW* of the stage child
	plan     bool   // the park plan has been carried out
	relay    relay  // passes the monitor's notices on once there is a task

	once sync.Once
}

// relay is the shim.Handler of a sandbox: before there is a task it keeps what
// matters, afterwards it passes on.
type relay struct {
	mu   sync.Mutex
	to   shim.Handler
	gone bool
	exit *shim.Exit
	lost chan struct{} // closed when the monitor is gone
	born func(pid, pidfd int)
}

// bind names who is told from now on; nil is nobody.
func (r *relay) bind(h shim.Handler) {
	r.mu.Lock()
	r.to = h
	gone, exit := r.gone, r.exit
	r.mu.Unlock()
	if h == nil {
		return
	}
	if exit != nil {
		h.Exited(*exit)
	}
	if gone {
		h.Gone()
	}
}

func (r *relay) target() shim.Handler {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.to
}

func (r *relay) Exited(e shim.Exit) {
	r.mu.Lock()
	h := r.to
	if h == nil {
		r.exit = &e
	}
	r.mu.Unlock()
	if h != nil {
		h.Exited(e)
	}
}

func (r *relay) ExecExited(c uint32, e shim.Exit) {
	if h := r.target(); h != nil {
		h.ExecExited(c, e)
	}
}

func (r *relay) Notify(fd int) {
	if h := r.target(); h != nil {
		h.Notify(fd)
		return
	}
	unix.Close(fd)
}

func (r *relay) Reborn(pid, pidfd int) {
	r.mu.Lock()
	born := r.born
	r.mu.Unlock()
	born(pid, pidfd)
}

func (r *relay) setBorn(f func(pid, pidfd int)) {
	r.mu.Lock()
	r.born = f
	r.mu.Unlock()
}

func (r *relay) Gone() {
	r.mu.Lock()
	h := r.to
	r.gone = true
	r.mu.Unlock()
	close(r.lost)
	if h != nil {
		h.Gone()
	}
}

// newSandbox makes the run directory, the cgroup and the monitor, at the same time.
func (d *Driver) newSandbox(id string, key contract.SandboxKey) (*sandbox, error) {
	s := &sandbox{d: d, id: id, key: key, dir: filepath.Join(d.dir, id), cgdir: -1, pidfd: -1}
	s.relay.lost = make(chan struct{})
	s.relay.born = func(pid, pidfd int) {
		if s.pidfd >= 0 {
			unix.Close(s.pidfd)
		}
		s.pid, s.pidfd = pid, pidfd
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, fault.New(fault.Conflict, "cannot make the run directory: %w", err)
	}
	groups := make(chan error, 1)
	go func() { groups <- s.makeGroup() }()
	var err error
	s.mon, err = d.exe.Spawn(s.dir, &s.relay)
	if gerr := <-groups; gerr != nil {
		err = errors.Join(err, gerr)
	}
	if err != nil {
		s.discard()
		return nil, err
	}
	return s, nil
}

func (s *sandbox) makeGroup() (err error) {
	if s.d.systemd {
		s.group, err = s.d.cg.Scope(s.key.CgroupParent, s.id)
		return err
	}
	parent := s.d.cgroupParent(s.key)
	g, err := s.d.cg.Create(parent, s.id)
	if fault.Is(err, fault.Conflict) {
		// Left by a container of the same id that ended: only an empty one goes.
		if old, e := s.d.cg.Open(filepath.Join(parent, s.id)); e == nil {
			if e := old.Remove(context.Background()); e == nil {
				g, err = s.d.cg.Create(parent, s.id)
			}
		}
	}
	if err != nil {
		return err
	}
	s.group = g
	if s.tasks, err = g.Tasks(); err != nil {
		return fault.New(fault.Internal, "cannot open the cgroup: %w", err)
	}
	if s.cgdir, err = g.Dir(); err != nil {
		return fault.New(fault.Internal, "cannot open the cgroup: %w", err)
	}
	return nil
}

// clone makes the stage child and maps its ids.
func (s *sandbox) clone(ctx context.Context, flags uint64, pidns, userns string, uids, gids []specs.LinuxIDMapping) error {
	r := shim.CloneRequest{Namespaces: flags, Cgroup: s.cgdir, PIDNS: -1, UserNS: -1, Nice: s.d.nice}
	for _, n := range []struct {
		path string
		fd   *int
	}{{pidns, &r.PIDNS}, {userns, &r.UserNS}} {
		if n.path == "" {
			continue
		}
		fd, err := source.Namespace(n.path)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		*n.fd = fd
	}
	c, err := s.mon.Clone(ctx, r)
	if err != nil {
		return startError(err)
	}
	s.pid, s.pidfd, s.flags = c.PID, c.PIDFD, flags
	s.pidStart = startTime(c.PID)
	if err := s.group.Join(c.PID); err != nil {
		return err
	}
	if flags&unix.CLONE_NEWUSER != 0 {
		if err := source.WriteIDMaps(s.pid, uids, gids); err != nil {
			return err
		}
	}
	if flags&unix.CLONE_NEWNET != 0 {
		s.netns, err = s.openProc("ns/net", unix.O_RDONLY)
	}
	return err
}

// openProc opens something under the process's /proc directory and makes sure
// that it was the process's, not a later one's of the same number.
func (s *sandbox) openProc(name string, flags int) (*os.File, error) {
	return openProc(s.pid, s.pidfd, name, flags)
}

func openProc(pid, pidfd int, name string, flags int) (*os.File, error) {
	p := "/proc/" + strconv.Itoa(pid) + "/" + name
	fd, err := unix.Open(p, flags|unix.O_CLOEXEC, 0)
	if err == nil {
		if err = unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return nil, fault.New(fault.NotFound, "cannot open %s of the container: %w", name, err)
	}
	return os.NewFile(uintptr(fd), p), nil
}

// park carries the park plan out.
func (s *sandbox) park(ctx context.Context) error {
	opts := s.d.planOptions(s.id)
	rules, mounts := s.d.pool.likely(s.key)
	opts.Prepare, s.prepared = mounts, mounts
	p, err := plan.Park(true, opts)
	if err != nil {
		return err
	}
	if err := s.clone(ctx, p.CloneFlags, "", "", nil, nil); err != nil {
		return err
	}
	fds, done, err := s.openSlots(p, slotSources{})
	defer done()
	if err != nil {
		return err
	}
	code, err := p.Encode()
	if err != nil {
		return err
	}
	pend, err := s.mon.Run(shim.Plan{Code: code, Slots: fds})
	if err != nil {
		return startError(err)
	}
	if err := pend.Done(ctx); err != nil {
		return startError(err)
	}
	s.plan = true
	s.closeTasks()
	if rules != nil {
		if _, err := s.group.Apply(&specs.LinuxResources{Devices: rules}); err != nil {
			return err
		}
	}
	if s.key.Network == "bridge" && s.d.cfg.PrepareLink != nil {
		s.link, err = s.d.cfg.PrepareLink(ctx, s.netns)
	}
	// Parked at low priority, ready at the ordinary one: a start must not wait
	// for the processor behind everybody else.
	for _, pid := range []int{s.mon.PID(), s.pid} {
		_ = unix.Setpriority(unix.PRIO_PROCESS, pid, s.d.nice)
	}
	return err
}

func (s *sandbox) closeTasks() {
	for _, fd := range s.tasks {
		unix.Close(fd)
	}
	s.tasks = nil
	if s.cgdir >= 0 {
		unix.Close(s.cgdir)
		s.cgdir = -1
	}
}

// closeFiles releases descriptors that only a start needs.
func (s *sandbox) closeFiles() {
	s.closeTasks()
	if s.netns != nil {
		s.netns.Close()
		s.netns = nil
	}
}

// discard kills and removes everything of a sandbox that no task was made from.
func (s *sandbox) discard() {
	s.once.Do(func() {
		if s.pidfd >= 0 {
			_ = unix.PidfdSendSignal(s.pidfd, unix.SIGKILL, nil, 0)
		}
		if s.mon != nil {
			_ = s.mon.Close()
			select {
			case <-s.mon.Done():
			case <-time.After(5 * time.Second):
				_ = unix.Kill(s.mon.PID(), unix.SIGKILL)
			}
		}
		if s.link != nil && s.d.cfg.DropLink != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			if err := s.d.cfg.DropLink(ctx, s.link); err != nil {
				s.d.log.Warn("cannot drop the link of an unused sandbox", "id", s.id, "error", err)
			}
			cancel()
		}
		s.closeFiles()
		if s.pidfd >= 0 {
			unix.Close(s.pidfd)
			s.pidfd = -1
		}
		if s.group != nil {
			g := s.group
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			_ = g.Signal(ctx, int(unix.SIGKILL))
			if err := g.Remove(ctx); err != nil {
				s.d.log.Warn("cannot remove a cgroup", "id", s.id, "error", err)
			}
			cancel()
		}
		_ = os.RemoveAll(s.dir)
	})
}

// startError turns a failed operation into the contract's error.
func startError(err error) error {
	var se *shim.StageError
	if errors.As(err, &se) {
		return &contract.StartError{Step: se.Name, Err: se.Err}
	}
	return err
}
