// Package native is the runtime driver that starts containers itself: it
// compiles the runtime spec to a plan (package plan), keeps parked sandboxes
// ready, opens what lies on the host, and has servin-shim (package shim) carry
// the plan out and watch the process.
//
// Vocabulary as in package runtime. The engine's composition root builds a
// Driver; nobody else imports this package.
package native

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/shim"
	"golang.org/x/sys/unix"
)

// Config tells a Driver where it lives.
type Config struct {
	// Root holds what must survive a power cut, RunRoot what need not.
	Root, RunRoot string
	// Instance tells daemons on one machine apart; it is part of cgroup names.
	Instance string
	// CgroupDriver is "cgroupfs" (or "") or "systemd".
	CgroupDriver string
	// Rootless: the engine of an ordinary user, in a user namespace. CgroupBase is
	// then the v2 subtree that was delegated to it, "" none.
	Rootless   bool
	CgroupBase string
	// Unified uses the cgroup v2 tree of a hybrid host alone.
	Unified bool
	// PoolSize is how many sandboxes of each kind are kept parked; 0 is none.
	PoolSize int
	// ParkAfter holds the first parking back until it is closed: an engine that starts
	// has better to do. Nil is at once.
	ParkAfter <-chan struct{}
	// PrepareLink makes a link in a parked sandbox's network namespace, DropLink
	// removes one that was never used. Without them "bridge" is not parked.
	PrepareLink func(ctx context.Context, netns *os.File) (any, error)
	DropLink    func(ctx context.Context, link any) error
	Logger      *slog.Logger
}

// Driver is the native runtime driver.
type Driver struct {
	cfg         Config
	log         *slog.Logger
	exe         *shim.Executable
	cg          *cgroup.Host
	dir         string   // RunRoot/shim
	parent      string   // default cgroup parent
	systemd     bool     // scopes instead of directories of ours
	controllers []string // v1 hierarchies
	nice        int
	limits      hostLimits
	filter      *filterCache
	pool        *pool
	tear        *teardown

	mu     sync.Mutex
	tasks  map[string]*task
	closed bool
}

var _ contract.Driver = (*Driver)(nil)

// plainChars are what an instance's name is made of.
const plainChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"

// New makes a driver and clears away what parked sandboxes of a former one left.
func New(cfg Config) (*Driver, error) {
	if cfg.RunRoot == "" || !filepath.IsAbs(cfg.RunRoot) {
		return nil, fault.New(fault.Invalid, "cannot make a runtime driver: RunRoot %q is not absolute", cfg.RunRoot)
	}
	if len(cfg.Instance) > 64 || strings.Trim(cfg.Instance, plainChars) != "" {
		return nil, fault.New(fault.Invalid, "cannot make a runtime driver: instance %q is not a plain name", cfg.Instance)
	}
	d := &Driver{cfg: cfg, log: cfg.Logger, dir: filepath.Join(cfg.RunRoot, "shim"), tasks: map[string]*task{}}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	d.parent = "/servin"
	if cfg.Instance != "" {
		d.parent += "-" + cfg.Instance
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return nil, fault.New(fault.Internal, "cannot make the runtime directory: %w", err)
	}
	var err error
	if cfg.Rootless {
		d.cg, err = cgroup.Delegated(cfg.CgroupBase)
	} else {
		d.cg, err = cgroup.Detect()
	}
	if err != nil {
		return nil, err
	}
	if cfg.Unified && !d.cg.Unified() {
		return nil, fault.New(fault.Unsupported, "cannot use the unified cgroup tree: there is none")
	}
	switch cfg.CgroupDriver {
	case "", "cgroupfs":
	case "systemd":
		if !cgroup.SystemdRunning() {
			return nil, fault.New(fault.Unsupported, "cannot use systemd for cgroups: the host was not booted with it; use the cgroupfs driver")
		}
		d.systemd = true
	default:
		return nil, fault.New(fault.Invalid, "cgroup driver %q is unknown (cgroupfs or systemd)", cfg.CgroupDriver)
	}
	if !d.systemd { // systemd puts the process where it belongs
		d.controllers = d.cg.Controllers()
	}
	if d.exe, err = shim.NewExecutable(); err != nil {
		return nil, err
	}
	if d.nice, err = unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil {
		d.nice = 20 - d.nice // the raw system call's convention
	}
	d.limits = readHostLimits()
	d.filter = newFilterCache(filepath.Join(cfg.RunRoot, "seccomp"))
	d.tear = newTeardown(d)
	d.pool = newPool(d)
	d.sweep()
	return d, nil
}

// sweep removes what belongs to nothing: run directories in which no process
// was ever started, and cgroups without a run directory.
func (d *Driver) sweep() {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return
	}
	known := map[string]bool{}
	for _, e := range entries {
		id := e.Name()
		dir := filepath.Join(d.dir, id)
		if !validID(id) {
			_ = os.RemoveAll(dir)
			continue
		}
		st, err := readState(dir)
		if err == nil && st.Started || exists(filepath.Join(dir, "shim.sock")) {
			known[id] = true
			continue
		}
		// Parked: its monitor ended with the daemon that it was parked for.
		d.removeLeftover(id, dir, st)
	}
	for _, id := range d.cg.Children(d.parent) {
		if validID(id) && !known[id] {
			if g, err := d.cg.Open(filepath.Join(d.parent, id)); err == nil {
				d.tear.add(func(ctx context.Context) error {
					_ = g.Signal(ctx, int(unix.SIGKILL))
					return g.Remove(ctx)
				})
			}
		}
	}
}

func (d *Driver) removeLeftover(id, dir string, st state) {
	path := st.Cgroup
	if path == "" {
		path = filepath.Join(d.parent, id)
	}
	g, err := d.cg.Open(path)
	d.tear.add(func(ctx context.Context) error {
		if err == nil {
			_ = g.Signal(ctx, int(unix.SIGKILL))
			if e := g.Remove(ctx); e != nil {
				return e
			}
		}
		return os.RemoveAll(dir)
	})
}

// CgroupV2 reports whether limits are those of cgroup v2.
func (d *Driver) CgroupV2() bool { return d.cg.Mode == cgroup.V2 }

// Lacking tells for each cgroup controller that containers cannot have why.
func (d *Driver) Lacking() map[string]string { return d.cg.Lacking() }

func exists(p string) bool {
	_, err := os.Lstat(p)
	return !errors.Is(err, fs.ErrNotExist)
}

func validID(id string) bool {
	if id == "" || len(id) > 128 || id[0] == '.' {
		return false
	}
	for _, c := range []byte(id) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '.') {
			return false
		}
	}
	return true
}

func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// Reserve implements runtime.Driver.
func (d *Driver) Reserve(key contract.SandboxKey) string { return d.pool.reserve(key) }

// Release implements runtime.Driver.
func (d *Driver) Release(id string) { d.pool.release(id) }

// Orphans implements runtime.Driver.
func (d *Driver) Orphans() ([]string, error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot list containers: %w", err)
	}
	var ids []string
	for _, e := range entries {
		dir := filepath.Join(d.dir, e.Name())
		if !validID(e.Name()) || d.pool.has(e.Name()) {
			continue
		}
		if st, err := readState(dir); err == nil && st.Started || exists(filepath.Join(dir, "shim.sock")) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// Run implements runtime.Driver.
func (d *Driver) Run(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.tear.run(ctx)
	}()
	if d.cfg.ParkAfter != nil {
		select {
		case <-d.cfg.ParkAfter:
		case <-ctx.Done():
		}
	}
	d.pool.run(ctx)
	<-done
	return nil
}

// Drained implements runtime.Driver.
func (d *Driver) Drained(ctx context.Context, full bool) error {
	for {
		if d.tear.idle() && (!full || d.pool.full()) {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// Close implements runtime.Driver.
func (d *Driver) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	tasks := make([]*task, 0, len(d.tasks))
	for _, t := range d.tasks {
		tasks = append(tasks, t)
	}
	d.mu.Unlock()
	d.pool.close()
	d.tear.flush()
	for _, t := range tasks {
		t.leave()
	}
	if len(tasks) == 0 {
		d.cg.RemoveParent(d.parent)
	}
	return d.exe.Close()
}

func (d *Driver) cgroupParent(key contract.SandboxKey) string {
	if key.CgroupParent == "" {
		return d.parent
	}
	return key.CgroupParent
}

func (d *Driver) forget(t *task) {
	d.mu.Lock()
	if d.tasks[t.id] == t {
		delete(d.tasks, t.id)
	}
	d.mu.Unlock()
}
