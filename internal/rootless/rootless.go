// Package rootless moves an ordinary user's engine into a user namespace where
// it is root. The namespaces (user, mount, network, ipc) are kept by a holder, a
// process that does nothing, so that containers outlive the engine and a new
// engine enters the same namespaces. A user-mode network (pasta, else
// slirp4netns) joins the network namespace to the host. cmd/servind calls Enter
// first thing; the composition root asks Inside what there is.
package rootless

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Marker is set in the environment of an engine inside the namespaces: a State
// in JSON.
const Marker = "SERVIN_ROOTLESS"

// State is what an engine inside the namespaces knows of the world outside.
type State struct {
	// Active: this process is inside.
	Active bool `json:"-"`
	// UID and GID are the user's.
	UID, GID int
	// CgroupBase is the v2 subtree delegated to the engine, "" none.
	CgroupBase string `json:",omitempty"`
	// Link is "pasta", "slirp4netns" or "" for no network beyond the namespace.
	Link string `json:",omitempty"`
	// FirstPort is the lowest port that the user may bind on the host.
	FirstPort uint16
}

// Config of Enter.
type Config struct {
	// RunRoot holds the holder's record; it must belong to the user.
	RunRoot string
	// Shim is a path at which servin-shim can be executed (a sealed memfd will do).
	Shim string
	// Args are the engine's program and its arguments.
	Args []string
	// Warn takes what the user should know, one sentence each.
	Warn func(string)
}

// Needed reports whether this process is an engine of an ordinary user that has
// not entered its namespaces yet.
func Needed() bool { return os.Geteuid() != 0 }

// Inside tells whether this process runs inside such namespaces, and with what.
func Inside() State {
	var s State
	if Needed() || json.Unmarshal([]byte(os.Getenv(Marker)), &s) != nil {
		return State{}
	}
	// The real root may have inherited the variable from somebody.
	m, err := os.ReadFile("/proc/self/uid_map")
	s.Active = err == nil && strings.Join(strings.Fields(string(m)), " ") != "0 0 4294967295"
	return s
}

// process names a process for good: a pid alone may have been given to another
// one, with its start time it is unique until the next boot.
type process struct {
	PID     int
	Started string // field 22 of /proc/PID/stat
}

func identify(pid int) process { return process{PID: pid, Started: startTime(pid)} }

func (p process) alive() bool { return p.PID > 1 && p.Started != "" && p.Started == startTime(p.PID) }

// holder is the record of the process that keeps the namespaces.
type holder struct {
	Version int
	process
	Boot       string
	Link       link
	CgroupBase string `json:",omitempty"`
}

const recordVersion = 2

// Enter replaces this process by the engine inside the namespaces, making them
// first where no holder lives. It returns only with an error.
func Enter(c Config) error {
	if err := os.MkdirAll(c.RunRoot, 0o700); err != nil {
		return fmt.Errorf("cannot make the run root: %w", err)
	}
	if err := ours(c.RunRoot); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(c.RunRoot, "rootless.lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot lock the run root: %w", err)
	}
	// Two engines started at once make one holder. Released by close-on-exec.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("cannot lock the run root: %w", err)
	}
	path := filepath.Join(c.RunRoot, recordName)
	h, alive := load(path)
	g := findGroups()
	if alive {
		if h.CgroupBase != "" && g.enter(h.CgroupBase, os.Getpid()) != nil {
			g.scope(c.Args)
			c.Warn("the engine cannot join its cgroup " + h.CgroupBase + ": containers cannot be started with limits until it is started where the first one was")
		}
	} else {
		base := g.delegated(os.Getpid())
		if base == "" {
			g.scope(c.Args)
		}
		if h, err = create(c); err != nil {
			return err
		}
		h.CgroupBase = base
	}
	// Recorded before and after the link is made, so that nothing is forgotten.
	if err := save(path, h); err != nil {
		_ = syscall.Kill(h.PID, syscall.SIGTERM)
		return err
	}
	if !h.Link.alive() {
		h.Link = connect(h.PID, c.RunRoot, c.Warn)
		if err := resolvConf(h.Link, c.RunRoot); err != nil {
			c.Warn(fmt.Sprintf("cannot write the name servers: %v", err))
		}
		if err := save(path, h); err != nil {
			return err
		}
	}
	state, err := json.Marshal(State{UID: os.Getuid(), GID: os.Getgid(), CgroupBase: h.CgroupBase, Link: h.Link.Kind, FirstPort: firstPort()})
	if err != nil {
		return err
	}
	env := append(os.Environ(), Marker+"="+string(state))
	argv := append([]string{"servin-shim", "rootless-enter", strconv.Itoa(h.PID)}, c.Args...)
	return fmt.Errorf("cannot enter the user namespace: %w", syscall.Exec(c.Shim, argv, env))
}

// ours refuses a run root that somebody else could have laid ready: whoever
// can write there can have this user's engine do anything.
func ours(dir string) error {
	for _, d := range []string{dir, filepath.Dir(dir)} {
		var st unix.Stat_t
		if err := unix.Stat(d, &st); err != nil {
			return fmt.Errorf("cannot look at %s: %w", d, err)
		}
		sticky := d != dir && st.Mode&unix.S_ISVTX != 0
		if int(st.Uid) != os.Getuid() && (d == dir || st.Uid != 0) || st.Mode&0o022 != 0 && !sticky {
			return fault.New(fault.Invalid, "cannot use the run root %s: %s is not this user's alone; set XDG_RUNTIME_DIR or --run-root to a folder that is", dir, d)
		}
	}
	return nil
}

// Prepare is the first thing to do inside: it shows the name servers that can be
// reached from there where the host's cannot.
func Prepare(runRoot string) error {
	file, err := os.Stat(filepath.Join(runRoot, resolvName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if now, err := os.Stat("/etc/resolv.conf"); err == nil && os.SameFile(now, file) {
		return nil // a former engine did it
	}
	if err := unix.Mount(filepath.Join(runRoot, resolvName), "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cannot show the name servers in /etc/resolv.conf: %w", err)
	}
	return nil
}

// firstPort is the lowest port that an ordinary user may bind in this network
// namespace.
func firstPort() uint16 {
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if n, perr := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 16); err == nil && perr == nil {
		return uint16(n)
	}
	return 1024
}

const recordName = "rootless.json"

// Leave ends the holder and the network, and with them the namespaces; for a
// complete shutdown.
func Leave(runRoot string) error {
	path := filepath.Join(runRoot, recordName)
	h, alive := load(path)
	var failed error
	if h.Boot == bootID() {
		if h.Link.alive() {
			failed = end(h.Link.process)
		}
		if alive {
			failed = errors.Join(failed, end(h.process))
		}
	}
	for _, name := range []string{recordName, "pasta.pid", "slirp4netns.sock", "slirp4netns.log", resolvName} {
		if err := os.Remove(filepath.Join(runRoot, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

func end(p process) error {
	if err := syscall.Kill(p.PID, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("cannot end process %d of the namespaces: %w", p.PID, err)
	}
	return nil
}

func load(path string) (holder, bool) {
	var h holder
	data, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(data, &h) != nil || h.Version != recordVersion {
		return holder{}, false
	}
	return h, h.Boot == bootID() && h.alive()
}

func save(path string, h holder) error {
	data, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(path, data, 0o600, durable.Nothing); err != nil {
		return fmt.Errorf("cannot record the holder of the namespaces: %w", err)
	}
	return nil
}

func bootID() string {
	data, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data))
}

// startTime reads when a process began, in clock ticks since boot.
func startTime(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name in field 2 may hold anything, spaces and brackets too.
	_, rest, ok := strings.Cut(string(data[max(0, strings.LastIndexByte(string(data), ')')):]), " ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 || f[0] == "Z" {
		return ""
	}
	return f[19]
}

// create starts a holder and maps its ids.
func create(c Config) (h holder, err error) {
	ids := mappings(c.Warn)
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return h, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "holder"), os.NewFile(uintptr(pair[1]), "engine")
	defer ours.Close()
	var stderr strings.Builder
	cmd := &exec.Cmd{Path: c.Shim, Args: []string{"servin-shim", "rootless-hold"}, ExtraFiles: []*os.File{theirs}, Dir: "/", Stderr: &stderr}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return h, fmt.Errorf("cannot start the holder of the namespaces: %w", err)
	}
	defer func() {
		if err != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if s := strings.TrimSpace(stderr.String()); s != "" {
				err = fault.New(fault.Unsupported, "%s", strings.TrimPrefix(s, "servin-shim: "))
			}
		}
	}()
	pid := cmd.Process.Pid
	if err := expect(ours, 'u'); err != nil {
		return h, err
	}
	if err := mapIDs(pid, ids); err != nil {
		return h, err
	}
	if _, err := ours.Write([]byte{'m'}); err != nil {
		return h, err
	}
	if err := expect(ours, 'r'); err != nil {
		return h, err
	}
	return holder{Version: recordVersion, process: identify(pid), Boot: bootID()}, nil
}

// expect waits for one byte from the holder.
func expect(f *os.File, want byte) error {
	var b [1]byte
	n, err := f.Read(b[:])
	if err != nil || n != 1 || b[0] != want {
		return errors.New("cannot make namespaces: the holder ended early")
	}
	return nil
}
