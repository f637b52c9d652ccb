package build

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// count is how many builds the campaign does.
func count() int {
	if long {
		return 200
	}
	return 10
}

// state is what must not grow.
type state struct {
	fds, threads, memory int
	layers, content      int64
	snapshots            int
}

func (e *engine) state(pid int) state {
	e.t.Helper()
	var s state
	if ents, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err == nil {
		s.fds = len(ents)
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) < 2:
		case f[0] == "Threads:":
			s.threads, _ = strconv.Atoi(f[1])
		case f[0] == "RssAnon:":
			s.memory, _ = strconv.Atoi(f[1])
		}
	}
	s.layers = size(e.t, filepath.Join(e.Dir, "root/images/layers/snapshots"))
	s.content = size(e.t, filepath.Join(e.Dir, "root/images/content"))
	ents, _ := os.ReadDir(filepath.Join(e.Dir, "root/images/layers/snapshots"))
	s.snapshots = len(ents)
	return s
}

// TestManyBuilds builds many different images, removes them, and looks for what
// grew: descriptors, threads, memory, layers, blobs, networks, cgroups.
func TestManyBuilds(t *testing.T) {
	e := start(t, "build:\n  cache: 30m\n  idle: 500ms\n")
	one := func(i int) {
		ctx := e.context(map[string]string{"Dockerfile": fmt.Sprintf("FROM bb AS a\nRUN echo %d > /n && head -c 262144 /dev/urandom > /r\nFROM bb\nCOPY --from=a /r /r\nRUN true\n", i)})
		if i%3 == 0 {
			if r := e.classic("-q", "-t", "grow", ctx); r.code != 0 {
				t.Fatal(r)
			}
		} else {
			e.must("build", "-q", "-t", "grow", ctx)
		}
		if i%10 == 7 { // and some fail
			e.servin("build", e.context(map[string]string{"Dockerfile": fmt.Sprintf("FROM bb\nRUN echo %d && false\n", i)}))
		}
		e.must("images", "prune", "--force")
		_ = os.RemoveAll(ctx)
	}
	settle := func() {
		harness.Eventually(t, "the builder leaves", 60*time.Second, func() bool { return e.builder() == 0 })
		e.must("builder", "prune", "--all", "--force")
		harness.Eventually(t, "the builder leaves", 60*time.Second, func() bool { return e.builder() == 0 })
		e.must("system", "prune", "--force")
	}
	for i := range 5 {
		one(-1 - i)
	}
	settle()
	pid := e.Cmd.Process.Pid
	before := e.state(pid)
	for i := range count() {
		one(i)
	}
	settle()
	var after state
	defer func() { t.Logf("before %+v\nafter  %+v", before, after) }()
	harness.Eventually(t, "what the builds left goes", 180*time.Second, func() bool {
		after = e.state(pid)
		return after.snapshots <= before.snapshots+2 && after.layers <= before.layers+2*mib && after.content <= before.content+4*mib
	})
	if after.fds > before.fds+8 || after.threads > before.threads+16 || after.memory > before.memory+16<<10 {
		t.Errorf("the engine grew: %+v, then %+v", before, after)
	}
	if got := e.must("networks", "inspect", "bridge"); strings.Contains(got, "build-") {
		t.Errorf("networks of steps are left: %s", got)
	}
	if g := e.groups(); len(g) > 0 {
		t.Errorf("cgroups are left: %v", g)
	}
}

// TestSideBySide builds many at a time.
func TestSideBySide(t *testing.T) {
	e := start(t, "")
	n := 4
	if long {
		n = 16
	}
	results := make(chan string, n)
	for i := range n {
		ctx := e.context(map[string]string{"Dockerfile": fmt.Sprintf("FROM bb\nRUN echo shared > /s\nRUN --mount=type=cache,target=/c echo %d >> /c/f; echo %d > /n\nCMD cat /n\n", i, i)})
		go func() {
			r := e.servin("build", "-t", fmt.Sprint("side", i), ctx)
			if r.code != 0 {
				results <- r.String()
				return
			}
			if r := e.servin("run", "--rm", fmt.Sprint("side", i)); strings.TrimSpace(r.out) != fmt.Sprint(i) {
				results <- r.String()
				return
			}
			results <- ""
		}()
	}
	for range n {
		if r := <-results; r != "" {
			t.Error(r)
		}
	}
}
