package build

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/test/harness"
)

// TestDockerfile builds with what Dockerfiles have today.
func TestDockerfile(t *testing.T) {
	e := start(t, "")
	agent, err := net.Listen("unix", e.Dir+"/agent")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	ctx := e.context(map[string]string{
		"Dockerfile": `# syntax is built in
FROM bb AS base
ARG A
RUN <<EOF
set -e
echo "here $A" > /here
EOF
COPY <<one <<two /docs/
first
one
second
two
RUN --mount=type=secret,id=s,env=S --mount=type=secret,id=s test "$(cat /run/secrets/s)" = hush && test "$S" = hush
RUN --mount=type=ssh test -S "$SSH_AUTH_SOCK"
RUN --mount=type=cache,target=/cache echo x >> /cache/n && wc -l < /cache/n > /runs
RUN --mount=type=bind,target=/ctx cat /ctx/sub/file > /bound && ! touch /ctx/new
RUN --mount=type=tmpfs,target=/t touch /t/f
RUN test ! -e /run/secrets/s && test ! -e /t/f && test ! -e /cache/n
RUN --network=none ! ip link | grep eth0
USER web
WORKDIR /w
RUN id -un > /tmp/me
FROM base AS linked
COPY --link --chown=web --chmod=640 sub /sub/
ADD --chmod=755 data.tar /unpacked/
FROM scratch AS files
COPY --from=base /docs /
COPY --from=extra /from-extra /
FROM linked
HEALTHCHECK --interval=5s CMD true
SHELL ["/bin/sh", "-ec"]
ONBUILD RUN true
CMD cat /here
`,
		"sub/file": "bound", "sub/.hidden": "h", "secret": "hush",
	})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Name: "inner", Mode: 0o644, Size: 2})
	_, _ = w.Write([]byte("in"))
	_ = w.Close()
	if err := os.WriteFile(ctx+"/data.tar", b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	extra := e.context(map[string]string{"from-extra": "extra"})
	common := []string{"--build-context", "extra=" + extra, "--secret", "id=s,src=" + ctx + "/secret", "--ssh", "default=" + e.Dir + "/agent"}
	build := func(args ...string) result {
		return e.servin(slices.Concat([]string{"build"}, common, args, []string{ctx})...)
	}

	iid, meta := e.Dir+"/iid", e.Dir+"/meta"
	r := build("-t", "d1", "--build-arg", "A=and now", "--iidfile", iid, "--metadata-file", meta, "--progress", "plain")
	if r.code != 0 {
		t.Fatal(r)
	}
	sh := func(script string) string { return e.must("run", "--rm", "--user", "0", "d1", "sh", "-c", script) }
	for script, want := range map[string]string{
		"cat /here":                            "here and now",
		"cat /docs/one /docs/two":              "first\nsecond",
		"cat /bound /tmp/me":                   "boundweb",
		"cd /sub; ls -A; stat -c '%a %U' file": ".hidden\nfile\n640 web",
		"cat /unpacked/inner":                  "in",
		"grep -r hush / --include='*' -l -s --exclude-dir=proc --exclude-dir=sys | head -1": "",
	} {
		if got := sh(script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	id, _ := os.ReadFile(iid)
	if got := e.must("images", "inspect", "--format", "{{.Id}}", "d1"); got != string(id) {
		t.Errorf("--iidfile has %s, the image is %s", id, got)
	}
	var m map[string]any
	mb, _ := os.ReadFile(meta)
	if err := json.Unmarshal(mb, &m); err != nil || m["containerimage.config.digest"] != string(id) {
		t.Errorf("--metadata-file: %v, %s", err, mb)
	}
	// The cache mount lives on.
	if r := build("-t", "d1", "--build-arg", "A=again"); r.code != 0 {
		t.Fatal(r)
	}
	if got := sh("cat /runs"); got != "2" {
		t.Errorf("the cache mount was used %s times", got)
	}

	// Other outputs.
	out := e.Dir + "/out"
	if r := build("--target", "files", "-o", out); r.code != 0 {
		t.Fatal(r)
	}
	ents, _ := os.ReadDir(out)
	if len(ents) != 3 || ents[0].Name() != "from-extra" {
		t.Errorf("--output of a directory: %v", ents)
	}
	for kind, member := range map[string]string{"tar": "one", "oci": "index.json", "docker": "manifest.json"} {
		file := e.Dir + "/out." + kind
		if r := build("--target", "files", "-t", "saved", "-o", "type="+kind+",dest="+file); r.code != 0 {
			t.Errorf("--output type=%s: %s", kind, r)
		} else if names := members(t, file); !slices.Contains(names, member) {
			t.Errorf("--output type=%s: %v has no %s", kind, names, member)
		}
	}
	if r := e.servin("load", "-i", e.Dir+"/out.docker"); r.code != 0 {
		t.Errorf("load what was built: %s", r)
	}
	before := e.servin("images", "-q").out
	if r := build("--target", "files", "-o", "type=cacheonly", "-t", "kept:nowhere"); r.code != 0 || e.servin("images", "-q").out != before {
		t.Errorf("--output type=cacheonly: %s", r)
	}
	if r := build("--target", "files", "-q"); r.code != 0 || !strings.HasPrefix(r.out, "sha256:") || r.err != "" {
		t.Errorf("--quiet: %s", r)
	}

	// Questions and mistakes.
	contains(t, build("--call", "targets").out, "linked", "files")
	contains(t, e.servin("build", "--check", e.context(map[string]string{"Dockerfile": "FROM bb\nCMD cat /here\n"})).out, "JSONArgsRecommended")
	if r := build("--target", "nosuch"); r.code == 0 {
		t.Errorf("a target that there is not: %s", r)
	}
	for _, args := range [][]string{{"--nosuch"}, {"--network", "nosuch"}, {"--tag", "UPPER"}, {"--output", "nosuch=x"}, {"--memory", "lots"}, {"--squash"}} {
		if r := build(args...); r.code != 125 {
			t.Errorf("%v: %s", args, r)
		}
	}
	failed := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN exit 42\n"})
	if r := e.servin("build", failed); r.code != 42 || !strings.Contains(r.err, "Dockerfile:2") {
		t.Errorf("the exit code and the place of a failed step: %s", r)
	}
}

func members(t *testing.T, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []string
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, h.Name)
	}
}

// TestStandardInput takes a Dockerfile, or a whole context, from a pipe, and
// reaches the engine through the command line's own connection.
func TestStandardInput(t *testing.T) {
	e := start(t, "")
	servin := filepath.Join(e.Bin, "servin")
	if r := e.exec(strings.NewReader("FROM bb\nRUN echo 1 > /n\n"), nil, servin, "build", "-t", "p1", "-"); r.code != 0 {
		t.Fatal(r)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, body := range map[string]string{"./D": "FROM p1\nCOPY f /f\n", "./f": "tarred"} {
		_ = w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))})
		_, _ = w.Write([]byte(body))
	}
	_ = w.Close()
	if r := e.exec(&b, nil, servin, "images", "build", "-f", "D", "-t", "p2", "-"); r.code != 0 {
		t.Fatal(r)
	}
	if got := e.must("run", "--rm", "p2", "cat", "/n", "/f"); got != "1\ntarred" {
		t.Errorf("got %q", got)
	}
	ctx := e.context(map[string]string{"f": "local"})
	r := e.exec(strings.NewReader("FROM bb\nCOPY f /f\n"), nil, servin, "build", "-f", "-", "-t", "p3", ctx)
	if r.code != 0 {
		t.Fatal(r)
	}
	// By a context's name: servin-build asks servin for a connection.
	if r := e.servin("context", "create", "here", "--host", "unix://"+e.Sock()); r.code != 0 {
		t.Fatal(r)
	}
	if r := e.exec(strings.NewReader("FROM p3\n"), []string{"SERVIN_HOST="}, servin, "--context", "here", "build", "-t", "p4", "-"); r.code != 0 {
		t.Fatal(r)
	}
}

// TestOverTCP builds through a listener without TLS, where connections are copied and hosts are looked at.
func TestOverTCP(t *testing.T) {
	e := &engine{Daemon: harness.New(t, "sb", "servin-buildd"), t: t}
	e.Args = []string{"--listen", "tcp://127.0.0.1:2375", "--insecure-tcp"}
	t.Cleanup(e.close)
	e.Boot()
	e.importBusybox()
	ctx := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN --mount=type=secret,id=s cat /run/secrets/s\n", "s": "a secret"})
	for _, argv := range [][]string{{filepath.Join(e.Bin, "servin"), "build"}, {"docker", "build"}} {
		env := []string{"SERVIN_HOST=tcp://127.0.0.1:2375", "DOCKER_HOST=tcp://127.0.0.1:2375", "DOCKER_BUILDKIT=1"}
		if r := e.exec(nil, env, append(argv, "-t", "tcp", "--secret", "id=s,src="+ctx+"/s", ctx)...); r.code != 0 && !strings.Contains(r.err, "buildx component is missing") {
			t.Errorf("%v: %s", argv, r)
		}
	}
}
