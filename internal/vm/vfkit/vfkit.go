//go:build unix

// Package vfkit runs machines under Apple's Virtualization.framework, through the
// program vfkit: its command line makes a machine, its service on a unix socket
// pauses and stops it. There are no named serial ports: the engine's port is a
// vsock port of the guest.
//
// It builds on every Unix, so that its tests run against a simulated vfkit; it has not been run
// on a Mac by us (docs/vm.md says what was).
package vfkit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Driver implements vm.Driver.
type Driver struct {
	// Program is vfkit, by name or path; Environment is added to ours for it.
	program     string
	environment []string
}

// Config says which vfkit to run; empty is the one on the PATH.
type Config struct {
	Program     string
	Environment []string
}

// New returns the driver.
func New(cfg Config) *Driver {
	if cfg.Program == "" {
		cfg.Program = "vfkit"
	}
	return &Driver{program: cfg.Program, environment: cfg.Environment}
}

// Name implements vm.Driver.
func (d *Driver) Name() string { return "vfkit" }

// Probe implements vm.Driver.
func (d *Driver) Probe(ctx context.Context, _ vm.Image, _ string) (vm.Host, error) {
	path, err := exec.LookPath(d.program)
	if err != nil {
		return vm.Host{}, fault.New(fault.Unsupported, "cannot find %s: install it (brew install vfkit)", d.program)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env = append(os.Environ(), d.environment...)
	out, err := cmd.Output()
	if err != nil {
		return vm.Host{}, fmt.Errorf("cannot run %s: %w", path, err)
	}
	return vm.Host{Accelerator: "Virtualization.framework", Version: strings.TrimSpace(string(out))}, nil
}

// args is vfkit's command line.
func args(s vm.Spec) ([]string, error) {
	for _, p := range []string{s.Image.Kernel, s.Image.Initrd, s.Image.Root, s.Data, s.Run} {
		if strings.ContainsAny(p, `,"`) {
			return nil, fault.New(fault.Invalid, "vfkit cannot use the path %q: it has a comma or a quote", p)
		}
	}
	cmdline := strings.ReplaceAll(s.Image.CommandLine, "console=ttyS0", "console=hvc0")
	a := []string{"--cpus", strconv.Itoa(s.CPUs), "--memory", strconv.FormatInt(s.Memory>>20, 10),
		"--restful-uri", "unix://" + sock(s, "rest"),
		"--bootloader", fmt.Sprintf(`linux,kernel=%s,initrd=%s,cmdline="%s"`, s.Image.Kernel, s.Image.Initrd, cmdline),
		"--device", "virtio-blk,path=" + s.Image.Root + ",deviceId=" + vmwire.SerialRoot,
		"--device", "virtio-blk,path=" + s.Data + ",deviceId=" + vmwire.SerialData,
		"--device", "virtio-net,nat", "--device", "virtio-rng", "--device", "virtio-balloon",
		"--device", "virtio-serial,logFilePath=" + filepath.Join(s.State, "vfkit-console.log"),
		"--device", fmt.Sprintf("virtio-vsock,port=%d,socketURL=%s,connect", vmwire.VsockPort, sock(s, "port"))}
	for _, sh := range s.Shares {
		if strings.ContainsAny(sh.Path, `,"`) {
			return nil, fault.New(fault.Invalid, "vfkit cannot share the path %q: it has a comma or a quote", sh.Path)
		}
		a = append(a, "--device", "virtio-fs,sharedDir="+sh.Path+",mountTag="+sh.Tag)
	}
	return a, nil
}

func sock(s vm.Spec, name string) string { return filepath.Join(s.Run, name+".sock") }

// detail is what the record says beyond the spec.
type detail struct {
	PID int `json:"pid"`
}

// Machine is a vfkit process.
type Machine struct {
	spec  vm.Spec
	pid   int
	rest  *http.Client
	ended chan struct{}
	once  sync.Once
	quit  chan struct{}
	said  *bytes.Buffer // complete once ended is closed
}

var (
	_ vm.Driver = (*Driver)(nil)
	_ vm.Pauser = (*Machine)(nil)
)

func newMachine(s vm.Spec, pid int) *Machine {
	return &Machine{spec: s, pid: pid, ended: make(chan struct{}), quit: make(chan struct{}), said: &bytes.Buffer{},
		rest: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", sock(s, "rest"))
		}}}}
}

// limited keeps the first of what a process says.
type limited struct {
	b *bytes.Buffer
}

func (l limited) Write(p []byte) (int, error) {
	if room := 8192 - l.b.Len(); room > 0 {
		l.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// Start implements vm.Driver.
func (d *Driver) Start(ctx context.Context, s vm.Spec, _ vm.Host, report func(string)) (vm.Machine, error) {
	if s.Image.Kernel == "" {
		return nil, fault.New(fault.Invalid, "this driver boots images in the vm format: cloudos image build --format vm")
	}
	path, err := exec.LookPath(d.program)
	if err != nil {
		return nil, fault.New(fault.Unsupported, "cannot find %s: install it (brew install vfkit)", d.program)
	}
	if err := os.MkdirAll(s.Run, 0o700); err != nil {
		return nil, err
	}
	if len(sock(s, "port")) > 100 {
		return nil, fault.New(fault.Invalid, "the path %s is too long for a socket", sock(s, "port"))
	}
	lock, err := vm.TakeLock(filepath.Join(s.Run, "machine.lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	removeRemains(s)
	for _, f := range []string{s.Image.Kernel, s.Image.Initrd, s.Image.Root} {
		if _, err := os.Stat(f); err != nil {
			return nil, err
		}
	}
	if err := vm.MakeDisk(s.Data, s.Disk); err != nil {
		return nil, err
	}
	a, err := args(s)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, a...)
	m := newMachine(s, 0)
	cmd.Stdout, cmd.Stderr = limited{m.said}, limited{m.said}
	cmd.Env = append(os.Environ(), d.environment...)
	cmd.ExtraFiles = []*os.File{lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	report("starting the machine")
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run %s: %w", path, err)
	}
	m.pid = cmd.Process.Pid
	go func() { cmd.Wait(); removeRemains(s); close(m.ended) }()
	if err := m.untilUp(ctx); err != nil {
		cmd.Process.Kill()
		<-m.ended
		return nil, fault.New(fault.Unavailable, "cannot start the machine: %w: %s", err, strings.TrimSpace(m.said.String()))
	}
	return m, nil
}

// untilUp waits until the machine's service says that it runs.
func (m *Machine) untilUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		st, err := m.state(ctx)
		if err == nil && (st == "VirtualMachineStateRunning" || st == "VirtualMachineStatePaused") {
			return nil
		}
		select {
		case <-m.ended:
			return errors.New("vfkit ended")
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Attach implements vm.Driver.
func (d *Driver) Attach(ctx context.Context, r vm.Record) (vm.Machine, error) {
	lock := filepath.Join(r.Spec.Run, "machine.lock")
	held, err := vm.LockHeld(lock)
	if err != nil {
		return nil, err
	}
	if !held {
		removeRemains(r.Spec)
		return nil, nil
	}
	var det detail
	if len(r.Detail) > 0 {
		if err := json.Unmarshal(r.Detail, &det); err != nil {
			return nil, fmt.Errorf("cannot read the machine's record: %w", err)
		}
	}
	m := newMachine(r.Spec, det.PID)
	if err := m.untilUp(ctx); err != nil {
		return nil, fault.New(fault.Unavailable, "a machine runs, but does not answer: %w", err)
	}
	go func() {
		for {
			if held, err := vm.LockHeld(lock); err == nil && !held {
				removeRemains(r.Spec)
				close(m.ended)
				return
			}
			select {
			case <-m.quit:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return m, nil
}

func removeRemains(s vm.Spec) {
	os.Remove(sock(s, "rest"))
	os.Remove(sock(s, "port"))
}

// Record implements vm.Machine.
func (m *Machine) Record() vm.Record {
	raw, _ := json.Marshal(detail{PID: m.pid})
	return vm.Record{Driver: "vfkit", Spec: m.spec, Detail: raw}
}

// PID implements vm.Machine.
func (m *Machine) PID() int { return m.pid }

// Port implements vm.Machine.
func (m *Machine) Port(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", sock(m.spec, "port"))
}

// state asks vfkit.
func (m *Machine) state(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://vfkit/vm/state", nil)
	if err != nil {
		return "", err
	}
	resp, err := m.rest.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var st struct {
		State string `json:"state"`
	}
	return st.State, json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&st)
}

// change tells vfkit what to do.
func (m *Machine) change(ctx context.Context, to string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://vfkit/vm/state", strings.NewReader(`{"state":"`+to+`"}`))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := m.rest.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
		return fmt.Errorf("vfkit refuses to %s: %s", strings.ToLower(to), bytes.TrimSpace(text))
	}
	return nil
}

// Pause implements vm.Pauser.
func (m *Machine) Pause(ctx context.Context) error { return m.change(ctx, "Pause") }

// Resume implements vm.Pauser. One that runs is left alone.
func (m *Machine) Resume(ctx context.Context) error {
	if paused, err := m.Paused(ctx); err != nil || !paused {
		return err
	}
	return m.change(ctx, "Resume")
}

// Paused implements vm.Pauser.
func (m *Machine) Paused(ctx context.Context) (bool, error) {
	st, err := m.state(ctx)
	return st == "VirtualMachineStatePaused", err
}

// Kill implements vm.Machine.
func (m *Machine) Kill(ctx context.Context) error {
	err := m.change(ctx, "HardStop")
	select {
	case <-m.ended:
		return nil
	case <-time.After(2 * time.Second):
	}
	if held, lerr := vm.LockHeld(filepath.Join(m.spec.Run, "machine.lock")); lerr == nil && held && m.pid > 0 {
		err = errors.Join(err, syscall.Kill(m.pid, syscall.SIGKILL))
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
		return nil // vfkit does not tell why
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close implements vm.Machine.
func (m *Machine) Close() error {
	m.once.Do(func() { close(m.quit) })
	return nil
}
