// Package rootless moves an ordinary user's engine into a user namespace where
// it is root. The namespaces (user, mount, network, ipc) are kept by a holder, a
// process that does nothing, so that containers outlive the engine and a new
// engine enters the same namespaces. A user-mode network (pasta, else
// slirp4netns) joins the network namespace to the host. cmd/servind calls Enter
// first thing; nothing else imports this package.
package rootless

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Marker is set in the environment of an engine inside the namespaces, to
// "UID:GID" of its user outside.
const Marker = "SERVIN_ROOTLESS"

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
func Needed() bool { return os.Geteuid() != 0 && os.Getenv(Marker) == "" }

// Active reports whether this process runs inside such namespaces.
func Active() bool { return os.Getenv(Marker) != "" }

// holder is the record of the process that keeps the namespaces. A pid alone
// may have been given to another process; with its start time it is unique.
type holder struct {
	Version int
	PID     int
	Started string // field 22 of /proc/PID/stat
	Boot    string
}

const recordVersion = 1

// Enter replaces this process by the engine inside the namespaces, making them
// first where no holder lives. It returns only with an error.
func Enter(c Config) error {
	if err := os.MkdirAll(c.RunRoot, 0o700); err != nil {
		return fmt.Errorf("cannot make the run root: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(c.RunRoot, "rootless.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("cannot lock the run root: %w", err)
	}
	// Two engines started at once make one holder. Released by close-on-exec.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("cannot lock the run root: %w", err)
	}
	path := filepath.Join(c.RunRoot, "rootless.json")
	h, alive := load(path)
	if !alive {
		if h, err = create(c); err != nil {
			return err
		}
		if err := save(path, h); err != nil {
			_ = syscall.Kill(h.PID, syscall.SIGTERM)
			return err
		}
	}
	env := append(os.Environ(), fmt.Sprintf("%s=%d:%d", Marker, os.Getuid(), os.Getgid()))
	argv := append([]string{"servin-shim", "rootless-enter", strconv.Itoa(h.PID)}, c.Args...)
	return fmt.Errorf("cannot enter the user namespace: %w", syscall.Exec(c.Shim, argv, env))
}

// Leave ends the holder, and with it the namespaces; for a complete shutdown.
func Leave(runRoot string) error {
	path := filepath.Join(runRoot, "rootless.json")
	h, alive := load(path)
	if alive {
		if err := syscall.Kill(h.PID, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("cannot end the holder of the namespaces: %w", err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func load(path string) (holder, bool) {
	var h holder
	data, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(data, &h) != nil || h.Version != recordVersion || h.PID <= 1 {
		return h, false
	}
	return h, h.Boot == bootID() && h.Started != "" && h.Started == startTime(h.PID)
}

func save(path string, h holder) error {
	data, err := json.Marshal(h)
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("cannot record the holder of the namespaces: %w", err)
	}
	return os.Rename(tmp, path)
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

// create starts a holder, maps its ids and joins its network to the host.
func create(c Config) (h holder, err error) {
	u, err := user.Current()
	if err != nil {
		return h, fmt.Errorf("cannot look up the user: %w", err)
	}
	uids, gids, err := mappings(u, c.Warn)
	if err != nil {
		return h, err
	}
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
	if err := mapIDs(pid, uids, gids); err != nil {
		return h, err
	}
	if _, err := ours.Write([]byte{'m'}); err != nil {
		return h, err
	}
	if err := expect(ours, 'r'); err != nil {
		return h, err
	}
	if err := connect(pid, c.RunRoot, c.Warn); err != nil {
		return h, err
	}
	return holder{Version: recordVersion, PID: pid, Started: startTime(pid), Boot: bootID()}, nil
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

// connect joins the holder's network namespace to the host's network.
func connect(pid int, runRoot string, warn func(string)) error {
	if path, err := exec.LookPath("pasta"); err == nil {
		// pasta copies the host's addresses and routes, and by itself forwards
		// ports that are listened on inside.
		out, err := exec.Command(path, "--config-net", "--quiet", "--pid", filepath.Join(runRoot, "pasta.pid"), strconv.Itoa(pid)).CombinedOutput()
		if err == nil {
			return nil
		}
		warn(fmt.Sprintf("pasta failed, trying slirp4netns: %s", strings.TrimSpace(string(out))))
	}
	if path, err := exec.LookPath("slirp4netns"); err == nil {
		return slirp(path, pid, runRoot)
	}
	warn("neither pasta nor slirp4netns is installed: containers have no network beyond this host (Debian packages: passt, slirp4netns)")
	return nil
}

// slirp starts slirp4netns and waits until its link is up.
func slirp(path string, pid int, runRoot string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	log, err := os.OpenFile(filepath.Join(runRoot, "slirp4netns.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		w.Close()
		return err
	}
	defer log.Close()
	cmd := exec.Command(path, "--configure", "--mtu=65520", "--disable-host-loopback", "--ready-fd=3",
		"--api-socket", filepath.Join(runRoot, "slirp4netns.sock"), strconv.Itoa(pid), "tap0")
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("cannot start slirp4netns: %w", err)
	}
	if err := r.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if err := expect(r, '1'); err != nil {
		_ = cmd.Process.Kill()
		return fmt.Errorf("cannot start slirp4netns: see %s", log.Name())
	}
	return nil
}
