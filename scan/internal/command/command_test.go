package command

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/scan/internal/sandbox"
)

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || string(want) != got {
		t.Errorf("%s differs (go test -update writes it anew) %v; got\n%s", name, err, got)
	}
}

var date = regexp.MustCompile(`\d{4}-\d{2}-\d{2}`)

func vulnerable(t testing.TB) []byte {
	return saved(t, [][]file{{
		{name: "etc/os-release", text: osRelease},
		{name: "var/lib/dpkg/status", text: dpkg("openssl", "3.0.11-1~deb12u1") + dpkg("zlib", "1.2.13.dfsg-1") + dpkg("zlib-fixed", "9")},
		{name: "app/gone/package.json", text: `{"name":"gone","version":"1.0.0"}`},
	}, {
		{name: "app/.wh.gone"},
		{name: "app/node_modules/left-pad/package.json", text: `{"name":"left-pad","version":"1.3.0","license":"WTFPL"}`},
	}}, nil)
}

// TestScan follows an image from what the engine saves to a report.
func TestScan(t *testing.T) {
	t.Setenv("SERVIN_SCAN_CACHE", t.TempDir())
	code, inv, said := run(t, vulnerable(t), "catalog", "--name", "vuln:1")
	if code != 0 {
		t.Fatal(said)
	}
	if strings.Contains(inv, `"gone"`) {
		t.Error("what a later layer removed is in the inventory")
	}
	_, text, _ := run(t, []byte(inv), "convert", "--format", "table")
	golden(t, "sbom.txt", text)
	for _, f := range []string{"spdx-json", "cyclonedx-json", "syft-json"} {
		if code, out, said := run(t, []byte(inv), "convert", "--format", f); code != 0 || !json.Valid([]byte(out)) || !strings.Contains(out, "left-pad") {
			t.Errorf("%s: %d %s %.300s", f, code, said, out)
		}
	}
	if code, _, said := run(t, []byte(inv), "match"); code != exitNoDatabase || !strings.Contains(said, "--update-db") {
		t.Errorf("without a database: %d %s", code, said)
	}
	db := database(t)
	for name, args := range map[string][]string{"scan.txt": nil, "scan-fixed.txt": {"--only-fixed"}} {
		code, out, said := run(t, []byte(inv), append([]string{"match", "--db", db}, args...)...)
		if code != 0 {
			t.Errorf("%s: %d %s", name, code, said)
		}
		golden(t, name, date.ReplaceAllString(out, "DATE"))
	}
	code, out, said := run(t, []byte(inv), "match", "--db", db, "--format", "json")
	var doc struct {
		Matches []struct{ Vulnerability struct{ ID, Severity string } }
	}
	if err := json.Unmarshal([]byte(out), &doc); code != 0 || err != nil || len(doc.Matches) != 3 {
		t.Errorf("json: %d %v %s %.500s", code, err, said, out)
	}
	code, out, said = run(t, []byte(inv), "match", "--db", db, "--format", "sarif")
	var sarif struct {
		Version string
		Runs    []struct{ Results []struct{ RuleID string } }
	}
	if err := json.Unmarshal([]byte(out), &sarif); code != 0 || err != nil || sarif.Version != "2.1.0" || len(sarif.Runs) != 1 || len(sarif.Runs[0].Results) != 3 {
		t.Errorf("sarif: %d %v %s %.500s", code, err, said, out)
	}
	for severity, want := range map[string]int{"critical": exitSevere, "low": exitSevere, "huge": exitFailed} {
		if code, _, said := run(t, []byte(inv), "match", "--db", db, "--fail-on", severity); code != want {
			t.Errorf("--fail-on %s: %d %s, want %d", severity, code, said, want)
		}
	}
	// Without the npm package nothing is critical.
	clean := saved(t, [][]file{{{name: "etc/os-release", text: osRelease}, {name: "var/lib/dpkg/status", text: dpkg("openssl", "3.0.11-1~deb12u1")}}}, nil)
	_, inv, _ = run(t, clean, "catalog", "--name", "x")
	if code, out, said := run(t, []byte(inv), "match", "--db", db, "--fail-on", "critical"); code != 0 || !strings.Contains(out, "1 known vulnerability (1 high)") {
		t.Errorf("nothing critical: %d %s%s", code, out, said)
	}
}

// TestHostile gives the scanner what would bring it down.
func TestHostile(t *testing.T) {
	t.Setenv("SERVIN_SCAN_CACHE", t.TempDir())
	many := func(n int) []file {
		var out []file
		for i := range n {
			out = append(out, file{name: fmt.Sprintf("d%d/%s/%d", i%100, strings.Repeat("x", 90), i)})
		}
		return out
	}
	loops := []file{{name: "a", link: "b"}, {name: "b", link: "a"}, {name: "c", link: "c/c"}, {name: "d/e", link: "../d"}, {name: "up", link: "../../../../etc/passwd"},
		{name: "var/lib/dpkg/status", link: "../../../a"}, {name: "usr/lib/node_modules", link: "/usr/lib/node_modules/x"}}
	for i := range 200 {
		loops = append(loops, file{name: fmt.Sprintf("l%d", i), link: fmt.Sprintf("l%d", i+1)})
	}
	oneBlob := func(f func(b []byte) []byte) func(map[string][]byte) {
		return func(m map[string][]byte) {
			for _, n := range slices.Sorted(func(yield func(string) bool) {
				for k := range m {
					if !yield(k) {
						return
					}
				}
			}) {
				if strings.HasPrefix(n, "blobs/") {
					m[n] = f(m[n])
					return
				}
			}
		}
	}
	small := [][]file{{{name: "etc/os-release", text: osRelease}}}
	for _, c := range []struct {
		name  string
		image []byte
		args  []string
		want  string // "" is success
	}{
		{"zip bomb", saved(t, [][]file{{{name: "zeros", size: 200 << 20}}}, nil), []string{"--max-size", "50m"}, "allow more with --max-size"},
		{"huge package database", saved(t, [][]file{{{name: "etc/os-release", text: osRelease}, {name: "var/lib/dpkg/status", text: strings.Repeat("Package: "+strings.Repeat("p", 1000)+"\nVersion: 1\nStatus: install ok installed\n\n", 100_000)}}}, nil), []string{"--memory", "96m"}, "of memory"},
		{"huge field", saved(t, [][]file{{{name: "var/lib/dpkg/status", text: "Package: a\nVersion: 1\nDescription: ", size: 150 << 20}}}, nil), []string{"--memory", "96m"}, "of memory"},
		{"many files", saved(t, [][]file{many(100_000)}, nil), []string{"--memory", "96m"}, "of memory"},
		{"link loops", saved(t, [][]file{loops}, nil), nil, ""},
		{"names that climb", saved(t, [][]file{{{name: "../../../../tmp/servin-scan-escaped", text: "x"}, {name: "/etc/os-release", text: osRelease}}}, nil), nil, ""},
		{"no image", []byte("nonsense"), nil, "cannot read the saved image"},
		{"nothing", nil, nil, "has no index"},
		{"a tar of nothing", make([]byte, 1024), nil, "has no index"},
		{"changed blob", saved(t, small, oneBlob(func(b []byte) []byte { b = bytes.Clone(b); b[len(b)/2] ^= 1; return b })), nil, "has other bytes than blob"},
		{"torn", vulnerable(t)[:3000], nil, "cannot read"},
		{"missing blob", saved(t, small, func(m map[string][]byte) {
			for n := range m {
				if strings.HasPrefix(n, "blobs/") {
					delete(m, n)
				}
			}
		}), nil, "holds no image"},
		{"index of indexes", saved(t, small, func(m map[string][]byte) { m["index.json"] = []byte(strings.Repeat(`{"manifests":[`, 10000)) }), nil, "index"},
	} {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			code, out, said := run(t, c.image, append([]string{"catalog", "--name", "evil"}, c.args...)...)
			switch {
			case c.want == "" && (code != 0 || !json.Valid([]byte(out))):
				t.Errorf("%d %s", code, said)
			case c.want != "" && (code != exitFailed || !strings.Contains(said, c.want)):
				t.Errorf("%d %q, want %q", code, said, c.want)
			}
			t.Logf("%v: %s", time.Since(begin).Round(time.Millisecond), said)
		})
	}
	if _, err := os.Stat("/tmp/servin-scan-escaped"); err == nil {
		t.Error("a layer wrote outside")
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "servin-scan-*")); len(left) > 0 {
		t.Logf("other scans may run: %v", left)
	}
	// What an image says must not act on a terminal.
	evil := saved(t, [][]file{{{name: "etc/os-release", text: osRelease}, {name: "var/lib/dpkg/status", text: dpkg("openssl", "1\x1b[31m")}}}, nil)
	_, inv, _ := run(t, evil, "catalog", "--name", "x")
	if _, out, _ := run(t, []byte(inv), "match", "--db", database(t)); strings.ContainsRune(out, 0x1b) {
		t.Errorf("an escape sequence gets through: %q", out)
	}
	if _, out, _ := run(t, []byte(inv), "convert", "--format", "table"); strings.ContainsRune(out, 0x1b) {
		t.Errorf("an escape sequence gets through: %q", out)
	}
}

// TestDatabases imports and fetches.
func TestDatabases(t *testing.T) {
	cache := t.TempDir()
	if err := os.Chmod(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SERVIN_SCAN_CACHE", cache)
	arch := archive(t, database(t))
	file := filepath.Join(t.TempDir(), "db.tar.gz")
	if err := os.WriteFile(file, arch, 0o644); err != nil {
		t.Fatal(err)
	}
	_, inv, _ := run(t, vulnerable(t), "catalog", "--name", "x")
	for range 2 { // the second time it is there
		if code, out, said := run(t, []byte(inv), "match", "--db", file); code != 0 || !strings.Contains(out, "CVE-2099-0001") {
			t.Fatalf("an archive: %d %s%s", code, out, said)
		}
	}
	status := http.StatusOK
	checksum := sum(arch)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		switch r.URL.Path {
		case "/databases/v6/latest.json":
			fmt.Fprintf(w, `{"status":"active","schemaVersion":"v6.1.10","built":"2099-01-02T03:04:05Z","path":"vulnerability-db.tar.gz","checksum":%q}`, checksum)
		case "/databases/v6/vulnerability-db.tar.gz":
			w.Write(arch)
		}
	}))
	defer srv.Close()
	fetch := func(want int, text string) {
		t.Helper()
		if code, out, said := run(t, nil, "update-db", "--url", srv.URL+"/databases"); code != want || !strings.Contains(out+said, text) {
			t.Errorf("%d %s%s, want %d %q", code, out, said, want, text)
		}
	}
	checksum = sum([]byte("other"))
	fetch(exitFailed, "the SHA-256 differs")
	if code, _, _ := run(t, []byte(inv), "match"); code != exitNoDatabase {
		t.Errorf("a wrong download is used: %d", code)
	}
	checksum = sum(arch)
	fetch(0, "Fetched the database of 2099-01-02")
	fetch(0, "is the newest")
	if code, out, said := run(t, []byte(inv), "match"); code != 0 || !strings.Contains(out, "GHSA-2099-test-0003") {
		t.Errorf("with what was fetched: %d %s%s", code, out, said)
	}
	status = http.StatusBadGateway
	fetch(exitFailed, "502")
	if code, _, _ := run(t, []byte(inv), "match"); code != 0 {
		t.Error("a failed update took the database away")
	}
	for name, bad := range map[string][]byte{"empty": nil, "no archive": bytes.Repeat([]byte("x"), 4096), "torn": arch[:len(arch)/2], "sqlite": append([]byte("SQLite format 3\x00"), make([]byte, 8192)...)} {
		f := filepath.Join(t.TempDir(), "bad")
		if err := os.WriteFile(f, bad, 0o644); err != nil {
			t.Fatal(err)
		}
		if code, _, said := run(t, []byte(inv), "match", "--db", f); code != exitFailed || !strings.Contains(said, "cannot") {
			t.Errorf("%s: %d %s", name, code, said)
		}
	}
	ents, err := os.ReadDir(filepath.Join(cache, "vulnerabilities"))
	if err != nil || len(ents) != 2 {
		t.Errorf("left behind: %v %v", ents, err)
	}
}

// TestSandbox has a stage try to get out.
func TestSandbox(t *testing.T) {
	db := database(t)
	var out bytes.Buffer
	if os.Geteuid() == 0 {
		t.Setenv("SERVIN_TEST_ROOT", "1")
	}
	err := sandbox.Run(t.Context(), sandbox.Job{Stage: "burglar", Out: &out, Database: db, Limits: sandbox.Limits{Memory: 256 << 20, Disk: 1 << 20, Time: time.Minute}})
	if err != nil || out.String() != "root: db scratch\n" {
		t.Errorf("%v\n%s", err, out.String())
	}
}
