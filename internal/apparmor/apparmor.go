// Package apparmor loads the profile of ordinary containers, "servin-default".
// The profile's text is servin-default.profile; hosts without apparmor_parser get
// the policy compiled from it beforehand (servin-default.policy, made by
// precompile.sh), written to the kernel through securityfs. The engine imports
// this package; putting a process under the profile is the runtime's work.
package apparmor

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// DefaultProfile is the name of the profile that this package loads.
const DefaultProfile = "servin-default"

//go:embed servin-default.policy
var policy []byte

//go:embed servin-default.profile
var text []byte

// Config of a loader; zero values are the host's own.
type Config struct {
	// Module is /sys/module/apparmor, Security /sys/kernel/security.
	Module, Security string
	// Parser is the command that compiles text where the kernel refuses the
	// precompiled policy, found on the path; "-" is none.
	Parser string
}

// Loader loads the default profile and keeps it loaded. It is safe for concurrent use.
type Loader struct {
	cfg Config

	mu     sync.Mutex
	loaded string // directory of the loaded profile, relative to apparmor's
}

// New makes a loader; it touches nothing yet.
func New(cfg Config) *Loader {
	if cfg.Module == "" {
		cfg.Module = "/sys/module/apparmor"
	}
	if cfg.Security == "" {
		cfg.Security = "/sys/kernel/security"
	}
	if cfg.Parser == "" {
		cfg.Parser = "apparmor_parser"
	}
	return &Loader{cfg: cfg}
}

// Supported tells whether the kernel has AppArmor on and this process may load
// profiles; reason says why not.
func (l *Loader) Supported() (ok bool, reason string) {
	b, err := os.ReadFile(filepath.Join(l.cfg.Module, "parameters/enabled"))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false, "the kernel has no AppArmor"
	case err != nil:
		return false, "cannot tell: " + err.Error()
	case !strings.HasPrefix(string(b), "Y"):
		return false, "AppArmor is switched off (kernel parameters apparmor=1 security=apparmor switch it on)"
	}
	d, err := l.open()
	if err != nil {
		return false, err.Error()
	}
	defer d.Close()
	// Loading needs CAP_MAC_ADMIN in the policy's namespace, which the file's
	// mode does not tell.
	if err := unix.Faccessat(int(d.Fd()), ".replace", unix.W_OK, unix.AT_EACCESS); err != nil {
		return false, "profiles cannot be loaded: " + err.Error()
	}
	return true, ""
}

// open opens AppArmor's directory in securityfs. Where nobody mounted securityfs,
// a mount of our own serves that no namespace shows.
func (l *Loader) open() (*os.File, error) {
	d, err := os.Open(filepath.Join(l.cfg.Security, "apparmor"))
	if err == nil {
		return d, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	fsfd, err := unix.Fsopen("securityfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen securityfs", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, os.NewSyscallError("fsconfig securityfs", err)
	}
	mnt, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsmount securityfs", err)
	}
	defer unix.Close(mnt)
	fd, err := unix.Openat(mnt, "apparmor", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "securityfs/apparmor", Err: err}
	}
	return os.NewFile(uintptr(fd), "apparmor"), nil
}

// Ensure loads the profile unless it is loaded. Others may unload it (an upgrade of
// the host's profiles does), so it is looked for each time, which costs a stat.
func (l *Loader) Ensure(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	d, err := l.open()
	if err != nil {
		return fault.New(fault.Unsupported, "cannot load AppArmor profile %s: %w", DefaultProfile, err)
	}
	defer d.Close()
	if l.loaded != "" {
		var st unix.Stat_t
		if unix.Fstatat(int(d.Fd()), l.loaded, &st, 0) == nil {
			return nil
		}
		l.loaded = ""
	}
	if found, ok := find(d); ok {
		// Of a former engine, or a former version: replaced, so that it is ours.
		l.loaded = found
	}
	if err := l.load(ctx, d); err != nil {
		l.loaded = ""
		return fault.New(fault.Unsupported, "cannot load AppArmor profile %s: %w", DefaultProfile, err)
	}
	if found, ok := find(d); ok {
		l.loaded = found
	}
	return nil
}

func (l *Loader) load(ctx context.Context, d *os.File) error {
	fd, err := unix.Openat(int(d.Fd()), ".replace", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: ".replace", Err: err}
	}
	// The kernel takes a policy as one write, whole or not at all.
	n, err := unix.Write(fd, policy)
	unix.Close(fd)
	if err == nil && n != len(policy) {
		err = io.ErrShortWrite
	}
	if err == nil {
		return nil
	}
	if l.cfg.Parser == "-" {
		return &os.PathError{Op: "write", Path: ".replace", Err: err}
	}
	// A kernel that does not take it may take what its own tools make of the text.
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.cfg.Parser, "--replace", "--skip-cache", "--quiet")
	cmd.Stdin = bytes.NewReader(text)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	out, perr := cmd.CombinedOutput()
	if perr == nil {
		return nil
	}
	if errors.Is(perr, exec.ErrNotFound) {
		return &os.PathError{Op: "write", Path: ".replace", Err: err}
	}
	if len(out) > 400 {
		out = out[:400]
	}
	return errors.Join(&os.PathError{Op: "write", Path: ".replace", Err: err},
		errors.New("apparmor_parser: "+perr.Error()+": "+strings.TrimSpace(string(out))))
}

// find looks for the loaded profile; its directory is its name and a number.
func find(d *os.File) (string, bool) {
	fd, err := unix.Openat(int(d.Fd()), "policy/profiles", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	p := os.NewFile(uintptr(fd), "profiles")
	defer p.Close()
	names, _ := p.Readdirnames(-1)
	for _, n := range names {
		if rest, ok := strings.CutPrefix(n, DefaultProfile+"."); ok && rest != "" && strings.Trim(rest, "0123456789") == "" {
			return "policy/profiles/" + n, true
		}
	}
	return "", false
}

// Unload removes the profile: at shutdown, when no container is left.
func (l *Loader) Unload() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	d, err := l.open()
	if err != nil {
		return nil // nothing can be loaded
	}
	defer d.Close()
	l.loaded = ""
	fd, err := unix.Openat(int(d.Fd()), ".remove", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(DefaultProfile))
		unix.Close(fd)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fault.New(fault.Internal, "cannot unload AppArmor profile %s: %w", DefaultProfile, err)
	}
	return nil
}
