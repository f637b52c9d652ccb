package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
)

// Exit codes besides the container's own, as Docker's.
const (
	exitFailure    = 1
	exitEngine     = 125 // the engine or the command line refused
	exitInterrupt  = 130
	exitBrokenPipe = 141
)

// exitError carries an exit code; with a nil err nothing is printed.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exitWith gives err a code.
func exitWith(code int, err error) error { return &exitError{code: code, err: err} }

// usagef is a wrong command line.
func usagef(format string, args ...any) error {
	return exitWith(exitEngine, fmt.Errorf(format, args...))
}

// multiError is several failures, one a line.
type multiError []error

func (m multiError) Error() string {
	var b strings.Builder
	for i, e := range m {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(e.Error())
	}
	return b.String()
}

func (m multiError) Unwrap() []error { return m }

func joined(errs []error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return multiError(errs)
}

// exit prints err and gives the exit code.
func (a *App) exit(err error) int {
	if err == nil {
		return 0
	}
	code, quiet := exitFailure, false
	var ee *exitError
	var ue *command.UsageError
	switch {
	case errors.As(err, &ee):
		code, quiet = ee.code, ee.err == nil
	case errors.As(err, &ue) && ue.Flag:
		code = exitEngine
	case errors.Is(err, context.Canceled):
		return exitInterrupt
	case errors.Is(err, syscall.EPIPE):
		return exitBrokenPipe
	}
	if quiet {
		return code
	}
	if m, ok := err.(multiError); ok {
		seen := map[string]bool{}
		for _, e := range m {
			if s := a.explain(e); !seen[s] {
				seen[s] = true
				fmt.Fprintf(a.Stderr, "servin: %s\n", s)
			}
		}
		return code
	}
	fmt.Fprintf(a.Stderr, "servin: %s\n", a.explain(err))
	return code
}

// explain says what to do where that is known.
func (a *App) explain(err error) string {
	text := err.Error()
	var ce *client.ConnectError
	if !errors.As(err, &ce) {
		if errors.Is(err, client.ErrConnectionLost) || errors.Is(err, io.ErrUnexpectedEOF) {
			return text + " (did servind stop? containers that run go on; start it again and look with 'servin ps')"
		}
		return text
	}
	network, addr, _ := client.ParseHost(ce.Host)
	why := errText(ce.Err)
	switch {
	case network == "unix" && errors.Is(err, os.ErrPermission):
		return fmt.Sprintf("cannot reach the engine at %s: permission denied: join the group that owns the socket (ls -l %s), run as root, or start a rootless engine of your own", ce.Host, addr)
	case network == "unix" && (errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)):
		if os.Geteuid() > 0 {
			return fmt.Sprintf("cannot reach the engine at %s: is servind running? Start one of your own with 'servind &', the host's with 'sudo systemctl start servind', or name another engine with --host or 'servin context use'", ce.Host)
		}
		return fmt.Sprintf("cannot reach the engine at %s: is servind running? Start it with 'sudo systemctl start servind' or 'sudo servind &', or name another engine with --host or 'servin context use'", ce.Host)
	case network == "ssh":
		return fmt.Sprintf("cannot reach the engine at %s: %s", ce.Host, why)
	}
	return fmt.Sprintf("cannot reach the engine at %s: %s: is servind listening there, and does it want TLS?", ce.Host, why)
}

// errText drops the parts of a network error that repeat the address.
func errText(err error) string {
	var se *os.SyscallError
	if errors.As(err, &se) {
		return se.Err.Error()
	}
	return err.Error()
}
