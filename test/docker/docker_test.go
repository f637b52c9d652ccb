package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
)

func TestSystem(t *testing.T) {
	e := start(t)
	out := e.must("version")
	for _, want := range []string{"Server:", `API version:\s+1\.56 \(minimum version 1\.24\)`, `OS/Arch:\s+linux/`} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("docker version lacks %q:\n%s", want, out)
		}
	}
	info := e.run("info")
	if info.code != 0 || !strings.Contains(info.out, "Storage Driver:") || !regexp.MustCompile(`Images: 1\b|Images: 2\b`).MatchString(info.out) {
		t.Error(info)
	}
	e.want("inactive", "info", "--format", "{{.Swarm.LocalNodeState}}")
	e.want(`.*Images.*Containers.*Local Volumes.*Build Cache.*`, "system", "df")
	e.must("system", "df", "-v")
	e.fails(1, "not a swarm manager", "node", "ls")
	e.fails(1, "not part of a swarm", "swarm", "leave")
	e.want(`ID +NAME +DESCRIPTION +ENABLED`, "plugin", "ls")
	for _, v := range []string{"1.24", "1.30", "1.40", "1.41", "1.44", "1.47", "1.51", "1.52", "1.56"} {
		for _, p := range []string{"/info", "/version", "/containers/json?all=1", "/images/json", "/networks", "/volumes", "/images/bb/json", "/images/bb/history"} {
			if code, body, err := e.http("GET", "/v"+v+p, ""); err != nil || code != 200 || !json.Valid([]byte(body)) {
				t.Errorf("v%s%s: %d %v %s", v, p, code, err, body)
			}
		}
	}
}

func TestRun(t *testing.T) {
	e := start(t)
	e.want("hello", "run", "--rm", "bb", "echo", "hello")
	e.want("", "ps", "-aq")
	if c := e.run("run", "--rm", "bb", "sh", "-c", "echo out; echo err >&2; exit 42"); c.code != 42 || c.out != "out\n" || c.err != "err\n" {
		t.Error(c)
	}
	if c := e.feed("line one\nline two\n", "run", "--rm", "-i", "bb", "cat"); c.out != "line one\nline two\n" {
		t.Error(c)
	}
	e.fails(127, "nosuch.*executable file not found", "run", "--rm", "bb", "nosuch")
	e.fails(127, "no such file or directory", "run", "--rm", "bb", "/no/such")
	e.fails(126, "permission denied", "run", "--rm", "bb", "/etc/passwd")
	e.fails(125, "No such image|pull access|not found|cannot pull|dial|lookup", "run", "--rm", "--pull", "never", "nosuch:image")
	e.want(`a=b\s+uid=1000\(web\) gid=1000\(web\).*/tmp\s+box`, "run", "--rm", "-e", "x=a=b", "-u", "web", "-w", "/tmp", "-h", "box", "bb",
		"sh", "-c", "echo $x; id; pwd; hostname")
	e.want("137", "run", "--rm", "bb", "sh", "-c", "sh -c 'kill -9 $$'; echo $?")
	e.want(".*eth0.*", "run", "--rm", "bb", "ip", "link")
	e.want("[^e]*", "run", "--rm", "--network", "none", "bb", "sh", "-c", "ls /sys/class/net")
	e.want("ok", "run", "--rm", "--read-only", "--tmpfs", "/t", "bb", "sh", "-c", "touch /x 2>/dev/null || touch /t/x && echo ok")
	e.want("/dev/pts/0", "run", "--rm", "-t", "bb", "tty")
	big := e.must("run", "--rm", "bb", "sh", "-c", "yes 0123456789 | head -n 100000")
	if len(big) != 11*100000-1 {
		t.Errorf("a large output has %d bytes", len(big))
	}
}

func TestLifeCycle(t *testing.T) {
	e := start(t)
	id := e.must("create", "--name", "web", "--label", "a=b", "bb", "sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done")
	if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(id) {
		t.Fatalf("id %q", id)
	}
	e.fails(1, `(?i)conflict.*in use`, "create", "--name", "web", "bb")
	e.want("web Created.*", "ps", "-a", "--format", "{{.Names}} {{.Status}}")
	e.want("web", "start", "web")
	e.want("web Up .*", "ps", "--format", "{{.Names}} {{.Status}}", "--filter", "label=a=b")
	e.want("", "ps", "-q", "--filter", "label=a=c")
	e.want("running true", "inspect", "-f", "{{.State.Status}} {{.State.Running}}", "web")
	e.want(id, "inspect", "-f", "{{.Id}}", id[:8])
	e.eventually("output is logged", func() bool { return e.must("logs", "web") == "up" })
	e.want("web", "start", "web") // already started: 304, no error
	e.want("web", "pause", "web")
	e.want(`.*\(Paused\)`, "ps", "--format", "{{.Status}}")
	e.fails(1, "paused", "exec", "web", "true")
	e.want("web", "unpause", "web")
	e.want("", "rename", "web", "app")
	e.want("PID.*sleep 0.1.*|PID.*sh -c.*", "top", "app", "-o", "pid,args")
	e.want("app", "stop", "-t", "5", "app")
	e.want("exited 7", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "app")
	e.want("app", "stop", "app")
	e.want("app", "restart", "app")
	e.fails(1, "(?i)cannot remove|running", "rm", "app")
	e.want("app", "kill", "-s", "KILL", "app")
	e.want("137", "wait", "app")
	e.want("app", "rm", "app")
	e.fails(1, "(?i)no such (object|container): app", "inspect", "app")
	e.fails(1, "(?i)no such container: app", "rm", "app")
	e.must("run", "-d", "--name", "xx", "bb", "sleep", "1000")
	e.want("xx", "rm", "-f", "xx")

	e.must("run", "-d", "--name", "rr", "--restart", "on-failure:2", "bb", "false")
	e.eventually("restarted twice", func() bool {
		return e.must("inspect", "-f", "{{.RestartCount}} {{.State.Status}}", "rr") == "2 exited"
	})
	e.must("run", "-d", "--name", "hh", "--health-cmd", "true", "--health-interval", "100ms", "bb", "sleep", "1000")
	e.eventually("healthy", func() bool { return strings.Contains(e.must("ps", "--format", "{{.Status}}"), "(healthy)") })
	e.must("update", "--memory", "64m", "--memory-swap", "64m", "hh")
	e.want("67108864", "inspect", "-f", "{{.HostConfig.Memory}}", "hh")
	e.want("NAME.*hh.*MiB.*", "stats", "--no-stream", "--format", "table {{.Name}} {{.MemUsage}}")
	e.want(`Total reclaimed space: .*|Deleted Containers:\s+[0-9a-f]{64}.*`, "container", "prune", "-f")
	e.want("hh", "ps", "-a", "--format", "{{.Names}}")
}

func TestExecAttachLogs(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "cc", "bb", "sh", "-c", "while :; do sleep 0.1; done")
	e.want("hi", "exec", "cc", "echo", "hi")
	if c := e.feed("to cat", "exec", "-i", "cc", "cat"); c.code != 0 || c.out != "to cat" {
		t.Error(c)
	}
	if c := e.run("exec", "cc", "sh", "-c", "echo o; echo e >&2; exit 9"); c.code != 9 || c.out != "o\n" || c.err != "e\n" {
		t.Error(c)
	}
	e.fails(127, "", "exec", "cc", "nosuch")
	e.fails(126, "", "exec", "cc", "/etc/passwd")
	e.want("1000:/tmp:v", "exec", "-u", "web", "-w", "/tmp", "-e", "k=v", "cc", "sh", "-c", "echo $(id -u):$(pwd):$k")
	e.want("/dev/pts/.*", "exec", "-t", "cc", "tty")
	e.want("", "exec", "-d", "cc", "sh", "-c", "touch /made")
	e.eventually("a detached exec ran", func() bool { return e.run("exec", "cc", "test", "-e", "/made").code == 0 })
	e.fails(1, "(?i)no such container", "exec", "nosuch", "true")

	e.must("run", "-d", "--name", "ll", "bb", "sh", "-c", "for i in 1 2 3; do echo o$i; done; echo e >&2")
	e.want("0", "wait", "ll")
	if c := e.run("logs", "ll"); c.out != "o1\no2\no3\n" || c.err != "e\n" {
		t.Error(c)
	}
	e.want("o3", "logs", "--tail", "2", "ll")
	e.want(`\d{4}-\d\d-\d\dT[\d:.]+Z o1.*`, "logs", "-t", "ll")
	e.want("", "logs", "--since", "2100-01-01", "ll")
	e.want("o1.*", "logs", "--since", "1h", "ll")
	e.want("", "logs", "--until", "1h", "ll")

	// Following ends with the container.
	e.must("run", "-d", "--name", "ff", "bb", "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done")
	e.want("1\n2\n3", "logs", "-f", "ff")

	// attach: input in, output out, end with the process.
	e.must("create", "-i", "--name", "aa", "bb", "sh", "-c", "read x; echo got $x; exit 5")
	if c := e.feed("word\n", "start", "-a", "-i", "aa"); c.code != 5 || c.out != "got word\n" {
		t.Error(c)
	}
}

func TestCopy(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "cc", "bb", "sleep", "1000")
	src := filepath.Join(e.dir, "src")
	if err := os.MkdirAll(src+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(src+"/d/f", []byte("text"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("f", src+"/d/l"); err != nil {
		t.Fatal(err)
	}
	e.must("cp", src, "cc:/copied")
	e.want("text", "exec", "cc", "cat", "/copied/d/l")
	e.must("cp", src+"/d/f", "cc:/tmp/")
	e.want("text.*640", "exec", "cc", "sh", "-c", "cat /tmp/f; stat -c %a /tmp/f")
	back := filepath.Join(e.dir, "back")
	e.must("cp", "cc:/copied", back)
	if b, err := os.ReadFile(back + "/d/f"); err != nil || string(b) != "text" {
		t.Errorf("%q %v", b, err)
	}
	if l, err := os.Readlink(back + "/d/l"); err != nil || l != "f" {
		t.Errorf("%q %v", l, err)
	}
	e.fails(1, "(?i)could not find|no such", "cp", "cc:/nosuch", back)
	e.fails(1, "(?i)no such", "cp", src, "nosuch:/")
	// A link inside the container does not lead outside it.
	e.must("exec", "cc", "ln", "-s", "/etc", "/out")
	e.must("cp", src+"/d/f", "cc:/out/planted")
	if _, err := os.Lstat("/etc/planted"); !os.IsNotExist(err) {
		t.Fatal("cp wrote to the host")
	}
	e.want("A /copied.*", "diff", "cc")
	e.must("stop", "-t", "0", "cc")
	e.want(".*ustar.*text.*|.*text.*", "cp", "cc:/tmp/f", "-") // a tar on standard output
}

func TestImages(t *testing.T) {
	e := start(t)
	e.want(".*bb +latest.*", "images")
	e.must("tag", "bb", "reg.example/team/bb:v1")
	e.want("sha256:[0-9a-f]{64}", "inspect", "--type", "image", "-f", "{{.Id}}", "reg.example/team/bb:v1")
	e.want(`reg.example/team/bb`, "images", "--format", "{{.Repository}}", "--filter", "reference=reg.example/team/*")
	e.want(".*[kM]B.*", "history", "bb")
	e.want("Untagged: reg.example/team/bb:v1", "rmi", "reg.example/team/bb:v1")
	e.fails(1, "(?i)no such image", "rmi", "nosuch")
	e.fails(1, "(?i)no such image", "tag", "nosuch", "x")

	e.must("run", "--name", "cc", "bb", "touch", "/new")
	e.want("sha256:[0-9a-f]{64}", "commit", "-m", "note", "-c", `CMD ["ls","/new"]`, "cc", "bb:new")
	e.want("/new", "run", "--rm", "bb:new")
	e.fails(1, "(?i)in use|using", "rmi", "bb:latest")
	e.must("rm", "cc")

	tar := filepath.Join(e.dir, "save.tar")
	e.must("save", "-o", tar, "bb:new")
	e.must("rmi", "bb:new")
	e.want("Loaded image: bb:new", "load", "-i", tar)
	e.want("/new", "run", "--rm", "bb:new")

	e.must("create", "--name", "xx", "bb")
	flat := filepath.Join(e.dir, "flat.tar")
	e.must("export", "-o", flat, "xx")
	e.want("sha256:[0-9a-f]{64}", "import", flat, "flat:1")
	e.want("hi", "run", "--rm", "flat:1", "/bin/echo", "hi")
	e.must("image", "prune", "-f")
	e.fails(1, "", "pull", "127.0.0.1:1/nosuch:latest")
	e.fails(1, "(?i)cannot build|servin-buildd|buildx", "build", "-")
}

func TestVolumesAndMounts(t *testing.T) {
	e := start(t)
	e.want("data", "volume", "create", "--label", "a=b", "data")
	e.want("data", "volume", "ls", "-q", "--filter", "label=a=b")
	e.want("local data", "volume", "inspect", "-f", "{{.Driver}} {{.Name}}", "data")
	e.must("run", "--rm", "-v", "data:/d", "bb", "sh", "-c", "echo kept > /d/f")
	e.want("kept", "run", "--rm", "--mount", "type=volume,src=data,dst=/d,readonly", "bb", "cat", "/d/f")
	host := filepath.Join(e.dir, "host")
	if err := os.MkdirAll(host, 0o755); err != nil {
		t.Fatal(err)
	}
	e.must("run", "--rm", "-v", host+":/h", "bb", "touch", "/h/made")
	if _, err := os.Stat(host + "/made"); err != nil {
		t.Error(err)
	}
	e.fails(1, "(?i)read-only", "run", "--rm", "-v", host+":/h:ro", "bb", "touch", "/h/x")
	e.fails(125, "(?i)does not exist|no such", "run", "--rm", "--mount", "type=bind,src=/no/such,dst=/x", "bb", "true")
	e.must("run", "-d", "--name", "uu", "-v", "data:/d", "bb", "sleep", "1000")
	e.fails(1, "(?i)in use", "volume", "rm", "data")
	e.must("rm", "-f", "uu")
	e.want("data", "volume", "rm", "data")
	e.fails(1, "(?i)no such volume", "volume", "inspect", "data")
	e.must("run", "-d", "--name", "anon", "-v", "/a", "bb", "sleep", "1000")
	e.must("rm", "-fv", "anon")
	e.want("", "volume", "ls", "-q")
	e.must("volume", "prune", "-f")
}

func TestNetworks(t *testing.T) {
	e := start(t)
	e.want(`bridge\s+host\s+none`, "network", "ls", "--format", "{{.Name}}", "--filter", "type=builtin")
	e.want("[0-9a-f]{64}", "network", "create", "--label", "a=b", "--subnet", "10.231.7.0/24", "mine")
	e.fails(1, "already exists", "network", "create", "mine")
	e.want("mine", "network", "ls", "--format", "{{.Name}}", "--filter", "label=a=b")
	e.want("10.231.7.0/24 bridge", "network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}} {{.Driver}}", "mine")
	e.must("run", "-d", "--name", "srv", "--network", "mine", "--network-alias", "alias", "bb", "sh", "-c",
		"mkdir /w; echo served > /w/index.html; httpd -f -p 80 -h /w")
	for _, name := range []string{"srv", "alias"} {
		e.want("served", "run", "--rm", "--network", "mine", "bb", "sh", "-c",
			"for i in 1 2 3 4 5 6 7 8 9; do wget -qO- http://"+name+"/ && exit; sleep 0.2; done; exit 1")
	}
	e.want(`10\.231\.7\.\d+`, "inspect", "-f", "{{.NetworkSettings.Networks.mine.IPAddress}}", "srv")
	e.want("srv", "network", "inspect", "-f", "{{range .Containers}}{{.Name}}{{end}}", "mine")
	e.fails(1, "(?i)active endpoints|in use", "network", "rm", "mine")

	e.must("network", "create", "other")
	e.must("network", "connect", "--alias", "two", "other", "srv")
	e.want("mine\nother", "inspect", "-f", `{{range $k, $v := .NetworkSettings.Networks}}{{println $k}}{{end}}`, "srv")
	e.want("served", "run", "--rm", "--network", "other", "bb", "wget", "-qO-", "http://two/")
	e.must("network", "disconnect", "other", "srv")
	e.want("mine", "inspect", "-f", `{{range $k, $v := .NetworkSettings.Networks}}{{println $k}}{{end}}`, "srv")

	e.must("run", "-d", "--name", "pub", "-p", "127.0.0.1::80", "bb", "httpd", "-f", "-p", "80", "-h", "/etc")
	addr := e.must("port", "pub", "80/tcp")
	if !regexp.MustCompile(`^127\.0\.0\.1:\d+$`).MatchString(addr) {
		t.Fatalf("docker port printed %q", addr)
	}
	e.want(`127\.0\.0\.1:\d+->80/tcp`, "ps", "--format", "{{.Ports}}", "--filter", "name=pub")
	e.eventually("the published port answers", func() bool {
		resp, err := http.Get("http://" + addr + "/passwd")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200
	})
	e.fails(125, "(?i)already allocated|in use", "run", "--rm", "-p", addr+":80", "bb", "true")
	e.want(`\d+\.\d+\.\d+\.\d+`, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", "pub")
	e.must("rm", "-f", "pub", "srv")
	e.want("other", "network", "rm", "other")
	e.want("Deleted Networks:\nmine", "network", "prune", "-f")
}

// TestTerminal is run -it under a pseudo-terminal: input, size, detach, attach.
func TestTerminal(t *testing.T) {
	e := start(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	open := func(args ...string) (*os.File, func() int) {
		cmd := e.command(ctx, args...)
		cmd.Env = append(cmd.Env, "TERM=xterm")
		tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 99})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tty.Close() })
		return tty, func() int { _ = cmd.Wait(); return cmd.ProcessState.ExitCode() }
	}
	// expect reads until the text has come.
	expect := func(tty *os.File, text string) {
		t.Helper()
		var seen []byte
		b := make([]byte, 1024)
		_ = tty.SetReadDeadline(time.Now().Add(20 * time.Second))
		for !strings.Contains(string(seen), text) {
			n, err := tty.Read(b)
			seen = append(seen, b[:n]...)
			if err != nil {
				t.Fatalf("no %q in %q: %v", text, seen, err)
			}
		}
	}
	tty, wait := open("run", "-it", "--name", "term", "bb", "sh")
	_, _ = tty.WriteString("stty size; echo mark$((1+1))\n")
	expect(tty, "mark2")
	_, _ = tty.WriteString("stty size\n")
	expect(tty, "33 99")
	_, _ = tty.WriteString("\x10\x11")
	if code := wait(); code != 0 {
		t.Errorf("detaching exits with %d", code)
	}
	e.want("true", "inspect", "-f", "{{.State.Running}}", "term")
	tty, wait = open("attach", "term")
	_, _ = tty.WriteString("exit 6\n")
	if code := wait(); code != 6 {
		t.Errorf("attach exits with %d", code)
	}
	e.want(".*mark2.*", "logs", "term")
}

// TestExecGoesOn: an exec whose client has left by its detach keys, or has died, is
// still there.
func TestExecGoesOn(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "gg", "bb", "sleep", "1000")
	for name, leave := range map[string]func(f *os.File, cmd *exec.Cmd){
		"keys": func(f *os.File, _ *exec.Cmd) { _, _ = f.Write([]byte{16, 17}) },
		"kill": func(_ *os.File, cmd *exec.Cmd) { _ = cmd.Process.Kill() },
	} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		cmd := e.command(ctx, "exec", "-it", "gg", "sh", "-c", "echo begun > /"+name+"; while sleep 0.01; do echo out; done")
		f, err := pty.Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.Copy(io.Discard, f) }()
		e.eventually("the exec runs", func() bool { return e.run("exec", "gg", "test", "-e", "/"+name).code == 0 })
		leave(f, cmd)
		_ = cmd.Wait()
		f.Close()
		cancel()
		time.Sleep(100 * time.Millisecond)
		if out := e.must("exec", "gg", "ps"); !strings.Contains(out, "begun > /"+name) {
			t.Errorf("%s: the process is gone:\n%s", name, out)
		}
	}
	if out := e.must("inspect", "-f", "{{len .ExecIDs}}", "gg"); out != "2" {
		t.Errorf("%s execs are shown, 2 run", out)
	}
	if c := e.run("exec", "-u", "nobodyatall", "gg", "true"); c.code != 126 || !strings.Contains(c.out+c.err, "unable to find user nobodyatall") {
		t.Error(c)
	}
	if c := e.run("exec", "gg", "nosuchprogram"); c.code != 127 {
		t.Error(c)
	}
	if code, body, err := e.http("POST", "/containers/gg/resize?h=10&w=20", ""); err != nil || code != 200 {
		t.Errorf("resize without a terminal: %d %s %v", code, body, err)
	}
}

func TestEventsStream(t *testing.T) {
	e := start(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := e.command(ctx, "events", "--format", "{{.Type}} {{.Action}} {{.Actor.Attributes.name}}", "--filter", "type=container")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond) // until it has subscribed; events are not repeated
	e.must("run", "--rm", "--name", "ev", "bb", "true")
	got := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(out)
		got <- string(b)
	}()
	time.Sleep(300 * time.Millisecond)
	cancel()
	_ = cmd.Wait()
	want := []string{"container create ev", "container attach ev", "container start ev", "container die ev", "container destroy ev"}
	all := <-got
	rest := all
	for _, w := range want {
		i := strings.Index(rest, w)
		if i < 0 {
			t.Fatalf("no %q in order in:\n%s", w, all)
		}
		rest = rest[i+len(w):]
	}
	time.Sleep(1100 * time.Millisecond) // docker sends whole seconds
	past := e.must("events", "--since", "1h", "--until", "0s", "--format", "{{.Action}}", "--filter", "container=ev")
	if !strings.Contains(past, "destroy") {
		t.Errorf("past events: %q", past)
	}
}

// TestAbandonedClients: clients that die in the middle of a stream leave no
// descriptor and no goroutine behind.
func TestAbandonedClients(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "base", "bb", "sleep", "1000")
	use := func() (fds, goroutines int) {
		l, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		_, metrics, err := e.http("GET", "/metrics", "")
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`(?m)^go_goroutines (\d+)$`).FindStringSubmatch(metrics)
		if m == nil {
			t.Fatalf("no go_goroutines in the metrics:\n%s", metrics)
		}
		goroutines, _ = strconv.Atoi(m[1])
		return len(l), goroutines
	}
	e.must("run", "--rm", "bb", "true") // what is opened on first use
	e.must("exec", "base", "true")
	time.Sleep(time.Second)
	fds, goroutines := use()

	ctx, kill := context.WithCancel(context.Background())
	defer kill()
	var clients []*exec.Cmd
	for _, args := range [][]string{{"logs", "-f", "base"}, {"events"}, {"attach", "base"}, {"wait", "base"}, {"stats", "base"}, {"exec", "base", "sleep", "1000"}} {
		for range 5 {
			cmd := e.command(ctx, args...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			clients = append(clients, cmd)
		}
	}
	e.eventually("every client is connected", func() bool {
		f, _ := use()
		return f >= fds+len(clients)
	})
	kill() // with SIGKILL
	for _, c := range clients {
		_ = c.Wait()
	}
	e.must("kill", "base") // ends what the execs started
	e.must("rm", "base")
	e.eventually("descriptors and goroutines are as before", func() bool {
		f, g := use()
		return f <= fds+2 && g <= goroutines+2
	})
}
