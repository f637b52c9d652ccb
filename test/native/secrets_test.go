package native

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// findText lists the files below dir that hold text.
func findText(t *testing.T, dir, text string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(text)) {
			out = append(out, p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSecrets(t *testing.T) {
	e := start(t, "--log-level", "debug")
	const text = "s3cr3t-Zaunk0enig"
	if r := e.pipe(strings.NewReader(text), "secrets", "create", "--label", "l=1", "db", "-"); r.code != 0 {
		t.Fatal(r)
	}
	if r := e.pipe(strings.NewReader("color=blue\n"), "configs", "create", "app"); r.code != 0 {
		t.Fatal(r)
	}
	if r := e.pipe(nil, "secrets", "create", "db"); r.code == 0 {
		t.Error("an empty secret was stored")
	}
	if out := e.must("configs", "inspect", "app", "--format", "{{.Name}} {{.Data}}"); out != "app Y29sb3I9Ymx1ZQo=" {
		t.Errorf("config: %s", out)
	}
	// As a file in memory, read-only, with the owner and mode asked for.
	e.must("run", "-d", "--name", "one", "--secret", "db", "--secret", "db,target=/etc/db.pass,uid=1000,gid=2000,mode=0440", "--config", "app", "bb", "sleep", "1000")
	if out := e.must("exec", "one", "sh", "-c", "cat /run/secrets/db /etc/db.pass; cat /app; stat -c '%a %u:%g' /run/secrets/db /etc/db.pass /app"); out != text+text+"color=blue\n444 0:0\n440 1000:2000\n444 0:0" {
		t.Errorf("in the container: %q", out)
	}
	for _, f := range []string{"/run/secrets/db", "/etc/db.pass", "/app", "/run/secrets/new"} {
		if r := e.run("exec", "one", "sh", "-c", "echo x > "+f); r.code == 0 {
			t.Errorf("%s can be written", f)
		}
	}
	if out := e.must("exec", "one", "sh", "-c", "grep -E ' (/run/secrets|/etc/db.pass|/app) ' /proc/mounts | cut -d' ' -f3,4 | cut -d, -f1 | sort -u"); out != "tmpfs ro" {
		t.Errorf("mounts: %q", out)
	}
	// Nowhere else: not in what the engine tells, logs, records or the image.
	for _, args := range [][]string{{"inspect", "one"}, {"secrets", "inspect", "db"}, {"secrets", "ls", "--json"}, {"logs", "one"}, {"exec", "one", "env"}, {"exec", "one", "cat", "/proc/1/cmdline"}} {
		if r := e.run(args...); strings.Contains(r.out+r.err, text) || strings.Contains(r.out, "czNjcjN0") {
			t.Errorf("servin %v shows the secret", args)
		}
	}
	e.must("commit", "one", "img")
	e.must("save", "-o", e.Dir+"/img.tar", "img")
	for _, dir := range []string{e.Dir + "/root", e.Dir + "/img.tar", e.Dir + "/servind.log"} {
		if l := findText(t, dir, text); len(l) > 0 {
			t.Errorf("the secret lies in %v", l)
		}
	}
	if r := e.run("secrets", "rm", "db"); r.code == 0 || !strings.Contains(r.err, "used by [one]") {
		t.Errorf("removal of one in use: %s", r)
	}
	for _, args := range [][]string{{"--secret", "nobody"}, {"--secret", "db", "--secret", "db,mode=0400"}, {"--secret", "app"}} {
		if r := e.run(append(append([]string{"run", "--rm"}, args...), "bb", "true")...); r.code != 125 && r.code != 1 {
			t.Errorf("%v: %s", args, r)
		}
	}

	// It survives the engine, and a new value arrives.
	e.Kill()
	e.Boot()
	if out := e.must("exec", "one", "cat", "/run/secrets/db"); out != text {
		t.Errorf("after a restart of the engine: %q", out)
	}
	r := e.pipe(strings.NewReader("second"), "secrets", "update", "db", "-")
	if r.code != 0 || !strings.Contains(r.err, "until they are restarted: one") {
		t.Errorf("update: %s", r)
	}
	if out := e.must("exec", "one", "cat", "/run/secrets/db", "/etc/db.pass"); out != "second"+text {
		t.Errorf("after an update: %q", out)
	}
	e.must("restart", "-t", "0", "one")
	if out := e.must("exec", "one", "cat", "/run/secrets/db", "/etc/db.pass"); out != "secondsecond" {
		t.Errorf("after a restart: %q", out)
	}
	e.must("rm", "-f", "one")

	// In a user namespace, with another runtime, and by label; never by an image's.
	if out := e.must("run", "--rm", "--userns", "auto", "--secret", "db,uid=5,mode=0400", "bb", "stat", "-c", "%u:%g %a", "/run/secrets/db"); out != "5:0 400" {
		t.Errorf("in a user namespace: %q", out)
	}
	if _, err := exec.LookPath("runc"); err == nil {
		if out := e.must("run", "--rm", "--runtime", "runc", "--secret", "db", "--secret", "db,target=/x", "bb", "cat", "/run/secrets/db", "/x"); out != "secondsecond" {
			t.Errorf("with runc: %q", out)
		}
	}
	e.must("create", "--name", "two", "--secret", "db,target=/y,mode=0400", "bb", "cat", "/y")
	if out := e.must("start", "-a", "two"); out != "second" {
		t.Errorf("create and start: %q", out)
	}
	e.must("rm", "two")
	if r := e.run("run", "--rm", "--label", "io.servin.secrets=db", "bb", "cat", "/run/secrets/db"); r.out != "second" {
		t.Errorf("by label: %s", r)
	}
	tar, err := exec.Command("tar", "-C", "/usr/bin", "-cf", "-", "busybox").Output()
	if err != nil {
		t.Fatal(err)
	}
	if r := e.pipe(bytes.NewReader(tar), "import", "-c", `LABEL io.servin.secrets=db io.servin.publish-through=true`, "-", "greedy"); r.code != 0 {
		t.Fatal(r)
	}
	if r := e.run("run", "--rm", "greedy", "/busybox", "cat", "/run/secrets/db"); r.code == 0 {
		t.Error("an image's label gave it a secret")
	}
	harness.Eventually(t, "nothing of the containers is left mounted", 5*time.Second, func() bool {
		b, _ := os.ReadFile("/proc/self/mountinfo")
		return !strings.Contains(string(b), e.Dir+"/run/containers")
	})

	// With a passphrase: locked after a restart until it is given.
	if err := os.WriteFile(e.Dir+"/pass", []byte("correct horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.must("secrets", "rotate-key", "--passphrase-file", e.Dir+"/pass")
	e.must("run", "--rm", "--secret", "db", "bb", "true")
	e.Kill()
	e.Boot()
	if r := e.run("run", "--rm", "--secret", "db", "bb", "true"); r.code == 0 || !strings.Contains(r.err, "secrets unlock") {
		t.Errorf("locked: %s", r)
	}
	e.must("secrets", "unlock", "--passphrase-file", e.Dir+"/pass")
	if out := e.must("run", "--rm", "--secret", "db", "bb", "cat", "/run/secrets/db"); out != "second" {
		t.Errorf("unlocked: %q", out)
	}
	e.must("secrets", "rm", "db")
	e.must("configs", "rm", "app")
}
