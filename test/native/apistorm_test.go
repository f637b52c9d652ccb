package native

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// apiStorm is eight clients that send random requests about a few objects, which
// they all share, to an engine that is killed meanwhile.
type apiStorm struct {
	e       *engine
	tarball []byte
	execs   sync.Map // ids that were made
	left    atomic.Int64
	gate    sync.RWMutex // held while the engine is down or looked at

	mu     sync.Mutex
	counts map[int]int // by status; 0 is a connection that broke
	slow   []string
}

// answer is what came of a request.
type answer struct {
	status int
	body   []byte
	err    error
}

// ids are those of containers.
var ids = regexp.MustCompile(`[0-9a-f]{64}`)

// requestLimit is what no request may take, however busy the machine is.
const requestLimit = 90 * time.Second

func (s *apiStorm) ask(method, path, body string) answer {
	cl := &http.Client{Timeout: requestLimit, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", s.e.Sock())
		}}}
	var rd io.Reader = strings.NewReader(body)
	if body == "TAR" {
		rd = bytes.NewReader(s.tarball)
	}
	req, err := http.NewRequest(method, "http://engine"+path, rd)
	if err != nil {
		return answer{err: err}
	}
	req.Header.Set("Content-Type", "application/json")
	begin := time.Now()
	resp, err := cl.Do(req)
	if err != nil {
		if time.Since(begin) >= requestLimit {
			s.mu.Lock()
			s.slow = append(s.slow, method+" "+path)
			s.mu.Unlock()
		}
		return answer{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, b, err}
}

func pickOf(r *rand.Rand, l ...string) string { return l[r.IntN(len(l))] }

// request makes one up.
func (s *apiStorm) request(r *rand.Rand) (method, path, body string) {
	c := fmt.Sprintf("c%d", r.IntN(12))
	n := fmt.Sprintf("n%d", r.IntN(3))
	v := fmt.Sprintf("v%d", r.IntN(4))
	i := fmt.Sprintf("made%d", r.IntN(3))
	ctr := "/containers/" + c
	exec := "none"
	s.execs.Range(func(k, _ any) bool { exec = k.(string); return r.IntN(4) > 0 })
	switch r.IntN(44) {
	case 0, 1, 2, 3:
		script := pickOf(r, "trap 'exit 0' TERM; while :; do sleep 0.2; done", "sleep 1", "exit 3", "echo x; touch /made; sleep 1000")
		host := pickOf(r, `{}`, `{"Memory":67108864}`, `{"NetworkMode":"none"}`, `{"AutoRemove":true}`, `{"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":2}}`,
			`{"Binds":["`+v+`:/v"]}`, `{"NetworkMode":"`+n+`"}`, `{"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1"}]}}`, `{"ReadonlyRootfs":true,"PidsLimit":50}`)
		health := pickOf(r, ``, ``, `,"Healthcheck":{"Test":["CMD","true"],"Interval":200000000}`)
		cmd, _ := json.Marshal([]string{"sh", "-c", script})
		return "POST", "/containers/create?name=" + c, fmt.Sprintf(`{"Image":%q,"Cmd":%s,"Volumes":%s,"Tty":%t%s,"HostConfig":%s}`,
			pickOf(r, "bb", "bb", "bb", i), cmd, pickOf(r, `{}`, `{"/anon":{}}`), r.IntN(4) == 0, health, host)
	case 4, 5, 6, 7:
		return "POST", ctr + "/start", ""
	case 8, 9:
		return "POST", ctr + "/stop?t=" + pickOf(r, "0", "1"), ""
	case 10:
		return "POST", ctr + "/kill?signal=" + pickOf(r, "KILL", "TERM", "HUP", "NOSUCH"), ""
	case 11:
		return "POST", ctr + "/restart?t=0", ""
	case 12:
		return "POST", ctr + "/pause", ""
	case 13, 14:
		return "POST", ctr + "/unpause", ""
	case 15:
		return "POST", ctr + "/rename?name=" + fmt.Sprintf("c%d", r.IntN(12)), ""
	case 16:
		return "POST", ctr + "/update", pickOf(r, `{"Memory":100663296,"MemorySwap":-1}`, `{"PidsLimit":100}`, `{"CpuShares":512}`, `{"RestartPolicy":{"Name":"no"}}`)
	case 17, 18:
		return "DELETE", ctr + "?v=1&force=" + pickOf(r, "0", "1", "1"), ""
	case 19:
		return "POST", ctr + "/exec", `{"Cmd":["sh","-c","` + pickOf(r, "true", "sleep 2", "exit 4") + `"],"AttachStdout":true}`
	case 20:
		return "POST", "/exec/" + exec + "/start", `{"Detach":` + pickOf(r, "true", "false") + `}`
	case 21:
		return "GET", "/exec/" + exec + "/json", ""
	case 22:
		return "GET", ctr + "/logs?stdout=1&stderr=1&tail=5", ""
	case 23:
		return "GET", ctr + "/stats?stream=0&one-shot=1", ""
	case 24:
		return "GET", ctr + "/top", ""
	case 25:
		return "GET", ctr + "/archive?path=" + pickOf(r, "/etc", "/none", "/bin/sh"), ""
	case 26:
		return "PUT", ctr + "/archive?path=" + pickOf(r, "/tmp", "/none", "/etc/passwd"), "TAR"
	case 27:
		return "GET", ctr + "/changes", ""
	case 28, 29:
		return "GET", ctr + "/json?size=" + pickOf(r, "0", "1"), ""
	case 30, 31:
		return "GET", "/containers/json?all=1&size=" + pickOf(r, "0", "1"), ""
	case 32:
		return "POST", "/commit?container=" + c + "&repo=" + i + "&pause=" + pickOf(r, "0", "1"), "{}"
	case 33:
		return "DELETE", "/images/" + i + "?force=" + pickOf(r, "0", "1"), ""
	case 34:
		return "GET", pickOf(r, "/images/json", "/images/"+i+"/json", "/images/"+i+"/history", "/system/df", "/info", "/version"), ""
	case 35:
		return "POST", "/images/bb/tag?repo=" + i, ""
	case 36:
		return "POST", "/networks/create", `{"Name":"` + n + `"}`
	case 37:
		return "DELETE", "/networks/" + n, ""
	case 38:
		return "POST", "/networks/" + n + "/" + pickOf(r, "connect", "disconnect"), `{"Container":"` + c + `","Force":` + pickOf(r, "false", "true") + `}`
	case 39:
		return pickOf(r, "GET", "DELETE"), "/volumes/" + v, ""
	case 40:
		return "POST", "/volumes/create", `{"Name":"` + v + `"}`
	case 41:
		f := url.QueryEscape(`{"until":["1h"]}`)
		return "POST", pickOf(r, "/containers/prune?filters="+f, "/images/prune?filters="+f, "/networks/prune?filters="+f), ""
	case 42:
		return "GET", fmt.Sprintf("/events?since=%d&until=%d", time.Now().Unix()-5, time.Now().Unix()), ""
	}
	return "POST", ctr + "/wait?condition=" + pickOf(r, "never", "not-running"), ""
}

// client sends requests until they are used up.
func (s *apiStorm) client(r *rand.Rand) {
	for s.left.Add(-1) >= 0 {
		s.gate.RLock()
		method, path, body := s.request(r)
		if strings.Contains(path, "/wait?condition=not-running") {
			// It would wait for as long as the container runs: it is ended.
			name := strings.TrimSuffix(path, "/wait?condition=not-running")
			s.note("POST", name+"/kill", s.ask("POST", name+"/kill", ""))
		}
		a := s.ask(method, path, body)
		s.gate.RUnlock()
		if strings.HasSuffix(path, "/exec") && a.status == http.StatusCreated {
			var made struct{ Id string }
			if json.Unmarshal(a.body, &made) == nil {
				s.execs.Store(made.Id, true)
			}
		}
		s.note(method, path, a)
		if a.err != nil {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// note complains of what no answer may be: a fault of the engine's own, or text
// that is no error.
func (s *apiStorm) note(method, path string, a answer) {
	s.mu.Lock()
	s.counts[a.status]++
	s.mu.Unlock()
	switch {
	case a.err != nil: // it was killed meanwhile, which the gate does not wait for
	case a.status >= 500 && a.status != http.StatusServiceUnavailable:
		s.e.t.Errorf("%s %s: %d %s", method, path, a.status, a.body)
	case a.status >= 400 && !strings.Contains(path, "/attach"):
		var e struct{ Message string }
		if json.Unmarshal(a.body, &e) != nil || e.Message == "" {
			s.e.t.Errorf("%s %s: %d without an error body: %q", method, path, a.status, a.body)
		}
	}
}

// seen is what inspect says of a container.
type seen struct {
	Id, Name string
	State    struct {
		Status          string
		Running, Paused bool
		Pid             int
	}
	HostConfig struct {
		Memory      int64
		NetworkMode string
	}
	NetworkSettings struct {
		Networks map[string]struct{ IPAddress string }
	}
	ExecIDs []string
}

// agree compares inspect with the kernel while nobody asks for anything.
// Containers end by themselves, so what differs is looked at again.
func (s *apiStorm) agree(when string) {
	s.e.t.Helper()
	var wrong []string
	for range 100 {
		if wrong = s.disagreements(); len(wrong) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.e.t.Errorf("%s, inspect and the kernel disagree:\n%s", when, strings.Join(wrong, "\n"))
}

func (s *apiStorm) disagreements() (wrong []string) {
	var list []struct{ Id, State string }
	if a := s.ask("GET", "/containers/json?all=1", ""); a.status != 200 || json.Unmarshal(a.body, &list) != nil {
		return []string{fmt.Sprintf("list: %d %s %v", a.status, a.body, a.err)}
	}
	groups := cgroupsOf()
	for _, l := range list {
		a := s.ask("GET", "/containers/"+l.Id+"/json", "")
		if a.status == http.StatusNotFound {
			continue // a --rm container that ended meanwhile
		}
		var c seen
		if err := json.Unmarshal(a.body, &c); err != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %d %s", l.Id, a.status, a.body))
			continue
		}
		bad := func(format string, args ...any) {
			wrong = append(wrong, fmt.Sprintf("%s (%.12s, %s): ", c.Name, c.Id, c.State.Status)+fmt.Sprintf(format, args...))
		}
		if l.State != c.State.Status {
			bad("listed as %s", l.State)
		}
		pids := groups[c.Id]
		if !c.State.Running || c.State.Status == "restarting" {
			if len(pids) > 0 && c.State.Status != "restarting" {
				bad("has processes %v", pids)
			}
			if c.State.Pid != 0 && c.State.Status != "restarting" {
				bad("has pid %d", c.State.Pid)
			}
			continue
		}
		if !slices.Contains(pids, c.State.Pid) {
			bad("its pid %d is not among its processes %v", c.State.Pid, pids)
			continue
		}
		if b, err := os.ReadFile("/sys/fs/cgroup/freezer" + groupPath(c.State.Pid, "freezer") + "/freezer.state"); err == nil {
			if frozen := strings.TrimSpace(string(b)) == "FROZEN"; frozen != c.State.Paused {
				bad("paused is %t, the freezer says %s", c.State.Paused, b)
			}
		}
		if b, err := os.ReadFile("/sys/fs/cgroup/memory" + groupPath(c.State.Pid, "memory") + "/memory.limit_in_bytes"); err == nil && c.HostConfig.Memory > 0 {
			if got := strings.TrimSpace(string(b)); got != strconv.FormatInt(c.HostConfig.Memory, 10) {
				bad("memory is %d, the kernel says %s", c.HostConfig.Memory, got)
			}
		}
		if m := c.HostConfig.NetworkMode; m != "host" && m != "none" {
			dev, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", c.State.Pid))
			if links := strings.Count(string(dev), "eth"); links != len(c.NetworkSettings.Networks) {
				bad("is on %d networks and has %d links", len(c.NetworkSettings.Networks), links)
			}
			trie, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/fib_trie", c.State.Pid))
			for n, ep := range c.NetworkSettings.Networks {
				if ep.IPAddress == "" || !strings.Contains(string(trie), ep.IPAddress+"\n") {
					bad("has not the address %q of network %s", ep.IPAddress, n)
				}
			}
		}
		for _, x := range c.ExecIDs {
			var st struct {
				Running bool
				Pid     int
			}
			if a := s.ask("GET", "/exec/"+x+"/json", ""); json.Unmarshal(a.body, &st) == nil && st.Running && !slices.Contains(pids, st.Pid) {
				bad("its exec runs as %d, which is not among its processes %v", st.Pid, pids)
			}
		}
	}
	return wrong
}

// cgroupsOf lists processes by the container's id in their cgroups' names.
func cgroupsOf() map[string][]int {
	m := map[string][]int{}
	for _, p := range glob("/proc/[0-9]*") {
		b, err := os.ReadFile(p + "/cgroup")
		if err != nil {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(p))
		for _, id := range ids.FindAllString(string(b), -1) {
			if !slices.Contains(m[id], pid) {
				m[id] = append(m[id], pid)
			}
		}
	}
	return m
}

// groupPath is a process's cgroup of a controller.
func groupPath(pid int, controller string) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 && f[1] == controller {
			return f[2]
		}
	}
	return "/none"
}

// TestAPIStorm: random requests by eight clients and a daemon killed in between
// meet no fault of the engine's own, no hang, no leak, and no state on which
// inspect and the kernel disagree.
func TestAPIStorm(t *testing.T) {
	e := start(t)
	var tb bytes.Buffer
	tw := tar.NewWriter(&tb)
	_ = tw.WriteHeader(&tar.Header{Name: "f", Mode: 0o644, Size: 4})
	_, _ = tw.Write([]byte("text"))
	tw.Close()
	s := &apiStorm{e: e, tarball: tb.Bytes(), counts: map[int]int{}}
	// What is kept after the first use of a thing is no leak.
	e.must("run", "--rm", "-v", "v0:/v", "bb", "true")
	e.must("run", "--rm", "--network", "none", "bb", "true")
	e.must("network", "create", "n0")
	e.must("run", "--rm", "--network", "n0", "-p", "127.0.0.1::80", "bb", "true")
	e.must("run", "--name", "c0", "bb", "true")
	e.must("commit", "c0", "made0")
	s.clear()
	before, files := e.take(), e.files()

	calls, kills := pick(500, 10_000), pick(2, 25)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	s.left.Store(int64(calls))
	var wg sync.WaitGroup
	for n := range uint64(8) {
		wg.Go(func() { s.client(rand.New(rand.NewPCG(seed, n))) })
	}
	for k := range kills {
		for limit := time.Now().Add(10 * time.Minute); s.left.Load() > int64(calls-(k+1)*calls/(kills+1)) && time.Now().Before(limit); {
			time.Sleep(5 * time.Millisecond)
		}
		e.Kill() // whatever is under way
		s.gate.Lock()
		e.Boot()
		s.agree(fmt.Sprintf("after kill %d", k+1))
		s.gate.Unlock()
	}
	wg.Wait()
	s.agree("at the end")
	t.Logf("answers by status: %v", s.counts)
	if len(s.slow) > 0 {
		t.Errorf("these took longer than %s: %q", requestLimit, s.slow)
	}
	if s.counts[200]+s.counts[201]+s.counts[204] < calls/5 {
		t.Errorf("too little succeeded: %v", s.counts)
	}
	s.clear()
	var after traces
	var changed []string
	for limit := time.Now().Add(time.Duration(pick(20, 200)) * time.Second); time.Now().Before(limit); time.Sleep(200 * time.Millisecond) {
		after, changed = e.take(), differ(files, e.files())
		// How many sandboxes are parked depends on what was asked for lately.
		// A layer that a container was to be made of is kept for two minutes.
		changed = slices.DeleteFunc(changed, func(s string) bool {
			return strings.HasPrefix(s, "run/shim/") || !long && strings.HasPrefix(s, "root/images/layers/snapshots/")
		})
		if after.mounts <= before.mounts && after.cgroups <= before.cgroups && after.links <= before.links && after.processes <= before.processes &&
			after.rules <= before.rules && after.fds <= before.fds+4 && len(changed) == 0 {
			return
		}
	}
	t.Logf("images: %s", s.ask("GET", "/images/json?all=1", "").body)
	t.Errorf("left behind: %+v, before %+v\n%s", after, before, strings.Join(changed, "\n"))
}

// clear removes everything but the image and waits for what is torn down behind.
func (s *apiStorm) clear() {
	s.e.t.Helper()
	var list []struct{ Id, Name string }
	get := func(path string) []struct{ Id, Name string } {
		list = nil
		if a := s.ask("GET", path, ""); a.status != 200 || json.Unmarshal(a.body, &list) != nil {
			s.e.t.Errorf("%s: %d %s %v", path, a.status, a.body, a.err)
		}
		return list
	}
	for _, c := range get("/containers/json?all=1") {
		if a := s.ask("DELETE", "/containers/"+c.Id+"?force=1&v=1", ""); a.status != 204 && a.status != 404 {
			s.e.t.Errorf("cannot remove %s: %d %s %v", c.Id, a.status, a.body, a.err)
		}
	}
	for _, n := range get("/networks") {
		if !slices.Contains([]string{"bridge", "host", "none"}, n.Name) {
			if a := s.ask("DELETE", "/networks/"+n.Id, ""); a.status != 204 {
				s.e.t.Errorf("cannot remove network %s: %d %s %v", n.Name, a.status, a.body, a.err)
			}
		}
	}
	if a := s.ask("POST", "/volumes/prune?filters="+url.QueryEscape(`{"all":["true"]}`), ""); a.status != 200 {
		s.e.t.Errorf("cannot prune volumes: %d %s %v", a.status, a.body, a.err)
	}
	for i := range 3 {
		s.ask("DELETE", fmt.Sprintf("/images/made%d?force=1", i), "")
	}
	if a := s.ask("POST", "/images/prune", ""); a.status != 200 {
		s.e.t.Errorf("cannot prune images: %d %s %v", a.status, a.body, a.err)
	}
	if a := s.ask("GET", "/servin/drained?full=1", ""); a.status != 204 {
		s.e.t.Errorf("the engine does not settle: %d %s %v", a.status, a.body, a.err)
	}
}
