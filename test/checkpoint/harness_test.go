// Package checkpoint drives checkpoints, restores and moves between two engines:
// without processes on this host's kernel, and with CRIU on one that it knows, in a
// virtual machine.
package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// engine is one daemon on folders of its own.
type engine struct {
	*harness.Daemon
	t *testing.T
}

// start begins a daemon.
func start(t *testing.T, config string, env ...string) *engine {
	t.Helper()
	e := &engine{Daemon: harness.New(t, "cp"), t: t}
	e.Config, e.Env = config, env
	t.Cleanup(e.Close)
	e.Boot()
	return e
}

// try runs the command line; both outputs come together.
func (e *engine) try(args ...string) (string, int) { return e.pipe(nil, args...) }

func (e *engine) pipe(in io.Reader, args ...string) (string, int) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, e.Bin+"/servin", append([]string{"--host", e.Host()}, args...)...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &out
	err := cmd.Run()
	var ee *exec.ExitError
	switch {
	case err == nil:
		return strings.TrimSpace(out.String()), 0
	case errors.As(err, &ee):
		return strings.TrimSpace(out.String()), ee.ExitCode()
	}
	return err.Error(), -1
}

func (e *engine) ok(args ...string) string {
	e.t.Helper()
	out, code := e.try(args...)
	if code != 0 {
		e.t.Fatalf("servin %s: exit %d: %s", strings.Join(args, " "), code, out)
	}
	return out
}

// fails runs what must fail with a text.
func (e *engine) fails(want string, args ...string) {
	e.t.Helper()
	out, code := e.try(args...)
	if code == 0 || !strings.Contains(out, want) {
		e.t.Errorf("servin %s: exit %d: %q, want %q", strings.Join(args, " "), code, out, want)
	}
}

func (e *engine) eventually(what string, ok func() bool) {
	e.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			e.t.Fatalf("%s: not within a minute\n%s", what, e.Log())
		}
	}
}

// status is a container's, "" where there is none.
func (e *engine) status(name string) string {
	out, code := e.try("inspect", "--format", "{{.State.Status}}", name)
	if code != 0 {
		return ""
	}
	return out
}

// count reads the number that a counting container keeps in a file.
func (e *engine) count(name string) int {
	out, code := e.try("exec", name, "cat", "/n")
	if code != 0 {
		return -1
	}
	n, _ := strconv.Atoi(strings.TrimSpace(out))
	return n
}

// image makes the image "bb" of the host's static busybox.
func (e *engine) image() {
	e.t.Helper()
	if out, code := e.pipe(harness.Busybox(e.t, "root:x:0:0:root:/root:/bin/sh", "root:x:0:", false), "import", "-", "bb"); code != 0 {
		e.t.Fatalf("cannot import busybox: %s", out)
	}
}

// counter counts in a file and in memory.
const counter = `i=0; while :; do i=$((i+1)); echo $i > /n.new; mv /n.new /n; sleep 0.05; done`
