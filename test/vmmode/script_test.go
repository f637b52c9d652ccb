package vmmode

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestScripts runs the command line's script suite against the engine in the machine, or those
// scripts alone whose names SERVIN_TEST_SCRIPTS, an expression, matches.
func TestScripts(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t, "--memory", "2g")
	m.must("vm", "start")
	work := filepath.Join(m.home, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	// The engine there reaches this host at 10.0.2.2, and in a folder that is shared devices' specs and
	// another OCI runtime, of which its image has none: ours is one static program.
	cdi, runtime := filepath.Join(work, "cdi"), filepath.Join(work, "another-runtime")
	program, err := os.ReadFile(filepath.Join(programs(), "servin-runtime"))
	if err == nil {
		err = os.WriteFile(runtime, program, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	doc := filepath.Join(m.home, "machine.yaml")
	text := "version: 1\nengine:\n  registries: {\"*\": {plainHTTP: true}}\n  cdiSpecDirs: [" + cdi + "]\n  runtimes: {another: {path: " + runtime + "}}\n"
	if err := os.WriteFile(doc, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	set := exec.Command(filepath.Join(programs(), "cloudos"), "config", "--host", "unix://"+m.status().Socket, "set", doc)
	if out, err := set.CombinedOutput(); err != nil {
		t.Fatalf("cloudos config set: %v: %s", err, out)
	}
	m.must("vm", "restart")
	cmd := exec.Command("go", "test", "-count=1", "-v", "-parallel", "1", "-timeout", "40m", "-run", "TestScripts/"+os.Getenv("SERVIN_TEST_SCRIPTS"), "../script")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "SERVIN_BIN="+programs(), "SERVIN_TEST_SOCKET="+m.status().Socket, "SERVIN_TEST_WORK="+work, "SERVIN_TEST_HOST=10.0.2.2", "SERVIN_TEST_CDI="+cdi, "SERVIN_TEST_RUNTIME=another", "SERVIN_TEST_SLOW=5")
	out, err := cmd.CombinedOutput()
	results := regexp.MustCompile(`(?m)^ *--- (PASS|FAIL|SKIP): .*$`).FindAll(out, -1)
	for _, r := range results {
		t.Logf("%s", r)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out[max(0, len(out)-20000):])
	}
}
