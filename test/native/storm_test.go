package native

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// ledger is what the engine has acknowledged: a name is there, or it is gone.
// Names whose last request got no clear answer are not in it.
type ledger struct {
	mu    sync.Mutex
	there map[string]bool
}

func (l *ledger) set(name string, r result, there bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.code == 0 {
		l.there[name] = there
	} else {
		delete(l.there, name)
	}
}

func (l *ledger) forget(name string) {
	l.mu.Lock()
	delete(l.there, name)
	l.mu.Unlock()
}

// check compares with the names that the engine lists.
func (l *ledger) check(t *testing.T, what, listed string) {
	t.Helper()
	have := map[string]bool{}
	for _, n := range strings.Fields(listed) {
		have[n] = true
	}
	for name, there := range l.there {
		if there && !have[name] {
			t.Errorf("%s %s was acknowledged and is lost", what, name)
		}
		if !there && have[name] {
			t.Errorf("%s %s was removed and is back", what, name)
		}
	}
}

// storm is work of every kind, sixteen at a time, on an engine that is killed
// again and again.
type storm struct {
	e                             *engine
	ref                           string
	containers, volumes, networks ledger
	stop                          atomic.Bool
	done, failed, refused         atomic.Int64
}

func (s *storm) ask(args ...string) result {
	r := s.e.run(args...)
	if strings.Contains(r.err, "cannot reach the engine") {
		s.refused.Add(1)
		time.Sleep(100 * time.Millisecond) // it is down: leave it the processor to come back
		return r
	}
	s.done.Add(1)
	if r.code != 0 {
		s.failed.Add(1)
	}
	if strings.Contains(r.err, "panic") || strings.Contains(r.err, "goroutine ") {
		s.e.t.Errorf("servin %s: %s", strings.Join(args, " "), r)
	}
	return r
}

// work does one thing after another; names are its own.
func (s *storm) work(worker int) {
	rnd := rand.New(rand.NewPCG(uint64(worker), 7))
	var mine []string
	for i := 0; !s.stop.Load(); i++ {
		name := fmt.Sprintf("s%dx%d", worker, i)
		if mine = append(mine, name); len(mine) > 12 { // address pools and the machine have an end
			for _, n := range mine {
				s.sweep(n)
			}
			mine = nil
		}
		switch rnd.IntN(8) {
		case 0:
			s.ask("run", "-d", "--rm", "bb", "true")
		case 1:
			s.containers.set(name, s.ask("create", "--name", name, "bb", "sleep", "1000"), true)
			s.ask("start", name)
			s.ask("exec", name, "true")
			if rnd.IntN(2) == 0 {
				s.containers.forget(name)
				s.containers.set(name, s.ask("rm", "-f", name), false)
			}
		case 2:
			s.containers.set(name, s.ask("run", "-d", "--name", name, "-v", "/anon", "-v", name+":/named", "-m", "64m", "bb", "sleep", "1000"), true)
			s.containers.forget(name)
			s.containers.set(name, s.ask("rm", "-f", "-v", name), false)
			s.volumes.forget(name)
		case 3:
			s.volumes.set(name, s.ask("volumes", "create", name), true)
			if rnd.IntN(2) == 0 {
				s.volumes.forget(name)
				s.volumes.set(name, s.ask("volumes", "rm", name), false)
			}
		case 4:
			s.networks.set(name, s.ask("networks", "create", name), true)
			s.ask("run", "-d", "--rm", "--network", name, "bb", "sleep", "0.1")
			if rnd.IntN(3) > 0 {
				s.networks.forget(name)
				s.networks.set(name, s.ask("networks", "rm", name), false)
			}
		case 5:
			s.ask("pull", "-q", s.ref)
			if rnd.IntN(2) == 0 {
				s.ask("rmi", s.ref)
			}
		case 6:
			s.ask("exec", "steady", "sh", "-c", "echo x; exit 3")
		case 7:
			s.ask("run", "-d", "--rm", "-p", "80", "bb", "sleep", "0.2")
		}
	}
}

// sweep removes what may be left under a worker's name, until it is gone.
func (s *storm) sweep(name string) {
	for _, x := range []struct {
		l    *ledger
		args []string
	}{
		{&s.containers, []string{"rm", "-f", "-v", name}}, {&s.networks, []string{"networks", "rm", name}}, {&s.volumes, []string{"volumes", "rm", name}},
	} {
		x.l.mu.Lock()
		there, known := x.l.there[name]
		x.l.mu.Unlock()
		if known && !there {
			continue
		}
		x.l.forget(name)
		if r := s.e.run(x.args...); r.code == 0 {
			x.l.set(name, r, false)
		}
	}
}

// clear removes everything that a storm left but what is named.
func (s *storm) clear(keep string) {
	t := s.e.t
	t.Helper()
	harness.Eventually(t, "containers removed", 60*time.Second, func() bool {
		args := []string{"rm", "-f", "-v"}
		for l := range strings.Lines(s.e.must("ps", "-a", "--format", "{{.ID}} {{.Names}}")) {
			if id, name, _ := strings.Cut(strings.TrimSpace(l), " "); name != keep {
				args = append(args, id)
			}
		}
		return len(args) == 3 || s.e.run(args...).code == 0
	})
	for _, kind := range []string{"volumes", "networks"} {
		field := "{{.Name}}"
		for _, n := range strings.Fields(s.e.must(kind, "ls", "--format", field)) {
			if n != "bridge" && n != "host" && n != "none" {
				if r := s.e.run(kind, "rm", n); r.code != 0 {
					t.Errorf("cannot remove after a storm: %s %s: %s", kind, n, r)
				}
			}
		}
	}
	s.e.run("rmi", s.ref)
}

// TestStorm kills the daemon at random moments under load. What was
// acknowledged is there, what ran runs on, and once all is removed the host and
// the engine's folders are as before.
func TestStorm(t *testing.T) {
	e := start(t, "--pool", "4")
	h := startRegistry(t)
	s := &storm{e: e}
	for _, l := range []*ledger{&s.containers, &s.volumes, &s.networks} {
		l.there = map[string]bool{}
	}
	s.ref, _ = h.push(t, "s:1", 1<<20, 3)

	// One of each first, so that what is made once is there.
	e.must("run", "-d", "--name", "steady", "-p", "18097:80", "bb", "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done")
	e.must("run", "--rm", "--network", "none", "bb", "true")
	e.must("networks", "create", "nn")
	e.must("networks", "rm", "nn")
	e.must("pull", s.ref)
	e.must("rmi", s.ref)
	pid := e.must("inspect", "--format", "{{.State.Pid}}", "steady")
	e.settle()
	time.Sleep(1200 * time.Millisecond)
	before, filesBefore := e.take(), e.files()

	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() { s.work(w) })
	}
	var worst time.Duration
	var times []string
	for range pick(10, 80) {
		time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
		e.Kill()
		begin := time.Now()
		e.Boot()
		took := time.Since(begin)
		worst = max(worst, took)
		times = append(times, took.Round(time.Millisecond).String())
		if got := e.must("inspect", "--format", "{{.State.Pid}} {{.State.Running}}", "steady"); got != pid+" true" {
			t.Errorf("after a crash: %q, want pid %s", got, pid)
		}
	}
	s.stop.Store(true)
	wg.Wait()
	t.Logf("%d requests, %d of them failed, %d more met no daemon; back after %s", s.done.Load(), s.failed.Load(), s.refused.Load(), strings.Join(times, " "))
	if worst > 10*time.Second {
		t.Errorf("a restart took %s", worst)
	}
	if s.done.Load()-s.failed.Load() < 40 {
		t.Error("too few requests succeeded for this test to say anything")
	}
	for _, d := range glob(e.Dir + "/root/*.damaged*") {
		t.Errorf("state was torn: %s", d)
	}
	if log := e.Log(); strings.Contains(log, "set aside") || strings.Contains(log, "panic") {
		t.Errorf("the daemon's log:\n%s", log)
	}
	s.containers.check(t, "container", e.must("ps", "-a", "--format", "{{.Names}}"))
	s.volumes.check(t, "volume", e.must("volumes", "ls", "-q"))
	s.networks.check(t, "network", e.must("networks", "ls", "--format", "{{.Name}}"))

	// Every line that was written is there, in order.
	lines := strings.Split(e.must("logs", "steady"), "\n")
	for i, l := range lines {
		if l != fmt.Sprint(i) {
			t.Errorf("line %d of the log is %q", i, l)
			break
		}
	}
	s.clear("steady")
	e.compare(before, filesBefore)
}
