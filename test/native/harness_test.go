// Package native drives the shipped programs on this host: the daemon on
// folders of its own, the command line against its socket, real containers.
package native

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// long reports whether the long campaigns were asked for (make test-long).
var long = harness.Long()

// pick chooses a size: small for make test, large for make test-long.
func pick(small, large int) int {
	if long {
		return large
	}
	return small
}

// engine is one daemon on folders of its own.
type engine struct {
	*harness.Daemon
	t  *testing.T
	id string // instance, see traces
}

func TestMain(m *testing.M) { harness.Main(m) }

// start begins a daemon in a fresh folder and gives it a busybox image "bb".
func start(t *testing.T, args ...string) *engine {
	t.Helper()
	e := &engine{Daemon: harness.New(t, "sv"), t: t}
	e.Args = args
	t.Cleanup(e.Close)
	e.Boot()
	e.importBusybox()
	return e
}

type result struct {
	out, err string
	code     int
	took     time.Duration
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.code, r.out, r.err)
}

// run runs the command line.
func (e *engine) run(args ...string) result { return e.pipe(nil, args...) }

func (e *engine) pipe(stdin io.Reader, args ...string) result {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(e.Bin, "servin"), append([]string{"--host", "unix://" + e.Sock()}, args...)...)
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errb
	begin := time.Now()
	err := cmd.Run()
	r := result{out: out.String(), err: errb.String(), took: time.Since(begin)}
	var ee *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &ee):
		r.code = ee.ExitCode()
	default:
		e.t.Fatalf("servin %s: %v", strings.Join(args, " "), err)
	}
	return r
}

// must runs the command line and fails the test unless it succeeds; it returns
// the trimmed output.
func (e *engine) must(args ...string) string {
	e.t.Helper()
	r := e.run(args...)
	if r.code != 0 {
		e.t.Fatalf("servin %s: %s", strings.Join(args, " "), r)
	}
	return strings.TrimSpace(r.out)
}

// importBusybox makes the image "bb" of the host's static busybox.
func (e *engine) importBusybox() {
	e.t.Helper()
	r := e.pipe(harness.Busybox(e.t, "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh", "root:x:0:\nweb:x:1000:\nextra:x:2000:web", false), "import", "-", "bb")
	if r.code != 0 {
		e.t.Fatalf("cannot import busybox: %s", r)
	}
}

// refuse starts a daemon that is expected to end by itself and returns what it
// said.
func (e *engine) refuse(more ...string) string {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	args := append([]string{"--root", e.Dir + "/root", "--run-root", e.Dir + "/run", "--listen", "unix://" + e.Sock()}, append(more, e.Args...)...)
	out, err := exec.CommandContext(ctx, filepath.Join(e.Bin, "servind"), args...).CombinedOutput()
	if err == nil || ctx.Err() != nil {
		e.t.Errorf("the daemon did not refuse: %v", err)
	}
	return string(out)
}
