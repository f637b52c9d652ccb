package build

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestClassic is docker build without BuildKit: POST /build with version=1.
func TestClassic(t *testing.T) {
	e := start(t, "")
	ctx := e.context(map[string]string{
		"Dockerfile": `FROM bb AS first
ARG WHO=nobody
ENV GREETING=hello
RUN echo "$GREETING $WHO" > /greeting && echo to-stdout && echo to-stderr >&2
COPY . /all/
FROM first AS second
LABEL stage=second
CMD ["cat", "/greeting"]
FROM bb
RUN false
`,
		"kept": "kept", "dropped": "dropped", ".dockerignore": "dropped\n", "deep/a/b": "b",
	})
	r := e.classic("-t", "c1", "-t", "c1:also", "--target", "second", "--build-arg", "WHO=you", "--label", "from=outside", ctx)
	if r.code != 0 {
		t.Fatal(r)
	}
	contains(t, r.out, "Step 1/", " : FROM ", "to-stdout", "to-stderr", "Successfully built ", "Successfully tagged c1:latest", "Successfully tagged c1:also")
	id := e.must("images", "inspect", "--format", "{{.Id}}", "c1")
	if m := regexp.MustCompile(`Successfully built ([0-9a-f]{12})\n`).FindStringSubmatch(r.out); m == nil || !strings.HasPrefix(id, "sha256:"+m[1]) {
		t.Errorf("the stream says %v, the image is %s", m, id)
	}
	if got := e.must("run", "--rm", "c1"); got != "hello you" {
		t.Errorf("the image prints %q", got)
	}
	if got := e.must("run", "--rm", "c1:also", "sh", "-c", "cd /all && find . -type f | sort"); got != "./.dockerignore\n./Dockerfile\n./deep/a/b\n./kept" {
		t.Errorf("the context arrived as %q", got)
	}
	if got := e.must("images", "inspect", "--format", "{{json .Config.Labels}}", "c1"); got != `{"from":"outside","stage":"second"}` {
		t.Errorf("labels: %s", got)
	}

	contains(t, r.out, "Step 1/9 : FROM bb AS first\n ---> ", "Step 2/9 : ARG WHO=nobody\n ---> ", "Step 3/9 : ENV GREETING=hello\n ---> ",
		"Step 4/9 : RUN echo \"$GREETING $WHO\" > /greeting && echo to-stdout && echo to-stderr >&2\n ---> Running in ",
		"\x1b[91mto-stderr\n\x1b[0m", " ---> Removed intermediate container ", "Step 5/9 : COPY . /all/\n ---> ", "Step 6/9 : FROM first AS second\n ---> ",
		"Step 8/9 : CMD [\"cat\", \"/greeting\"]\n ---> ", "Step 9/9 : LABEL from=outside\n ---> ")

	// Again: from the cache, and quiet.
	r = e.classic("-t", "c1", "--target", "second", "--build-arg", "WHO=you", "--build-arg", "NOBODYS=1", "--label", "from=outside", ctx)
	if n := strings.Count(r.out, " ---> Using cache\n"); n != 7 {
		t.Errorf("%d steps came from the cache: %s", n, r)
	}
	contains(t, r.out, "[Warning] One or more build-args [NOBODYS] were not consumed\n")
	if r := e.classic("-q", "--target", "second", "--build-arg", "WHO=you", "--label", "from=outside", ctx); strings.TrimSpace(r.out) != id {
		t.Errorf("quiet: %s, want %s", r, id)
	}
	if r := e.classic("--no-cache", "--target", "first", ctx); strings.Contains(r.out, "Using cache") {
		t.Errorf("--no-cache used it: %s", r.out)
	}

	// What goes wrong, in Docker's words.
	r = e.classic(ctx)
	if r.code != 1 {
		t.Errorf("a failed step: %s", r)
	}
	contains(t, r.all(), "Step 10/10 : RUN false\n ---> Running in ", "The command '/bin/sh -c false' returned a non-zero code: 1")
	for dockerfile, want := range map[string]string{
		"FROM bb\nADD nothere /x\n":                                  "ADD failed: file not found in build context or excluded by .dockerignore: stat nothere: file does not exist",
		"FROM bb\nCOPY --from=0 a /a\n":                              "invalid from flag value 0: refers to current build stage",
		"FROM bb\nCOPY --from=nosuch.invalid/x a /a\n":               "invalid from flag value nosuch.invalid/x: ",
		"FROM scratch\n":                                             "No image was generated. Is your Dockerfile empty?",
		"FROM bb\nSHELL [\"sh\", \"-exc\"]\nRUN exit 3  &  exit 4\n": "The command 'sh -exc exit 3  &  exit 4' returned a non-zero code: 4",
		"RUN true\n": "no build stage in current context",
		"":           "the Dockerfile (Dockerfile) cannot be empty",
	} {
		contains(t, e.classic(e.context(map[string]string{"Dockerfile": dockerfile})).all(), want)
	}
	if r := e.classic("-f", filepath.Join(ctx, "nosuch"), ctx); r.code != 1 {
		t.Errorf("no Dockerfile: %s", r)
	}
	bad := e.context(map[string]string{"Dockerfile": "FROM bb\nNOSUCH thing\n"})
	contains(t, e.classic(bad).all(), "unknown instruction: NOSUCH")
	contains(t, e.classic("--network", "nosuch", bad).all(), "not supported")
	contains(t, e.classic("--squash", bad).all(), "squash")
	contains(t, e.classic(e.context(map[string]string{"Dockerfile": "FROM nosuch.invalid/image\n"})).all(), "nosuch.invalid/image")
}

// TestClassicRemote takes contexts from addresses and standard input.
func TestClassicRemote(t *testing.T) {
	e := start(t, "")
	files := t.TempDir()
	if err := os.WriteFile(files+"/Dockerfile.txt", []byte("FROM bb\nRUN echo fetched > /how\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(http.FileServer(http.Dir(files)))
	defer srv.Close()
	if r := e.classic("-t", "r1", srv.URL+"/Dockerfile.txt"); r.code != 0 {
		t.Fatal(r)
	}
	if got := e.must("run", "--rm", "r1", "cat", "/how"); got != "fetched" {
		t.Errorf("got %q", got)
	}
	in := strings.NewReader("FROM bb\nRUN echo piped > /how\n")
	if r := e.exec(in, []string{"DOCKER_BUILDKIT=0"}, "docker", "build", "-t", "r2", "-"); r.code != 0 {
		t.Fatal(r)
	}
	if got := e.must("run", "--rm", "r2", "cat", "/how"); got != "piped" {
		t.Errorf("got %q", got)
	}
}

// TestClassicLimits gives steps networks and limits.
func TestClassicLimits(t *testing.T) {
	e := start(t, "")
	ctx := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN ip -o link | cut -d: -f2; grep . /etc/hosts; ulimit -n; df /dev/shm | tail -1\n"})
	r := e.classic("--network", "none", "--add-host", "box:10.9.8.7", "--add-host", "up:host-gateway", "--ulimit", "nofile=77:77", "--shm-size", "1m", ctx)
	if r.code != 0 {
		t.Fatal(r)
	}
	contains(t, r.out, "10.9.8.7", "77\n", " 1024 ", "172.17.0.1\tup")
	if strings.Contains(r.out, "eth0") {
		t.Error("network none has a link")
	}
	contains(t, e.classic("--no-cache", ctx).out, "eth0")
	host := e.classic("--no-cache", "--network", "host", ctx)
	contains(t, host.out, "lo")
	mem := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; true\n"})
	contains(t, e.classic("--memory", "64m", mem).out, "67108864")
}

// TestTraced is POST /build with version=2: BuildKit's status as it is.
func TestTraced(t *testing.T) {
	e := start(t, "")
	var body bytes.Buffer
	writeTar(&body, map[string]string{"Dockerfile": "FROM bb\nRUN echo traced > /f\n"})
	resp, err := e.HTTP().Post("http://engine/v1.47/build?version=2&t=traced&buildid=b1", "application/x-tar", &body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var trace int
	var id string
	for dec := json.NewDecoder(resp.Body); ; {
		var m struct {
			ID    string
			Aux   json.RawMessage
			Error string
		}
		if err := dec.Decode(&m); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		switch m.ID {
		case "moby.buildkit.trace":
			trace++
		case "moby.image.id":
			var a struct{ ID string }
			_ = json.Unmarshal(m.Aux, &a)
			id = a.ID
		}
		if m.Error != "" {
			t.Error(m.Error)
		}
	}
	if trace == 0 || id != e.must("images", "inspect", "--format", "{{.Id}}", "traced") {
		t.Errorf("%d traces, image %q", trace, id)
	}
	if resp, err := e.HTTP().Post("http://engine/build?version=2&remote=client-session", "", nil); err != nil || resp.StatusCode != 200 {
		t.Errorf("no session: %v %v", resp, err)
	} else {
		b, _ := io.ReadAll(resp.Body)
		contains(t, string(b), "session")
	}
}
