package native

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// raw sends one request without the command line between, and reads the answer
// also where it comes before all was sent.
func (e *engine) raw(method, path, kind, body string) (status int, answer string) {
	e.t.Helper()
	c, err := net.Dial("unix", e.Sock())
	if err != nil {
		e.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	req, err := http.NewRequest(method, "http://engine"+path, strings.NewReader(body))
	if err != nil {
		e.t.Fatal(err)
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	go func() { _ = req.Write(c) }()
	resp, err := http.ReadResponse(bufio.NewReader(c), req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, string(b)
}

// TestHostileRequests sends what no client of good will sends. Each is answered
// with a status of 400 to 499 and a message, and changes nothing.
func TestHostileRequests(t *testing.T) {
	e := start(t)
	e.must("create", "--name", "kept", "bb", "true")
	state := func() string {
		return e.must("ps", "-aq", "--no-trunc") + "\n" + e.must("volumes", "ls", "-q") + "\n" + e.must("networks", "ls", "-q") + "\n" + e.must("images", "-q")
	}
	before := state()
	deep := strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000)
	wide := `{"Image":"bb","Env":["` + strings.Repeat("x", 20<<20) + `"]}`
	bodies := map[string]string{
		"nothing": "", "no json": "<x/>", "half": `{"Image":`, "list": `[]`, "number": "7", "string": `"x"`, "deep": deep, "deep list": strings.Repeat("[", 100_000),
		"wide": wide, "wrong types": `{"Image":7,"Name":[],"Env":{},"HostConfig":"x","Driver":{},"IPAM":3}`, "two": `{"Image":"bb"}{"Image":"bb"}`,
		"nul bytes": "{\"Image\":\"bb\x00\"}", "invalid utf-8": "{\"Image\":\"\xff\xfe\"}", "escaped nul": `{"Image":"b\u0000b","Name":"a\u0000b"}`,
		"traversal": `{"Image":"../../etc/passwd","Name":"../../../x"}`, "control characters": `{"Image":"bb\u001b[2J","Name":"a\nb"}`,
		"huge number": `{"Image":"bb","HostConfig":{"Memory":1e400}}`, "negative": `{"Image":"bb","HostConfig":{"Memory":-9223372036854775808}}`,
		"fraction": `{"Image":"bb","HostConfig":{"PidsLimit":1.5}}`,
	}
	check := func(what string, status int, answer string) {
		t.Helper()
		if status < 400 || status > 499 {
			t.Errorf("%s: status %d, %.300s", what, status, answer)
			return
		}
		var m struct{ Message string }
		if json.Unmarshal([]byte(answer), &m) != nil || strings.TrimSpace(m.Message) == "" {
			t.Errorf("%s: no message: %.300s", what, answer)
		}
		if strings.ContainsFunc(m.Message, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }) {
			t.Errorf("%s: the message has control characters: %.300q", what, m.Message)
		}
		if len(m.Message) > 8<<10 {
			t.Errorf("%s: a message of %d bytes", what, len(m.Message))
		}
	}
	for name, body := range bodies {
		for _, path := range []string{"/containers/create?name=x", "/servin/run", "/containers/kept/exec", "/networks/create", "/containers/kept/update", "/networks/bridge/connect"} {
			if name == "nothing" && !strings.Contains(path, "create") {
				continue
			}
			status, answer := e.raw("POST", path, "application/json", body)
			if status == 200 && path == "/containers/kept/update" {
				continue // fields that it does not know are nothing to it
			}
			check(name+" to "+path, status, answer)
		}
	}
	for _, body := range []string{deep, `{"Name":"../x"}`, `{"Name":"a/b"}`, `{"Name":"."}`, `{"Name":"a\u0000"}`, `{"Name":7}`, `{"Name":"` + strings.Repeat("n", 300) + `"}`, `{"Name":"x","Driver":"no-such"}`} {
		status, answer := e.raw("POST", "/volumes/create", "application/json", body)
		check(fmt.Sprintf("volume %.40q", body), status, answer)
	}
	for _, p := range []string{
		"GET /containers/..%2f..%2fetc/json", "GET /containers/%00/json", "GET /containers/%0a/json", "GET /containers/" + strings.Repeat("a", 5000) + "/json",
		"GET /volumes/..%2f..", "DELETE /volumes/..%2f..%2fimages", "DELETE /volumes/..", "GET /images/..%2f..%2fx/json", "DELETE /networks/..%2fx", "GET /nothing", "PUT /containers/kept/json",
		"GET /v99.99/info", "GET /v1.x/info", "GET /containers/json?filters=%7B", "GET /containers/json?filters=[]", "GET /containers/json?filters=%7B%22nope%22:[%22x%22]%7D", "GET /containers/json?limit=x",
		"GET /containers/kept/logs", "GET /containers/kept/logs?stdout=1&tail=-7&since=yesterday", "GET /containers/kept/archive", "GET /containers/kept/archive?path=/no/such/file", "PUT /containers/kept/archive?path=/no/such/dir",
		"POST /containers/kept/kill?signal=NOPE", "POST /containers/kept/kill?signal=99999", "POST /containers/kept/resize?h=-1&w=x", "POST /containers/kept/rename?name=a/b", "POST /containers/kept/rename", "POST /containers/kept/wait?condition=never",
		"GET /exec/nope/json", "POST /exec/nope/start", "POST /images/create", "POST /images/create?fromImage=UPPER", "POST /images/create?fromImage=a%00b", "POST /images/create?fromImage=127.0.0.1:1/x&tag=..",
		"POST /images/bb/tag?repo=A", "POST /images/bb/tag?repo=a&tag=%0a", "POST /images/bb/tag", "GET /images/nope/get", "GET /events?filters=x", "GET /events?since=x", "POST /commit?container=nope", "POST /commit", "POST /containers/kept/stop?t=x", "GET /_ping/x",
		"POST /volumes/prune?filters=x", "POST /images/prune?filters=x", "POST /containers/prune?filters=x", "POST /networks/prune?filters=x", "GET /images/json?filters=x", "GET /networks?filters=x", "GET /volumes?filters=x",
	} {
		method, path, _ := strings.Cut(p, " ")
		status, answer := e.raw(method, path, "", "")
		check(p, status, answer)
	}
	// Images that are none.
	for name, body := range map[string]string{"text": "hello", "empty": "", "zeros": strings.Repeat("\x00", 4096), "gzip of nothing": "\x1f\x8b\x08\x00\x00"} {
		status, answer := e.raw("POST", "/images/load", "application/x-tar", body)
		if status == 200 && strings.Contains(answer, "error") { // the stream had begun
			continue
		}
		check("load "+name, status, answer)
	}
	if err := e.Ping(); err != nil {
		t.Fatal(err)
	}
	if after := state(); after != before {
		t.Errorf("something changed:\n%s\nwas\n%s", after, before)
	}
	if l := e.Log(); strings.Contains(l, "panic") {
		t.Errorf("the daemon panicked:\n%s", l)
	}
}
