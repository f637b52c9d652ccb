package dockerapi

import (
	"encoding/base64"
	"flag"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

var update = flag.Bool("update", false, "write golden files")

type routeCase struct {
	method, path, body string
	status             int
	call               string // what the backend saw; "" nothing
	answer             string // a piece of the answer
	header             map[string]string
}

var auth = base64.RawURLEncoding.EncodeToString([]byte(`{"username":"u","password":"p?>"}`))

// routeCases has at least one line for each route (checked below).
var routeCases = []routeCase{
	{method: "GET", path: "/_ping", status: 200, answer: "OK"},
	{method: "HEAD", path: "/v1.40/_ping", status: 200},
	{method: "GET", path: "/version", status: 200, call: "version", answer: `"ApiVersion":"1.56"`},
	{method: "GET", path: "/info", status: 200, call: "info", answer: `"ID":"i0"`},
	{method: "GET", path: "/events?since=1&until=2.5&filters=" + `{"type":["image"]}`, status: 200, call: `events 1000000000 2500000000 {"type":{"image":true}}`},
	{method: "GET", path: "/system/df?type=image", status: 200, call: "df [image] verbose=true"},
	{method: "GET", path: "/v1.41/system/df?type=image", status: 200, call: "df [container image volume build-cache] verbose=true"},
	{method: "GET", path: "/system/df?type=cow", status: 400, answer: "unknown object type: cow"},
	{method: "POST", path: "/auth", body: `{"username":"u"}`, status: 200, call: "login u", answer: "Login Succeeded"},
	{method: "POST", path: "/auth", body: `{"password":"hunter2`, status: 400, answer: "invalid JSON"},

	{method: "GET", path: `/containers/json?all=1&size=yes&filters={"label":{"a=b":true}}`, status: 200, call: `list {"All":true,"Size":true,"Limit":0,"Filters":{"label":{"a=b":true}}}`, answer: `"Health"`},
	{method: "GET", path: "/containers/json?limit=3", status: 200, call: `list {"All":true,"Size":false,"Limit":3,"Filters":{}}`},
	{method: "GET", path: "/containers/json?limit=many", status: 400, answer: "not an integer"},
	{method: "GET", path: "/containers/json?filters={", status: 400, answer: "invalid filter"},
	{method: "POST", path: "/containers/create?name=/web&platform=linux/arm64/v8", body: `{"Image":"busybox","Unknown":{"a":1}}`, status: 201, call: `"Name":"web","Platform":"linux/arm64`, answer: `{"Id":"c0ffee","Warnings":[]}`},
	{method: "POST", path: "/containers/create?name=a%20b", body: `{"Image":"busybox"}`, status: 400, answer: "Invalid container name"},
	{method: "POST", path: "/containers/create", body: ``, status: 400, answer: "invalid JSON: EOF"},
	{method: "POST", path: "/containers/create", body: `{}`, status: 400, answer: "config cannot be empty"},
	{method: "POST", path: "/containers/create", body: `{"Image":"x"} {}`, status: 400, answer: "unexpected content after JSON"},
	{method: "POST", path: "/containers/create", body: `{"Image":1}`, status: 400, answer: "invalid JSON"},
	{method: "POST", path: "/containers/create", body: strings.Repeat(`{"a":`, 100), status: 400, answer: "nested"},
	{method: "POST", path: "/containers/prune", status: 200, call: "prune containers {}"},
	{method: "GET", path: "/containers/web/json?size=1", status: 200, call: "inspect web size=true"},
	{method: "GET", path: "/containers//web/json", status: 200, call: "inspect web size=false"},
	{method: "GET", path: "/containers/web/top?ps_args=-o%20pid", status: 200, call: `top web "-o pid"`},
	{method: "GET", path: "/containers/web/logs?stdout=1&tail=5&since=1.5", status: 200, call: `logs web {"Stdout":true,"Stderr":false,"Follow":false,"Timestamps":false,"Details":false,"Since":"1970-01-01T00:00:01.5Z","Until":"0001-01-01T00:00:00Z","Tail":5}`},
	{method: "GET", path: "/containers/web/logs", status: 400, answer: "must specify at least one"},
	{method: "GET", path: "/containers/web/changes", status: 200, call: "changes web", answer: `[{"Kind":1,"Path":"/x"}]`},
	{method: "GET", path: "/containers/web/export", status: 200, call: "export web", answer: "tar"},
	{method: "GET", path: "/containers/web/stats?stream=0&one-shot=1", status: 200, call: "stats web stream=false one-shot=true", answer: `"os_type":"linux"`},
	{method: "GET", path: "/v1.40/containers/web/stats?stream=0&one-shot=1", status: 200, call: "stats web stream=false one-shot=false"},
	{method: "HEAD", path: "/containers/web/archive?path=/x", status: 200, call: "stat web /x"},
	{method: "GET", path: "/containers/web/archive?path=/x", status: 200, call: "archive web /x", answer: "tar"},
	{method: "GET", path: "/containers/web/archive", status: 400, answer: "path cannot be empty"},
	{method: "PUT", path: "/containers/web/archive?path=/x&noOverwriteDirNonDir=1&copyUIDGID=true", body: "tar", status: 200, call: `extract web /x noOverwriteDirNonDir=true copyUIDGID=true "tar"`},
	{method: "POST", path: "/containers/web/start?detachKeys=ctrl-a", status: 204, call: `start web keys="ctrl-a"`},
	{method: "POST", path: "/containers/web/start?detachKeys=ctrl-1", status: 400, answer: "detach keys"},
	{method: "POST", path: "/containers/web/start", body: `{"Binds":[]}`, status: 400, answer: "non-empty request body"},
	{method: "POST", path: "/containers/web/stop?t=3&signal=INT", status: 204, call: "stop web signal=INT t=3"},
	{method: "POST", path: "/v1.41/containers/web/stop?signal=INT", status: 204, call: "stop web signal= t=-"},
	{method: "POST", path: "/containers/web/restart?t=-1", status: 204, call: "restart web signal= t=-1"},
	{method: "POST", path: "/containers/web/kill?signal=9", status: 204, call: "kill web signal=9"},
	{method: "POST", path: "/containers/web/pause", status: 204, call: "pause web"},
	{method: "POST", path: "/containers/web/unpause", status: 204, call: "unpause web"},
	{method: "POST", path: "/containers/web/rename?name=app", status: 204, call: "rename web app"},
	{method: "POST", path: "/containers/web/rename", status: 400, answer: "empty"},
	{method: "POST", path: "/containers/web/update", body: `{"Memory":7,"PidsLimit":-1,"BlkioWeightDevice":[{}]}`, status: 200, call: "update web memory=7 pids=true weight=1"},
	{method: "POST", path: "/v1.54/containers/web/update", body: `{"BlkioWeightDevice":[{}]}`, status: 200, call: "update web memory=0 pids=false weight=0"},
	{method: "POST", path: "/containers/web/resize?h=24&w=80", status: 200, call: "resize web 80x24"},
	{method: "POST", path: "/containers/web/resize?h=24", status: 400, answer: "resize width"},
	{method: "POST", path: "/containers/web/resize?h=70000&w=1", status: 400, answer: "resize height"},
	{method: "POST", path: "/containers/web/wait?condition=next-exit", status: 200, call: "wait web next-exit", answer: `{"StatusCode":7}`},
	{method: "POST", path: "/v1.29/containers/web/wait?condition=next-exit", status: 200, call: "wait web not-running"},
	{method: "POST", path: "/containers/web/wait?condition=never", status: 400, answer: "invalid condition"},
	{method: "POST", path: "/containers/web/attach?detachKeys=oops", status: 400, answer: "detach keys"},
	{method: "GET", path: "/containers/web/attach/ws?detachKeys=oops", status: 400, answer: "detach keys"},
	{method: "POST", path: "/containers/web/exec", body: `{"Cmd":["true"],"ConsoleSize":[24,80]}`, status: 201, call: `"ConsoleSize":[24,80]`, answer: `{"Id":"e0"}`},
	{method: "POST", path: "/v1.41/containers/web/exec", body: `{"Cmd":["true"],"ConsoleSize":[24,80]}`, status: 201, call: `exec create web {"User":"","Privileged":false,"Tty":false,"AttachStdin"`},
	{method: "POST", path: "/containers/web/exec", body: `{}`, status: 400, answer: "No exec command"},
	{method: "DELETE", path: "/containers/web?force=1&v=1", status: 204, call: "remove web force=true v=true link=false"},
	{method: "POST", path: "/commit?container=web&repo=a/b&tag=c&pause=0&changes=CMD%20x", body: `{}`, status: 201, call: `"Container":"web","Ref":"docker.io/a/b:c","Comment":"","Author":"","Pause":false,"Changes":["CMD x"],"Config":null`, answer: `{"Id":"sha256:abc"}`},
	{method: "POST", path: "/commit?container=web&repo=A", status: 400, answer: "invalid reference"},

	{method: "POST", path: "/exec/e0/start", body: `{"Detach":true}`, status: 200, call: `exec start e0 {"Detach":true,"Tty":false}`},
	{method: "POST", path: "/exec/e0/resize?h=1&w=2", status: 200, call: "exec resize e0 2x1"},
	{method: "GET", path: "/exec/e0/json", status: 200, call: "exec inspect e0", answer: `"ID":"e0"`},

	{method: "GET", path: "/images/json?all=1&shared-size=1&manifests=1", status: 200, call: "images {} all=true shared=true manifests=true", answer: `"Containers":1`},
	{method: "GET", path: "/v1.24/images/json?filter=busy*", status: 200, call: `images {"reference":{"busy*":true}} all=false shared=false manifests=false`, answer: `"RepoTags":["<none>:<none>"]`},
	{method: "GET", path: "/images/search?term=x", status: 501, answer: "cannot search"},
	{method: "GET", path: "/images/get?names=a&names=b:c", status: 200, call: "save [a b:c] null", answer: "tar"},
	{method: "GET", path: "/images/get", status: 400, answer: "no image"},
	{method: "GET", path: "/images/reg.example/a/b:c/get", status: 200, call: "save [reg.example/a/b:c] null"},
	{method: "GET", path: `/images/a/get?platform={"os":"linux","architecture":"arm64"}`, status: 200, call: `save [a] [{"architecture":"arm64","os":"linux"}]`},
	{method: "POST", path: "/images/load?quiet=0", body: "tar", status: 200, call: `load "tar" null quiet=false`, answer: `Loaded image: busybox:latest`},
	{method: "POST", path: "/images/create?fromImage=busybox&tag=latest&platform=linux/amd64", status: 200, call: `pull docker.io/library/busybox:latest platform=linux/amd64 all=false auth={"username":"u","password":"p?\u003e"}`, header: map[string]string{"X-Registry-Auth": auth}, answer: `"status":"Downloading","progressDetail":{"current":50,"total":100}`},
	{method: "POST", path: "/images/create?fromImage=busybox:", status: 200, call: `pull docker.io/library/busybox platform= all=true auth=null`},
	{method: "POST", path: "/images/create?fromImage=busybox&tag=sha256:" + strings.Repeat("a", 64), status: 200, call: "pull docker.io/library/busybox@sha256:aaaa"},
	{method: "POST", path: "/images/create?fromImage=BAD", status: 400, answer: "invalid reference"},
	{method: "POST", path: "/images/create?fromImage=scratch", status: 403, answer: "reserved"},
	{method: "POST", path: "/images/create?fromSrc=-&repo=a&changes=CMD%20x", body: "tar", status: 200, call: `import "tar" docker.io/library/a:latest "Imported from -" platform= [CMD x]`, answer: "sha256:abc"},
	{method: "POST", path: "/images/create", status: 400, answer: "must be given"},
	{method: "POST", path: "/images/prune", status: 200, call: "image prune {} inuse=1"},
	{method: "GET", path: "/images/a/b:c/json?manifests=1", status: 200, call: "image inspect a/b:c platform= manifests=true"},
	{method: "GET", path: `/images/a/json?platform={"os":"linux"}`, status: 400, answer: "both OS and Architecture"},
	{method: "GET", path: "/images/a/history", status: 200, call: "history a platform=", answer: "[]"},
	{method: "GET", path: "/images/a/attestations", status: 501, answer: "cannot read attestations"},
	{method: "GET", path: "/v1.54/images/a/attestations", status: 400, answer: "requires minimum API version 1.55"},
	{method: "POST", path: "/images/reg.example:5000/a/push?tag=b", status: 200, call: "push reg.example:5000/a:b platform= all=false auth=null", answer: "Pushed"},
	{method: "POST", path: "/images/a/push", status: 200, call: "push docker.io/library/a platform= all=true auth=null"},
	{method: "POST", path: "/images/a:b/tag?repo=c&tag=d", status: 201, call: "tag a:b docker.io/library/c:d"},
	{method: "POST", path: "/images/a/tag?repo=sha256&tag=d", status: 400, answer: "ambiguous"},
	{method: "DELETE", path: "/images/a/b:c?force=1", status: 200, call: "image remove a/b:c force=true noprune=false inuse=1", answer: "[]"},
	{method: "GET", path: "/distribution/a/b:c/json", status: 200, call: "distribution docker.io/a/b:c auth=null"},

	{method: "GET", path: "/networks", status: 200, call: "network list {}", answer: `"Id":"n0"`},
	{method: "GET", path: "/networks/", status: 200, call: "network list {}"},
	{method: "GET", path: "/v1.27/networks", status: 200, call: "network inspect n0", answer: `"Containers"`},
	{method: "POST", path: "/networks/create", body: `{"Name":"x","EnableIPv4":false}`, status: 201, call: `"Name":"x","Driver":"","Scope":"","EnableIPv4":false`, answer: `"Id":"n0"`},
	{method: "POST", path: "/v1.47/networks/create", body: `{"Name":"x","EnableIPv4":false,"CheckDuplicate":true}`, status: 201, call: `"Name":"x","Driver":"","Scope":"","IPAM":null`},
	{method: "POST", path: "/networks/create", body: `{"Name":"x","IPAM":{"Config":[{"Subnet":"nonsense"}]}}`, status: 400, answer: "invalid JSON"},
	{method: "POST", path: "/networks/create", body: `{}`, status: 400, answer: "name is empty"},
	{method: "POST", path: "/networks/prune", status: 200, call: "network prune {}"},
	{method: "GET", path: "/networks/net", status: 200, call: "network inspect net", answer: `"Status"`},
	{method: "POST", path: "/networks/net/connect", body: `{"Container":"web","EndpointConfig":{"Aliases":["db"]}}`, status: 200, call: `network connect net {"Container":"web"`},
	{method: "POST", path: "/networks/net/connect", body: `{}`, status: 400, answer: "no container"},
	{method: "POST", path: "/networks/net/disconnect", body: `{"Container":"web","Force":true}`, status: 200, call: `network disconnect net {"Container":"web","Force":true}`},
	{method: "DELETE", path: "/networks/net", status: 204, call: "network remove net"},

	{method: "GET", path: "/volumes", status: 200, call: "volume list {}", answer: `"Volumes":[]`},
	{method: "POST", path: "/volumes/create", body: `{"Name":"v"}`, status: 201, call: `volume create {"Name":"v"}`},
	{method: "POST", path: "/volumes/create", status: 201, call: "volume create {}"},
	{method: "POST", path: "/volumes/prune", status: 200, call: "volume prune {}"},
	{method: "POST", path: "/v1.41/volumes/prune", status: 200, call: `volume prune {"all":{"true":true}}`},
	{method: "GET", path: "/volumes/v", status: 200, call: "volume inspect v"},
	{method: "PUT", path: "/volumes/v", status: 503, answer: "swarm is unavailable"},
	{method: "DELETE", path: "/volumes/v?force=1", status: 204, call: "volume remove v force=true"},

	{method: "POST", path: "/build", status: 501, answer: "servin-buildd"},
	{method: "POST", path: "/build/cancel", status: 501, answer: "servin-buildd"},
	{method: "POST", path: "/build/prune", status: 200, answer: `"SpaceReclaimed":0`},
	{method: "POST", path: "/session", status: 501, answer: "servin-buildd"},
	{method: "POST", path: "/grpc", status: 501, answer: "servin-buildd"},

	{method: "GET", path: "/plugins", status: 200, answer: "[]"},
	{method: "GET", path: "/plugins/privileges", status: 501},
	{method: "POST", path: "/plugins/pull?remote=a/b", body: `[]`, status: 501},
	{method: "POST", path: "/plugins/pull", status: 400, answer: "invalid reference"},
	{method: "POST", path: "/plugins/p/set", body: `[`, status: 400, answer: "invalid JSON"},
	{method: "POST", path: "/plugins/create", status: 501},
	{method: "GET", path: "/plugins/a/b/json", status: 404, answer: `plugin \"a/b\" not found`},
	{method: "DELETE", path: "/plugins/a", status: 404},
	{method: "POST", path: "/plugins/a/enable", status: 404},
	{method: "POST", path: "/plugins/a/disable", status: 404},
	{method: "POST", path: "/plugins/a/upgrade", status: 404},
	{method: "POST", path: "/plugins/a/push", status: 404},
	{method: "POST", path: "/plugins/a/set", status: 404},

	{method: "POST", path: "/servin/run", body: `{}`, status: 400, answer: "config cannot be empty"},
	{method: "POST", path: "/servin/containers/web/exec", body: `{}`, status: 400, answer: "No exec command specified"},
	{method: "GET", path: "/servin/health", status: 200, answer: `"Status":"ok"`},
	{method: "GET", path: "/servin/doctor", status: 200, call: "doctor", answer: "[]"},
	{method: "POST", path: "/servin/doctor/fix", body: `{"Actions":["a","b"]}`, status: 200, call: "fix [a b]", answer: `{"Done":[]}`},
	{method: "GET", path: "/servin/drained?full=1", status: 204, call: "drained full=true"},
	{method: "POST", path: "/servin/prune", body: `{"All":true}`, status: 200, call: `prune {"All":true}`},
	{method: "POST", path: "/servin/shutdown", body: `{"Containers":true}`, status: 204, call: "shutdown containers=true"},
	{method: "POST", path: "/servin/lease?id=short", status: 400, answer: "cannot hold lease"},
	{method: "GET", path: "/servin/alerts", status: 404, answer: "no alert rules"},
	{method: "POST", path: "/servin/alerts/x/test", status: 404, answer: "no alert rules"},
	{method: "GET", path: "/metrics", status: 200, call: "metrics", answer: "servin_up 1"},

	{method: "GET", path: "/nowhere", status: 404, answer: `{"message":"page not found"}`},
	{method: "PATCH", path: "/info", status: 404, answer: "page not found"},
	{method: "OPTIONS", path: "/containers/json", status: 200},
	{method: "GET", path: "/v1.23/info", status: 400, answer: "client version 1.23 is too old"},
	{method: "GET", path: "/v1.57/info", status: 400, answer: `{"message":"client version 1.57 is too new. Maximum supported API version is 1.56"}`},
	{method: "GET", path: "/v2.0/info", status: 400, answer: "too new"},
	{method: "GET", path: "/v1.x/info", status: 400, answer: "invalid API version"},
	{method: "GET", path: "/info?a=%zz", status: 400, answer: "invalid query"},
	{method: "GET", path: "/containers/a%01b/json", status: 400, answer: "control character"},
	{method: "GET", path: "/containers/a/b/json", status: 200, call: "inspect a/b size=false"},
	{method: "GET", path: "/containers/a/b/top", status: 404, answer: "page not found"},
	{method: "GET", path: "/containers//json", status: 404, answer: "page not found"},
}

func swarmCases() []routeCase {
	var out []routeCase
	for _, r := range routes(Config{}) {
		for _, p := range []string{"/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs"} {
			if firstElement(r.pattern) == p {
				answer := "This node is not a swarm manager."
				switch r.pattern {
				case "/swarm/leave":
					answer = "This node is not part of a swarm"
				case "/swarm/init", "/swarm/join":
					answer = "swarm mode"
				}
				out = append(out, routeCase{method: r.method, path: strings.Replace(r.pattern, "{id}", "x", 1), status: 503, answer: answer})
			}
		}
	}
	return out
}

func TestRoutes(t *testing.T) {
	f := &fake{}
	_, client := serveFake(t, f)
	rt := newRouter(routes(Config{}))
	covered := map[string]bool{}
	for _, c := range slices.Concat(routeCases, swarmCases(), ownCases) {
		path, _, _ := strings.Cut(c.path, "?")
		if _, p, err := cutVersion(path); err == nil {
			if r, _ := rt.find(c.method, p); r != nil {
				covered[r.method+" "+r.pattern] = true
			}
		}
		t.Run(c.method+" "+path, func(t *testing.T) {
			f.calls = nil
			req := newRequest(t, c)
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != c.status {
				t.Fatalf("status %d, want %d: %s", resp.StatusCode, c.status, b)
			}
			if got := f.last(); (c.call == "") != (got == "") || !strings.Contains(got, c.call) {
				t.Errorf("backend saw %q, want %q", got, c.call)
			}
			if !strings.Contains(string(b), c.answer) {
				t.Errorf("answer %q, want %q in it", b, c.answer)
			}
			if v := resp.Header.Get("Api-Version"); v != MaxAPIVersion {
				t.Errorf("Api-Version is %q", v)
			}
		})
	}
	// Attach and exec start take the connection over: stream_test.go.
	covered["POST /containers/{id}/attach"] = true
	covered["POST /servin/containers/{id}/checkpoint"] = true // likewise, checkpoints_test.go
	for _, r := range routes(Config{}) {
		if !covered[r.method+" "+r.pattern] {
			t.Errorf("no case for %s %s", r.method, r.pattern)
		}
	}
}

func newRequest(t *testing.T, c routeCase) *http.Request {
	t.Helper()
	path := strings.NewReplacer(`{"`, "%7B%22", `"`, "%22", "{", "%7B", "}", "%7D", "[", "%5B", "]", "%5D").Replace(c.path)
	var body io.Reader
	if c.body != "" {
		body = strings.NewReader(c.body)
	}
	req, err := http.NewRequest(c.method, "http://docker", body)
	if err != nil {
		t.Fatal(err)
	}
	// Opaque keeps what url.Parse would refuse or clean.
	req.URL.Opaque = path
	if c.body != "" && (strings.HasPrefix(c.body, "{") || strings.HasPrefix(c.body, "[")) {
		req.Header.Set("Content-Type", "application/json")
	}
	for k, v := range c.header {
		req.Header.Set(k, v)
	}
	return req
}

func TestErrorsBecomeStatuses(t *testing.T) {
	f := &fake{}
	_, client := serveFake(t, f)
	for kind, status := range map[fault.Kind]int{
		fault.Internal: 500, fault.Invalid: 400, fault.Unauthorized: 401, fault.Forbidden: 403, fault.NotFound: 404,
		fault.NotModified: 304, fault.Conflict: 409, fault.Gone: 410, fault.Unsupported: 501, fault.Unavailable: 503,
		fault.Exhausted: 503, fault.DeadlineExceeded: 504, fault.NotAcceptable: 406,
	} {
		f.err = fault.New(kind, "cannot do it")
		resp, err := client.Post("http://docker/containers/x/start", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		want := `{"message":"cannot do it"}`
		if status == 304 {
			want = ""
		}
		if resp.StatusCode != status || trim(b) != want {
			t.Errorf("kind %d: status %d, body %q; want %d, %q", kind, resp.StatusCode, b, status, want)
		}
	}
	if resp, err := client.Get("http://docker/v1.20/info"); err != nil {
		t.Fatal(err)
	} else {
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if strings.HasPrefix(string(b), "{") {
			t.Errorf("clients before 1.24 expect plain text, got %q", b)
		}
	}
}

func TestLimits(t *testing.T) {
	_, client := serveFake(t, &fake{})
	big := `{"Image":"` + strings.Repeat("x", maxJSON) + `"}`
	for _, length := range []int64{int64(len(big)), -1} {
		req, _ := http.NewRequest("POST", "http://docker/containers/create", io.LimitReader(strings.NewReader(big), int64(len(big))))
		req.ContentLength = length
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("length %d: status %d", length, resp.StatusCode)
		}
	}
	req, _ := http.NewRequest("POST", "http://docker/containers/create", strings.NewReader("Image=x"))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 400 {
		t.Errorf("a form as body: status %d", resp.StatusCode)
	}
}

// TestRouteDocs keeps docs/api.md equal to the table.
func TestRouteDocs(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# API

The engine serves the Docker Engine API, versions ` + MinAPIVersion + ` to ` + MaxAPIVersion + `, and a few routes of its own under
` + "`/servin/`" + ` and ` + "`/metrics`" + `. A path may start with ` + "`/v1.NN`" + `; without it the newest version is meant.
Docker's routes behave as the [Engine API reference](https://docs.docker.com/reference/api/engine/) says for the
version asked for. Errors are ` + "`{\"message\": \"…\"}`" + `.

Our own routes (types in package ` + "`api`" + `):

| route | does |
|---|---|
| ` + "`POST /servin/run`" + ` | creates, attaches, starts and waits in one round trip: body ` + "`RunRequest`" + `, upgraded stream of frames |
| ` + "`POST /servin/containers/{name}/exec`" + ` | creates and starts an exec and tells its end in one round trip: body as of ` + "`POST /containers/{name}/exec`" + `, answered as a run is; the id of the first frame is the exec's |
| ` + "`GET /servin/health`" + ` | ` + "`Health`" + `; waits for nothing |
| ` + "`GET /servin/doctor`" + ` | checks the host, a list of ` + "`Finding`" + ` |
| ` + "`POST /servin/doctor/fix`" + ` | carries out the actions of findings that the user agreed to, ` + "`FixRequest` to `FixReport`" + ` |
| ` + "`GET /servin/drained?full=1`" + ` | 204 once no teardown is pending and, with full, the pool of parked sandboxes is full |
| ` + "`POST /servin/prune`" + ` | ` + "`PruneRequest`" + ` to ` + "`PruneReport`" + ` |
| ` + "`POST /servin/shutdown`" + ` | ` + "`ShutdownRequest`" + `; 204 before the daemon leaves |
| ` + "`POST /servin/lease?id=ID`" + ` | answers at once and goes on as long as the client holds it; ten seconds after the last holder left, what has the label ` + "`io.servin.lease=ID`" + ` is removed |
| ` + "`GET /servin/volumes/{name}/backup?pause=1&size=1`" + ` | streams an archive of a volume (zstd); the connection is cut when something fails midway |
| ` + "`POST /servin/volumes/{name}/restore?replace=1`" + ` | makes a volume, or replaces its content, of such an archive: ` + "`VolumeArchive`" + ` |
| ` + "`GET /servin/volumes/{name}/export`" + `, ` + "`POST …/import`" + ` | the same with a plain tar |
| ` + "`POST /servin/volumes/{name}/clone`" + ` | ` + "`VolumeClone`" + ` to a volume |
| ` + "`POST /servin/containers/{id}/checkpoint`" + ` | ` + "`CheckpointStart`" + `; a framed stream: the checkpoint as a tar, and a ` + "`CheckpointEvent`" + ` in each control frame. After ` + "`Ready`" + ` the line ` + "`commit`" + ` ends the container; without it the container goes on |
| ` + "`POST /servin/containers/{id}/restore`" + ` | ` + "`RestoreOptions`" + ` to ` + "`Restored`" + `: a new container of a checkpoint that the engine keeps |
| ` + "`POST /servin/checkpoints/import?options=JSON`" + ` | the tar, to ` + "`Restored`" + ` |
| ` + "`GET /servin/alerts`" + `, ` + "`POST /servin/alerts/{rule or action}/test`" + ` | ` + "`Alerts`" + `; carries actions out and tells how that went, a list of ` + "`AlertTest`" + ` |
| ` + "`GET`, `POST /servin/secrets`" + `, ` + "`GET`, `DELETE …/{name}`, `POST …/{name}/update`" + ` | ` + "`SecretSpec`" + ` to ` + "`Secret`" + `; a value that was stored is never answered. The same below ` + "`/servin/configs`" + `, where the value of one is |
| ` + "`POST /servin/secrets/unlock`, `…/lock`, `…/rotate-key`" + ` | ` + "`SecretKey`" + `; the passphrase that secrets are encrypted with |
| ` + "`GET /servin/signatures?image=`" + ` | what the registry holds in signatures of an image, unchecked, as ` + "`Signatures`; `X-Registry-Auth`" + ` |
| ` + "`GET /servin/policy`, `POST …/reload`, `…/check`, `…/test`" + ` | ` + "`Policy`; reads the file again; a document, and a `RunRequest`, to `PolicyVerdict`" + ` |
| ` + "`GET /servin/audit?since=1h&follow=1`, `…/audit/verify`" + ` | lines of ` + "`AuditRecord`; `AuditReport`" + ` |
| ` + "`GET /metrics`" + ` | Prometheus text; on the unix socket and over TLS alone |

Listeners: a unix socket of mode 0660; tcp with TLS and client certificates; plain tcp on a loopback address with
` + "`--insecure-tcp`" + `, where requests with an ` + "`Origin`" + ` or a foreign ` + "`Host`" + ` get 403.

[The state of each of Docker's routes](api-routes.md) is written by the contract test, which compares answers with
Docker's API document.

## Our own routes

` + "`{name}`" + ` may hold slashes, ` + "`{id}`" + ` may not.

` + ownRoutes() + `
## Types of our own routes
` + ownTypes(t))
	const path = "../../docs/api.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != b.String() {
		t.Errorf("docs/api.md differs from the route table (%v): go test ./internal/dockerapi -run RouteDocs -update", err)
	}
}
