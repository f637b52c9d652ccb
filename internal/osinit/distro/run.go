package distro

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Word is the argument that the machine's process is started with, and the descriptors that it finds.
const (
	Word             = "machine"
	listenFD, lockFD = 3, 4
)

// Run runs the machine of the image with the digest and ends with it. Fresh says that the distribution was made
// of just this image.
func (d Distribution) Run(digest string, fresh bool) error {
	h, err := d.Hold(digest, fresh)
	if err != nil {
		return err
	}
	defer h.Close()
	return h.machine()
}

// Held is a distribution for one machine: nobody else starts one meanwhile.
type Held struct {
	// Port is where the host connects to.
	Port *net.UnixListener
	lock *os.File
}

// Close lets go of it, in order.
func (h *Held) Close() error { return errors.Join(h.Port.Close(), h.lock.Close()) }

// Hold takes a distribution whose programs are the image's.
func (d Distribution) Hold(digest string, fresh bool) (held *Held, err error) {
	if !isDigest(digest) {
		return nil, fmt.Errorf("%q is no digest of an image", digest)
	}
	l, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	slot, err := d.current()
	if err != nil {
		return nil, err
	}
	have, err := d.image(slot)
	if err != nil {
		return nil, err
	}
	if have == "" && fresh {
		if err := d.mark(slot, digest); err != nil {
			return nil, err
		}
		have = digest
	}
	if have != digest {
		return nil, failure(vmwire.DistributionOther, "the programs are those of another image")
	}
	// Who replaced the programs may have been killed before this.
	if err := d.settings(slot); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := d.sweep(); err != nil {
		fmt.Fprintln(os.Stderr, "cloudos-init:", err) // they take room, no more
	}
	// One of a machine that was killed; the lock says that it is nobody's.
	if err := os.Remove(d.socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	port, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.socket(), Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("cannot listen for the host: %w", err)
	}
	return &Held{Port: port, lock: l}, nil
}

// machine runs the machine as the first process of namespaces of its own. The network's is WSL's.
func (h *Held) machine() error {
	port, err := h.Port.File()
	if err != nil {
		return err
	}
	defer port.Close()
	// Who listens to the output may leave: the machine runs on.
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	// The machine ends with the thread that started it.
	runtime.LockOSThread()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, Word)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = []string{"PATH=/bin"}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{port, h.lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Pdeathsig:  unix.SIGKILL,
		Setsid:     true,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start the machine: %w", err)
	}
	fmt.Println(vmwire.DistributionStarted)
	over := make(chan struct{})
	defer close(over)
	go func() {
		for {
			select {
			case <-signals:
				_ = cmd.Process.Signal(unix.SIGTERM) // it may be gone already
			case <-over:
				return
			}
		}
	}()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("the machine ended: %w", err)
	}
	return nil
}

// Inherited is what the machine's process was given: the port to serve. The lock stays open for as long as it lives.
func Inherited() (net.Listener, error) {
	unix.CloseOnExec(lockFD)
	f := os.NewFile(listenFD, "port")
	defer f.Close()
	unix.CloseOnExec(listenFD)
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("cannot serve the host: %w", err)
	}
	return l, nil
}
