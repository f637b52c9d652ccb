package build

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestRegistry pushes results, builds on what only a registry has, and leaves and
// takes cache there.
func TestRegistry(t *testing.T) {
	e := start(t, "")
	reg := startRegistry(t)
	ctx := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN cat /proc/sys/kernel/random/uuid > /id\nCMD cat /id\n"})
	e.must("build", "-t", reg+"/made:1", "--push", "--load", ctx)
	first := e.must("run", "--rm", reg+"/made:1", "cat", "/id")
	e.must("rmi", "--force", reg+"/made:1")
	e.must("builder", "prune", "--all", "--force")

	// The base is fetched and unpacked by the engine, once.
	e.must("build", "-t", "on", e.context(map[string]string{"Dockerfile": "FROM " + reg + "/made:1\nRUN cp /id /copy\n"}))
	if got := e.must("run", "--rm", "on", "cat", "/copy"); got != first {
		t.Errorf("the pushed image holds %q, not %q", got, first)
	}

	// Cache by way of the registry, of the image itself, and of a directory.
	dir := e.Dir + "/cache"
	for name, c := range map[string][2]string{
		"registry": {"type=registry,ref=" + reg + "/cache:r", "type=registry,ref=" + reg + "/cache:r"},
		"inline":   {"type=inline", reg + "/inline:1"},
		"local":    {"type=local,dest=" + dir, "type=local,src=" + dir},
	} {
		tag := reg + "/" + name + ":1"
		e.must("build", "-t", tag, "--push", "--load", "--no-cache", "--cache-to", c[0], ctx)
		want := e.must("run", "--rm", tag, "cat", "/id")
		e.must("rmi", "--force", tag)
		e.must("builder", "prune", "--all", "--force")
		e.must("build", "-t", "again", "--cache-from", c[1], ctx)
		if got := e.must("run", "--rm", "again", "cat", "/id"); got != want {
			t.Errorf("%s: the cache was not used", name)
		}
	}
	e.must("builder", "prune", "--all", "--force")
	r := e.classic("-t", "again", "--cache-from", reg+"/inline:1", ctx)
	contains(t, r.out, "Using cache")

	// Attestations.
	e.must("build", "-t", reg+"/attested:1", "--provenance", "mode=max", "--push", "--load", ctx)
	if got := e.must("run", "--rm", reg+"/attested:1", "sh", "-c", "test -s /id && echo ran"); got != "ran" {
		t.Errorf("an image with attestations: %q", got)
	}
	out := e.Dir + "/prov"
	e.must("build", "--provenance", "mode=min", "-o", out, e.context(map[string]string{"Dockerfile": "FROM scratch\nCOPY Dockerfile /\n"}))
	var p struct{ PredicateType string }
	b, err := os.ReadFile(filepath.Join(out, "provenance.json"))
	if err != nil || json.Unmarshal(b, &p) != nil || !strings.Contains(p.PredicateType, "slsa.dev/provenance") {
		t.Errorf("provenance: %v %s", err, b)
	}
}

// TestPlatforms builds for several platforms at once; nothing runs for the
// foreign one.
func TestPlatforms(t *testing.T) {
	e := start(t, "")
	reg := startRegistry(t)
	ctx := e.context(map[string]string{"Dockerfile": "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /arch\n", "amd64": "amd64", "arm64": "arm64"})
	e.must("build", "-t", reg+"/multi:1", "--platform", "linux/amd64,linux/arm64", "--push", ctx)
	e.must("pull", "--platform", "linux/arm64", reg+"/multi:1")
	if got := e.must("images", "inspect", "--format", "{{.Architecture}}", reg+"/multi:1"); got != "arm64" && got != "amd64" {
		t.Errorf("architecture %q", got)
	}
	e.must("build", "-t", "foreign", "--platform", "linux/arm64", ctx)
	if got := e.must("images", "inspect", "--format", "{{.Architecture}}", "foreign"); got != "arm64" {
		t.Errorf("architecture %q", got)
	}
	if r := e.servin("build", "--platform", "nosuch/nosuch/nosuch/x", ctx); r.code != 125 {
		t.Errorf("no platform: %s", r)
	}
}

// buildxVersion is what make test-long builds where no buildx is installed.
const buildxVersion = "v0.35.0"

// buildx finds docker's plugin, or in the long campaign builds it.
func buildx(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{os.Getenv("SERVIN_TEST_BUILDX"), os.Getenv("HOME") + "/.docker/cli-plugins", "/usr/libexec/docker/cli-plugins", "/usr/lib/docker/cli-plugins", "/usr/local/lib/docker/cli-plugins"} {
		if p := filepath.Join(dir, "docker-buildx"); dir != "" {
			if _, err := os.Stat(p); err == nil {
				return p
			}
		}
	}
	if !long {
		t.Skip("SKIP: no docker buildx here (make test-long builds one)")
	}
	dir := t.TempDir()
	p := filepath.Join(dir, "docker-buildx")
	script := "cd " + dir + " && printf 'module x\\ngo 1.26\\n' > go.mod && go get github.com/docker/buildx@" + buildxVersion + " && CGO_ENABLED=0 go build -o docker-buildx github.com/docker/buildx/cmd/buildx"
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot build buildx: %v\n%s", err, b)
	}
	return p
}

// TestBuildx is docker build and docker buildx with the docker driver.
func TestBuildx(t *testing.T) {
	plugin := buildx(t)
	e := start(t, "")
	reg := startRegistry(t)
	conf := e.Dir + "/docker"
	if err := os.MkdirAll(conf+"/cli-plugins", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(plugin, conf+"/cli-plugins/docker-buildx"); err != nil {
		t.Fatal(err)
	}
	docker := func(args ...string) result {
		return e.exec(nil, []string{"DOCKER_CONFIG=" + conf}, append([]string{"docker"}, args...)...)
	}
	must := func(args ...string) result {
		t.Helper()
		r := docker(args...)
		if r.code != 0 {
			t.Fatalf("docker %v: %s", args, r)
		}
		return r
	}
	ctx := e.context(map[string]string{"Dockerfile": "FROM bb\nARG A\nRUN --mount=type=secret,id=s cat /run/secrets/s > /s; echo $A > /a; ip -o link | grep -c eth0 > /net || true\nCMD cat /a\n", "secret": "hush"})
	must("build", "-t", "x1", "--build-arg", "A=one", "--secret", "id=s,src="+ctx+"/secret", ctx)
	if got := strings.TrimSpace(must("run", "--rm", "x1", "cat", "/a", "/s", "/net").out); got != "one\nhush1" {
		t.Errorf("got %q", got)
	}
	contains(t, must("buildx", "ls").out, "docker", "running")
	contains(t, must("buildx", "inspect").out, "BuildKit version:", "overlayfs")
	must("buildx", "build", "--network", "host", "-t", "x2", ctx)
	must("buildx", "build", "-t", reg+"/x:1", "--push", ctx)
	must("buildx", "build", "-o", e.Dir+"/xo", ctx)
	must("buildx", "build", "-t", "x3", "--provenance=true", ctx)
	must("buildx", "build", "--load", "-t", "x3", ctx)
	must("run", "--rm", "x3", "true")
	must("buildx", "build", "--cache-to", "type=registry,ref="+reg+"/xc:1", "--cache-from", "type=registry,ref="+reg+"/xc:1", ctx)
	contains(t, must("buildx", "du").out, "Total:")
	contains(t, must("buildx", "history", "ls").out, "Completed")
	contains(t, must("builder", "prune", "-af").out, "Total")
	must("buildx", "prune", "-af")
	if r := docker("build", e.context(map[string]string{"Dockerfile": "FROM bb\nRUN exit 9\n"})); r.code == 0 {
		t.Errorf("a failed step: %s", r)
	}
	bake := e.context(map[string]string{"Dockerfile": "FROM bb\nARG N\nRUN echo $N > /n\n",
		"docker-bake.json": `{"group":{"default":{"targets":["a","b"]}},"target":{"a":{"args":{"N":"1"},"tags":["bake:a"]},"b":{"args":{"N":"2"},"tags":["bake:b"]}}}`})
	cmd := exec.Command("docker", "buildx", "bake")
	cmd.Dir = bake
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+e.Sock(), "DOCKER_CONFIG="+conf)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("bake: %v %s", err, b)
	}
	if got := strings.TrimSpace(must("run", "--rm", "bake:b", "cat", "/n").out); got != "2" {
		t.Errorf("bake made %q", got)
	}
}
