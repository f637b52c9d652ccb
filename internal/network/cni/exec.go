package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	// maxDiagnosis bounds what is kept of a plugin's standard error, and
	// maxMessage what of it, or of its error object, goes into one of ours.
	maxDiagnosis = 16 << 10
	maxMessage   = 1 << 10
	// busyTries: a plugin that is being installed cannot be executed yet.
	busyTries, busyWait = 20, 100 * time.Millisecond
)

// executor runs plugins as processes. It implements invoke.Exec.
type executor struct {
	version.PluginDecoder
	limits Limits
	slots  chan struct{}
}

func newExecutor(l Limits) *executor {
	return &executor{limits: l, slots: make(chan struct{}, l.Parallel)}
}

// FindInPath finds a plugin's program.
func (x *executor) FindInPath(plugin string, paths []string) (string, error) {
	p, err := invoke.FindInPath(plugin, paths)
	if err != nil {
		return "", fault.New(fault.NotFound, "plugin %q is not in %s", plugin, strings.Join(paths, ", "))
	}
	return p, nil
}

// lease is what a plugin inherits, so that a later engine sees it running.
type leaseKey struct{}

func withLease(ctx context.Context, f *os.File) context.Context {
	return context.WithValue(ctx, leaseKey{}, f)
}

// ExecPlugin runs a plugin until it ends, ctx does or it says too much; then
// its whole process group is killed. One that even so does not end (it hangs in
// the kernel) is left behind.
func (x *executor) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	select {
	case x.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	type outcome struct {
		out []byte
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		defer func() { <-x.slots }()
		out, err := x.run(ctx, path, stdin, environ)
		done <- outcome{out, err}
	}()
	select {
	case o := <-done:
		return o.out, o.err
	case <-ctx.Done():
	}
	select {
	case o := <-done:
		return o.out, o.err
	case <-time.After(2 * x.limits.Grace):
		return nil, fault.New(fault.DeadlineExceeded, "it cannot be killed: it hangs in the kernel")
	}
}

func (x *executor) run(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	for try := 1; ; try++ {
		ctx, cancel := context.WithCancelCause(ctx)
		out := &bounded{limit: x.limits.Output, full: func() {
			cancel(fmt.Errorf("it wrote more than %d bytes", x.limits.Output))
		}}
		diag := &tail{limit: maxDiagnosis}
		c := exec.CommandContext(ctx, path)
		c.Env, c.Stdin, c.Stdout, c.Stderr, c.Dir = environ, bytes.NewReader(stdin), out, diag, "/"
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		// The group has what the plugin has started: address plugins, mostly.
		c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
		c.WaitDelay = x.limits.Grace
		if f, ok := ctx.Value(leaseKey{}).(*os.File); ok {
			c.ExtraFiles = []*os.File{f}
		}
		err := c.Run()
		cause := context.Cause(ctx)
		cancel(nil)
		switch {
		case err == nil, errors.Is(err, exec.ErrWaitDelay) && cause == nil:
			// The latter: it ended well but left somebody with its output open.
			return out.b, nil
		case errors.Is(err, syscall.ETXTBSY) && try < busyTries && cause == nil:
			select {
			case <-time.After(busyWait):
				continue
			case <-ctx.Done():
			}
		case errors.Is(cause, context.DeadlineExceeded):
			return nil, fault.New(fault.DeadlineExceeded, "it did not end in time and was killed%s", diag.quote())
		case errors.Is(cause, context.Canceled):
			return nil, cause
		case cause != nil:
			return nil, fault.New(fault.Internal, "%w; it was killed", cause)
		}
		return nil, failure(err, out.b, diag)
	}
}

// failure reads the error object that a plugin prints when it fails.
func failure(err error, out []byte, diag *tail) error {
	var e types.Error
	if len(bytes.TrimSpace(out)) == 0 {
		return fmt.Errorf("it failed without saying why: %w%s", err, diag.quote())
	}
	if jerr := json.Unmarshal(out, &e); jerr != nil || e.Msg == "" && e.Code == 0 {
		return fmt.Errorf("it failed (%w) and printed what is no CNI error: %q", err, clean(string(out)))
	}
	msg := clean(e.Msg)
	if d := clean(e.Details); d != "" {
		msg += "; " + d
	}
	return &pluginError{fault.New(kindOf(e.Code), "%s (CNI error %d)", msg, e.Code), e.Code}
}

// pluginError is a failure that a plugin has explained.
type pluginError struct {
	error
	code uint
}

func (e *pluginError) Unwrap() error { return e.error }

// kindOf sorts the error codes of the spec.
func kindOf(code uint) fault.Kind {
	switch code {
	case types.ErrUnknownContainer:
		return fault.NotFound
	case types.ErrInvalidEnvironmentVariables, types.ErrInvalidNetworkConfig, types.ErrUnsupportedField, types.ErrIncompatibleCNIVersion:
		return fault.Invalid
	case types.ErrTryAgainLater, types.ErrPluginNotAvailable, types.ErrLimitedConnectivity:
		return fault.Unavailable
	}
	return fault.Internal
}

// clean makes a plugin's words fit for logs, terminals and error texts.
func clean(s string) string {
	cut := len(s) > maxMessage
	if cut {
		s = s[:maxMessage]
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == '\uFFFD' || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069:
			return -1
		}
		return r
	}, s)
	if cut {
		s += "…"
	}
	return strings.TrimSpace(s)
}

// bounded keeps what is written up to a limit and then refuses more.
type bounded struct {
	b     []byte
	limit int
	full  func()
}

var errTooMuch = errors.New("too much output")

func (w *bounded) Write(p []byte) (int, error) {
	if len(w.b)+len(p) > w.limit {
		w.full()
		return 0, errTooMuch
	}
	w.b = append(w.b, p...)
	return len(p), nil
}

// tail keeps the end of what is written.
type tail struct {
	b     []byte
	limit int
}

func (w *tail) Write(p []byte) (int, error) {
	w.b = append(w.b, p...)
	if len(w.b) > w.limit {
		w.b = append(w.b[:0], w.b[len(w.b)-w.limit:]...)
	}
	return len(p), nil
}

func (w *tail) quote() string {
	s := string(w.b)
	if len(s) > maxMessage {
		s = s[len(s)-maxMessage:]
	}
	if s = clean(s); s == "" {
		return ""
	}
	return fmt.Sprintf("; it said %q", s)
}
