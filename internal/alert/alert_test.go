package alert

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestExpressions(t *testing.T) {
	v := &Values{
		Numbers: map[string]float64{"cpu": 85, "memory": 40, "memory_bytes": 600 << 20, "restarts": 3, "uptime": 400},
		Words:   map[string]string{"state": "running", "health": "unhealthy"},
	}
	for text, want := range map[string]bool{
		"cpu > 80": true, "cpu>80%": true, "cpu > 90": false, "cpu >= 85 and memory < 50%": true, "cpu < 1 or restarts == 3": true,
		"not (cpu > 80)": false, "!(cpu > 90) && state == running": true, "memory_bytes > 512MB": true, "memory_bytes > 1g": false,
		"health == 'unhealthy'": true, "health != healthy": true, `state = "running"`: true, "uptime > 5min": true, "uptime > 1h": false,
		"pids > 0": false, "not pids > 0": true, // what is missing is never true
		"cpu > 90 or cpu > 80 and memory > 90": false,
	} {
		e, err := ParseExpr(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
		} else if got := e.Eval(v); got != want {
			t.Errorf("%q is %t", text, got)
		}
	}
	for _, text := range []string{"", "cpu", "cpu >", "cpu 80", "cpu > high", "load > 1", "state > running", "(cpu > 1", "cpu > 1)", "cpu > 1 2", "cpu > 1 and", "state == 'x", "cpu > 1q",
		"cpu > 80 and disk_used > 90", strings.Repeat("(", 1000) + "cpu > 1", strings.Repeat("x", 5000)} {
		if _, err := ParseExpr(text); err == nil {
			t.Errorf("%.40q is read", text)
		}
	}
}

func FuzzParseExpr(f *testing.F) {
	f.Add("cpu > 80% and (state == running or health != 'healthy')")
	f.Fuzz(func(t *testing.T, s string) {
		if e, err := ParseExpr(s); err == nil {
			e.Eval(&Values{})
			if len(e.Names()) == 0 {
				t.Errorf("%q names nothing", s)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(doc))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = Parse(b) })
}

const doc = `version: 1
interval: 1s
rules:
  - {name: hot, when: cpu > 80, for: 30s, repeat: 1m, match: {name: "web*"}, actions: [ops]}
  - {name: oom, when: event == oom, actions: [ops]}
  - {name: full, when: disk_used > 90%, actions: [ops]}
  - {name: ended, when: "state == exited and exit_code != 0", match: {labels: {team: red}}}
actions:
  ops: {webhook: "http://127.0.0.1:1/x", headers: {Authorization: "Bearer x"}}
  page: {command: [/bin/true], user: nobody, timeout: 2s}
`

func TestDocuments(t *testing.T) {
	if _, err := Parse([]byte(doc)); err != nil {
		t.Fatal(err)
	}
	for change, want := range map[string]string{
		"version: 1=>version: 2":                            "reads version 1",
		"cpu > 80,=>cpu is high,":                           "no comparison",
		"actions: [ops]}=>actions: [none]}":                 `there is no action "none"`,
		"name: oom,=>name: hot,":                            "two rules hot",
		"user: nobody=>user: root":                          "must not run as root",
		"user: nobody=>user: no-such-user-x":                "cannot find the user",
		"[/bin/true]=>[true]":                               "absolute path",
		`webhook: "http:=>webhook: "file:`:                  "http or https",
		"timeout: 2s=>timeout: 2h":                          "at most 5m",
		"interval: 1s=>interval: 1ms":                       "at least 1s",
		"when: event == oom,=>for: 1m, when: event == oom,": "an event has no duration",
		"interval: 1s=>colour: red":                         "colour",
		"repeat: 1m=>repeat: 1s":                            "at least 10s",
	} {
		from, to, _ := strings.Cut(change, "=>")
		if _, err := Parse([]byte(strings.Replace(doc, from, to, 1))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", change, err, want)
		}
	}
}

func TestJudge(t *testing.T) {
	r, err := Parse([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	j := newJudge(r)
	now := time.Unix(1e9, 0)
	var cpu time.Duration
	web := func(percent float64) Container {
		cpu += time.Duration(percent / 100 * float64(10*time.Second))
		return Container{ID: "1", Name: "web1", State: "running", Read: now, CPU: cpu, Disk: -1}
	}
	told := func(l []verdict) string {
		var s []string
		for _, v := range l {
			n := ""
			if v.notice.Container != nil {
				n = " " + v.notice.Container.Name
			}
			s = append(s, v.notice.Rule+" "+v.notice.Status+n)
		}
		return strings.Join(s, ", ")
	}
	step := func(want string, e Engine, all ...Container) {
		t.Helper()
		if got := told(j.tick(now, all, e)); got != want {
			t.Errorf("at %s: got %q, want %q", now.Sub(time.Unix(1e9, 0)), got, want)
		}
		now = now.Add(10 * time.Second)
	}
	step("", Engine{}, web(0))
	step("", Engine{}, web(90)) // holds from here
	step("", Engine{}, web(90))
	step("", Engine{}, web(90))
	step("hot firing web1", Engine{}, web(90))
	for range 5 {
		step("", Engine{}, web(90))
	}
	step("hot firing web1", Engine{}, web(90)) // told again after a minute
	step("hot resolved web1", Engine{}, web(10))
	step("", Engine{}, web(90))
	step("", Engine{}, web(10)) // not for long enough
	db := Container{ID: "2", Name: "db", State: "running", Read: now, CPU: cpu + time.Hour, Disk: -1}
	step("", Engine{}, db)
	for range 3 {
		step("", Engine{}, web(99))
	}
	step("", Engine{}, web(99))
	step("hot firing web1", Engine{}, web(99))
	step("hot resolved web1", Engine{}) // it is gone
	step("full firing", Engine{DiskUsed: 95})
	step("full resolved", Engine{DiskUsed: 50})
	red := Container{ID: "3", Name: "job", State: "exited", ExitCode: 2, Labels: map[string]string{"team": "red"}, Disk: -1}
	step("ended firing job", Engine{}, red)
	red.ExitCode = 0
	step("ended resolved job", Engine{}, red)
	if got := told(j.event(now, "oom", &db)); got != "oom firing db" {
		t.Errorf("got %q", got)
	}
	if got := told(j.event(now, "die", &db)); got != "" {
		t.Errorf("got %q", got)
	}
	if len(j.alarms) != 0 {
		t.Errorf("left: %v", j.alarms)
	}
}

// world is a Source for tests.
type world struct {
	mu     sync.Mutex
	all    []Container
	events chan string
}

func (w *world) Containers() []Container {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Container(nil), w.all...)
}
func (w *world) Read(_ context.Context, c *Container, stats, disk bool) {
	if disk {
		c.Disk = 5 << 30
	}
}
func (w *world) Engine() Engine { return Engine{} }
func (w *world) Events(ctx context.Context, fn func(string, Container)) {
	for {
		select {
		case e := <-w.events:
			fn(e, Container{ID: "1", Name: "web", State: "running", Disk: -1})
		case <-ctx.Done():
			return
		}
	}
}

func TestWatch(t *testing.T) {
	var mu sync.Mutex
	var got []Notice
	fails := 1
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if fails--; fails >= 0 {
			w.WriteHeader(503)
			return
		}
		var n Notice
		b, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(b, &n); err != nil || r.Header.Get("X-Token") != "secret" {
			t.Errorf("got %s, %v, %v", b, err, r.Header)
		}
		got = append(got, n)
	}))
	defer srv.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "rules.yaml")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(file, []byte(`version: 1
interval: 1s
rules:
  - {name: big, when: disk_bytes > 4gb, actions: [hook], message: look}
  - {name: killed, when: event == oom, actions: [hook]}
actions:
  hook: {webhook: "`+srv.URL+`", headers: {X-Token: secret}, perMinute: 3}
`), 0o600))
	w := &world{all: []Container{{ID: "1", Name: "web", State: "running"}}, events: make(chan string)}
	a, err := New(Config{Path: file, Source: w})
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = a.Run(ctx) }()
	wait := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(15 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not in time: %s; got %+v, %+v", what, got, a.List())
			}
		}
	}
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(got) }
	w.events <- "oom"
	wait("two notices", func() bool { return count() == 2 })
	mu.Lock()
	seen := map[string]Notice{got[0].Rule: got[0], got[1].Rule: got[1]}
	mu.Unlock()
	if n := seen["big"]; n.Status != "firing" || n.Message != "look" || n.Container.Name != "web" || !reflect.DeepEqual(n.Values, map[string]any{"disk_bytes": float64(5 << 30)}) {
		t.Errorf("got %+v", n)
	}
	if seen["killed"].Values["event"] != "oom" {
		t.Errorf("got %+v", seen["killed"])
	}
	// More in a minute than the action may have: the rest is counted.
	for range 4 {
		w.events <- "oom"
	}
	wait("the rate holds", func() bool { x := a.List().Actions[0]; return x.Done >= 3 && x.Dropped >= 1 })
	// A bad file is not used, a good one is.
	before, _ := os.ReadFile(file)
	must(os.WriteFile(file, []byte("version: 1\nrules: [{name: x, when: nonsense}]\n"), 0o600))
	must(os.Chtimes(file, time.Time{}, time.Now().Add(10*time.Second)))
	wait("the fault shows", func() bool { l := a.List(); return l.Error != "" && len(l.Rules) == 2 })
	must(os.WriteFile(file, []byte(strings.Replace(string(before), "4gb", "9gb", 1)), 0o600))
	must(os.Chtimes(file, time.Time{}, time.Now().Add(20*time.Second)))
	wait("the new rules", func() bool {
		l := a.List()
		return l.Error == "" && l.Rules[0].When == "disk_bytes > 9gb" && l.Rules[0].State == "ok"
	})
	if r, err := a.Test(ctx, "hook"); err != nil || len(r) != 1 || r[0].Error != "" {
		t.Errorf("test: %+v, %v", r, err)
	}
	if _, err := a.Test(ctx, "none"); err == nil {
		t.Error("a rule that is not there can be tested")
	}
	cancel()
	<-done
}

func TestCommands(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root to change the user")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for d := dir; d != "/"; d = filepath.Dir(d) { // nobody must get there
		if fi, err := os.Stat(d); err == nil && fi.Mode().Perm()&1 == 0 {
			_ = os.Chmod(d, fi.Mode()|0o011)
		}
	}
	act := func(script, timeout string) Action {
		r, err := Parse([]byte(fmt.Sprintf("version: 1\nactions: {x: {command: [/bin/sh, -c, %q], timeout: %s}}\n", script, timeout)))
		if err != nil {
			t.Fatal(err)
		}
		return r.Actions["x"]
	}
	out := filepath.Join(dir, "out")
	n := Notice{Rule: "r", Status: "firing", Container: &Subject{Name: "web"}}
	if err := perform(context.Background(), act("id -u; id -G; echo $SERVIN_ALERT_RULE $SERVIN_ALERT_CONTAINER; cat; exec >"+out+" ; id -u; id -G; echo $SERVIN_ALERT_RULE $SERVIN_ALERT_CONTAINER", "5s"), n); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(out)
	if f := strings.Fields(string(b)); len(f) != 4 || f[0] != "65534" || f[1] != "65534" || f[2] != "r" || f[3] != "web" {
		t.Errorf("the command says %q", b)
	}
	err := perform(context.Background(), act("echo it is bad; exit 3", "5s"), n)
	if err == nil || !strings.Contains(err.Error(), "exit status 3: it is bad") {
		t.Errorf("got %v", err)
	}
	pidfile := filepath.Join(dir, "pid")
	err = perform(context.Background(), act("sleep 1000 & echo $! > "+pidfile+"; wait", "300ms"), n)
	if err == nil || !strings.Contains(err.Error(), "did not end within") {
		t.Errorf("got %v", err)
	}
	pid, _ := os.ReadFile(pidfile)
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		st, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		if err != nil || strings.Contains(string(st), ") Z ") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("what it left behind runs on: %s", st)
		}
	}
}
