// Package docker drives the engine with Docker's own command line, which must
// not notice that it talks to something else.
package docker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// engine is a daemon on folders of its own, with a busybox image "bb".
type engine struct {
	t      *testing.T
	dir    string
	sock   string
	docker string
	cmd    *exec.Cmd
	exited chan struct{}
}

// start begins a daemon for one test.
func start(t *testing.T) *engine {
	t.Helper()
	docker, err := exec.LookPath("docker")
	if err != nil {
		t.Skip("SKIP: there is no docker command on the PATH")
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: the engine is started as root here")
	}
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	servind := filepath.Join(bin, "servind")
	if _, err := os.Stat(servind); err != nil {
		t.Fatalf("no servind in %s: run make build first", bin)
	}
	// A short path: unix socket names are limited to 107 bytes.
	dir, err := os.MkdirTemp("", "dk")
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{t: t, dir: dir, sock: dir + "/s", docker: docker, exited: make(chan struct{})}
	log, err := os.Create(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	e.cmd = exec.Command(servind, "--root", dir+"/root", "--run-root", dir+"/run", "--listen", "unix://"+e.sock)
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = e.cmd.Wait(); close(e.exited) }()
	t.Cleanup(e.close)
	e.eventually("the daemon answers", func() bool {
		select {
		case <-e.exited:
			t.Fatalf("the daemon ended:\n%s", e.log())
		default:
		}
		_, _, err := e.http("GET", "/_ping", "")
		return err == nil
	})
	e.importBusybox()
	return e
}

func (e *engine) close() {
	if code, body, err := e.http("POST", "/servin/shutdown?containers=1", ""); err != nil || code != http.StatusNoContent {
		e.t.Errorf("cannot shut down: %d %s %v", code, body, err)
	}
	select {
	case <-e.exited:
	case <-time.After(30 * time.Second):
		e.t.Error("the daemon does not end after its shutdown")
		_ = e.cmd.Process.Kill()
		<-e.exited
	}
	if e.t.Failed() {
		e.t.Logf("the daemon's log:\n%s", e.log())
	}
	if err := os.RemoveAll(e.dir); err != nil {
		e.t.Errorf("cannot remove the engine's folders: %v", err)
	}
}

func (e *engine) log() string {
	b, _ := os.ReadFile(e.dir + "/log")
	return string(b[max(0, len(b)-8000):])
}

// http sends a plain request and returns status and body.
func (e *engine) http(method, path, body string) (int, string, error) {
	c := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", e.sock)
		}}}
	req, err := http.NewRequest(method, "http://docker"+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(b)), err
}

// call is what came of a command.
type call struct {
	args     []string
	out, err string
	code     int
}

func (c call) String() string {
	return fmt.Sprintf("docker %s: exit %d\nstdout: %s\nstderr: %s", strings.Join(c.args, " "), c.code, c.out, c.err)
}

// command prepares docker with an environment that is the test's alone.
func (e *engine) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, e.docker, args...)
	cmd.Env = []string{"DOCKER_HOST=unix://" + e.sock, "PATH=" + os.Getenv("PATH"), "HOME=" + e.dir, "DOCKER_CONFIG=" + e.dir + "/config"}
	return cmd
}

// run runs docker.
func (e *engine) run(args ...string) call { return e.feed("", args...) }

// feed runs docker with an input.
func (e *engine) feed(stdin string, args ...string) call {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := e.command(ctx, args...)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	err := cmd.Run()
	c := call{args: args, out: out.String(), err: errb.String(), code: cmd.ProcessState.ExitCode()}
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		e.t.Fatalf("%s: %v", c, err)
	}
	return c
}

// must runs docker, which has to succeed, and returns what it printed.
func (e *engine) must(args ...string) string {
	e.t.Helper()
	c := e.run(args...)
	if c.code != 0 {
		e.t.Fatal(c)
	}
	return strings.TrimSpace(c.out)
}

// want runs docker and compares what it prints with a regular expression.
func (e *engine) want(pattern string, args ...string) {
	e.t.Helper()
	if out := e.must(args...); !regexp.MustCompile(`(?s)\A(?:` + pattern + `)\z`).MatchString(out) {
		e.t.Errorf("docker %s printed %q, want %q", strings.Join(args, " "), out, pattern)
	}
}

// fails runs docker, which has to fail with the code and say what matches.
func (e *engine) fails(code int, pattern string, args ...string) {
	e.t.Helper()
	c := e.run(args...)
	if c.code != code || !regexp.MustCompile(`(?s)`+pattern).MatchString(c.err) {
		e.t.Errorf("want exit %d and %q\n%s", code, pattern, c)
	}
}

func (e *engine) eventually(what string, ok func() bool) {
	e.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			e.t.Fatalf("not within 20 s: %s\n%s", what, e.log())
		}
	}
}

// importBusybox makes the image "bb" from the host's static busybox.
func (e *engine) importBusybox() {
	e.t.Helper()
	root := e.dir + "/bb"
	script := `set -e; mkdir -p R/bin R/etc R/tmp R/proc R/sys R/dev R/root; chmod 1777 R/tmp
cp "$(command -v busybox)" R/bin/busybox
for a in $(busybox --list); do [ "$a" = busybox ] || ln -s busybox R/bin/$a; done
printf 'root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/root:/bin/sh\n' > R/etc/passwd
printf 'root:x:0:\nweb:x:1000:\n' > R/etc/group
tar -C R -cf R.tar .`
	if _, err := exec.LookPath("busybox"); err != nil {
		e.t.Skip("SKIP: there is no busybox to make an image of")
	}
	if out, err := exec.Command("sh", "-c", strings.ReplaceAll(script, "R", root)).CombinedOutput(); err != nil {
		e.t.Fatalf("cannot make an image: %v: %s", err, out)
	}
	e.must("import", "-c", `CMD ["sh"]`, "-c", "ENV PATH=/bin", root+".tar", "bb")
}
