package ociruntime

import (
	"errors"
	"fmt"
	osexec "os/exec"
	"strings"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/plan"
	"github.com/cloudos-io/cloudos/internal/shim"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func hookError(err error) error {
	se := (*shim.StageError)(nil)
	switch {
	case !errors.As(err, &se):
		return err
	case se.Err == unix.ECHILD && se.Hook.Signaled():
		return fmt.Errorf("signal: %v", se.Hook.Signal())
	case se.Err == unix.ECHILD:
		return fmt.Errorf("exit status %d", se.Hook.ExitStatus())
	}
	return se.Err
}

// explain turns the failure of an operation into words that callers know.
func (b *birth) explain(err error, from int) error {
	var se *shim.StageError
	if !errors.As(err, &se) {
		return err
	}
	i := se.Op + from
	if se.Op < 0 || i >= len(b.p.Ops) {
		return fmt.Errorf("error during container init: %w", err)
	}
	if n, ok := b.hookAt[i]; ok {
		return fmt.Errorf("error during container init: error running startContainer hook #%d: %w", n, hookError(err))
	}
	return fmt.Errorf("error during container init: %w", explain(se, b.p.Ops[i].Kind, b.spec.Process, b.rec.Config.Cgroups.CpusetCpus))
}

func explain(se *shim.StageError, kind plan.Kind, p *specs.Process, cpus string) error {
	switch kind {
	case plan.OpLookup, plan.OpExec:
		return execError(p.Args[0], se.Err, kind == plan.OpExec)
	case plan.OpCwd:
		return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", p.Cwd, se.Err)
	case plan.OpMount, plan.OpMove, plan.OpReceive, plan.OpSource:
		if kind == plan.OpMount && se.Err == unix.ELOOP {
			return fmt.Errorf("error mounting: %w: it must be mounted on ordinary directory", se)
		}
		return fmt.Errorf("error mounting: %w", se)
	case plan.OpScheduler:
		if se.Err == unix.EPERM && p.Scheduler != nil && cpus != "" {
			return fmt.Errorf("process scheduler can't be used together with AllowedCPUs: %w", se.Err)
		}
	case plan.OpRlimits:
		return fmt.Errorf("error setting rlimits: %w", se.Err)
	case plan.OpCreds:
		if errors.Is(se.Err, unix.EINVAL) {
			return fmt.Errorf("cannot %s: %w (is the id mapped in the container's user namespace?)", se.Name, se.Err)
		}
	}
	return se
}

// notExecuted: a program was found, and the kernel would not run it.
type notExecuted struct {
	name  string
	errno syscall.Errno
}

func (e *notExecuted) Error() string { return "exec " + e.name + ": " + e.errno.Error() }
func (e *notExecuted) Unwrap() error { return e.errno }

func execError(name string, errno syscall.Errno, ran bool) error {
	switch {
	case ran:
		return &notExecuted{name, errno}
	case !strings.Contains(name, "/"):
		return fmt.Errorf("exec: %q: %w", name, osexec.ErrNotFound)
	case errno == unix.ENOENT || errno == unix.ENOTDIR:
		return fmt.Errorf("exec: %q: stat %s: %w", name, name, errno)
	}
	return fmt.Errorf("exec: %q: %w", name, errno)
}
