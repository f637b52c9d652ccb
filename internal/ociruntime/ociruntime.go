// Package ociruntime is an OCI runtime behind runc's command line: create, start,
// state, kill, delete, exec and the rest, for engines that bring their own
// monitor (containerd's shim, conmon, BuildKit's executor).
//
// Vocabulary. A *bundle* is a directory with config.json and a root file system. A
// *container* is what create made of one; its records lie in a directory of its
// own below the root directory. A created container waits at its *gate*, a pipe
// with a name, for start. There is no monitor: the container's init is the
// caller's child, or its subreaper's, and nothing of ours lives on beside it.
//
// The way into the container is the one that the engine takes: package plan
// compiles the bundle's spec, package shim's launcher clones the start-up stage,
// which carries the plan out. Texts of errors follow runc's where callers look
// for them. cmd/servin-runtime imports this package.
package ociruntime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/userns"
)

// Errors that callers know by their text.
var (
	errEmptyID    = errors.New("container id cannot be empty")
	errInvalidID  = errors.New("invalid container ID format")
	errExist      = errors.New("container with given ID already exists")
	errNotExist   = errors.New("container does not exist")
	errNotRunning = errors.New("container not running")
	errNotPaused  = errors.New("container not paused")
)

// app is one invocation.
type app struct {
	name    string // of the program, as it was called
	release string
	root    string // directory of the containers' records
	rootSet bool
	systemd bool
	// rootless: errors for want of permission over cgroups are no errors.
	rootless string
	log      *logger
	stdin    *os.File
	stdout   *os.File
	stderr   *os.File
}

// Main carries one command line out and returns the status to exit with.
func Main(args []string, version string) int {
	a := &app{name: "servin-runtime", release: version, log: newLogger(), stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	if len(args) > 0 {
		a.name = filepath.Base(args[0])
	}
	var code exitCode
	err := a.run(args[min(1, len(args)):])
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		if code.err != nil {
			a.log.fatal(code.err)
		}
		return code.code
	}
	a.log.fatal(err)
	return 1
}

// exitCode is an end with a status of its own; err may be nil.
type exitCode struct {
	code int
	err  error
}

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// defaultRoot is where records lie unless --root says otherwise.
func defaultRoot() (root string, xdg bool) {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		own := os.Geteuid() != 0
		if !own && userns.RunningInUserNS() {
			u, ok := os.LookupEnv("USER")
			own = !ok || u != "root"
		}
		if own {
			return dir + "/servin-runtime", true
		}
	}
	return "/run/servin-runtime", false
}

// setRoot settles the directory of the records.
func (a *app) setRoot(given string, set bool) error {
	if !set {
		root, xdg := defaultRoot()
		a.root = root
		if !xdg {
			return nil
		}
		// Without the sticky bit what lies there may be pruned (XDG base
		// directory specification).
		if err := os.MkdirAll(root, 0o700); err != nil {
			return fmt.Errorf("the path in $XDG_RUNTIME_DIR must be writable by the user: %w", err)
		}
		return os.Chmod(root, 0o700|os.ModeSticky)
	}
	root, err := filepath.Abs(given)
	if err != nil {
		return err
	}
	if root == "/" {
		return errors.New("option --root must not be /")
	}
	a.root, a.rootSet = root, true
	return nil
}

// rootlessCgroups tells whether a lack of permission over cgroups is to be borne.
func (a *app) rootlessCgroups() (bool, error) {
	if a.rootless != "" && !strings.EqualFold(a.rootless, "auto") {
		return strconv.ParseBool(a.rootless)
	}
	if os.Geteuid() != 0 {
		return true, nil
	}
	return userns.RunningInUserNS(), nil
}

func validID(id string) error {
	if id == "" {
		return errEmptyID
	}
	if id == "." || id == ".." || len(id) > 1024 {
		return errInvalidID
	}
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '+', c == '-', c == '.':
		default:
			return errInvalidID
		}
	}
	return nil
}
