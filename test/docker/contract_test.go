package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/cloudos-io/cloudos/internal/dockerapi"
)

var update = flag.Bool("update", false, "write docs/api-routes.md")

// contractCase is one request and the status that it must be answered with.
type contractCase struct {
	op, path string
	body     string
	want     int
	header   string // one "Key: value"
}

// contractCases walk through every operation that is not Swarm's, in an order in
// which each finds what it needs: the container "run" runs, "old" does not, "tty"
// has a terminal; the rest is made on the way. REG is a registry, EXEC an exec.
func contractCases() []contractCase {
	const create = "POST /containers/create"
	zero := strings.Repeat("0", 64)
	return []contractCase{
		{op: "GET /_ping", path: "/_ping", want: 200},
		{op: "HEAD /_ping", path: "/_ping", want: 200},
		{op: "GET /version", path: "/version", want: 200},
		{op: "GET /info", path: "/info", want: 200},
		{op: "GET /events", path: "/events?since=0&until=1", want: 200},
		{op: "GET /events", path: "/events?since=5&until=1", want: 400},
		{op: "GET /events", path: "/events?until=1&filters={", want: 400},
		{op: "GET /system/df", path: "/system/df", want: 200},
		{op: "GET /system/df", path: "/system/df?type=image&type=container&verbose=1", want: 200},
		{op: "POST /auth", path: "/auth", body: `{"username":"u","password":"p","serveraddress":"REG"}`, want: 200},

		{op: create, path: "/containers/create?name=new", body: `{"Image":"bb","Cmd":["true"],"Labels":{"a":"b"},"ExposedPorts":{"80/tcp":{}},"HostConfig":{"Memory":67108864,"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":2}},"NetworkingConfig":{"EndpointsConfig":{"bridge":{}}}}`, want: 201},
		{op: create, path: "/containers/create?name=new", body: `{"Image":"bb"}`, want: 409},
		{op: create, path: "/containers/create", body: `{"Image":"no-such-image"}`, want: 404},
		{op: create, path: "/containers/create", body: `{"Image":`, want: 400},
		{op: create, path: "/containers/create?name=a%20b", body: `{"Image":"bb"}`, want: 400},
		{op: "GET /containers/json", path: "/containers/json", want: 200},
		{op: "GET /containers/json", path: "/containers/json?all=1&size=1&limit=2", want: 200},
		{op: "GET /containers/json", path: `/containers/json?filters={"status":["asleep"]}`, want: 400},
		{op: "GET /containers/{id}/json", path: "/containers/run/json?size=1", want: 200},
		{op: "GET /containers/{id}/json", path: "/containers/old/json", want: 200},
		{op: "GET /containers/{id}/json", path: "/containers/none/json", want: 404},
		{op: "GET /containers/{id}/top", path: "/containers/run/top?ps_args=-o%20pid,args", want: 200},
		{op: "GET /containers/{id}/top", path: "/containers/none/top", want: 404},
		{op: "GET /containers/{id}/logs", path: "/containers/old/logs?stdout=1&stderr=1&timestamps=1&tail=5", want: 200},
		{op: "GET /containers/{id}/logs", path: "/containers/none/logs?stdout=1", want: 404},
		{op: "GET /containers/{id}/changes", path: "/containers/old/changes", want: 200},
		{op: "GET /containers/{id}/changes", path: "/containers/none/changes", want: 404},
		{op: "GET /containers/{id}/export", path: "/containers/old/export", want: 200},
		{op: "GET /containers/{id}/export", path: "/containers/none/export", want: 404},
		{op: "GET /containers/{id}/stats", path: "/containers/run/stats?stream=0&one-shot=1", want: 200},
		{op: "GET /containers/{id}/stats", path: "/containers/old/stats?stream=0", want: 200},
		{op: "GET /containers/{id}/stats", path: "/containers/none/stats?stream=0", want: 404},
		{op: "POST /containers/{id}/resize", path: "/containers/tty/resize?h=40&w=100", want: 200},
		{op: "POST /containers/{id}/resize", path: "/containers/none/resize?h=40&w=100", want: 404},
		{op: "POST /containers/{id}/start", path: "/containers/new/start", want: 204},
		{op: "POST /containers/{id}/start", path: "/containers/run/start", want: 304},
		{op: "POST /containers/{id}/start", path: "/containers/run/start?detachKeys=no-key", want: 400},
		{op: "POST /containers/{id}/start", path: "/containers/none/start", want: 404},
		{op: "POST /containers/{id}/wait", path: "/containers/new/wait", want: 200},
		{op: "POST /containers/{id}/wait", path: "/containers/run/wait?condition=never", want: 400},
		{op: "POST /containers/{id}/wait", path: "/containers/none/wait", want: 404},
		{op: "POST /containers/{id}/stop", path: "/containers/new/stop?t=1", want: 304},
		{op: "POST /containers/{id}/stop", path: "/containers/tty/stop?t=0&signal=KILL", want: 204},
		{op: "POST /containers/{id}/stop", path: "/containers/none/stop", want: 404},
		{op: "POST /containers/{id}/restart", path: "/containers/tty/restart?t=0", want: 204},
		{op: "POST /containers/{id}/restart", path: "/containers/none/restart", want: 404},
		{op: "POST /containers/{id}/kill", path: "/containers/tty/kill?signal=SIGCONT", want: 204},
		{op: "POST /containers/{id}/kill", path: "/containers/old/kill", want: 409},
		{op: "POST /containers/{id}/kill", path: "/containers/none/kill", want: 404},
		{op: "POST /containers/{id}/update", path: "/containers/new/update", body: `{"Memory":134217728,"MemorySwap":-1,"RestartPolicy":{"Name":"no"}}`, want: 200},
		{op: "POST /containers/{id}/update", path: "/containers/none/update", body: `{}`, want: 404},
		{op: "POST /containers/{id}/rename", path: "/containers/new/rename?name=newer", want: 204},
		{op: "POST /containers/{id}/rename", path: "/containers/newer/rename?name=run", want: 409},
		{op: "POST /containers/{id}/rename", path: "/containers/none/rename?name=x1", want: 404},
		{op: "POST /containers/{id}/pause", path: "/containers/tty/pause", want: 204},
		{op: "POST /containers/{id}/pause", path: "/containers/none/pause", want: 404},
		{op: "POST /containers/{id}/unpause", path: "/containers/tty/unpause", want: 204},
		{op: "POST /containers/{id}/unpause", path: "/containers/none/unpause", want: 404},
		{op: "POST /containers/{id}/attach", path: "/containers/old/attach?logs=1&stdout=1", want: 200},
		{op: "POST /containers/{id}/attach", path: "/containers/old/attach?logs=1&stdout=1", header: "Upgrade: tcp", want: 101},
		{op: "POST /containers/{id}/attach", path: "/containers/run/attach?detachKeys=no-key", want: 400},
		{op: "POST /containers/{id}/attach", path: "/containers/none/attach", want: 404},
		{op: "GET /containers/{id}/attach/ws", path: "/containers/old/attach/ws?logs=1&stdout=1", header: "Upgrade: websocket", want: 101},
		{op: "GET /containers/{id}/attach/ws", path: "/containers/run/attach/ws?detachKeys=no-key", want: 400},
		{op: "GET /containers/{id}/attach/ws", path: "/containers/none/attach/ws", want: 404},
		{op: "HEAD /containers/{id}/archive", path: "/containers/run/archive?path=/etc/passwd", want: 200},
		{op: "HEAD /containers/{id}/archive", path: "/containers/run/archive", want: 400},
		{op: "HEAD /containers/{id}/archive", path: "/containers/run/archive?path=/none", want: 404},
		{op: "GET /containers/{id}/archive", path: "/containers/old/archive?path=/etc/", want: 200},
		{op: "GET /containers/{id}/archive", path: "/containers/run/archive?path=/etc/passwd/", want: 400},
		{op: "GET /containers/{id}/archive", path: "/containers/run/archive?path=/none", want: 404},
		{op: "PUT /containers/{id}/archive", path: "/containers/old/archive?path=/tmp&noOverwriteDirNonDir=1", body: "TAR", want: 200},
		{op: "PUT /containers/{id}/archive", path: "/containers/old/archive", body: "TAR", want: 400},
		{op: "PUT /containers/{id}/archive", path: "/containers/readonly/archive?path=/tmp", body: "TAR", want: 403},
		{op: "PUT /containers/{id}/archive", path: "/containers/old/archive?path=/none", body: "TAR", want: 404},
		{op: "POST /containers/{id}/exec", path: "/containers/run/exec", body: `{"Cmd":["true"],"AttachStdout":true}`, want: 201},
		{op: "POST /containers/{id}/exec", path: "/containers/old/exec", body: `{"Cmd":["true"]}`, want: 409},
		{op: "POST /containers/{id}/exec", path: "/containers/none/exec", body: `{"Cmd":["true"]}`, want: 404},
		{op: "GET /exec/{id}/json", path: "/exec/EXEC/json", want: 200},
		{op: "POST /exec/{id}/start", path: "/exec/EXEC/start", body: `{"Detach":false}`, want: 200},
		{op: "POST /exec/{id}/start", path: "/exec/EXEC/start", body: `{"Detach":true}`, want: 409},
		{op: "POST /exec/{id}/start", path: "/exec/none/start", body: `{}`, want: 404},
		{op: "GET /exec/{id}/json", path: "/exec/EXEC/json", want: 200},
		{op: "GET /exec/{id}/json", path: "/exec/none/json", want: 404},
		{op: "POST /exec/{id}/resize", path: "/exec/EXEC/resize?h=10&w=10", want: 200},
		{op: "POST /exec/{id}/resize", path: "/exec/EXEC/resize?h=ten&w=10", want: 400},
		{op: "POST /exec/{id}/resize", path: "/exec/none/resize?h=1&w=1", want: 404},
		{op: "POST /commit", path: "/commit?container=old&repo=made&tag=1&comment=c&author=a&changes=CMD%20ls", body: `{}`, want: 201},
		{op: "POST /commit", path: "/commit?container=none", body: `{}`, want: 404},

		{op: "GET /images/json", path: "/images/json?all=1&shared-size=1&digests=1", want: 200},
		{op: "GET /images/json", path: "/images/json?manifests=1&identity=1", want: 200},
		{op: "GET /images/{name}/json", path: "/images/made:1/json?manifests=1", want: 200},
		{op: "GET /images/{name}/json", path: "/images/none/json", want: 404},
		{op: "GET /images/{name}/history", path: "/images/made:1/history", want: 200},
		{op: "GET /images/{name}/history", path: "/images/none/history", want: 404},
		{op: "GET /images/{name}/attestations", path: "/images/made:1/attestations?statement=1", want: 200},
		{op: "GET /images/{name}/attestations", path: "/images/made:1/attestations?platform={}&platform={}", want: 400},
		{op: "GET /images/{name}/attestations", path: "/images/none/attestations", want: 404},
		{op: "POST /images/{name}/tag", path: "/images/made:1/tag?repo=REG/made&tag=1", want: 201},
		{op: "POST /images/{name}/tag", path: "/images/made:1/tag?repo=BAD", want: 400},
		{op: "POST /images/{name}/tag", path: "/images/none/tag?repo=x", want: 404},
		{op: "POST /images/{name}/push", path: "/images/REG/made/push?tag=1", header: "X-Registry-Auth: e30=", want: 200},
		{op: "POST /images/{name}/push", path: "/images/REG/none/push?tag=1", header: "X-Registry-Auth: e30=", want: 200},
		{op: "GET /distribution/{name}/json", path: "/distribution/REG/made:1/json", want: 200},
		{op: "GET /distribution/{name}/json", path: "/distribution/REG/made:2/json", want: 404},
		{op: "POST /images/create", path: "/images/create?fromImage=REG/made&tag=1", want: 200},
		{op: "POST /images/create", path: "/images/create?fromSrc=-&repo=flat&message=m&changes=ENV%20A=b", body: "TAR", want: 200},
		{op: "POST /images/create", path: "/images/create?fromImage=REG/none&tag=1", want: 404},
		{op: "GET /images/{name}/get", path: "/images/made:1/get", want: 200},
		{op: "GET /images/get", path: "/images/get?names=made:1&names=bb", want: 200},
		{op: "POST /images/load", path: "/images/load?quiet=1", body: "SAVED", want: 200},
		{op: "GET /images/search", path: "/images/search?term=REG/app&limit=5", want: 200},
		{op: "DELETE /images/{name}", path: "/images/bb:latest", want: 409},
		{op: "DELETE /images/{name}", path: "/images/made:1?force=1&noprune=1", want: 200},
		{op: "DELETE /images/{name}", path: "/images/none", want: 404},
		{op: "POST /images/prune", path: `/images/prune?filters={"dangling":["true"]}`, want: 200},
		{op: "POST /build", path: "/build?t=built:1&version=1&rm=1", body: "CONTEXT", header: "Content-Type: application/x-tar", want: 200},
		{op: "POST /build", path: "/build?version=1&memory=much", header: "Content-Type: application/x-tar", want: 400},
		{op: "POST /build/prune", path: "/build/prune?all=1", want: 200},
		{op: "POST /session", path: "/session", want: 400},
		{op: "POST /session", path: "/session", header: "Upgrade: h2c", want: 101},
		{op: "POST /session", path: "/session", header: "Upgrade: foo", want: 400},

		{op: "POST /networks/create", path: "/networks/create", body: `{"Name":"cnet","Labels":{"a":"b"},"IPAM":{"Config":[{"Subnet":"10.99.77.0/24"}]}}`, want: 201},
		{op: "POST /networks/create", path: "/networks/create", body: `{"Name":"cnet2","IPAM":{"Config":[{"Subnet":"nonsense"}]}}`, want: 400},
		{op: "POST /networks/create", path: "/networks/create", body: `{"Name":"host"}`, want: 403},
		{op: "POST /networks/create", path: "/networks/create", body: `{"Name":"cnet3","Driver":"no-such-driver"}`, want: 404},
		{op: "GET /networks", path: "/networks", want: 200},
		{op: "GET /networks/{id}", path: "/networks/cnet?verbose=1", want: 200},
		{op: "GET /networks/{id}", path: "/networks/nonet", want: 404},
		{op: "POST /networks/{id}/connect", path: "/networks/cnet/connect", body: `{"Container":"run","EndpointConfig":{"Aliases":["al"]}}`, want: 200},
		{op: "POST /networks/{id}/connect", path: "/networks/cnet/connect", body: `{`, want: 400},
		{op: "POST /networks/{id}/connect", path: "/networks/host/connect", body: `{"Container":"run"}`, want: 403},
		{op: "POST /networks/{id}/connect", path: "/networks/nonet/connect", body: `{"Container":"run"}`, want: 404},
		{op: "GET /containers/{id}/json", path: "/containers/run/json", want: 200},
		{op: "POST /networks/{id}/disconnect", path: "/networks/cnet/disconnect", body: `{"Container":"run"}`, want: 200},
		{op: "POST /networks/{id}/disconnect", path: "/networks/cnet/disconnect", body: `{"Container":"run"}`, want: 403},
		{op: "POST /networks/{id}/disconnect", path: "/networks/nonet/disconnect", body: `{"Container":"run"}`, want: 404},
		{op: "DELETE /networks/{id}", path: "/networks/bridge", want: 403},
		{op: "DELETE /networks/{id}", path: "/networks/cnet", want: 204},
		{op: "DELETE /networks/{id}", path: "/networks/cnet", want: 404},
		{op: "POST /networks/prune", path: "/networks/prune", want: 200},

		{op: "POST /volumes/create", path: "/volumes/create", body: `{"Name":"cvol","Labels":{"a":"b"}}`, want: 201},
		{op: "GET /volumes", path: `/volumes?filters={"label":["a"]}`, want: 200},
		{op: "GET /volumes/{name}", path: "/volumes/cvol", want: 200},
		{op: "GET /volumes/{name}", path: "/volumes/none", want: 404},
		{op: "PUT /volumes/{name}", path: "/volumes/none?version=1", body: `{"Spec":{}}`, want: 503},
		{op: "DELETE /volumes/{name}", path: "/volumes/held", want: 409},
		{op: "DELETE /volumes/{name}", path: "/volumes/cvol", want: 204},
		{op: "DELETE /volumes/{name}", path: "/volumes/cvol", want: 404},
		{op: "POST /volumes/prune", path: "/volumes/prune", want: 200},

		{op: "GET /plugins", path: "/plugins", want: 200},
		{op: "GET /plugins/privileges", path: "/plugins/privileges?remote=some/plugin:1", want: 501},
		{op: "POST /plugins/pull", path: "/plugins/pull?remote=some/plugin:1&name=p", body: `[]`, want: 501},
		{op: "POST /plugins/create", path: "/plugins/create?name=p", body: "TAR", want: 501},
		{op: "GET /plugins/{name}/json", path: "/plugins/none/json", want: 404},
		{op: "DELETE /plugins/{name}", path: "/plugins/none", want: 404},
		{op: "POST /plugins/{name}/enable", path: "/plugins/none/enable?timeout=1", want: 404},
		{op: "POST /plugins/{name}/disable", path: "/plugins/none/disable", want: 404},
		{op: "POST /plugins/{name}/upgrade", path: "/plugins/none/upgrade?remote=some/plugin:1", body: `[]`, want: 404},
		{op: "POST /plugins/{name}/push", path: "/plugins/none/push", want: 404},
		{op: "POST /plugins/{name}/set", path: "/plugins/none/set", body: `["A=b"]`, want: 404},

		{op: "DELETE /containers/{id}", path: "/containers/newer?v=1", want: 204},
		{op: "DELETE /containers/{id}", path: "/containers/run", want: 409},
		{op: "DELETE /containers/{id}", path: "/containers/" + zero, want: 404},
		{op: "DELETE /containers/{id}", path: "/containers/run?link=1", want: 400},
		{op: "POST /containers/prune", path: `/containers/prune?filters={"until":["1h"]}`, want: 200},
	}
}

// beyond are statuses that are right although the document lacks them.
var beyond = map[string][]int{
	"POST /containers/{id}/attach":    {409},
	"POST /session":                   {101},
	"GET /containers/json":            {400},
	"POST /images/prune":              {400},
	"GET /plugins/privileges":         {501},
	"POST /plugins/pull":              {501},
	"POST /plugins/create":            {501},
	"POST /plugins/{name}/upgrade":    {404},
	"GET /distribution/{name}/json":   {404},
	"DELETE /containers/{id}":         {400, 409},
	"POST /containers/{id}/exec":      {409},
	"POST /exec/{id}/start":           {409},
	"PUT /volumes/{name}":             {404},
	"POST /networks/{id}/disconnect":  {403},
	"POST /networks/{id}/connect":     {400, 403},
	"PUT /containers/{id}/archive":    {403},
	"GET /containers/{id}/attach/ws":  {101},
	"POST /build":                     {400},
	"GET /images/{name}/attestations": {400},
	"POST /containers/{id}/wait":      {400},
	"POST /containers/{id}/rename":    {409},
}

// untested tells why a documented status is not provoked here.
var untested = map[string]string{
	"500":                                 "a fault of the engine's own",
	"POST /auth 204":                      "answered by none: the token comes with 200",
	"POST /images/{name}/tag 409":         "a name may always be given to another image",
	"POST /images/{name}/push 404":        "told within the stream, as Docker does",
	"GET /images/{name}/attestations 501": "the image store has them",
	"PUT /volumes/{name} 404":             "for cluster volumes alone",
	"POST /auth 401":                      "no registry here refuses",
	"GET /containers/{id}/attach/ws 200":  "an upgrade is answered with 101",
	"POST /images/create 401":             "no registry here refuses",
	"GET /distribution/{name}/json 401":   "no registry here refuses",
	"PUT /volumes/{name} 200":             "for cluster volumes alone",
	"PUT /volumes/{name} 503":             "for cluster volumes alone",
	"PUT /volumes/{name} 400":             "for cluster volumes alone",
}

// plugins of Docker's managed kind are not run: their successes are not either.
func unserved(op string) string {
	if strings.Contains(op, "/plugins") {
		return "managed plugins are not run"
	}
	return ""
}

// TestContract sends requests to every operation of Docker's API document and
// checks status and body against it. docs/api-routes.md tells what was proved.
func TestContract(t *testing.T) {
	doc := readDocument(t)
	e := start(t)
	reg := serveRegistry(t)
	e.must("run", "-d", "--name", "run", "-p", "127.0.0.1::80", "--health-cmd", "true", "bb", "sleep", "1000")
	e.must("run", "-d", "-t", "--name", "tty", "bb", "sleep", "1000")
	e.must("run", "--name", "old", "-v", "held:/held", "-v", "/anon", "bb", "sh", "-c", "echo out; echo err >&2; touch /x")
	e.must("create", "--name", "readonly", "--read-only", "bb")
	proved := map[string][]int{}
	vars := strings.NewReplacer("REG", reg)
	var lastExec string
	var saved []byte
	for _, c := range contractCases() {
		path := strings.ReplaceAll(vars.Replace(c.path), "EXEC", lastExec)
		body := []byte(vars.Replace(c.body))
		switch c.body {
		case "TAR":
			body = tarOf(t, "f", "text")
		case "CONTEXT":
			body = tarOf(t, "Dockerfile", "FROM bb\nLABEL a=b\n")
		case "SAVED":
			body = saved
		}
		status, header, got := e.ask(t, c, path, body)
		name := c.op + " (" + path + ")"
		if status != c.want {
			t.Errorf("%s: status %d, want %d: %.300s", name, status, c.want, got)
			continue
		}
		method, pattern, _ := strings.Cut(c.op, " ")
		o, ok := doc.Paths[pattern][strings.ToLower(method)]
		if !ok {
			t.Errorf("%s: the document has no such operation", c.op)
			continue
		}
		a, documented := doc.answer(o, status)
		if !documented && !slices.Contains(beyond[c.op], status) {
			t.Errorf("%s: status %d is not documented", name, status)
		}
		if !slices.Contains(proved[c.op], status) {
			proved[c.op] = append(proved[c.op], status)
		}
		for _, f := range checkAnswer(doc, a, method, c, status, header, got) {
			t.Errorf("%s: %d: %s", name, status, f)
		}
		switch {
		case c.op == "POST /containers/{id}/exec" && status == 201:
			var r struct{ Id string }
			_ = json.Unmarshal(got, &r)
			lastExec = r.Id
		case c.op == "GET /images/{name}/get":
			saved = got
		}
	}
	swarm := e.askSwarm(t, doc, proved)
	complete(t, doc, proved)
	writeRoutes(t, doc, proved, swarm)
}

// checkAnswer compares a body with what the document says of it.
func checkAnswer(doc *document, a answerSpec, method string, c contractCase, status int, h http.Header, body []byte) []string {
	ck := &checker{doc: doc}
	if c.op == "GET /system/df" && !strings.Contains(c.path, "verbose") {
		// Docker goes on with what these were called up to 1.51.
		ck.also = []string{"LayersSize", "Images", "Containers", "Volumes", "BuildCache"}
	}
	s := a.Schema
	if status >= 400 && s == nil {
		s = &schema{Ref: "#/definitions/ErrorResponse"}
	}
	switch {
	case method == http.MethodHead || status == 101 || status == 204 || status == 304:
		if method != http.MethodHead && status != 101 && len(body) > 0 {
			ck.bad("body", "%q, want none", body)
		}
		return ck.found
	case s == nil || s.Type == "string":
		return nil
	case c.op == "POST /containers/{id}/attach" && status >= 400:
		return nil // as text, for who waits for a stream
	}
	if ct := h.Get("Content-Type"); !strings.HasPrefix(ct, "application/json") && ct != "application/jsonl" {
		ck.bad("Content-Type", "%q", ct)
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	for n := 0; ; n++ {
		var v any
		err := dec.Decode(&v)
		if err == io.EOF && n > 0 || err == io.EOF && c.op == "GET /events" {
			return ck.found
		}
		if err != nil {
			ck.bad("body", "no JSON: %v: %.200q", err, body)
			return ck.found
		}
		if streams(c.op) && status < 400 {
			continue // messages of progress; the document does not describe them
		}
		ck.check("", s, v)
	}
}

func streams(op string) bool {
	return slices.Contains([]string{"POST /images/create", "POST /images/{name}/push", "POST /images/load", "POST /build"}, op)
}

// ask sends one request.
func (e *engine) ask(t *testing.T, c contractCase, path string, body []byte) (int, http.Header, []byte) {
	t.Helper()
	method, _, _ := strings.Cut(c.op, " ")
	req, err := http.NewRequest(method, "http://docker"+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if len(body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	if k, v, ok := strings.Cut(c.header, ": "); ok {
		req.Header.Set(k, v)
		if k == "Upgrade" {
			req.Header.Set("Connection", "Upgrade")
		}
		if v == "websocket" {
			req.Header.Set("Sec-WebSocket-Version", "13")
			req.Header.Set("Sec-WebSocket-Key", base64.StdEncoding.EncodeToString([]byte("0123456789abcdef")))
			req.Header.Set("Origin", "http://docker")
		}
	}
	// Large JSON in a query is written as it is: net/http would refuse blanks.
	req.URL.RawQuery = strings.NewReplacer(`{`, "%7B", `}`, "%7D", `"`, "%22", "[", "%5B", "]", "%5D").Replace(req.URL.RawQuery)
	cl := &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", e.sock)
		}}}
	resp, err := cl.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp.StatusCode, resp.Header, nil
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
	}
	return resp.StatusCode, resp.Header, b
}

// askSwarm asks every route of swarm mode: none but 503, with Docker's words.
func (e *engine) askSwarm(t *testing.T, doc *document, proved map[string][]int) map[string]bool {
	t.Helper()
	swarm := map[string]bool{}
	for path, ops := range doc.Paths {
		for method, o := range ops {
			if method == "parameters" || !slices.ContainsFunc(o.Tags, func(s string) bool {
				return slices.Contains([]string{"Swarm", "Node", "Service", "Task", "Secret", "Config"}, s)
			}) {
				continue
			}
			op := strings.ToUpper(method) + " " + path
			swarm[op] = true
			body := ""
			if method == "post" {
				body = "{}"
			}
			p := strings.NewReplacer("{id}", "some", "{name}", "some").Replace(path)
			status, _, got := e.ask(t, contractCase{op: op}, p+"?version=1", []byte(body))
			if status != http.StatusServiceUnavailable || !bytes.Contains(got, []byte("warm")) {
				t.Errorf("%s: %d %s", op, status, got)
			}
			if _, ok := o.Responses["503"]; !ok {
				t.Errorf("%s: 503 is not documented", op)
			}
			proved[op] = []int{status}
		}
	}
	if len(swarm) < 30 {
		t.Errorf("only %d routes of swarm mode", len(swarm))
	}
	return swarm
}

// complete checks that no operation and no status was forgotten.
func complete(t *testing.T, doc *document, proved map[string][]int) {
	t.Helper()
	for path, ops := range doc.Paths {
		for method, o := range ops {
			op := strings.ToUpper(method) + " " + path
			if method == "parameters" {
				continue
			}
			if len(proved[op]) == 0 {
				t.Errorf("%s was not asked", op)
				continue
			}
			if slices.Equal(proved[op], []int{503}) || unserved(op) != "" {
				continue
			}
			for code := range o.Responses {
				if untested[code] != "" || untested[op+" "+code] != "" {
					continue
				}
				if !slices.ContainsFunc(proved[op], func(n int) bool { return fmt.Sprint(n) == code }) {
					t.Errorf("%s: the documented status %s was not provoked", op, code)
				}
			}
		}
	}
}

// writeRoutes keeps docs/api-routes.md equal to what was proved.
func writeRoutes(t *testing.T, doc *document, proved map[string][]int, swarm map[string]bool) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, `# State of Docker's routes

Written by `+"`go test ./test/docker -run Contract -update`"+`, which sends requests to every operation of Docker's API
document of version %s and checks status and body of the answers against it. "Proved" are the statuses seen; those
of 500 are faults of the engine's own and not provoked. Routes are served from version 1.24 on unless "since" says otherwise.

| method | path | since | state | proved | notes |
|---|---|---|---|---|---|
`, doc.Info.Version)
	for _, r := range dockerapi.Routes() {
		op := r.Method + " " + r.Pattern
		if _, ok := proved[op]; !ok {
			op = r.Method + " " + strings.NewReplacer("{id}", "{name}").Replace(r.Pattern)
		}
		if _, ok := proved[op]; !ok {
			op = r.Method + " " + strings.NewReplacer("{name}", "{id}").Replace(r.Pattern)
		}
		codes := proved[op]
		if len(codes) == 0 {
			continue // ours, or of older documents
		}
		slices.Sort(codes)
		state, notes := "served", []string{}
		switch {
		case swarm[op]:
			state = "no swarm"
			notes = append(notes, "answers as a Docker that is in no swarm")
		case unserved(op) != "" && op != "GET /plugins":
			state = "refused"
			notes = append(notes, unserved(op))
		}
		for k, why := range untested {
			if o, code, ok := strings.Cut(k, "} "); ok && o+"}" == op || strings.HasPrefix(k, op+" ") {
				if !ok {
					code = strings.TrimPrefix(k, op+" ")
				}
				notes = append(notes, code+": "+why)
			}
		}
		slices.Sort(notes)
		list := make([]string, len(codes))
		for i, c := range codes {
			list[i] = fmt.Sprint(c)
		}
		fmt.Fprintf(&b, "| %s | `%s` | %s | %s | %s | %s |\n", r.Method, r.Pattern, r.Since, state, strings.Join(list, " "), strings.Join(slices.Compact(notes), "; "))
	}
	if t.Failed() {
		return
	}
	const path = "../../docs/api-routes.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != b.String() {
		t.Errorf("docs/api-routes.md differs from what was proved (%v): go test ./test/docker -run Contract -update", err)
	}
}

func tarOf(t *testing.T, name, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte(text))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// serveRegistry is a registry with an index that can be searched.
func serveRegistry(t *testing.T) string {
	t.Helper()
	content := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/search" {
			_, _ = io.WriteString(w, `{"num_results":1,"query":"app","results":[{"name":"app","description":"d","star_count":3,"is_official":false,"is_automated":true}]}`)
			return
		}
		content.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}
