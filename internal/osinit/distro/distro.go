// Package distro is what a distribution of WSL2 needs that a machine with a kernel of its own does not:
// the first process there is Microsoft's. It keeps the programs in one of two *slots*, replaces
// them as a whole, starts the machine (package osinit) as the first process of namespaces of its own, and joins
// the host with the machine's port. Package vmwire has what the driver (internal/vm/wsl) and it agree on; ADR 58 says why.
package distro

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Distribution is the tree of files of one.
type Distribution struct {
	// Root is its root folder: "/".
	Root string
}

// Failure ends the program with a status that the driver knows.
type Failure struct {
	Status int
	Err    error
}

func (f *Failure) Error() string { return f.Err.Error() }
func (f *Failure) Unwrap() error { return f.Err }

func failure(status int, format string, args ...any) error {
	return &Failure{status, fmt.Errorf(format, args...)}
}

// Status is what a program ends with that failed so.
func Status(err error) int {
	var f *Failure
	switch {
	case err == nil:
		return 0
	case errors.As(err, &f):
		return f.Status
	}
	return 1
}

func (d Distribution) path(name ...string) string {
	return filepath.Join(append([]string{d.Root}, name...)...)
}

// socket is where the machine's port is, and marker the file in a slot that says which image it is of.
func (d Distribution) socket() string { return d.path("run/cloudos-port.sock") }

const marker = ".image"

// isDigest says whether it is a SHA-256 in small hexadecimal digits.
func isDigest(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }

// current is the slot that is used.
func (d Distribution) current() (string, error) {
	to, err := os.Readlink(d.path(vmwire.DistributionSystem))
	if err != nil {
		return "", fmt.Errorf("cannot tell which programs are used: %w", err)
	}
	switch slot := filepath.Base(to); slot {
	case "a", "b":
		return slot, nil
	}
	return "", fmt.Errorf("cannot tell which programs are used: %s is none of the slots", to)
}

func other(slot string) string {
	if slot == "a" {
		return "b"
	}
	return "a"
}

// image is the digest of what a slot has; empty is not known.
func (d Distribution) image(slot string) (string, error) {
	b, err := os.ReadFile(d.path(vmwire.DistributionSlots, slot, marker))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// lock makes sure that one machine runs and nobody replaces its programs meanwhile. It holds as long as anybody
// has the file, the machine's last process included.
func (d Distribution) lock() (*os.File, error) {
	f, err := os.Open(d.path(vmwire.DistributionSlots))
	if err != nil {
		return nil, fmt.Errorf("cannot lock the distribution: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, failure(vmwire.DistributionRuns, "a machine runs in this distribution already")
		}
		return nil, fmt.Errorf("cannot lock the distribution: %w", err)
	}
	return f, nil
}

// Alive says whether a machine runs, as an error if none does.
func (d Distribution) Alive() error {
	f, err := d.lock()
	if err == nil {
		f.Close()
		return failure(vmwire.DistributionDead, "no machine runs in this distribution")
	}
	if Status(err) == vmwire.DistributionRuns {
		return nil
	}
	return err
}

// Wait waits until the machine has ended, and says if that was not in order; or until in ends.
func (d Distribution) Wait(in io.Reader) error {
	f, err := os.Open(d.path(vmwire.DistributionSlots))
	if err != nil {
		return fmt.Errorf("cannot wait for the machine: %w", err)
	}
	defer f.Close()
	over := make(chan error, 1)
	go func() { over <- lockShared(f) }()
	left := make(chan struct{})
	go func() {
		defer close(left)
		_, _ = io.Copy(io.Discard, in) // however it ends
	}()
	select {
	case err := <-over:
		if err != nil {
			return fmt.Errorf("cannot wait for the machine: %w", err)
		}
	case <-left:
		return nil
	}
	// A machine that ends in order takes it away.
	if _, err := os.Lstat(d.socket()); err == nil {
		return errors.New("the machine fell")
	}
	return nil
}

func lockShared(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Bridge joins the program's input and output with the machine's port, until either ends.
func (d Distribution) Bridge(ctx context.Context, in io.Reader, out io.Writer) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", d.socket())
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
			return failure(vmwire.DistributionDead, "no machine runs in this distribution")
		}
		return fmt.Errorf("cannot reach the machine's port: %w", err)
	}
	defer c.Close()
	var once sync.Once
	ended := make(chan error, 2)
	end := func(err error) { once.Do(func() { ended <- err }) }
	go func() { _, err := io.Copy(c, in); end(err) }()
	go func() { _, err := io.Copy(out, c); end(err) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
