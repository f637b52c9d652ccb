// Package wsl runs machines as distributions of WSL2, which every edition of Windows has. The machine is a
// distribution of its own, made of the image's format wsl: our first process runs in it below Microsoft's
// kernel and first process (package osinit/distro, ADR 58). All is done with wsl.exe: a call of it holds the
// machine for as long as it runs, another carries each connection to its port over standard input and output.
// What is kept lies in the distribution's own disk, and stays when another image replaces the programs in it.
//
// The package builds everywhere: its tests run it against a simulated wsl.exe, and on Linux the real distribution in
// namespaces as WSL makes them. It has not been run on Windows by us (docs/vm.md says what was).
package wsl

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Config is how the host is reached.
type Config struct {
	// Program is wsl.exe, with what is added to its environment.
	Program string
	Env     []string
	// Home is the state folder whose machine is the distribution "servin"; others' names have a digest of theirs.
	Home string
	// Place and Origin tell where folders of the host are in the distribution, and back.
	Place, Origin func(path string) (string, error)
}

// ThisHost is the computer that we run on, with the state folder of its user.
func ThisHost(home string) Config {
	return Config{Program: program(), Home: home, Place: Place, Origin: Origin}
}

// Driver implements vm.Driver.
type Driver struct{ cfg Config }

var (
	_ vm.Driver = (*Driver)(nil)
	_ vm.Keeper = (*Driver)(nil)
)

// New returns the driver.
func New(cfg Config) *Driver { return &Driver{cfg: cfg} }

// Name implements vm.Driver.
func (d *Driver) Name() string { return "wsl2" }

// name is that of a machine's distribution.
func (d *Driver) name(s vm.Spec) string {
	if filepath.Clean(s.State) == filepath.Clean(d.cfg.Home) {
		return "servin"
	}
	sum := sha256.Sum256([]byte(filepath.Clean(s.State)))
	return "servin-" + hex.EncodeToString(sum[:4])
}

// How long calls of wsl.exe may take. The first one after Windows started starts WSL's virtual machine.
const (
	probePatience  = 30 * time.Second
	startPatience  = 2 * time.Minute
	importPatience = 10 * time.Minute
)

// Probe implements vm.Driver.
func (d *Driver) Probe(ctx context.Context, img vm.Image, _ string) (vm.Host, error) {
	if err := fits(img); img.Dir != "" && err != nil {
		return vm.Host{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	out, err := run(d.command(ctx, "--version"))
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("it did not answer within %v", probePatience)
		}
		return vm.Host{}, fault.New(fault.Unsupported, "cannot use WSL2: %w; install it with 'wsl --install --no-distribution' as an administrator and restart Windows, or, where there is an older one, with 'wsl --update'", err)
	}
	v := version(out)
	if v == "" {
		return vm.Host{}, fault.New(fault.Unsupported, "cannot use WSL2: it tells no version; update it with 'wsl --update'")
	}
	return vm.Host{Accelerator: "hyper-v", Version: "WSL " + v}, nil
}

// version is the first number with dots in a text: the words around it are the user's language.
func version(text string) string {
	for _, w := range strings.Fields(text) {
		w = strings.Trim(w, ".,;:()")
		if strings.Count(w, ".") >= 2 && strings.Trim(w, "0123456789.") == "" {
			return w
		}
	}
	return ""
}

func fits(img vm.Image) error {
	if img.Tar == "" {
		return fault.New(fault.Invalid, "WSL2 runs distributions: build the image with 'cloudos image build --format wsl' and name its folder with 'servin vm config --image DIR'")
	}
	return nil
}

// Start implements vm.Driver.
func (d *Driver) Start(ctx context.Context, s vm.Spec, _ vm.Host, report func(string)) (vm.Machine, error) {
	if err := fits(s.Image); err != nil {
		return nil, err
	}
	if _, err := os.Stat(s.Image.Tar); err != nil {
		return nil, err
	}
	name := d.name(s)
	there, err := d.has(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("cannot list WSL's distributions: %w", err)
	}
	args := []string{vmwire.DistributionRun, s.Image.TarDigest}
	if !there {
		report("making the distribution " + name)
		if err := d.make(ctx, name, s); err != nil {
			return nil, err
		}
		args = append(args, vmwire.DistributionFresh)
	}
	report("starting the distribution " + name)
	m, err := d.launch(ctx, name, s, args)
	if n, _ := status(err); n == vmwire.DistributionOther {
		report("bringing the image's programs into the distribution " + name)
		if err := d.replace(ctx, name, s); err != nil {
			return nil, err
		}
		m, err = d.launch(ctx, name, s, args)
	}
	if n, _ := status(err); n == vmwire.DistributionRuns {
		return nil, fault.New(fault.Conflict, "the machine runs already")
	}
	if err != nil {
		return nil, fmt.Errorf("cannot start the machine: %w", err)
	}
	return m, nil
}

// make registers the distribution. WSL does that whole or not at all.
func (d *Driver) make(ctx context.Context, name string, s vm.Spec) error {
	dir := filepath.Join(s.State, name)
	if _, err := os.Stat(filepath.Join(dir, "ext4.vhdx")); err == nil {
		return fault.New(fault.Conflict, "cannot make the distribution %s: %s has a disk that WSL does not know: register it again with 'wsl --import-in-place %s %s', or remove it", name, dir, name, filepath.Join(dir, "ext4.vhdx"))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, importPatience)
	defer cancel()
	if _, err := run(d.command(ctx, "--import", name, dir, s.Image.Tar, "--version", "2")); err != nil {
		return fmt.Errorf("cannot make the distribution %s: %w; WSL2 needs virtualization, in the computer's firmware and as the Windows feature Virtual Machine Platform ('wsl --install --no-distribution' switches it on)", name, err)
	}
	return nil
}

// replace puts the image's programs in the place of those that the distribution has, and has WSL start it anew: it
// reads its settings then.
func (d *Driver) replace(ctx context.Context, name string, s vm.Spec) error {
	f, err := os.Open(s.Image.Tar)
	if err != nil {
		return err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, importPatience)
	defer cancel()
	cmd := d.inside(ctx, name, vmwire.DistributionReplace, s.Image.TarDigest)
	cmd.Stdin = f
	if _, err := run(cmd); err != nil {
		return fmt.Errorf("cannot bring the image's programs into the distribution %s: %w", name, err)
	}
	if _, err := run(d.command(ctx, "--terminate", name)); err != nil {
		return fmt.Errorf("cannot end the distribution %s: %w", name, err)
	}
	return nil
}

// launch starts the call of wsl.exe that holds the machine, and waits until the machine has its port. The call
// outlives us: its output is a file.
func (d *Driver) launch(ctx context.Context, name string, s vm.Spec, args []string) (*Machine, error) {
	path := filepath.Join(s.State, consoleFile)
	// A machine that runs still writes to it: it is taken away, not cut short.
	if err := os.Rename(path, path+".1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		path += ".2" // Windows does not move what is open
	}
	out, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot keep the machine's console: %w", err)
	}
	defer out.Close()
	cmd := d.inside(context.WithoutCancel(ctx), name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run wsl.exe: %w", err)
	}
	m := newMachine(d, name, s, path, false)
	go m.watch(cmd, func() string { return tail(path) })
	end := time.NewTimer(startPatience)
	defer end.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(vmwire.DistributionStarted)) {
				return m, nil
			}
			continue
		case <-m.over:
			if m.err == nil {
				m.err = errors.New("it ended at once")
			}
			return nil, m.err
		case <-ctx.Done():
			err = ctx.Err()
		case <-end.C:
			err = fmt.Errorf("WSL did not start it within %v", startPatience)
		}
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), probePatience)
		defer cancel()
		return nil, errors.Join(err, m.Kill(kill))
	}
}

// tail is the end of what a call said.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return decode(b[max(0, len(b)-2048)&^1:])
}

// Attach implements vm.Driver. The distribution's name alone finds it.
func (d *Driver) Attach(ctx context.Context, r vm.Record) (vm.Machine, error) {
	name := d.name(r.Spec)
	// Only one that runs is asked: to ask starts it.
	runs, err := d.has(ctx, name, "--running")
	if err != nil || !runs {
		return nil, err
	}
	ask, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	_, err = run(d.inside(ask, name, vmwire.DistributionAlive))
	if n, ok := status(err); ok && n == vmwire.DistributionDead {
		_, err := run(d.command(ask, "--terminate", name))
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("cannot tell whether the machine runs: %w", err)
	}
	m := newMachine(d, name, r.Spec, filepath.Join(r.Spec.State, consoleFile), true)
	// Another call holds it from now on, too, and tells of its end.
	cmd := d.inside(context.WithoutCancel(ctx), name, vmwire.DistributionWait)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out := &limited{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run wsl.exe: %w", err)
	}
	m.release = func() {
		_ = in.Close()
		_ = cmd.Process.Kill() // it may have ended
	}
	go m.watch(cmd, func() string { return decode(out.b.Bytes()) })
	return m, nil
}

// Keeps implements vm.Keeper. A computer without WSL keeps nothing in it.
func (d *Driver) Keeps(ctx context.Context, s vm.Spec) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	there, err := d.has(ctx, d.name(s))
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return there, err
}

// Destroy implements vm.Keeper.
func (d *Driver) Destroy(ctx context.Context, s vm.Spec) error {
	name := d.name(s)
	if there, err := d.Keeps(ctx, s); err != nil || !there {
		return err
	}
	if _, err := run(d.command(ctx, "--unregister", name)); err != nil {
		return fmt.Errorf("cannot remove the distribution %s: %w", name, err)
	}
	if err := os.Remove(filepath.Join(s.State, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// watch waits for the call that holds the machine.
func (m *Machine) watch(cmd *exec.Cmd, said func() string) {
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = &failed{exit.ExitCode(), short(strings.TrimSpace(said()))}
	}
	m.err = err
	close(m.over)
}
