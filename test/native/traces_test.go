package native

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// traces counts what an engine can leave behind on a host.
type traces struct {
	mounts, cgroups, links, netns, processes, tables int
	fds, goroutines                                  int
}

func count(t *testing.T, script string, args ...string) int {
	t.Helper()
	out, err := exec.Command("bash", append([]string{"-c", script, "sh"}, args...)...).Output()
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(out)))
	return n
}

// take counts now. Only what belongs to the engine is counted where it can be told.
func (e *engine) take() traces {
	e.t.Helper()
	tr := traces{
		mounts:    count(e.t, `wc -l < /proc/self/mountinfo`),
		cgroups:   count(e.t, `find /sys/fs/cgroup -type d 2>/dev/null | wc -l`),
		links:     count(e.t, `ip -o link | wc -l`),
		netns:     count(e.t, `for p in /proc/[0-9]*; do readlink $p/ns/net; done 2>/dev/null | sort -u | wc -l`),
		processes: count(e.t, `pgrep -c servin-shim`),
		tables:    count(e.t, `nft list tables 2>/dev/null | wc -l`),
	}
	select {
	case <-e.exited:
	default:
		if d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.cmd.Process.Pid)); err == nil {
			tr.fds = len(d)
		}
	}
	return tr
}

// settle waits until teardown is done and the pool is full.
func (e *engine) settle() {
	e.t.Helper()
	e.must("system", "drained", "--full")
}

// TestNoTraces starts and removes containers in every usual way, sixteen at a
// time, and compares the host before and after.
func TestNoTraces(t *testing.T) {
	e := start(t)
	warm := func(n int) {
		sem := make(chan struct{}, 16)
		errs := make(chan string, n)
		for i := range n {
			sem <- struct{}{}
			go func() {
				defer func() { <-sem }()
				args := []string{"run", "--rm", "bb", "true"}
				switch i % 4 {
				case 1:
					args = []string{"run", "--rm", "--network", "none", "-v", "/data", "bb", "sh", "-c", "echo x > /data/x"}
				case 2:
					args = []string{"run", "--rm", "-m", "64m", "--pids-limit", "32", "bb", "true"}
				case 3:
					name := fmt.Sprint("c", i)
					if r := e.run("create", "--name", name, "bb", "sleep", "100"); r.code != 0 {
						errs <- r.String()
						return
					}
					if r := e.run("start", name); r.code != 0 {
						errs <- r.String()
						return
					}
					args = []string{"rm", "-f", name}
				}
				if r := e.run(args...); r.code != 0 {
					errs <- strings.Join(args, " ") + ": " + r.String()
				}
			}()
		}
		for range cap(sem) {
			sem <- struct{}{}
		}
		select {
		case err := <-errs:
			t.Fatal(err)
		default:
		}
	}
	warm(32)
	e.settle()
	time.Sleep(1200 * time.Millisecond)
	before := e.take()
	warm(pick(160, 1000))
	e.settle()
	time.Sleep(1200 * time.Millisecond)
	after := e.take()
	before.fds, after.fds = before.fds/8, after.fds/8 // idle connections come and go
	if before != after {
		t.Errorf("traces left:\nbefore %+v\nafter  %+v", before, after)
	}
}

// TestShutdownLeavesNothing ends an engine with running containers and looks
// for anything of it on the host.
func TestShutdownLeavesNothing(t *testing.T) {
	before := (&engine{t: t, exited: closed()}).take()
	e := start(t)
	e.must("networks", "create", "extra")
	e.must("run", "-d", "--name", "aa", "-p", "18099:80", "bb", "sleep", "1000")
	e.must("run", "-d", "--name", "bb1", "--network", "extra", "-v", "vol:/v", "bb", "sleep", "1000")
	e.must("system", "shutdown", "--force")
	select {
	case <-e.exited:
	case <-time.After(30 * time.Second):
		t.Fatal("the daemon did not end")
	}
	time.Sleep(1200 * time.Millisecond)
	after := e.take()
	after.fds = 0
	if before != after {
		t.Errorf("traces left:\nbefore %+v\nafter  %+v", before, after)
	}
	if m, _ := filepath.Glob(e.dir + "/run/*/*"); len(m) > 0 {
		t.Logf("left under the run root: %v", m)
	}
}

func closed() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}
