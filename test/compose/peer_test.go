package compose

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// peer builds Docker's own Compose, which takes minutes the first time.
func peer(t *testing.T) string {
	t.Helper()
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: building Docker's Compose takes minutes: make test-long does")
	}
	out := filepath.Join(t.TempDir(), "docker-compose")
	cmd := exec.Command("go", "build", "-o", out, "github.com/docker/compose/v2/cmd")
	cmd.Dir = "peer"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot build Docker's Compose: %v: %s", err, b)
	}
	return out
}

// TestDockerCompose drives the engine with Docker's own Compose.
func TestDockerCompose(t *testing.T) {
	bin := peer(t)
	p := newApp(t)
	must := func(args ...string) string {
		t.Helper()
		c := p.exec(bin, args...)
		if c.code != 0 {
			t.Fatal(c)
		}
		return strings.TrimSpace(c.out)
	}
	must("up", "-d", "--wait", "web")
	if out := must("exec", "-T", "web", "sh", "-c", "echo $A $FROM_FILE; cat /run/secrets/tok /etc/cfg; ulimit -n"); out != "none yes\nfrom a variable\nconfig of none\n123" {
		t.Errorf("got %q", out)
	}
	var row struct{ State, Health string }
	if err := json.Unmarshal([]byte(must("ps", "--format", "json", "db")), &row); err != nil || row.State != "running" || row.Health != "healthy" {
		t.Errorf("got %+v, %v", row, err)
	}
	// A second up by either finds nothing to do, since both hash alike.
	for who, c := range map[string]call{"docker": p.exec(bin, "up", "-d"), "servin": p.run("up", "-d")} {
		if c.code != 0 || strings.Contains(c.err, "Recreate") {
			t.Errorf("%s makes something anew: %s", who, c)
		}
	}
	db := p.id("db-1")
	must("exec", "-T", "db", "sh", "-c", "echo kept > /anon/f")
	must("up", "-d", "--force-recreate", "db")
	if p.id("db-1") == db || must("exec", "-T", "db", "cat", "/anon/f") != "kept" {
		t.Error("db was not made anew with its volume")
	}
	must("up", "-d", "--scale", "web=3", "--no-recreate")
	if n := len(strings.Fields(must("ps", "-q", "web"))); n != 3 {
		t.Errorf("scaled to %d", n)
	}
	if c := p.exec(bin, "run", "--rm", "-T", "web", "sh", "-c", "exit 4"); c.code != 4 {
		t.Errorf("want 4: %s", c)
	}
	must("--profile", "more", "up", "-d", "extra")
	must("pause", "extra")
	must("unpause", "extra")
	must("restart", "-t", "0", "extra")
	if out := must("logs", "--no-log-prefix", "init"); !strings.Contains(out, "begun") {
		t.Errorf("logs: %q", out)
	}
	must("top")
	must("images")
	p.write("f", "x")
	must("cp", "f", "db:/tmp/f")
	if out := must("port", "--index", "1", "web", "80"); !strings.HasPrefix(out, "127.0.0.1:") {
		t.Errorf("port: %q", out)
	}
	must("--profile", "*", "down", "-v", "-t", "0")
	if out := must("ps", "-aq"); out != "" {
		t.Errorf("left: %s", out)
	}
	// One begins, the other ends.
	must("up", "-d")
	p.must("down", "-v", "-t", "0")
	p.must("up", "-d")
	must("down", "-v", "-t", "0")
}

// TestHashesAreAlike compares the hashes of services that use what there is.
func TestHashesAreAlike(t *testing.T) {
	bin := peer(t)
	p := newApp(t)
	// Of env files only what comes out of them counts, which config does not read.
	p.write("compose.yaml", strings.Replace(app, "    env_file: [vars.env]\n", "", 1))
	theirs := p.exec(bin, "--profile", "*", "config", "--hash", "*")
	if ours := p.must("--profile", "*", "config", "--hash", "*"); theirs.code != 0 || ours != strings.TrimSpace(theirs.out) {
		t.Errorf("ours\n%s\ntheirs\n%s", ours, theirs)
	}
}
