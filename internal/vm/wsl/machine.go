package wsl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// consoleFile has what the machine says on standard output, in the state folder.
const consoleFile = "wsl-console.log"

// Machine is a distribution that runs.
type Machine struct {
	d       *Driver
	name    string
	console string
	adopted bool

	mu   sync.Mutex
	spec vm.Spec

	over chan struct{} // closed when the call that holds it has ended
	err  error         // how, once over is closed

	release func() // ends a call of ours alone
	once    sync.Once
	quit    chan struct{}
}

var (
	_ vm.Machine = (*Machine)(nil)
	_ vm.Console = (*Machine)(nil)
	_ vm.Reaches = (*Machine)(nil)
	_ vm.Placer  = (*Machine)(nil)
	_ vm.Sharer  = (*Machine)(nil)
)

func newMachine(d *Driver, name string, s vm.Spec, console string, adopted bool) *Machine {
	return &Machine{d: d, name: name, spec: s, console: console, adopted: adopted, over: make(chan struct{}), release: func() {}, quit: make(chan struct{})}
}

// Record implements vm.Machine.
func (m *Machine) Record() vm.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return vm.Record{Driver: "wsl2", Spec: m.spec}
}

// PID implements vm.Machine: what it takes is in WSL's virtual machine, which is the system's.
func (m *Machine) PID() int { return 0 }

// Place implements vm.Placer.
func (m *Machine) Place(path string) (string, error) { return m.d.cfg.Place(path) }

// Origin implements vm.Placer.
func (m *Machine) Origin(path string) (string, error) { return m.d.cfg.Origin(path) }

// ShareProblems implements vm.Reaches.
func (m *Machine) ShareProblems() map[string]string {
	p := map[string]string{}
	for _, s := range m.Record().Spec.Shares {
		if _, err := m.d.cfg.Place(s.Path); err != nil {
			p[s.Path] = err.Error()
		}
	}
	return p
}

// AddShare implements vm.Sharer: WSL has the drives mounted, the guest does the rest.
func (m *Machine) AddShare(_ context.Context, s vm.Share) error {
	if _, err := m.d.cfg.Place(s.Path); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.spec.Shares = append(slices.Clone(m.spec.Shares), s)
	return nil
}

// Port implements vm.Machine: a call of wsl.exe carries the connection.
func (m *Machine) Port(ctx context.Context) (net.Conn, error) {
	select {
	case <-m.over:
		return nil, errors.New("the machine has ended")
	default:
	}
	cmd := m.d.inside(context.WithoutCancel(ctx), m.name, vmwire.DistributionBridge)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	said := &limited{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run wsl.exe: %w", err)
	}
	return &bridge{cmd: cmd, in: in, out: out, said: said}, nil
}

// Kill implements vm.Machine.
func (m *Machine) Kill(ctx context.Context) error {
	if _, err := run(m.d.command(ctx, "--terminate", m.name)); err != nil {
		// One that has ended already, or is not registered any more, is what was asked for.
		if runs, rerr := m.d.has(ctx, m.name, "--running"); rerr != nil || runs {
			return fmt.Errorf("cannot end the machine: %w", err)
		}
	}
	select {
	case <-m.over:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the machine was ended, but wsl.exe does not end: %w", ctx.Err())
	}
}

// Wait implements vm.Machine.
func (m *Machine) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-m.quit:
		return nil
	case <-m.over:
	}
	if m.err != nil {
		return fmt.Errorf("the machine ended: %w", m.err)
	}
	return nil
}

// Close implements vm.Machine.
func (m *Machine) Close() error {
	m.once.Do(func() { close(m.quit); m.release() })
	return nil
}

// Console implements vm.Console: what the machine says. Nothing can be typed there.
func (m *Machine) Console(ctx context.Context) (net.Conn, error) {
	f, err := os.Open(m.console)
	if err != nil {
		return nil, err
	}
	if m.adopted { // the beginning was read by who started it
		if _, err := f.Seek(0, io.SeekEnd); err != nil {
			f.Close()
			return nil, err
		}
	}
	return &follower{f: f, over: m.over, closed: make(chan struct{})}, nil
}

// pipe is what connections of ours lack of a network's.
type pipe struct{}

func (pipe) LocalAddr() net.Addr              { return address{} }
func (pipe) RemoteAddr() net.Addr             { return address{} }
func (pipe) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (pipe) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (pipe) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

type address struct{}

func (address) Network() string { return "wsl" }
func (address) String() string  { return vmwire.Port }

// bridge is a connection over a call of wsl.exe.
type bridge struct {
	pipe
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  io.ReadCloser
	said *limited
	once sync.Once
	done error
}

func (b *bridge) Read(p []byte) (int, error) {
	n, err := b.out.Read(p)
	if err != nil {
		if err := b.end(false); err != nil {
			return n, err
		}
	}
	return n, err
}

func (b *bridge) Write(p []byte) (int, error) { return b.in.Write(p) }

func (b *bridge) Close() error {
	_ = b.end(true)
	return nil
}

// end ends the call and says what was wrong with it; one that is ended by us was right.
func (b *bridge) end(ours bool) error {
	b.once.Do(func() {
		_ = b.in.Close()
		if ours {
			_ = b.cmd.Process.Kill() // it may have ended
		}
		err := b.cmd.Wait()
		var exit *exec.ExitError
		if !ours && errors.As(err, &exit) {
			b.done = &failed{exit.ExitCode(), short(strings.TrimSpace(decode(b.said.b.Bytes())))}
		}
	})
	return b.done
}

// follower reads a file that grows, until the machine has ended.
type follower struct {
	pipe
	f      *os.File
	over   chan struct{}
	once   sync.Once
	closed chan struct{}
}

func (f *follower) Read(p []byte) (int, error) {
	for last := false; ; {
		n, err := f.f.Read(p)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) || last {
			return n, err
		}
		select {
		case <-f.closed:
			return 0, net.ErrClosed
		case <-f.over:
			last = true // what came between
		case <-time.After(250 * time.Millisecond):
		}
	}
}

func (f *follower) Write(p []byte) (int, error) { return len(p), nil }

func (f *follower) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.f.Close()
}
