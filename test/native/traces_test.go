package native

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// traces counts what an engine has on a host: what names its folder, or the
// instance id that its links, tables and cgroups carry.
type traces struct {
	mounts, cgroups, links, processes, namespaces, tables, rules, fds int
}

// lines counts the lines of a command's output that hold one of the texts.
func lines(t *testing.T, texts []string, argv ...string) (n int) {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).Output()
	if err != nil && len(out) == 0 {
		return 0
	}
	for line := range strings.Lines(string(out)) {
		for _, text := range texts {
			if text != "" && strings.Contains(line, text) {
				n++
				break
			}
		}
	}
	return n
}

// instance learns the id that this engine's cgroups and tables carry, while
// the engine runs alone in its network namespace.
func (e *engine) instance() string {
	if e.id == "" {
		out, err := exec.Command("nft", "list", "tables").Output()
		m := regexp.MustCompile(`servin_([0-9a-f]{8})`).FindSubmatch(out)
		if err != nil || m == nil {
			e.t.Fatalf("cannot learn the instance id: %v, tables %q", err, out)
		}
		e.id = string(m[1])
	}
	return e.id
}

// take counts now.
func (e *engine) take() traces {
	e.t.Helper()
	id := []string{e.instance()}
	tr := traces{
		mounts:  lines(e.t, []string{e.Dir, id[0]}, "cat", "/proc/self/mountinfo"),
		cgroups: lines(e.t, id, "find", "/sys/fs/cgroup", "-mindepth", "3", "-type", "d"),
		// The suite runs in a network namespace of its own: every link but lo is the engine's.
		links:  lines(e.t, []string{"ether"}, "ip", "-o", "link"),
		tables: lines(e.t, id, "nft", "list", "tables"),
	}
	tr.rules = lines(e.t, []string{"accept", "drop", "jump", "dnat", "masquerade", "elements", "@"}, "nft", "list", "table", "ip", "servin_"+id[0])
	spaces := map[string]bool{}
	for _, p := range e.processes() {
		tr.processes++
		for _, ns := range glob(fmt.Sprintf("/proc/%d/ns/*", p)) {
			if to, err := os.Readlink(ns); err == nil {
				spaces[to] = true
			}
		}
	}
	tr.namespaces = len(spaces)
	select {
	case <-e.Exited:
	default:
		tr.fds = len(glob(fmt.Sprintf("/proc/%d/fd/*", e.Cmd.Process.Pid)))
	}
	return tr
}

// processes are those of the engine: they have its folder open or as their
// working directory, or are in one of its cgroups.
func (e *engine) processes() (pids []int) {
	e.t.Helper()
	id := e.instance()
	for _, p := range glob("/proc/[0-9]*") {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil {
			continue
		}
		if cg, err := os.ReadFile(p + "/cgroup"); err == nil && strings.Contains(string(cg), id) {
			pids = append(pids, pid)
			continue
		}
		for _, l := range append(glob(p+"/fd/*"), p+"/cwd") {
			if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, e.Dir+"/") {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// numbers and ids in paths, which differ from time to time.
var varying = regexp.MustCompile(`[0-9a-f]{32,64}|[0-9a-f]{8}-[0-9a-f-]{27}|\b[0-9]+\b`)

// files counts the paths under the engine's folders, with what varies replaced.
// What is kept ready for the next start is not counted.
func (e *engine) files() map[string]int {
	m := map[string]int{}
	for _, top := range []string{"root", "run"} {
		_ = filepath.WalkDir(filepath.Join(e.Dir, top), func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			rel := strings.TrimPrefix(path, e.Dir+"/")
			if rel == "root/layers/spare" || strings.HasPrefix(rel, "root/images/layers/snapshots/") && d.IsDir() && strings.HasSuffix(rel, "/fs") {
				m[rel]++
				return filepath.SkipDir
			}
			m[varying.ReplaceAllString(rel, "N")]++
			return nil
		})
	}
	return m
}

// differ lists the paths whose number differs.
func differ(before, after map[string]int) (d []string) {
	for p, n := range after {
		if n != before[p] {
			d = append(d, fmt.Sprintf("%s: %d, was %d", p, n, before[p]))
		}
	}
	for p, n := range before {
		if after[p] == 0 {
			d = append(d, fmt.Sprintf("%s: 0, was %d", p, n))
		}
	}
	slices.Sort(d)
	return d
}

func glob(pattern string) []string {
	m, _ := filepath.Glob(pattern)
	return m
}

// settle waits until teardown is done and the pool is full.
func (e *engine) settle() {
	e.t.Helper()
	e.must("system", "drained", "--full")
}

// memory is what a daemon says of itself on its debug socket after a full
// collection, and the kernel of it.
type memory struct {
	Goroutines             int
	HeapBytes, HeapObjects int64
	pss                    int64 // bytes
}

func (e *engine) memory(socket string) (m memory) {
	e.t.Helper()
	c := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
	resp, err := c.Get("http://daemon/debug/memory")
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil {
		e.t.Fatal(err)
	}
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", e.Cmd.Process.Pid))
	if err != nil {
		e.t.Fatal(err)
	}
	for line := range strings.Lines(string(rollup)) {
		var kb int64
		if _, err := fmt.Sscanf(line, "Pss: %d kB", &kb); err == nil {
			m.pss = kb << 10
		}
	}
	return m
}

// TestNoTraces starts and removes containers in every usual way, sixteen at a
// time, and compares the host and the daemon before and after.
func TestNoTraces(t *testing.T) {
	debug := filepath.Join(t.TempDir(), "debug.sock")
	e := start(t, "--debug", "unix://"+debug)
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
	n := pick(160, 1000)
	warm(n)
	e.settle()
	time.Sleep(1200 * time.Millisecond)
	before, files, was := e.take(), e.files(), e.memory(debug)
	warm(n) // the same once more
	e.settle()
	time.Sleep(1200 * time.Millisecond)
	after, is := e.take(), e.memory(debug)
	before.fds, after.fds = before.fds/8, after.fds/8 // idle connections come and go
	if before != after {
		t.Errorf("traces left:\nbefore %+v\nafter  %+v", before, after)
	}
	for _, d := range differ(files, e.files()) {
		t.Errorf("files: %s", d)
	}
	t.Logf("after %d containers %+v, after %d more %+v", n, was, n, is)
	if is.Goroutines > was.Goroutines+8 {
		t.Errorf("%d goroutines, were %d", is.Goroutines, was.Goroutines)
	}
	// Less than half a kilobyte for each container would be a leak that a daemon
	// could live with; tables that doubled once are not one.
	if d := is.HeapBytes - was.HeapBytes; d > 256<<10+int64(n)*512 {
		t.Errorf("the heap grew by %d bytes in %d containers", d, n)
	}
	if d := is.pss - was.pss; d > 6<<20 {
		t.Errorf("the daemon grew by %d bytes in %d containers", d, n)
	}
}

// TestShutdownLeavesNothing ends an engine with running containers and looks
// for anything of it on the host.
func TestShutdownLeavesNothing(t *testing.T) {
	e := start(t)
	e.must("networks", "create", "extra")
	e.must("run", "-d", "--name", "aa", "-p", "18099:80", "bb", "sleep", "1000")
	e.must("run", "-d", "--name", "bb1", "--network", "extra", "-v", "vol:/v", "bb", "sleep", "1000")
	if tr := e.take(); tr.links == 0 || tr.tables == 0 || tr.cgroups == 0 || tr.processes == 0 {
		t.Fatalf("what a running engine has is not seen, so this test could not fail: %+v", tr)
	}
	e.must("system", "shutdown", "--force")
	select {
	case <-e.Exited:
	case <-time.After(30 * time.Second):
		t.Fatal("the daemon did not end")
	}
	time.Sleep(1200 * time.Millisecond)
	if tr := e.take(); tr != (traces{}) {
		links, _ := exec.Command("ip", "-d", "-o", "link").CombinedOutput()
		t.Errorf("traces left: %+v; links:\n%s", tr, links)
	}
}
