package dockerapi

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// swagger is what the tests need of Docker's API document.
type swagger struct {
	Info  struct{ Version string }
	Paths map[string]map[string]struct {
		Responses map[string]any
	}
}

func moduleDir(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/moby/api").Output()
	dir := string(bytes.TrimSpace(out))
	if err != nil || dir == "" {
		t.Skipf("SKIP: the module github.com/moby/moby/api is not here: %v", err)
	}
	return dir
}

func readSwagger(t *testing.T, path string) swagger {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var s swagger
	if err := yaml.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestContractRoutes: every path and method of the document is in the table,
// and the newest version served is the document's.
func TestContractRoutes(t *testing.T) {
	s := readSwagger(t, filepath.Join(moduleDir(t), "swagger.yaml"))
	if s.Info.Version != MaxAPIVersion {
		t.Errorf("the document is of version %s, we serve up to %s", s.Info.Version, MaxAPIVersion)
	}
	have := map[string]bool{}
	for _, r := range routes(Config{}) {
		have[r.method+" "+normal(r.pattern)] = true
	}
	n := 0
	for path, ops := range s.Paths {
		for method := range ops {
			if method == "parameters" {
				continue
			}
			n++
			if key := strings.ToUpper(method) + " " + normal(path); !have[key] {
				t.Errorf("%s is documented and not served", key)
			}
		}
	}
	if n < 100 {
		t.Errorf("only %d operations were read", n)
	}
}

// TestContractVersions: what a version's own document has is served to clients
// of that version.
func TestContractVersions(t *testing.T) {
	docs, err := filepath.Glob(filepath.Join(moduleDir(t), "docs", "v1.*.yaml"))
	if err != nil || len(docs) < 30 {
		t.Fatalf("%d documents, %v", len(docs), err)
	}
	since := map[string]version{}
	for _, r := range routes(Config{}) {
		since[r.method+" "+normal(r.pattern)] = r.since
	}
	for _, doc := range docs {
		s := readSwagger(t, doc)
		v, _, err := cutVersion("/v" + s.Info.Version)
		if err != nil {
			t.Fatalf("%s: %v", doc, err)
		}
		for path, ops := range s.Paths {
			for method := range ops {
				key := strings.ToUpper(method) + " " + normal(path)
				if from, ok := since[key]; !ok || v < from {
					t.Errorf("%s: %s is documented and not served", v, key)
				}
			}
		}
	}
}

func normal(path string) string { return strings.ReplaceAll(path, "{id}", "{name}") }

// undocumented lists statuses that we answer on purpose although the document
// does not name them.
var undocumented = map[string][]int{
	// Any request can be malformed, too large or for a version not served.
	"*": {400, 413},
	// What this engine does not do says so.
	"POST /build": {501}, "POST /session": {501}, "GET /images/search": {501}, "GET /images/{name}/attestations": {501},
	"GET /plugins/privileges": {501}, "POST /plugins/pull": {501}, "POST /plugins/create": {501}, "POST /plugins/{name}/upgrade": {404},
	"POST /plugins/{name}/set": {404}, "POST /plugins/{name}/push": {404},
	// The document forgets that names can be reserved.
	"POST /images/create": {403},
	"PUT /volumes/{id}":   {503}, "PUT /volumes/{name}": {503},
}

// TestContractStatuses: what the cases of TestRoutes are answered with is
// documented for the operation.
func TestContractStatuses(t *testing.T) {
	s := readSwagger(t, filepath.Join(moduleDir(t), "swagger.yaml"))
	allowed := map[string][]int{}
	for path, ops := range s.Paths {
		for method, op := range ops {
			key := strings.ToUpper(method) + " " + normal(path)
			for code := range op.Responses {
				if n, err := strconv.Atoi(code); err == nil {
					allowed[key] = append(allowed[key], n)
				}
			}
		}
	}
	_, client := serveFake(t, &fake{})
	rt := newRouter(routes(Config{}))
	for _, c := range append(routeCases, swarmCases()...) {
		path, _, _ := strings.Cut(c.path, "?")
		_, p, err := cutVersion(path)
		r, _ := rt.find(c.method, p)
		if err != nil || r == nil {
			continue
		}
		key := c.method + " " + normal(r.pattern)
		codes, documented := allowed[key]
		if !documented {
			continue
		}
		codes = slices.Concat(codes, undocumented["*"], undocumented[key])
		resp, err := client.Do(newRequest(t, c))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if !slices.Contains(codes, resp.StatusCode) {
			t.Errorf("%s answers %d, documented are %v", key, resp.StatusCode, codes)
		}
		if resp.StatusCode == http.StatusNoContent && resp.ContentLength > 0 {
			t.Errorf("%s: 204 with a body", key)
		}
	}
}
