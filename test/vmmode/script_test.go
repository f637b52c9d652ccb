package vmmode

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestScripts runs the command line's script suite against the engine in the machine.
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
	// The engine there reaches this host at 10.0.2.2, and devices' specs in a folder that is shared.
	cdi := filepath.Join(work, "cdi")
	doc := filepath.Join(m.home, "machine.yaml")
	text := "version: 1\nengine:\n  registries: {\"*\": {plainHTTP: true}}\n  cdiSpecDirs: [" + cdi + "]\n"
	if err := os.WriteFile(doc, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	set := exec.Command(filepath.Join(programs(), "cloudos"), "config", "--host", "unix://"+m.status().Socket, "set", doc)
	if out, err := set.CombinedOutput(); err != nil {
		t.Fatalf("cloudos config set: %v: %s", err, out)
	}
	m.must("vm", "restart")
	cmd := exec.Command("go", "test", "-count=1", "-v", "-parallel", "1", "-timeout", "40m", "../script")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "SERVIN_BIN="+programs(), "SERVIN_TEST_SOCKET="+m.status().Socket, "SERVIN_TEST_WORK="+work, "SERVIN_TEST_HOST=10.0.2.2", "SERVIN_TEST_CDI="+cdi, "SERVIN_TEST_SLOW=5")
	out, err := cmd.CombinedOutput()
	results := regexp.MustCompile(`(?m)^ *--- (PASS|FAIL|SKIP): .*$`).FindAll(out, -1)
	for _, r := range results {
		t.Logf("%s", r)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out[max(0, len(out)-20000):])
	}
}
