// Package command is the runtime driver over the command line of an OCI
// runtime: runc, crun, runsc, kata and their kind. The runtime makes the
// container; its streams, log and exit are servin-shim's (package shim), as
// with the native driver, so such a container outlives the daemon as well.
//
// Vocabulary as in package runtime. A *bundle* is the directory that the
// runtime wants: config.json and the mounted root file system. The engine's
// composition root makes one Driver for each runtime.
package command

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Config names a runtime and where its containers live.
type Config struct {
	// Name is the runtime's name for directories; Path its program; Args go
	// before every subcommand.
	Name, Path string
	Args       []string
	// RunRoot holds run directories and bundles. Instance tells daemons apart in
	// cgroup names.
	RunRoot, Instance string
	// SystemdCgroup has the runtime use systemd (--systemd-cgroup).
	SystemdCgroup bool
	Logger        *slog.Logger
}

// Driver is the runtime driver.
type Driver struct {
	cfg    Config
	log    *slog.Logger
	exe    *shim.Executable
	cg     *cgroup.Host
	dir    string
	parent string

	mu     sync.Mutex
	tasks  map[string]*task
	closed bool
}

var _ contract.Driver = (*Driver)(nil)

// New makes a driver.
func New(cfg Config) (*Driver, error) {
	plain := regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)
	if cfg.Name == "" || cfg.Name[0] == '.' || !plain.MatchString(cfg.Name) || !plain.MatchString(cfg.Instance) {
		return nil, fault.New(fault.Invalid, "runtime name %q or instance %q is not plain", cfg.Name, cfg.Instance)
	}
	if !filepath.IsAbs(cfg.RunRoot) {
		return nil, fault.New(fault.Invalid, "RunRoot %q is not absolute", cfg.RunRoot)
	}
	path, err := osexec.LookPath(cfg.Path)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return nil, fault.New(fault.NotFound, "cannot find runtime %s: %w", cfg.Name, err)
	}
	cfg.Path = path
	d := &Driver{cfg: cfg, log: cfg.Logger, dir: filepath.Join(cfg.RunRoot, "runtime-"+cfg.Name), parent: "/servin", tasks: map[string]*task{}}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if cfg.Instance != "" {
		d.parent += "-" + cfg.Instance
	}
	err = os.MkdirAll(d.dir, 0o711)
	for _, sub := range []struct {
		name string
		mode os.FileMode
	}{{"", 0o711}, {"roots", 0o711}, {"state", 0o700}} {
		if sub.name != "" && err == nil {
			err = os.MkdirAll(filepath.Join(d.dir, sub.name), sub.mode)
		}
		if err == nil { // whatever the umask
			err = os.Chmod(filepath.Join(d.dir, sub.name), sub.mode)
		}
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot make the runtime directory: %w", err)
	}
	if d.cg, err = cgroup.Detect(); err != nil {
		return nil, err
	}
	if d.exe, err = shim.NewExecutable(); err != nil {
		return nil, err
	}
	d.sweep()
	return d, nil
}

// sweep removes what a daemon left that was killed while it created a container.
func (d *Driver) sweep() {
	for _, id := range d.entries() {
		if _, err := readState(filepath.Join(d.dir, id)); errors.Is(err, os.ErrNotExist) {
			t := &task{d: d, id: id, dir: filepath.Join(d.dir, id)}
			if err := t.clear(context.Background()); err != nil {
				d.log.Warn("cannot clear away a container", "id", id, "error", err)
			}
		}
	}
}

func (d *Driver) entries() []string {
	entries, _ := os.ReadDir(d.dir)
	var ids []string
	for _, e := range entries {
		if validID(e.Name()) && e.Name() != "state" && e.Name() != "roots" {
			ids = append(ids, e.Name())
		}
	}
	return ids
}

func validID(id string) bool {
	return regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`).MatchString(id)
}

// Reserve implements runtime.Driver; nothing is parked.
func (d *Driver) Reserve(contract.SandboxKey) string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// Release implements runtime.Driver.
func (d *Driver) Release(string) {}

// Orphans implements runtime.Driver.
func (d *Driver) Orphans() ([]string, error) {
	var ids []string
	for _, id := range d.entries() {
		if _, err := readState(filepath.Join(d.dir, id)); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Run implements runtime.Driver; there is nothing to do.
func (d *Driver) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Drained implements runtime.Driver.
func (d *Driver) Drained(context.Context, bool) error { return nil }

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
	for _, t := range tasks {
		t.leave()
	}
	if len(tasks) == 0 {
		d.cg.RemoveParent(d.parent)
	}
	return d.exe.Close()
}

// command is a call of the runtime with its own log for errors.
func (d *Driver) args(logFile string, args ...string) []string {
	a := append([]string{d.cfg.Path}, d.cfg.Args...)
	a = append(a, "--root", filepath.Join(d.dir, "state"), "--log", logFile, "--log-format", "json")
	if d.cfg.SystemdCgroup {
		a = append(a, "--systemd-cgroup")
	}
	return append(a, args...)
}

// call runs the runtime to its end.
func (d *Driver) call(ctx context.Context, dir string, stdin []byte, args ...string) error {
	logFile := filepath.Join(dir, "runtime.log")
	a := d.args(logFile, args...)
	cmd := osexec.CommandContext(ctx, a[0], a[1:]...)
	cmd.Env = environment()
	cmd.WaitDelay = time.Second
	if stdin != nil {
		cmd.Stdin = newReader(stdin)
	}
	mark := size(logFile)
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return fault.New(fault.DeadlineExceeded, "cannot run %s %s: %w", d.cfg.Name, args[0], context.Cause(ctx))
		}
		return d.reason(args[0], logFile, mark, err)
	}
	return nil
}

// RuntimeError is what a runtime gave as its reason.
type RuntimeError struct{ Text string }

func (e *RuntimeError) Error() string { return e.Text }

// reason finds why a call failed: the last error in its log.
func (d *Driver) reason(what, logFile string, mark int64, err error) error {
	if text := lastError(logFile, mark); text != "" {
		err = &RuntimeError{text}
	}
	return &contract.StartError{Step: d.cfg.Name + " " + what, Err: err}
}

func lastError(logFile string, mark int64) (text string) {
	f, err := os.Open(logFile)
	if err != nil {
		return ""
	}
	defer f.Close()
	_, _ = f.Seek(mark, 0)
	for dec := json.NewDecoder(f); ; {
		var line struct{ Level, Msg string }
		if dec.Decode(&line) != nil {
			return text
		}
		if line.Level == "error" || line.Level == "fatal" {
			text = line.Msg
		}
	}
}

func size(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

func environment() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, k := range []string{"XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// state is what a later daemon must know: state.json in the run directory.
type state struct {
	Version  int                    `json:"version"`
	ID       string                 `json:"id"`
	PID      int                    `json:"pid"`
	Cgroup   string                 `json:"cgroup"`
	Terminal bool                   `json:"terminal,omitempty"`
	OwnPID   bool                   `json:"ownPid,omitempty"`
	UIDs     []specs.LinuxIDMapping `json:"uids,omitempty"`
	Created  time.Time              `json:"created"`
}

const stateVersion = 1

func readState(dir string) (state, error) {
	var st state
	b, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return st, err
	}
	if st.Version > stateVersion {
		return st, fault.New(fault.Unsupported, "cannot read %s: it is of a later version (%d)", dir, st.Version)
	}
	return st, nil
}

// Restore implements runtime.Driver.
func (d *Driver) Restore(ctx context.Context, id string) (contract.Task, error) {
	if !validID(id) {
		return nil, fault.New(fault.Invalid, "container id %.64q is not a plain name", id)
	}
	d.mu.Lock()
	known := d.tasks[id]
	d.mu.Unlock()
	if known != nil {
		return known, nil
	}
	dir := filepath.Join(d.dir, id)
	st, err := readState(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "no runtime state of container %s", id)
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read the state of container %s: %w", id, err)
	}
	t := newTask(d, id)
	t.pid, t.terminal, t.ownPID, t.uids, t.live = st.PID, st.Terminal, st.OwnPID, st.UIDs, true
	if t.group, err = d.cg.Open(st.Cgroup); err != nil {
		return nil, err
	}
	mon, err := shim.Dial(dir, notices{t})
	if err == nil {
		t.mon = mon
		sctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		ms, err := mon.State(sctx)
		if err != nil {
			mon.Leave()
			return nil, t.requestError("restore", err)
		}
		t.pid, t.at, t.held = ms.PID, time.Unix(0, ms.StartedAt), ms.Phase == shim.Held
		if fd, e := unix.PidfdOpen(t.pid, 0); e == nil && ms.Phase != shim.Exited {
			t.pidfd = fd
		}
	} else if e, started, rerr := shim.ReadRecord(dir); rerr == nil {
		t.at = started
		t.end(exitOf(e))
	} else {
		t.monitorKilled()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if other := d.tasks[id]; other != nil {
		return other, nil
	}
	d.tasks[id] = t
	return t, nil
}
