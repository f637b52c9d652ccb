package ociruntime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func (a *app) start(f *flags) error {
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	lock, err := c.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	status, err := c.status()
	if err != nil {
		return err
	}
	switch status {
	case statusCreated:
	case statusStopped:
		return errors.New("cannot start a container that has stopped")
	case statusRunning:
		return errors.New("cannot start an already running container")
	default:
		return fmt.Errorf("cannot start a container in the %s state", status)
	}
	notify := a.newNotify(c.dir, os.Getenv("NOTIFY_SOCKET"))
	if notify != nil {
		if err := notify.bind(); err != nil {
			return err
		}
	}
	if err := c.openUp(); err != nil {
		return err
	}
	spec, err := c.spec()
	if err != nil {
		return err
	}
	if err := c.runHooks("poststart", spec.Hooks.Poststart, specs.StateRunning); err != nil {
		// The spec has it that this is to be told, and no more.
		a.log.Warnf("%v", err)
	}
	if notify != nil {
		return notify.relay(c.rec.InitPID)
	}
	return nil
}

// openUp lets init go through its gate and waits until it has become the program:
// its end of the pipe closes by that.
func (c *container) openUp() error {
	fd, err := c.openGate()
	if err != nil {
		return errors.New("container process is already dead")
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte{'0'}); err != nil {
		return fmt.Errorf("cannot start the container: %w", err)
	}
	for {
		p := []unix.PollFd{{Fd: int32(fd)}}
		if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
		if p[0].Revents&unix.POLLERR != 0 {
			break
		}
	}
	if err := os.Remove(c.filePath(gateName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func killFlags(f *flags) { f.boolean("all,a", "") }

func (a *app) kill(f *flags) error {
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	name := "SIGTERM"
	if len(f.args) > 1 && f.args[1] != "" {
		name = f.args[1]
	}
	sig, err := parseSignal(name)
	if err != nil {
		return err
	}
	err = c.signal(sig, *f.flag["all"])
	if errors.Is(err, errNotRunning) && *f.flag["all"] {
		return nil
	}
	return err
}

func parseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 0 || n > 64 {
			return -1, fmt.Errorf("unknown signal %q", s)
		}
		return unix.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	var n int
	if _, err := fmt.Sscanf(name, "SIGRTMIN+%d", &n); err == nil && n >= 0 && n <= 30 {
		return unix.Signal(34 + n), nil
	}
	if _, err := fmt.Sscanf(name, "SIGRTMAX-%d", &n); err == nil && n >= 0 && n <= 30 {
		return unix.Signal(64 - n), nil
	}
	return -1, fmt.Errorf("unknown signal %q", s)
}

func (c *container) ownPIDs() bool {
	for _, n := range c.rec.Config.Namespaces {
		if n.Type == "NEWPID" {
			return n.Path == ""
		}
	}
	return false
}

// signal sends one to init. Without a pid namespace of its own the end of init
// does not end the others, so SIGKILL goes to all; all asks for that in any case.
func (c *container) signal(sig unix.Signal, all bool) error {
	if all && sig != unix.SIGKILL && !c.alive() {
		return errNotRunning
	}
	if all && sig != unix.SIGKILL || sig == unix.SIGKILL && !c.ownPIDs() {
		err := killAll(c.cg, sig)
		switch {
		case err == nil:
			return nil
		case c.rec.Config.RootlessCgroups:
			c.app.log.Warnf("failed to kill all processes, possibly due to lack of cgroup (Hint: enable cgroup v2 delegation): %v", err)
		case errors.Is(err, errNoCgroup) && !c.alive():
			return fmt.Errorf("unable to kill all processes: %w", errNotRunning)
		default:
			return fmt.Errorf("unable to kill all processes: %w", err)
		}
	}
	return c.signalInit(sig)
}

func (c *container) signalInit(sig unix.Signal) error {
	fd, err := unix.PidfdOpen(c.rec.InitPID, 0)
	if err != nil {
		return errNotRunning
	}
	defer unix.Close(fd)
	// Looked at after the descriptor was opened: it is ours, or nobody's any more.
	if !c.alive() {
		return errNotRunning
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("unable to signal init: %w", os.ErrProcessDone)
		}
		return fmt.Errorf("unable to signal init: %w", err)
	}
	if sig == unix.SIGKILL {
		// In a frozen cgroup of v1 it dies only once that is thawed.
		if st, err := c.cg.GetFreezerState(); err == nil && st == cgroups.Frozen {
			_ = c.cg.Freeze(cgroups.Thawed)
		}
	}
	return nil
}

func deleteFlags(f *flags) {
	f.boolean("force,f", "forcibly deletes the container if it is still running (uses SIGKILL)")
}

func (a *app) delete(f *flags) error {
	id, force := f.args[0], *f.flag["force"]
	c, err := a.load(id)
	if err != nil {
		if errors.Is(err, errNotExist) {
			if e := a.deleteDraft(id); e != nil {
				a.log.Warnf("%v", e)
			}
			if force {
				return nil
			}
		}
		return err
	}
	lock, err := c.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	status, err := c.status()
	if err != nil {
		return err
	}
	switch {
	case force || status == statusCreated:
		return c.killAndDestroy()
	case status == statusStopped:
		return c.destroy()
	}
	return fmt.Errorf("cannot delete container %s that is not stopped: %s", id, status)
}

// deleteDraft removes what a creation left that was cut short.
func (a *app) deleteDraft(id string) error {
	c, err := a.loadFrom(id, draftName)
	if errors.Is(err, errNotExist) {
		return os.RemoveAll(filepath.Join(a.root, id))
	}
	if err != nil {
		return err
	}
	lock, err := c.lock() // held while somebody still creates it
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := os.Stat(c.filePath(recordName)); err == nil {
		return fmt.Errorf("cannot remove %s: it has come to life", id)
	}
	return c.destroyFiles()
}

func (c *container) killAndDestroy() error {
	fd, err := unix.PidfdOpen(c.rec.InitPID, 0)
	if err == nil {
		defer unix.Close(fd)
	}
	if !c.alive() {
		fd = -1
	}
	_ = c.signal(unix.SIGKILL, false)
	deadline := time.Now().Add(10 * time.Second)
	for fd >= 0 && c.alive() {
		left := time.Until(deadline)
		if left <= 0 {
			return errors.New("container init still running")
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
	}
	return c.destroy()
}

// destroy removes what is left of a container whose init has ended.
func (c *container) destroy() error {
	if !c.ownPIDs() {
		// Those that outlived init. It may well fail without permission over cgroups.
		_ = killAll(c.cg, unix.SIGKILL)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		awaitEmpty(ctx, c.cg)
		cancel()
	}
	if err := c.destroyFiles(); err != nil {
		return err
	}
	if !bytes.Contains(c.rec.Servin.Spec, []byte("poststop")) {
		return nil
	}
	spec, err := c.spec()
	if err != nil {
		return err
	}
	for i := range spec.Hooks.Poststop {
		if err := c.runHooks("poststop", spec.Hooks.Poststop[i:i+1], specs.StateStopped); err != nil {
			c.app.log.Warnf("%v", err)
		}
	}
	return nil
}

func (c *container) destroyFiles() error {
	if c.cg != nil {
		if st, err := c.cg.GetFreezerState(); err == nil && st == cgroups.Frozen {
			_ = c.cg.Freeze(cgroups.Thawed)
		}
		if err := c.cg.Destroy(); err != nil {
			return fmt.Errorf("unable to remove container's cgroup: %w", err)
		}
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return fmt.Errorf("unable to remove container state dir: %w", err)
	}
	return nil
}

func (a *app) pause(f *flags) error { return a.freeze(f, cgroups.Frozen) }

func (a *app) resume(f *flags) error { return a.freeze(f, cgroups.Thawed) }

func (a *app) freeze(f *flags, to cgroups.FreezerState) error {
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	rootless, err := a.rootlessCgroups()
	if err != nil {
		return err
	}
	if rootless {
		a.log.Warnf("pausing may fail if you don't have the full access to cgroups")
	}
	status, err := c.status()
	switch {
	case err != nil:
		return err
	case to == cgroups.Frozen && status != statusRunning && status != statusCreated:
		return errNotRunning
	case to == cgroups.Thawed && status != statusPaused:
		return errNotPaused
	}
	return c.cg.Freeze(to)
}

// containerState is what state and list show.
type containerState struct {
	Version     string            `json:"ociVersion"`
	ID          string            `json:"id"`
	PID         int               `json:"pid"`
	Status      string            `json:"status"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Created     time.Time         `json:"created"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owner       string            `json:"owner"`
}

func (c *container) show() (*containerState, error) {
	status, err := c.status()
	if err != nil {
		return nil, err
	}
	s := &containerState{Version: c.rec.Config.Version, ID: c.id, PID: c.rec.InitPID, Status: status, Bundle: c.rec.Servin.Bundle,
		Rootfs: c.rec.Config.Rootfs, Created: c.rec.Created, Annotations: c.rec.Servin.Annotations}
	if status == statusStopped {
		s.PID = 0
	}
	return s, nil
}

func (a *app) state(f *flags) error {
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	s, err := c.show()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	_, err = a.stdout.Write(b)
	return err
}

func listFlags(f *flags) {
	f.text("format,f", "table", "select one of: table or json")
	f.boolean("quiet,q", "display only container IDs")
}

func (a *app) list(f *flags) error {
	all, err := a.containers()
	if err != nil {
		return err
	}
	if *f.flag["quiet"] {
		for _, s := range all {
			fmt.Fprintln(a.stdout, s.ID)
		}
		return nil
	}
	switch *f.str["format"] {
	case "table":
		w := tabwriter.NewWriter(a.stdout, 12, 1, 3, ' ', 0)
		fmt.Fprint(w, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER\n")
		for _, s := range all {
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", s.ID, s.PID, s.Status, s.Bundle, s.Created.Format(time.RFC3339Nano), s.Owner)
		}
		return w.Flush()
	case "json":
		return json.NewEncoder(a.stdout).Encode(all)
	}
	return errFormat
}

func (a *app) containers() ([]*containerState, error) {
	entries, err := os.ReadDir(a.root)
	if errors.Is(err, os.ErrNotExist) && !a.rootSet {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []*containerState
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		st, err := e.Info()
		if err != nil {
			continue // it has just been deleted
		}
		c, err := a.load(e.Name())
		if err != nil {
			fmt.Fprintf(a.stderr, "load container %s: %v\n", e.Name(), err)
			continue
		}
		s, err := c.show()
		if err != nil {
			fmt.Fprintf(a.stderr, "status for %s: %v\n", e.Name(), err)
			continue
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			s.Owner = ownerName(sys.Uid)
		}
		all = append(all, s)
	}
	return all, nil
}

func ownerName(uid uint32) string {
	n := strconv.Itoa(int(uid))
	if u, err := user.LookupId(n); err == nil {
		return u.Username
	}
	return "#" + n
}
