package native

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/test/harness"
)

func TestPolicy(t *testing.T) {
	e := start(t)
	if r := e.run("system", "policy", "show"); r.code != 0 || !strings.Contains(r.err, "everything is allowed") {
		t.Errorf("without a policy: %s", r)
	}
	allowed := e.Dir + "/allowed"
	for _, d := range []string{allowed, e.Dir + "/other"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := e.Dir + "/policy.yaml"
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`version: 1
rules:
  - name: basics
    privileged: deny
    hostNamespaces: {allow: []}
    capabilities: {allow: [NET_BIND_SERVICE]}
    mounts: {binds: [{source: ` + allowed + `}]}
    images: {allow: [bb]}
    unconfined: {allow: []}
  - name: limits
    when: {labels: {tier: web}}
    message: web containers need --memory, see the handbook
    resources: {memory: {max: 256m}}
  - name: no-exec
    when: {labels: {locked: "*"}}
    exec: {allowed: deny}
`)
	// Before there is a policy: what exists may be started, but its binds are asked about.
	e.must("create", "--name", "linked", "-v", e.Dir+"/link:/d", "bb", "ls", "/d")
	os.Remove(e.Dir + "/link")
	restart := func() {
		e.must("system", "shutdown")
		<-e.Exited
		conf := "policy: " + path + "\n"
		e.Config = conf
		e.Boot()
	}
	restart()
	if out := e.must("system", "policy", "show"); !strings.Contains(out, "name: basics") {
		t.Errorf("show: %s", out)
	}
	for _, args := range [][]string{
		{"--privileged"}, {"--pid", "host"}, {"--cap-add", "SYS_ADMIN"}, {"--cap-add", "ALL"}, {"-v", e.Dir + "/other:/d"}, {"-v", "/:/d"},
		{"--mount", "type=bind,source=" + e.Dir + "/other,target=/d"}, {"--security-opt", "seccomp=unconfined"}, {"--label", "tier=web"},
		{"--label", "tier=web", "-m", "1g"}, {"--mount", "type=volume,source=esc,target=/d,volume-opt=type=none,volume-opt=o=bind,volume-opt=device=" + e.Dir + "/other"},
	} {
		r := e.run(append(append([]string{"run", "--rm"}, args...), "bb", "true")...)
		if r.code != 125 || !strings.Contains(r.err, "policy rule") {
			t.Errorf("%v: %s", args, r)
		}
		r = e.run(append(append([]string{"system", "policy", "test"}, args...), "bb", "true")...)
		if r.code == 0 || !strings.Contains(r.out, "policy rule") {
			t.Errorf("test %v: %s", args, r)
		}
	}
	if r := e.run("run", "--rm", "--label", "tier=web", "bb", "true"); !strings.Contains(r.err, "see the handbook") {
		t.Errorf("the message: %s", r)
	}
	for _, args := range [][]string{{}, {"--cap-add", "NET_BIND_SERVICE"}, {"-v", allowed + ":/d"}, {"-v", "vol:/d"}, {"--label", "tier=web", "-m", "64m"}} {
		e.must(append(append([]string{"run", "--rm"}, args...), "bb", "true")...)
		if out := e.must(append(append([]string{"system", "policy", "test"}, args...), "bb", "true")...); out != "allowed" {
			t.Errorf("test %v: %s", args, out)
		}
	}
	// Around it: a volume that is a bind, another name of the image, an exec, a limit.
	if r := e.run("volumes", "create", "-o", "type=none", "-o", "o=bind", "-o", "device="+e.Dir+"/other", "esc"); r.code == 0 || !strings.Contains(r.err, "policy rule") {
		t.Errorf("a volume that binds: %s", r)
	}
	e.must("tag", "bb", "renamed")
	if r := e.run("run", "--rm", "renamed", "true"); r.code != 125 {
		t.Errorf("another name: %s", r)
	}
	e.must("run", "-d", "--name", "locked", "--label", "locked=1", "bb", "sleep", "1000")
	if r := e.run("exec", "locked", "true"); r.code == 0 || !strings.Contains(r.err, "policy rule \"no-exec\"") {
		t.Errorf("exec: %s", r)
	}
	e.must("rm", "-f", "locked")
	e.must("run", "-d", "--name", "web", "--label", "tier=web", "-m", "64m", "bb", "sleep", "1000")
	if r := e.run("update", "-m", "1g", "--memory-swap", "2g", "web"); r.code == 0 || !strings.Contains(r.err, "policy rule \"limits\"") {
		t.Errorf("update: %s", r)
	}
	e.must("rm", "-f", "web")
	// A source that became a link after the container was made.
	if err := os.Symlink(e.Dir+"/other", allowed+"/link"); err != nil {
		t.Fatal(err)
	}
	if r := e.run("run", "--rm", "-v", allowed+"/link:/d", "bb", "true"); r.code != 125 {
		t.Errorf("a link: %s", r)
	}
	os.Remove(allowed + "/link")
	e.must("create", "--name", "swap", "-v", allowed+"/link:/d", "bb", "true")
	if err := os.Symlink("/etc", allowed+"/link"); err != nil {
		t.Fatal(err)
	}
	if r := e.run("start", "swap"); r.code == 0 || !strings.Contains(r.err, "policy rule") {
		t.Errorf("a link put in later: %s", r)
	}
	e.must("rm", "swap", "linked")

	// A broken document is not loaded; the one before stays.
	if r := e.run("system", "policy", "check", path); r.code != 0 {
		t.Errorf("check: %s", r)
	}
	write("version: 1\nrules: [{name: a, privilegd: deny}]\n")
	if r := e.run("system", "policy", "check", path); r.code == 0 || !strings.Contains(r.err, "privilegd") {
		t.Errorf("check: %s", r)
	}
	if r := e.run("system", "policy", "reload"); r.code == 0 || !strings.Contains(r.err, "stays in force") {
		t.Errorf("reload: %s", r)
	}
	if r := e.run("run", "--rm", "--privileged", "bb", "true"); r.code != 125 {
		t.Errorf("after a broken reload: %s", r)
	}
	write("version: 1\nrules: [{name: later, readOnlyRoot: required}]\n")
	if err := e.Cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "SIGHUP reloads the policy", 5*time.Second, func() bool { return strings.Contains(e.run("system", "policy", "show").out, "later") })
	if r := e.run("run", "--rm", "bb", "true"); r.code != 125 || !strings.Contains(r.err, "--read-only") {
		t.Errorf("the new policy: %s", r)
	}
	e.must("run", "--rm", "--read-only", "bb", "true")
	e.must("system", "shutdown")
	<-e.Exited
	write("nonsense")
	if out := e.refuse("--config", e.Dir+"/config.yaml"); !strings.Contains(out, "cannot use the policy") {
		t.Errorf("an engine with a broken policy says: %s", out)
	}
	write("version: 1\n")
	e.Boot()
}

func TestAudit(t *testing.T) {
	e := start(t)
	if r := e.pipe(strings.NewReader("top-secret-value"), "secrets", "create", "db", "-"); r.code != 0 {
		t.Fatal(r)
	}
	e.must("run", "--rm", "-e", "TOKEN=hidden-token", "--secret", "db", "-v", "/etc:/e:ro", "bb", "echo", "hidden-argument")
	e.must("run", "-d", "--name", "box", "bb", "sleep", "1000")
	e.must("exec", "box", "echo", "hidden-too")
	e.run("rm", "nobody")
	e.must("ps")
	out := e.must("system", "audit")
	for _, want := range []string{"POST /servin/secrets", "POST /servin/run", "image=bb", "secrets=secret:db", "binds=/etc:/e:ro", `/exec "box" arguments=1 command=echo`,
		"404 DELETE /containers/", "uid=0 servin"} {
		if !strings.Contains(out, want) {
			t.Errorf("the log does not show %q", want)
		}
	}
	raw := e.must("system", "audit", "--json")
	for _, bad := range []string{"top-secret-value", "hidden-", "GET /containers/json"} {
		if strings.Contains(raw, bad) {
			t.Errorf("the log holds %q", bad)
		}
	}
	r := e.run("system", "audit", "--verify")
	if r.code != 0 || !strings.Contains(r.out, "are as they were written") {
		t.Fatalf("verify: %s", r)
	}
	_, head, _ := strings.Cut(r.out, "\nhead ")
	head = strings.TrimSpace(head)

	// Killed: every call that was answered is there.
	id := e.must("volumes", "create", "answered")
	e.Kill()
	e.Boot()
	if out := e.must("system", "audit"); !strings.Contains(out, "POST /volumes/create") {
		t.Errorf("%s was made, and no record of it is left", id)
	}
	if r := e.run("system", "audit", "--verify", "--head", head); r.code != 0 {
		t.Errorf("verify after a kill: %s", r)
	}
	if out := e.must("system", "audit", "--since", "1h", "--json"); !strings.Contains(out, `"event":"start"`) {
		t.Error("--since 1h shows nothing")
	}
	if out := e.must("system", "audit", "--since", time.Now().Add(time.Hour).Format(time.RFC3339)); out != "" {
		t.Errorf("the future: %s", out)
	}

	// Changed behind the engine's back: it shows.
	names, _ := filepath.Glob(e.Dir + "/root/audit/audit-*.log")
	if len(names) != 1 {
		t.Fatal(names)
	}
	good, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(names[0], bytes.Replace(good, []byte(`"object":"nobody"`), []byte(`"object":"nothin"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := e.run("system", "audit", "--verify"); r.code == 0 || !strings.Contains(r.out, "its hash is not") {
		t.Errorf("a changed record: %s", r)
	}
	// Rewritten as a whole, the note of its head with it: the head noted elsewhere shows it.
	var out2 []byte
	prev := api.AuditGenesis
	var last api.AuditRecord
	for line := range bytes.Lines(good) {
		var rec api.AuditRecord
		if err := json.Unmarshal(line, &rec); err != nil {
			t.Fatal(err)
		}
		if rec.Prev = prev; rec.Object == "nobody" {
			rec.Object = "nothin"
		}
		b, _ := rec.Seal()
		out2, prev, last = append(out2, b...), rec.Hash, rec
	}
	e.Kill()
	if err := os.WriteFile(names[0], out2, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(e.Dir+"/root/audit/head", []byte(strings.Repeat("0", 20-len(itoa(last.Seq)))+itoa(last.Seq)+" "+last.Hash+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.Boot()
	if r := e.run("system", "audit", "--verify", "--head", head); r.code == 0 || !strings.Contains(r.out, "was rewritten") {
		t.Errorf("a rewritten log: %s", r)
	}
}

func itoa(n uint64) string { b, _ := json.Marshal(n); return string(b) }
