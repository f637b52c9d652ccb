package native

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// TestDaemonKilled kills the daemon while containers run and while others are
// being started: what ran goes on, output and exit codes are complete.
func TestDaemonKilled(t *testing.T) {
	e := start(t)
	const lines = 2000
	e.must("run", "-d", "--name", "writer", "bb", "sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); done; sleep 1; exit 9", lines))
	e.must("run", "-d", "--name", "steady", "-p", "18098:80", "bb", "sh", "-c", "sleep 1000")
	pid := e.must("inspect", "--format", "{{.State.Pid}}", "steady")
	for range pick(3, 20) {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { e.run("run", "--rm", "bb", "true") })
		}
		time.Sleep(20 * time.Millisecond)
		e.Kill()
		begin := time.Now()
		e.Boot()
		if got := e.must("inspect", "--format", "{{.State.Pid}} {{.State.Running}}", "steady"); got != pid+" true" {
			t.Fatalf("after a crash: %q, want pid %s", got, pid)
		}
		t.Logf("taken back after %s", time.Since(begin).Round(time.Millisecond))
		wg.Wait() // the command line waits for an engine that went away
	}
	harness.Eventually(t, "exit of the writer", 30*time.Second, func() bool {
		return e.must("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "writer") == "exited 9"
	})
	out := strings.Split(e.must("logs", "writer"), "\n")
	if len(out) != lines {
		t.Fatalf("%d lines in the log, want %d", len(out), lines)
	}
	for i, l := range out {
		if l != fmt.Sprint("line ", i) {
			t.Fatalf("line %d is %q", i, l)
		}
	}
	if r := e.run("exec", "steady", "echo", "alive"); r.out != "alive\n" {
		t.Errorf("exec after take-over: %s", r)
	}
	harness.Eventually(t, "leftovers of --rm containers gone", 10*time.Second, func() bool {
		return len(strings.Fields(e.must("ps", "-aq"))) == 2
	})
}

// TestExitWhileDown lets a container end while no daemon runs.
func TestExitWhileDown(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "cc", "bb", "sh", "-c", "sleep 1; echo last words; exit 42")
	e.Kill()
	time.Sleep(1500 * time.Millisecond)
	e.Boot()
	if got := e.must("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "cc"); got != "exited 42" {
		t.Errorf("state %q", got)
	}
	if got := e.must("logs", "cc"); got != "last words" {
		t.Errorf("log %q", got)
	}
	e.must("run", "-d", "--name", "always", "--restart", "always", "bb", "sleep", "1000")
	e.Kill()
	// Its monitor is killed too: the container dies with it and must be started again.
	e.Boot()
	harness.Eventually(t, "restarted or still up", 10*time.Second, func() bool {
		return e.must("inspect", "--format", "{{.State.Status}}", "always") == "running"
	})
}
