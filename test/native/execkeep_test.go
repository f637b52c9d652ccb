package native

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// call sends a request to the engine's API.
func (e *engine) call(method, path, body string) (int, string) {
	e.t.Helper()
	req, err := http.NewRequest(method, "http://engine"+path, strings.NewReader(body))
	if err != nil {
		e.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.HTTP().Do(req)
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// TestExecOutlivesDaemon: an exec that runs is known to the next daemon, which
// learns of its end; of one that ended meanwhile, that it ended.
func TestExecOutlivesDaemon(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "cc", "bb", "sleep", "1000")
	begin := func(cmd string) string {
		var made struct{ Id string }
		code, body := e.call("POST", "/containers/cc/exec", `{"Cmd":["sh","-c","`+cmd+`"],"Env":["SECRET=hidden"]}`)
		if code != 201 || json.Unmarshal([]byte(body), &made) != nil {
			t.Fatal(code, body)
		}
		if code, body := e.call("POST", "/exec/"+made.Id+"/start", `{"Detach":true}`); code != 200 {
			t.Fatal(code, body)
		}
		return made.Id
	}
	type state struct {
		Running  bool
		Pid      int
		ExitCode *int
	}
	look := func(id string) (s state) {
		code, body := e.call("GET", "/exec/"+id+"/json", "")
		if code != 200 || json.Unmarshal([]byte(body), &s) != nil {
			t.Fatal(code, body)
		}
		return s
	}
	lasting, other, short := begin("sleep 500"), begin("trap 'exit 7' TERM; while :; do sleep 0.1; done"), begin("sleep 500")
	pid, shortPid := look(lasting).Pid, look(short).Pid
	notes := func() []string { return glob(e.Dir + "/run/execs/*.json") }
	harness.Eventually(t, "the execs are noted", 10*time.Second, func() bool { return len(notes()) == 3 })
	for _, n := range notes() {
		if b, _ := os.ReadFile(n); strings.Contains(string(b), "hidden") {
			t.Errorf("%s holds the environment", n)
		}
	}
	e.Kill()
	if err := syscall.Kill(shortPid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "the short one ends", 10*time.Second, func() bool { return syscall.Kill(shortPid, 0) != nil })
	e.Boot()
	if s := look(lasting); !s.Running || s.Pid != pid || s.ExitCode != nil {
		t.Errorf("after the restart: %+v, its pid was %d", s, pid)
	}
	if s := look(short); s.Running || s.ExitCode == nil {
		t.Errorf("one that ended meanwhile: %+v", s)
	}
	if code, _ := e.call("POST", "/exec/"+lasting+"/start", `{"Detach":true}`); code != 409 {
		t.Errorf("it can be started again: %d", code)
	}
	_ = syscall.Kill(look(other).Pid, syscall.SIGTERM)
	harness.Eventually(t, "its end is known", 10*time.Second, func() bool { return !look(other).Running })
	if s := look(other); s.ExitCode == nil || *s.ExitCode != 7 {
		t.Errorf("its end: %+v", s)
	}
	e.must("stop", "-t", "0", "cc")
	harness.Eventually(t, "nothing is noted any more", 10*time.Second, func() bool { return len(notes()) == 0 })
}
