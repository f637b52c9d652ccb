package native

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// parent reads a process's parent, 0 if it is gone.
func parent(pid string) (ppid int) {
	status, _ := os.ReadFile("/proc/" + pid + "/status")
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "PPid: %d", &ppid); err == nil {
			break
		}
	}
	return ppid
}

// TestMonitorStorm kills monitors and stage processes (parked, starting, at
// work for an exec) and processes that unpack layers, at random, under load.
// Requests may fail for it, but the daemon serves on, no container is held for
// running that is not, one that was spared runs on, and nothing is left.
func TestMonitorStorm(t *testing.T) {
	e := start(t, "--pool", "4")
	h := startRegistry(t)
	s := &storm{e: e}
	for _, l := range []*ledger{&s.containers, &s.volumes, &s.networks} {
		l.there = map[string]bool{}
	}
	s.ref, _ = h.push(t, "s:1", 8<<20, 3)
	e.must("run", "-d", "--name", "steady", "-p", "18097:80", "bb", "sleep", "100000")
	e.must("run", "--rm", "--network", "none", "bb", "true")
	e.must("pull", s.ref)
	e.must("rmi", s.ref)
	pid := e.must("inspect", "--format", "{{.State.Pid}}", "steady")
	spared := parent(pid)
	e.settle()
	time.Sleep(1200 * time.Millisecond)
	before, filesBefore := e.take(), e.files()

	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() { s.work(w) })
	}
	killed := map[string]int{}
	for deadline := time.Now().Add(time.Duration(pick(8, 120)) * time.Second); time.Now().Before(deadline); {
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
		var victims []int
		kinds := map[int]string{}
		for _, p := range e.processes() {
			comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p))
			args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
			switch {
			case p == spared || p == e.Cmd.Process.Pid || fmt.Sprint(p) == pid:
			case strings.HasPrefix(string(comm), "servin-shim"):
				kind := "monitor"
				if parent(fmt.Sprint(p)) != e.Cmd.Process.Pid {
					kind = "stage"
				}
				victims, kinds[p] = append(victims, p), kind
			case strings.Contains(string(args), "unpack"):
				for range 4 { // rarer, so more likely
					victims = append(victims, p)
				}
				kinds[p] = "unpacker"
			}
		}
		if len(victims) == 0 {
			continue
		}
		v := victims[rand.IntN(len(victims))]
		if syscall.Kill(v, syscall.SIGKILL) == nil {
			killed[kinds[v]]++
		}
	}
	s.stop.Store(true)
	wg.Wait()
	t.Logf("%d requests, %d of them failed; killed %v", s.done.Load(), s.failed.Load(), killed)
	if s.refused.Load() > 0 {
		t.Errorf("the daemon was away for %d requests:\n%s", s.refused.Load(), e.Log())
	}
	if s.done.Load()-s.failed.Load() < 40 {
		t.Error("too few requests succeeded for this test to say anything")
	}
	if got := e.must("inspect", "--format", "{{.State.Pid}} {{.State.Running}}", "steady"); got != pid+" true" {
		t.Errorf("the spared container: %q, want pid %s", got, pid)
	}
	harness.Eventually(t, "only what runs is said to run", 10*time.Second, func() bool {
		for id := range strings.FieldsSeq(e.must("ps", "-q")) {
			r := e.run("inspect", "--format", "{{.State.Pid}}", id)
			if _, err := os.Stat("/proc/" + strings.TrimSpace(r.out)); r.code == 0 && err != nil {
				return false
			}
		}
		return true
	})
	s.containers.check(t, "container", e.must("ps", "-a", "--format", "{{.Names}}"))
	s.volumes.check(t, "volume", e.must("volumes", "ls", "-q"))
	e.must("pull", "-q", s.ref)
	s.clear("steady")
	e.compare(before, filesBefore)
}

// compare waits until the host and the engine's folders are as they were.
func (e *engine) compare(before traces, files map[string]int) {
	e.t.Helper()
	e.must("run", "--rm", "--network", "none", "bb", "true") // sandboxes of this kind are kept ready again
	var after traces
	var diff []string
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		e.settle()
		after, diff = e.take(), differ(files, e.files())
		before.fds, after.fds = 0, 0
		if before == after && len(diff) == 0 {
			return
		}
		if time.Now().After(deadline) {
			break
		}
	}
	if before != after {
		e.t.Errorf("traces left:\nbefore %+v\nafter  %+v", before, after)
	}
	for _, d := range diff {
		e.t.Errorf("files: %s", d)
	}
}
