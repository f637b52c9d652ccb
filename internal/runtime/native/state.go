package native

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const stateVersion = 1

// state is what a later daemon must know of a task: state.json in its run
// directory. It is not synced: a power cut takes the container along.
type state struct {
	Version  int                    `json:"version"`
	ID       string                 `json:"id"`
	Started  bool                   `json:"started"`
	PID      int                    `json:"pid"`
	PIDStart uint64                 `json:"pidStart"` // in ticks since boot, tells a later process of the same number apart
	Cgroup   string                 `json:"cgroup"`
	Terminal bool                   `json:"terminal,omitempty"`
	OwnPID   bool                   `json:"ownPid,omitempty"`
	UserNS   bool                   `json:"userNs,omitempty"`
	UIDs     []specs.LinuxIDMapping `json:"uids,omitempty"`
	GIDs     []specs.LinuxIDMapping `json:"gids,omitempty"`
	Filter   string                 `json:"filter,omitempty"`
	Bundle   string                 `json:"bundle,omitempty"`
	Hooks    *specs.Hooks           `json:"hooks,omitempty"`
	Labels   map[string]string      `json:"labels,omitempty"`
	Created  time.Time              `json:"created"`
	// Binds and Masked are what a checkpoint must know of the mounts; nil where a
	// former build has started the task.
	Binds  []string `json:"binds"`
	Masked []string `json:"masked,omitempty"`
}

// save writes the state; it overlaps with the stage's work.
func (t *task) save() error {
	st := state{
		Version: stateVersion, ID: t.id, Started: true, PID: t.pid, PIDStart: t.pidStart, Cgroup: t.group.Path(),
		Terminal: t.terminal, OwnPID: t.ownPID, UserNS: t.userNS, UIDs: t.ids[0], GIDs: t.ids[1], Filter: t.filter,
		Bundle: t.bundle, Created: t.created, Binds: t.binds, Masked: t.masked,
	}
	if t.hooks != nil && len(t.hooks.Poststart)+len(t.hooks.Poststop) > 0 {
		st.Hooks = &specs.Hooks{Poststart: t.hooks.Poststart, Poststop: t.hooks.Poststop}
		st.Labels = t.labels
	}
	b, err := json.Marshal(st)
	if err == nil {
		err = replaceFile(t.dir, "state.json", b)
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot write the container's state: %w", err)
	}
	return nil
}

// replaceFile writes a small file in whole, in as few system calls as that takes.
func replaceFile(dir, name string, b []byte) error {
	tmp := dir + "/." + name
	fd, err := unix.Open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: tmp, Err: err}
	}
	n, err := unix.Write(fd, b)
	unix.Close(fd)
	if err == nil && n < len(b) {
		err = unix.ENOSPC
	}
	if err == nil {
		err = unix.Rename(tmp, dir+"/"+name)
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: dir + "/" + name, Err: err}
	}
	return nil
}

func readState(dir string) (state, error) {
	var st state
	b, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return state{}, err
	}
	if st.Version > stateVersion {
		return st, fault.New(fault.Unsupported, "cannot read %s: it is of a later version (%d)", dir, st.Version)
	}
	return st, nil
}

// startTime is when a process started, in clock ticks since boot; 0 if unknown.
func startTime(pid int) uint64 {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	var buf [1024]byte
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return 0
	}
	b := buf[:n]
	// The name may hold blanks and parentheses; the fields follow the last one.
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0
	}
	ticks, _ := strconv.ParseUint(f[19], 10, 64)
	return ticks
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
	if !exists(dir) {
		return nil, fault.New(fault.NotFound, "no runtime state of container %s", id)
	}
	st, err := readState(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("cannot read a container's state", "id", id, "error", err)
	}
	if st.Cgroup == "" {
		st.Cgroup = filepath.Join(d.parent, id)
	}
	g, err := d.cg.Open(st.Cgroup)
	if err != nil {
		return nil, err
	}
	t := &task{
		d: d, id: id, dir: dir, group: g, pid: st.PID, pidfd: -1, terminal: st.Terminal, ownPID: st.OwnPID, userNS: st.UserNS,
		ids: [2][]specs.LinuxIDMapping{st.UIDs, st.GIDs}, filter: st.Filter, bundle: st.Bundle, hooks: st.Hooks, labels: st.Labels,
		created: st.Created, binds: st.Binds, masked: st.Masked, exited: make(chan struct{}), execs: map[uint32]*exec{}, early: map[uint32]shim.Exit{},
	}
	if err := t.reconnect(ctx, st); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if other := d.tasks[id]; other != nil {
		return other, nil
	}
	d.tasks[id] = t
	return t, nil
}

// reconnect finds the monitor, or what it left.
func (t *task) reconnect(ctx context.Context, st state) error {
	relay := &relay{lost: make(chan struct{}), born: t.reborn}
	mon, err := shim.Dial(t.dir, relay)
	if err == nil {
		t.mon = mon
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		ms, serr := mon.State(ctx)
		cancel()
		if serr == nil && ms.Phase >= shim.Starting {
			t.pid, t.at, t.terminal = ms.PID, time.Unix(0, ms.StartedAt), ms.Terminal
			t.held, t.live = ms.Phase == shim.Held, true
			if ms.Phase != shim.Exited {
				// The monitor has not reaped it, so the number is still its own.
				if fd, e := unix.PidfdOpen(t.pid, 0); e == nil {
					t.pidfd = fd
				}
			}
			relay.bind(notices{t})
			return nil
		}
		mon.Close()
		<-mon.Done()
		t.mon = nil
		err = errors.Join(serr, err)
	}
	if e, started, rerr := shim.ReadRecord(t.dir); rerr == nil {
		t.at = started
		t.end(exitOf(e))
		return nil
	}
	// No monitor and no record: it was killed. Its container must not go on unwatched.
	if st.PID > 0 && st.PIDStart != 0 {
		if fd, e := unix.PidfdOpen(st.PID, 0); e == nil {
			if startTime(st.PID) == st.PIDStart {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			}
			unix.Close(fd)
		}
	}
	kctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_ = t.group.Signal(kctx, int(unix.SIGKILL))
	t.d.log.Error("a container's monitor is gone without a record; the container was killed", "id", t.id, "error", err)
	t.end(contract.Exit{Code: 137, Signal: int(unix.SIGKILL), At: time.Now(), Error: "the container's monitor (servin-shim) was killed"})
	return nil
}
