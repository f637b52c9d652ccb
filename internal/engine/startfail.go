package engine

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// startFailed notes why a start failed.
func (e *Engine) startFailed(u *unit, cause error, o launch) {
	if o.create {
		return // the container goes away with the request
	}
	_, p, err := e.change(u, func(n *container.Record) {
		if serr := step(n, container.EventStartFailed); serr != nil {
			return
		}
		n.State.Error = cause.Error()
		n.State.ExitCode = startExitCode(cause)
		n.Attached, n.Ports = nil, nil
	})
	e.saved(u, p, err)
	e.publish(u, events.ActionDie, map[string]string{"exitCode": fmt.Sprint(startExitCode(cause))})
	e.notify(u, true)
}

// startExitCode is what a shell would give for the failure: 126 where the
// command cannot be executed, 127 where it cannot be found, 128 otherwise.
func startExitCode(err error) int {
	var se *runtime.StartError
	if errors.As(err, &se) && se.Step == "exec" || errors.As(err, &se) && strings.HasPrefix(se.Step, "exec") {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return 127
		}
		return 126
	}
	return 128
}

// execExitCode is startExitCode for an exec, where the directory to start in
// counts like the command: Docker tells the two apart by the words alone.
func execExitCode(err error) int {
	var se *runtime.StartError
	if !errors.As(err, &se) {
		return startExitCode(err)
	}
	switch {
	case errors.Is(se.Err, unix.EACCES), errors.Is(se.Err, unix.EISDIR), errors.Is(se.Err, unix.ENOEXEC):
		return 126
	case errors.Is(se.Err, unix.ENOENT), errors.Is(se.Err, unix.ENOTDIR):
		return 127
	}
	return startExitCode(err)
}

// explain says what went wrong in words that clients know, and what a command
// line should exit with.
func explain(r *container.Record, err error) error {
	return fault.WithExitCode(exitCodeOf(err), explainStart("failed to create task for container: ", r.Path, err))
}

// exitCodeOf is 126 or 127 where the command is to blame, else 125.
func exitCodeOf(err error) int {
	if c := startExitCode(err); c != 128 {
		return c
	}
	return 125
}

func explainStart(prefix, cmd string, err error) error {
	var se *runtime.StartError
	if !errors.As(err, &se) {
		return err
	}
	if strings.HasPrefix(se.Step, "exec") {
		switch {
		case errors.Is(se.Err, unix.ENOENT) && !strings.Contains(cmd, "/"):
			return fault.New(fault.Invalid, "%sexec: %q: executable file not found in $PATH", prefix, cmd)
		case errors.Is(se.Err, unix.ENOENT), errors.Is(se.Err, unix.ENOTDIR):
			return fault.New(fault.Invalid, "%sexec: %q: stat %s: no such file or directory", prefix, cmd, cmd)
		case errors.Is(se.Err, unix.EACCES), errors.Is(se.Err, unix.EISDIR), errors.Is(se.Err, unix.ENOEXEC):
			return fault.New(fault.Invalid, "%sexec: %q: %s", prefix, cmd, execError(se.Err))
		}
	}
	if fault.Of(err) != fault.Internal {
		return err
	}
	kind := fault.Internal
	for _, e := range []error{unix.ENOENT, unix.ENOTDIR, unix.EINVAL, unix.EACCES, unix.EPERM, unix.ELOOP, unix.ENODEV, unix.EROFS, unix.ENAMETOOLONG} {
		if errors.Is(err, e) {
			kind = fault.Invalid // something that the request names is not as it must be
		}
	}
	return fault.New(kind, "%s%w", prefix, err)
}

func execError(err error) string {
	if errors.Is(err, unix.ENOEXEC) {
		return "exec format error"
	}
	if errors.Is(err, unix.EISDIR) {
		return "is a directory: permission denied"
	}
	return "permission denied"
}
