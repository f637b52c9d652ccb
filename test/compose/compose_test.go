package compose

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// app is a project with most of what projects have.
const app = `
services:
  db:
    image: bb
    command: sh -c 'touch /tmp/ok; exec sleep 1000'
    healthcheck: {test: ["CMD", "test", "-f", "/tmp/ok"], interval: 200ms, retries: 20}
    volumes: ["data:/data", "/anon"]
    networks: {back: {aliases: [database]}}
    stop_grace_period: 0s
  init:
    image: bb
    command: sh -c 'echo begun'
    networks: [back]
  web:
    image: bb
    command: sh -c 'cat /run/secrets/tok /etc/cfg /run/secrets/file; exec sleep 1000'
    environment: {A: "${A:-none}", FROM_FILE:}
    env_file: [vars.env]
    depends_on:
      db: {condition: service_healthy}
      init: {condition: service_completed_successfully}
    secrets: [tok, file]
    configs: [{source: cfg, target: /etc/cfg, mode: 0400}]
    networks: [back, front]
    ports: ["127.0.0.1::80"]
    tmpfs: /scratch
    ulimits: {nofile: 123}
    deploy: {resources: {limits: {memory: 64M}}}
    stop_grace_period: 0s
  extra:
    image: bb
    command: sleep 1000
    profiles: [more]
    stop_grace_period: 0s
networks: {back: {}, front: {}}
volumes: {data: {}}
secrets: {tok: {environment: TOK}, file: {file: ./secret.txt}}
configs: {cfg: {content: "config of ${A:-none}\n"}}
`

func newApp(t *testing.T) *project {
	p := newProject(t, app, "vars.env", "FROM_FILE=yes\n", "secret.txt", "from a file\n")
	p.env = []string{"TOK=from a variable\n"}
	return p
}

func TestUpAndDown(t *testing.T) {
	p := newApp(t)
	p.must("up", "-d")
	p.want("web-1  | from a variable\nweb-1  | config of none\nweb-1  | from a file", "logs", "web")
	p.want("init-1  | begun", "logs", "init")
	p.want("none yes", "exec", "-T", "web", "sh", "-c", "echo $A $FROM_FILE")
	p.want("123", "exec", "-T", "web", "sh", "-c", "ulimit -n")
	if out := p.must("exec", "-T", "web", "nslookup", "database"); !strings.Contains(out, "Address") {
		t.Errorf("the alias is not known: %s", out)
	}
	if out := p.must("ps", "--services"); out != "db\nweb" {
		t.Errorf("got services %q", out)
	}
	var row struct {
		Name, Service, State, Health string
		Publishers                   []struct{ TargetPort int }
	}
	for _, line := range strings.Split(p.must("ps", "--format", "json"), "\n") {
		if err := json.Unmarshal([]byte(line), &row); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		if row.State != "running" || row.Service == "db" && row.Health != "healthy" || row.Service == "web" && len(row.Publishers) != 1 {
			t.Errorf("got %+v", row)
		}
	}
	if out := p.must("port", "web", "80"); !strings.HasPrefix(out, "127.0.0.1:") {
		t.Errorf("got port %q", out)
	}
	for label, want := range map[string]string{"com.docker.compose.project": p.name, "com.docker.compose.service": "web", "com.docker.compose.container-number": "1",
		"com.docker.compose.oneoff": "False", "com.docker.compose.project.working_dir": p.dir, "com.docker.compose.depends_on": "db:service_healthy:false,init:service_completed_successfully:false"} {
		if got := p.servin("inspect", "--format", fmt.Sprintf("{{index .Config.Labels %q}}", label), p.name+"-web-1"); got != want {
			t.Errorf("label %s is %q, want %q", label, got, want)
		}
	}
	if out := p.servin("inspect", p.name+"-web-1"); strings.Contains(out, "from a variable") {
		t.Error("inspect shows the secret")
	}
	if out := p.must("ls", "-q"); !strings.Contains(out, p.name) {
		t.Errorf("ls lacks the project: %s", out)
	}
	p.must("--profile", "more", "up", "-d", "extra")
	p.want("db\nextra\nweb", "ps", "--services")
	p.must("stop", "web")
	p.want("db\nextra", "ps", "--services")
	p.must("start", "web")
	p.must("pause", "db")
	if out := p.must("ps", "--status", "paused", "--services"); out != "db" {
		t.Errorf("paused: %q", out)
	}
	p.must("unpause", "db")
	p.must("kill", "extra")
	p.must("rm", "-f", "extra")
	p.must("--profile", "more", "down", "-v")
	if out := p.must("ps", "-aq"); out != "" {
		t.Errorf("left: %s", out)
	}
	for _, kind := range []string{"networks", "volumes"} {
		if out := p.servin(kind, "ls", "-q", "--filter", "label=com.docker.compose.project="+p.name); out != "" {
			t.Errorf("left %s: %s", kind, out)
		}
	}
}

// TestConvergence has a project change and wants what changed made anew, and
// nothing else.
func TestConvergence(t *testing.T) {
	p := newApp(t)
	p.must("up", "-d")
	db, web := p.id("db-1"), p.id("web-1")
	p.must("exec", "-T", "db", "sh", "-c", "echo kept > /anon/f")
	if c := p.run("up", "-d"); c.code != 0 || strings.Contains(c.err, "Recreate") || p.id("db-1") != db || p.id("web-1") != web {
		t.Errorf("a second up changed something: %s", c)
	}
	p.env = append(p.env, "A=changed")
	p.must("up", "-d")
	if p.id("db-1") != db || p.id("web-1") == web {
		t.Error("not just the service that changed was made anew")
	}
	p.want("web-1  | from a variable\nweb-1  | config of changed\nweb-1  | from a file", "logs", "web")
	web = p.id("web-1")
	p.write("compose.yaml", strings.Replace(app, "config of", "other config of", 1))
	p.must("up", "-d")
	if out := p.must("exec", "-T", "web", "cat", "/etc/cfg"); out != "other config of changed" || p.id("web-1") == web {
		t.Errorf("the changed config did not reach the container: %q", out)
	}
	p.write("compose.yaml", strings.Replace(app, "touch /tmp/ok;", "touch /tmp/ok; true;", 1))
	p.must("up", "-d")
	if p.id("db-1") == db {
		t.Error("db was not made anew")
	}
	p.want("kept", "exec", "-T", "db", "cat", "/anon/f")
	db = p.id("db-1")
	p.must("up", "-d", "-V", "db")
	if c := p.run("exec", "-T", "db", "cat", "/anon/f"); c.code == 0 || p.id("db-1") == db {
		t.Errorf("-V kept the anonymous volume: %s", c)
	}
	p.must("up", "-d", "--scale", "web=3", "--no-deps", "web")
	if n := len(strings.Fields(p.must("ps", "-q", "web"))); n != 3 {
		t.Errorf("scaled to %d", n)
	}
	first := p.id("web-1")
	p.must("scale", "web=1")
	if n := len(strings.Fields(p.must("ps", "-q", "web"))); n != 1 || p.id("web-1") != first {
		t.Errorf("scaled down to %d", n)
	}
	// The network changes below a container.
	p.write("compose.yaml", strings.Replace(app, "networks: {back: {}, front: {}}", "networks: {back: {labels: {x: y}}, front: {}}", 1))
	p.must("up", "-d")
	if out := p.must("exec", "-T", "web", "nslookup", "database"); !strings.Contains(out, "Address") {
		t.Errorf("the alias is not known on the new network: %s", out)
	}
	// A service goes.
	p.write("compose.yaml", strings.Replace(app, "  extra:", "  other:", 1))
	p.must("--profile", "more", "up", "-d", "--no-deps", "other")
	p.write("compose.yaml", app)
	if c := p.run("up", "-d"); c.code != 0 || !strings.Contains(c.err, "orphan") {
		t.Errorf("no word of orphans: %s", c)
	}
	p.must("up", "-d", "--remove-orphans")
	if c := p.exec(p.e.bin+"/servin", "inspect", p.name+"-other-1"); c.code == 0 {
		t.Error("the orphan is there")
	}
	// Dry runs do nothing.
	before := p.must("ps", "-aq")
	if c := p.run("--dry-run", "up", "-d", "--force-recreate"); c.code != 0 || !strings.Contains(c.err, "DRY-RUN MODE -") || p.must("ps", "-aq") != before {
		t.Errorf("a dry run: %s", c)
	}
}

func TestAttached(t *testing.T) {
	p := newProject(t, `
services:
  tests: {image: bb, command: sh -c 'echo testing; sleep 0.3; exit 7', depends_on: [srv]}
  srv:
    image: bb
    command: sh -c 'trap "echo bye; exit 0" TERM; echo up; while true; do sleep 0.1; done'
    post_start: [{command: ["sh", "-c", "echo hooked"]}]
    pre_stop: [{command: ["sh", "-c", "echo leaving"]}]
  flaky: {image: bb, command: sh -c 'exit 3', restart: "on-failure:1", profiles: [flaky]}
`)
	c := p.run("up", "--exit-code-from", "tests")
	if c.code != 7 {
		t.Errorf("want 7: %s", c)
	}
	for _, want := range []string{"Attaching to srv-1, tests-1\n", "tests-1   | testing\n", "srv-1     | up\n", "srv-1 ->  | hooked\n", "srv-1 ->  | leaving\n", "srv-1     | bye\n", "tests-1 exited with code 7\n", "Aborting on container exit...\n"} {
		// Names are padded once a longer one is known.
		if !strings.Contains(squeeze(c.out), squeeze(want)) {
			t.Errorf("it does not say %q: %s", want, c)
		}
	}
	b := p.background("servin-compose", "up", "srv")
	b.says("| up")
	if err := b.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := b.ends(); code != 130 || !strings.Contains(b.out.String(), "Gracefully Stopping") || !strings.Contains(b.out.String(), "| bye") {
		t.Errorf("exit %d: %s", code, b.out)
	}
	p.want("", "ps", "-q")
	if c := p.run("up", "flaky"); c.code != 0 || !strings.Contains(c.out, "flaky-1 exited with code 3 (restarting)") {
		t.Errorf("restarts are not told: %s", c)
	}
	p.fails(3, "exited with code 3", "up", "--abort-on-container-failure", "flaky")
	// Two interrupts kill.
	p.write("compose.yaml", "services:\n  deaf: {image: bb, command: sh -c 'trap \"\" TERM; echo up; while true; do sleep 1; done'}\n")
	b = p.background("servin-compose", "up", "deaf")
	b.says("| up")
	for range 2 {
		if err := b.cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		b.says("Gracefully")
	}
	if code := b.ends(); code != 130 {
		t.Errorf("exit %d: %s", code, b.out)
	}
}

func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }

func TestRunAndExec(t *testing.T) {
	p := newProject(t, `
services:
  app:
    image: bb
    command: sleep 1000
    depends_on: {db: {condition: service_started}}
    ports: ["80"]
    environment: {X: service}
    stop_grace_period: 0s
  db: {image: bb, command: sleep 1000, stop_grace_period: 0s}
`)
	p.fails(4, "^((?s).*)$", "run", "--rm", "app", "sh", "-c", "exit 4")
	p.want("db", "ps", "--services")
	p.want("flag /w web", "run", "--rm", "-e", "X=flag", "-w", "/w", "-u", "web", "app", "sh", "-c", "echo $X $PWD $(whoami)")
	p.want("", "ps", "-aq", "app")
	id := p.must("run", "-d", "--name", p.name+"-special", "app", "sleep", "1000")
	if got := p.servin("inspect", "--format", `{{.Name}} {{index .Config.Labels "com.docker.compose.oneoff"}} {{len .NetworkSettings.Ports}}`, id); !strings.HasPrefix(got, "/"+p.name+"-special True") {
		t.Errorf("got %s", got)
	}
	p.want("entered", "run", "--rm", "--entrypoint", "echo", "app", "entered")
	p.must("up", "-d")
	p.fails(3, "", "exec", "-T", "app", "sh", "-c", "exit 3")
	p.want("set", "exec", "-T", "-e", "V=set", "app", "sh", "-c", "echo $V")
	p.fails(1, `service "nonsense" is not running`, "exec", "-T", "nonsense", "true")
	p.write("f.txt", "content")
	p.must("cp", "f.txt", "app:/tmp/")
	p.want("content", "exec", "-T", "app", "cat", "/tmp/f.txt")
	p.must("cp", "app:/tmp/f.txt", "back.txt")
	if b, _ := os.ReadFile(p.dir + "/back.txt"); string(b) != "content" {
		t.Errorf("came back as %q", b)
	}
	if out := p.must("top", "app"); !strings.Contains(out, "sleep 1000") {
		t.Errorf("top: %s", out)
	}
	if out := p.must("images", "--format", "json"); !strings.Contains(out, `"Repository":"bb"`) {
		t.Errorf("images: %s", out)
	}
	// Nothing tells when somebody waits: later is tried when it was too early.
	for delay := 200 * time.Millisecond; ; delay *= 2 {
		b := p.background("servin-compose", "wait", "db")
		time.Sleep(delay)
		p.must("kill", "db")
		code := b.ends()
		if code == 137 {
			break
		}
		if delay > 5*time.Second || !strings.Contains(b.out.String(), "no containers for project") {
			t.Fatalf("wait gave %d: %s", code, b.out)
		}
		p.must("start", "db")
	}
	// By name alone, from elsewhere.
	p.dir = t.TempDir()
	p.must("-p", p.name, "stop", "-t", "0")
	p.want("", "-p", p.name, "ps", "-q")
	p.must("-p", p.name, "start")
	p.must("-p", p.name, "down", "--remove-orphans", "-t", "0")
	p.want("", "-p", p.name, "ps", "-aq")
}

func TestFailuresAreTold(t *testing.T) {
	p := newProject(t, `
services:
  sick: {image: bb, command: sleep 1000, healthcheck: {test: "false", interval: 100ms, retries: 1}, stop_grace_period: 0s}
  fails: {image: bb, command: "false"}
  needs-healthy: {image: bb, depends_on: {sick: {condition: service_healthy}}}
  needs-done: {image: bb, depends_on: {fails: {condition: service_completed_successfully}}}
  can-do-without: {image: bb, command: echo hi, depends_on: {sick: {condition: service_healthy, required: false}}}
  missing: {image: no-such-host.invalid/none, pull_policy: never}
`)
	p.fails(1, "dependency failed to start: container .*-sick-1 is unhealthy", "up", "-d", "needs-healthy")
	p.fails(1, `service "fails" didn't complete successfully: exit 1`, "up", "-d", "needs-done")
	if c := p.run("up", "-d", "can-do-without"); c.code != 0 || !strings.Contains(c.err, "optional dependency") {
		t.Error(c)
	}
	p.fails(1, "(?i)no such image", "up", "-d", "missing")
	p.fails(1, "no such service: nonsense", "up", "-d", "nonsense")
	p.fails(1, "application not healthy after 1s|is unhealthy", "up", "--wait", "--wait-timeout", "1", "sick")
	p.fails(1, "unknown flag: --nonsense", "up", "--nonsense")
	p.write("compose.yaml", "services:\n  a: {image: bb, nonsense: 1}\n")
	p.fails(1, "nonsense", "config")
	p.write("compose.yaml", "services:\n  a: {image: bb, command: 'true'}\n")
}

// TestKilledBetweenSteps kills compose while it replaces containers, again and
// again, and wants the next run to find its way.
func TestKilledBetweenSteps(t *testing.T) {
	yaml := func(n int) string {
		return fmt.Sprintf("services:\n  a: {image: bb, command: sleep 1000, scale: 3, stop_grace_period: 0s, environment: {N: \"%d\"}}\n", n)
	}
	p := newProject(t, yaml(0))
	p.must("up", "-d")
	for n := 1; n <= 6; n++ {
		p.write("compose.yaml", yaml(n))
		b := p.background("servin-compose", "--progress", "plain", "up", "-d")
		// Killed as soon as something has happened, a step later each time.
		p.eventually("it has begun", func() bool {
			s := b.out.String()
			return strings.Count(s, "\n") >= n*2 || strings.Contains(s, "Started")
		})
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait()
		p.must("up", "-d")
		for i := 1; i <= 3; i++ {
			if got := p.servin("inspect", "--format", "{{.State.Running}} {{.Config.Env}}", fmt.Sprintf("%s-a-%d", p.name, i)); !strings.HasPrefix(got, "true") || !strings.Contains(got, fmt.Sprintf("N=%d ", n)) {
				t.Fatalf("after kill %d container %d is %s", n, i, got)
			}
		}
		if ids := strings.Fields(p.must("ps", "-aq")); len(ids) != 3 {
			t.Fatalf("after kill %d there are %d containers", n, len(ids))
		}
	}
}

func TestExtendsIncludeAndConfig(t *testing.T) {
	p := newProject(t, `
include: [part/compose.yaml]
services:
  web:
    extends: {file: base.yaml, service: base}
    environment: {OWN: "1"}
    stop_grace_period: 0s
`, "base.yaml", "services:\n  base: {image: bb, command: sleep 1000, environment: {BASE: \"1\"}}\n",
		"part/compose.yaml", "services:\n  part: {image: bb, command: sleep 1000, stop_grace_period: 0s, volumes: [\"./d:/d\"]}\n", "part/d/f", "included\n",
		"override.yaml", "services:\n  web: {environment: {OWN: \"2\"}}\n")
	p.must("-f", "compose.yaml", "-f", "override.yaml", "up", "-d")
	p.want("1 2", "exec", "-T", "web", "sh", "-c", "echo $BASE $OWN")
	p.want("included", "exec", "-T", "part", "cat", "/d/f")
	p.want("part\nweb", "config", "--services")
	if out := p.must("config", "--hash", "web"); len(out) != len("web ")+64 {
		t.Errorf("got %q", out)
	}
	var tree struct {
		Services map[string]struct{ Environment map[string]string }
	}
	if err := json.Unmarshal([]byte(p.must("config", "--format", "json")), &tree); err != nil || tree.Services["web"].Environment["OWN"] != "1" {
		t.Errorf("got %+v, %v", tree, err)
	}
	// What config prints can be used in the file's place.
	p.write("printed.yaml", p.must("config"))
	p.want("part\nweb", "-f", "printed.yaml", "config", "--services")
}

func TestWatch(t *testing.T) {
	p := newProject(t, `
services:
  app:
    image: bb
    command: sh -c 'echo began; exec sleep 1000'
    stop_grace_period: 0s
    develop:
      watch:
      - {path: src, action: sync, target: /app, ignore: [skip], initial_sync: true}
      - {path: conf, action: sync+restart, target: /conf}
      - {path: run, action: sync+exec, target: /run.d, exec: {command: ["sh", "-c", "echo $(cat /run.d/f) > /ran"]}}
`, "src/a", "1", "src/skip/b", "1", "conf/f", "1", "run/f", "1")
	b := p.background("servin-compose", "watch")
	b.says("Watch enabled")
	has := func(file, text string) {
		t.Helper()
		p.eventually(file+" is "+text, func() bool {
			c := p.run("exec", "-T", "app", "cat", file)
			return c.code == 0 && strings.TrimSpace(c.out) == text
		})
	}
	has("/app/a", "1")
	if c := p.run("exec", "-T", "app", "ls", "/app/skip"); c.code == 0 {
		t.Error("what is ignored was copied")
	}
	p.write("src/a", "2")
	has("/app/a", "2")
	p.write("src/new/deep", "3")
	has("/app/new/deep", "3")
	if err := os.RemoveAll(p.dir + "/src/new"); err != nil {
		t.Fatal(err)
	}
	p.eventually("what is gone goes", func() bool { return p.run("exec", "-T", "app", "ls", "/app/new").code != 0 })
	p.write("run/f", "ran-it")
	has("/ran", "ran-it")
	p.write("conf/f", "2")
	p.eventually("it was restarted", func() bool { return strings.Count(p.must("logs", "app"), "began") == 2 })
	has("/conf/f", "2")
	_ = b.cmd.Process.Signal(os.Interrupt)
	b.ends()
}

func TestBuild(t *testing.T) {
	if _, err := os.Stat(shared.bin + "/servin-build"); err != nil {
		t.Skip("SKIP: there is no servin-build in " + shared.bin)
	}
	p := newProject(t, `
services:
  app:
    build:
      context: .
      args: {WHO: world}
      secrets: [s]
    command: cat /hello /n
  child:
    build:
      dockerfile_inline: |
        FROM parent
        CMD ["cat", "/hello"]
      additional_contexts: {parent: "service:app"}
secrets: {s: {environment: SECRET}}
`, "Dockerfile", "FROM bb\nARG WHO\nRUN echo \"hello $WHO\" > /hello\nRUN --mount=type=secret,id=s wc -c < /run/secrets/s > /n\n")
	p.env = []string{"SECRET=12345"}
	c := p.run("up")
	if c.code != 0 || !strings.Contains(c.out, "| hello world") || !strings.Contains(c.out, "| 5") || strings.Contains(c.out+c.err, "12345") {
		t.Fatal(c)
	}
	p.want("hello world", "run", "--rm", "child")
	p.must("down", "--rmi", "local")
	if c := p.exec(p.e.bin+"/servin", "images", "inspect", p.name+"-app"); c.code == 0 {
		t.Error("the image is there after --rmi local")
	}
}
