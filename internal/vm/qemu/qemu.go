// Package qemu runs machines under QEMU: KVM on Linux where it really runs
// guests, the platform's accelerator on macOS and Windows, else QEMU's own
// translator (TCG).
//
// QEMU is started with its monitor, the engine's port and the console as sockets
// that this process bound (mode 0600, in a folder of mode 0700), with its disks as
// descriptors, under its own system call filter and, where we are root, as
// an unprivileged user: it can open nothing by itself. It listens on no network. Host folders
// are served by one virtiofsd each, sandboxed in namespaces of its own.
//
// A lock that QEMU inherits (Spec.Run/machine.lock) says whether a machine runs,
// however its starter ended; QEMU's own lock on the data disk is a second one.
package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"net"
	"os"
	"os/exec"
	"path/filepath"

	"strconv"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// Config says where programs are; empty fields are looked up.
type Config struct {
	// Programs are further folders to look for qemu-system-… and virtiofsd in.
	Programs []string
}

// Driver implements vm.Driver.
type Driver struct{ cfg Config }

// New returns the driver.
func New(cfg Config) *Driver { return &Driver{cfg: cfg} }

// Name implements vm.Driver.
func (d *Driver) Name() string { return "qemu" }

// find looks a program up: virtiofsd is on nobody's PATH.
func (d *Driver) find(name string) (string, error) {
	for _, dir := range d.cfg.Programs {
		if p := filepath.Join(dir, name); isProgram(p) {
			return p, nil
		}
	}
	if p, err := exec.LookPath(name); err == nil {
		return filepath.Abs(p)
	}
	for _, dir := range []string{"/usr/lib/qemu", "/usr/libexec", "/usr/libexec/qemu", "/opt/homebrew/bin", "/usr/local/bin", `C:\Program Files\qemu`} {
		if p := filepath.Join(dir, name); isProgram(p) || isProgram(p+".exe") {
			return p, nil
		}
	}
	return "", fault.New(fault.Unsupported, "cannot find the program %s", name)
}

func isProgram(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.Mode().IsRegular()
}

// detail is what the record says beyond the spec.
type detail struct {
	UUID  string  `json:"uuid"`
	PID   int     `json:"pid,omitempty"`
	Birth uint64  `json:"birth,omitempty"` // of that process, in ticks since boot
	Host  vm.Host `json:"host"`
	// Shares that came later, in the order of their places.
	Hot int `json:"hot,omitempty"`
	// Problems says why shares are missing, by path.
	Problems map[string]string `json:"problems,omitempty"`
}

// Machine is a QEMU process.
type Machine struct {
	spec    vm.Spec
	mon     *monitor
	program string // of virtiofsd, for shares that come later

	mu     sync.Mutex
	detail detail

	ended chan struct{} // closed once the process is gone
	once  sync.Once
	quit  chan struct{} // closed by Close
	said  *tail
}

var (
	_ vm.Driver  = (*Driver)(nil)
	_ vm.Pauser  = (*Machine)(nil)
	_ vm.Balloon = (*Machine)(nil)
	_ vm.Resizer = (*Machine)(nil)
	_ vm.Sharer  = (*Machine)(nil)
	_ vm.Console = (*Machine)(nil)
	_ vm.Reaches = (*Machine)(nil)
)

func socket(s vm.Spec, name string) string { return filepath.Join(s.Run, name+".sock") }

// Attach implements vm.Driver.
func (d *Driver) Attach(ctx context.Context, r vm.Record) (vm.Machine, error) {
	var det detail
	if len(r.Detail) > 0 {
		if err := json.Unmarshal(r.Detail, &det); err != nil {
			return nil, fmt.Errorf("cannot read the machine's record: %w", err)
		}
	}
	held, err := vm.LockHeld(filepath.Join(r.Spec.Run, "machine.lock"))
	if err != nil {
		return nil, err
	}
	if !held {
		removeRemains(r.Spec)
		return nil, nil
	}
	// It may be on its way up: its starter died between the two.
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	mon, err := dialMonitor(ctx, socket(r.Spec, "monitor"))
	if err != nil {
		if held, lerr := vm.LockHeld(filepath.Join(r.Spec.Run, "machine.lock")); lerr == nil && !held {
			removeRemains(r.Spec)
			return nil, nil
		}
		return nil, fault.New(fault.Unavailable, "a machine runs, but does not answer: %w; end its process (%s) and start again", err, processHint(r.Spec, det.PID))
	}
	if det.PID == 0 || birth(det.PID) != det.Birth {
		det.PID = findProcess(machineUUID(r.Spec))
		det.Birth = birth(det.PID)
	}
	fsd, _ := d.find("virtiofsd")
	m := &Machine{spec: r.Spec, mon: mon, detail: det, program: fsd, ended: make(chan struct{}), quit: make(chan struct{}), said: &tail{max: 16 << 10}}
	// A starter that died before its last step left the guest standing at its first instruction.
	var st struct{ Status string }
	if err := mon.do(ctx, "query-status", nil, &st); err == nil && st.Status == "prelaunch" {
		if err := mon.do(ctx, "cont", nil, nil); err != nil {
			mon.close()
			return nil, err
		}
	}
	go m.watch(nil)
	return m, nil
}

func processHint(s vm.Spec, pid int) string {
	if pid == 0 {
		pid = findProcess(machineUUID(s))
	}
	if pid == 0 {
		return "qemu-system"
	}
	return "process " + strconv.Itoa(pid)
}

// dialMonitor waits for QEMU to serve its monitor.
func dialMonitor(ctx context.Context, path string) (*monitor, error) {
	for {
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, "unix", path)
		if err == nil {
			var m *monitor
			if m, err = converse(ctx, conn); err == nil {
				return m, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// watch closes ended when the process is gone.
func (m *Machine) watch(cmd *exec.Cmd) {
	if cmd != nil {
		cmd.Wait()
	} else {
		select {
		case <-m.mon.done:
		case <-m.quit:
			return
		}
		// The monitor's end may be ours or somebody else's doing: the lock tells.
		for {
			if held, err := vm.LockHeld(filepath.Join(m.spec.Run, "machine.lock")); err == nil && !held {
				break
			}
			select {
			case <-m.quit:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	removeRemains(m.spec)
	close(m.ended)
}

// Record implements vm.Machine.
func (m *Machine) Record() vm.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	raw, _ := json.Marshal(m.detail)
	return vm.Record{Driver: "qemu", Spec: m.spec, Detail: raw}
}

// PID implements vm.Machine.
func (m *Machine) PID() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.detail.PID
}

// ShareProblems implements vm.Reaches.
func (m *Machine) ShareProblems() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.detail.Problems
}

// Port implements vm.Machine.
func (m *Machine) Port(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", socket(m.spec, "port"))
}

// Console implements vm.Console.
func (m *Machine) Console(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", socket(m.spec, "console"))
}

// Kill implements vm.Machine.
func (m *Machine) Kill(ctx context.Context) error {
	qctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	err := m.mon.do(qctx, "quit", nil, nil)
	cancel()
	select {
	case <-m.ended:
		return nil
	case <-time.After(2 * time.Second):
	}
	if pid := m.PID(); pid > 0 && birth(pid) == m.detail.Birth {
		if p, perr := os.FindProcess(pid); perr == nil {
			err = errors.Join(err, p.Kill())
		}
	}
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("cannot end the machine: %w", errors.Join(err, ctx.Err()))
	}
}

// Wait implements vm.Machine.
func (m *Machine) Wait(ctx context.Context) error {
	select {
	case <-m.ended:
	case <-ctx.Done():
		return ctx.Err()
	}
	if raw, ok := m.mon.event("SHUTDOWN"); ok {
		var d struct {
			Guest  bool   `json:"guest"`
			Reason string `json:"reason"`
		}
		if json.Unmarshal(raw, &d) == nil && (d.Guest || d.Reason == "host-qmp-quit") {
			return nil
		}
		return fmt.Errorf("the machine ended: %s", clean(d.Reason))
	}
	if last := m.said.last(); last != "" {
		return fmt.Errorf("the machine ended without a word of its guest: %s", last)
	}
	return errors.New("the machine ended without a word of its guest: was its process killed?")
}

// Close implements vm.Machine.
func (m *Machine) Close() error {
	m.once.Do(func() { close(m.quit); m.mon.close() })
	return nil
}

// Pause implements vm.Pauser.
func (m *Machine) Pause(ctx context.Context) error { return m.mon.do(ctx, "stop", nil, nil) }

// Resume implements vm.Pauser.
func (m *Machine) Resume(ctx context.Context) error { return m.mon.do(ctx, "cont", nil, nil) }

// Paused implements vm.Pauser.
func (m *Machine) Paused(ctx context.Context) (bool, error) {
	var st struct{ Running bool }
	err := m.mon.do(ctx, "query-status", nil, &st)
	return !st.Running, err
}

// SetMemory implements vm.Balloon.
func (m *Machine) SetMemory(ctx context.Context, bytes int64) error {
	if bytes > m.spec.Memory {
		return fault.New(fault.Conflict, "the machine was started with %d MiB of memory", m.spec.Memory>>20)
	}
	return m.mon.do(ctx, "balloon", map[string]int64{"value": bytes}, nil)
}

// GrowDisk implements vm.Resizer.
func (m *Machine) GrowDisk(ctx context.Context, bytes int64) error {
	if err := vm.MakeDisk(m.spec.Data, bytes); err != nil {
		return err
	}
	return m.mon.do(ctx, "block_resize", map[string]any{"node-name": "data", "size": bytes}, nil)
}

// removeRemains removes what a machine that has ended left: sockets, and file
// servers to which no QEMU ever connected.
func removeRemains(s vm.Spec) {
	files, _ := filepath.Glob(filepath.Join(s.Run, "share-*.sock"))
	for _, f := range files {
		if conn, err := net.DialTimeout("unix", f, time.Second); err == nil {
			conn.Close() // a server ends with its first conversation
		}
		os.Remove(f)
	}
	for _, name := range []string{"monitor", "console", "port"} {
		os.Remove(socket(s, name))
	}
}

// machineUUID names the machine of a place: it is the same at each start.
func machineUUID(s vm.Spec) string {
	b := sha256.Sum256([]byte("servin machine " + s.Data))
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80 // version 8: our own
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}
