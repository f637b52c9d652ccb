package build

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSyntaxImage builds with a frontend that a Dockerfile names: BuildKit's own,
// from its module, as an image of this engine and of a registry.
func TestSyntaxImage(t *testing.T) {
	if !long {
		t.Skip("SKIP: building BuildKit's frontend takes minutes: make test-long")
	}
	dir := t.TempDir()
	build := exec.Command("go", "build", "-mod=mod", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, "dockerfile-frontend"), "github.com/moby/buildkit/frontend/dockerfile/cmd/dockerfile-frontend")
	build.Dir, build.Env = "../../buildd", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the frontend: %v: %s", err, out)
	}
	e := start(t, "")
	reg := startRegistry(t)
	label := `LABEL moby.buildkit.frontend.network.none="true" moby.buildkit.frontend.caps="moby.buildkit.frontend.inputs,moby.buildkit.frontend.subrequests,moby.buildkit.frontend.contexts"`
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nCOPY dockerfile-frontend /bin/dockerfile-frontend\n"+label+"\nENTRYPOINT [\"/bin/dockerfile-frontend\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e.must("build", "-q", "-t", "frontend:1", "-t", reg+"/frontend:1", dir)
	e.must("push", "-q", reg+"/frontend:1")
	for _, ref := range []string{"frontend:1", reg + "/frontend:1"} {
		file := "# syntax=" + ref + "\nFROM bb\nARG WHO=nobody\nRUN <<E\necho made for $WHO > /f\nE\nRUN --mount=type=secret,id=s cat /run/secrets/s >> /f\nCMD cat /f\n"
		if err := os.WriteFile(e.Dir+"/s", []byte("told\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		ctx := e.context(map[string]string{"Dockerfile": file})
		e.must("build", "--no-cache", "-t", "made", "--build-arg", "WHO="+strings.NewReplacer(":", "-", "/", "-").Replace(ref), "--secret", "id=s,src="+e.Dir+"/s", ctx)
		if got := e.must("run", "--rm", "made"); !strings.HasPrefix(got, "made for ") || !strings.HasSuffix(got, "told") {
			t.Errorf("%s: %q", ref, got)
		}
	}
	// What it has to say about a Dockerfile comes from it, too.
	r := e.servin("build", e.context(map[string]string{"Dockerfile": "# syntax=frontend:1\nFROM bb\nNONSENSE\n"}))
	if r.code == 0 || !strings.Contains(r.err, "NONSENSE") {
		t.Error(r)
	}
	r = e.servin("build", e.context(map[string]string{"Dockerfile": "# syntax=" + reg + "/none:1\nFROM bb\n"}))
	if r.code == 0 || !strings.Contains(r.err, "none:1") {
		t.Error(r)
	}
}

// TestScanner has an image of ours write the inventory of what was built, by the
// protocol that BuildKit's scanners speak.
func TestScanner(t *testing.T) {
	e := start(t, "")
	script := `set -e
name=$(basename "$BUILDKIT_SCAN_SOURCE")
test -e "$BUILDKIT_SCAN_SOURCE/built"
echo '{"_type":"https://in-toto.io/Statement/v0.1","predicateType":"https://spdx.dev/Document","predicate":{"spdxVersion":"SPDX-2.3","name":"'"$(cat "$BUILDKIT_SCAN_SOURCE/built")"'"}}' > "$BUILDKIT_SCAN_DESTINATION/$name.spdx.json"
`
	e.must("build", "-q", "-t", "scanner:1", e.context(map[string]string{"Dockerfile": "FROM bb\nCOPY scan /scan\nENTRYPOINT [\"sh\", \"/scan\"]\n", "scan": script}))
	out := e.Dir + "/out"
	e.must("build", "--sbom", "generator=scanner:1", "-o", out, e.context(map[string]string{"Dockerfile": "FROM bb\nRUN echo the work of a step > /built\n"}))
	files, _ := filepath.Glob(out + "/sbom*.json")
	if len(files) != 1 {
		list, _ := os.ReadDir(out)
		t.Fatalf("%v, of %v", files, list)
	}
	b, err := os.ReadFile(files[0])
	var s struct {
		PredicateType string
		Predicate     struct{ Name string }
		Subject       []struct{ Name string }
	}
	if err != nil || json.Unmarshal(b, &s) != nil || s.PredicateType != "https://spdx.dev/Document" || s.Predicate.Name != "the work of a step" {
		t.Errorf("%v %s", err, b)
	}
	// One that fails fails the build.
	e.must("build", "-q", "-t", "scanner:2", e.context(map[string]string{"Dockerfile": "FROM bb\nENTRYPOINT [\"sh\", \"-c\", \"echo out of order >&2; exit 3\"]\n"}))
	if r := e.servin("build", "--sbom", "generator=scanner:2", "-o", out+"2", e.context(map[string]string{"Dockerfile": "FROM bb\n"})); r.code == 0 || !strings.Contains(r.err, "out of order") {
		t.Error(r)
	}
}
