// Package compose drives servin compose, servin debug, servin watch and package
// servintest against a real engine, and Docker's own Compose beside ours.
package compose

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/client"
)

// engine is a daemon on folders of its own, with a busybox image "bb".
type engine struct {
	dir, host string
	bin       string
	cmd       *exec.Cmd
	exited    chan struct{}
	c         *client.Client
}

// shared is the engine of all tests: each has a project and names of its own.
var shared *engine

func TestMain(m *testing.M) {
	code := 1
	defer func() { os.Exit(code) }()
	if os.Getenv("SERVINTEST_CHILD") != "" { // uses its parent's engine
		code = m.Run()
		return
	}
	if os.Getuid() != 0 {
		fmt.Println("SKIP: the engine is started as root here")
		code = 0
		return
	}
	e, err := start()
	if err != nil {
		fmt.Println(err)
		return
	}
	shared = e
	code = m.Run()
	if err := e.close(); err != nil {
		fmt.Println(err)
		code = 1
	}
}

func start() (*engine, error) {
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if _, err := os.Stat(filepath.Join(bin, "servin-compose")); err != nil {
		return nil, fmt.Errorf("no servin-compose in %s: run make build first", bin)
	}
	// A short path: unix socket names are limited to 107 bytes.
	dir, err := os.MkdirTemp("", "cp")
	if err != nil {
		return nil, err
	}
	e := &engine{dir: dir, host: "unix://" + dir + "/s", bin: bin, exited: make(chan struct{})}
	log, err := os.Create(dir + "/log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	e.cmd = exec.Command(filepath.Join(bin, "servind"), "--root", dir+"/root", "--run-root", dir+"/run", "--listen", e.host)
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := e.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { _ = e.cmd.Wait(); close(e.exited) }()
	if e.c, err = client.New(client.Config{Host: e.host}); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(20 * time.Second); e.c.Ping(context.Background()) != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("the daemon does not answer:\n%s", e.log())
		}
	}
	return e, e.importBusybox()
}

func (e *engine) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	err := e.c.Shutdown(ctx, true)
	e.c.Close()
	select {
	case <-e.exited:
	case <-ctx.Done():
		_ = e.cmd.Process.Kill()
		<-e.exited
		err = errors.Join(err, errors.New("the daemon does not end after its shutdown"))
	}
	if err != nil {
		return fmt.Errorf("cannot shut down: %w\n%s", err, e.log())
	}
	return os.RemoveAll(e.dir)
}

func (e *engine) log() string {
	b, _ := os.ReadFile(e.dir + "/log")
	return string(b[max(0, len(b)-8000):])
}

// importBusybox makes the image "bb" of the host's static busybox.
func (e *engine) importBusybox() error {
	root := e.dir + "/bb"
	script := `set -e; mkdir -p R/bin R/etc R/tmp R/proc R/sys R/dev R/root; chmod 1777 R/tmp
cp /usr/bin/busybox R/bin/busybox
for a in $(busybox --list); do [ "$a" = busybox ] || ln -s busybox R/bin/$a; done
printf 'root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/root:/bin/sh\n' > R/etc/passwd
printf 'root:x:0:\nweb:x:1000:\n' > R/etc/group
tar -C R -cf R.tar .`
	if out, err := exec.Command("sh", "-c", strings.ReplaceAll(script, "R", root)).CombinedOutput(); err != nil {
		return fmt.Errorf("cannot make an image: %w: %s", err, out)
	}
	f, err := os.Open(root + ".tar")
	if err != nil {
		return err
	}
	defer f.Close()
	return e.c.ImageImport(context.Background(), f, client.ImportOptions{Repo: "bb", Changes: []string{`CMD ["sh"]`, "ENV PATH=/bin"}}, nil)
}

// call is what came of a command.
type call struct {
	args     []string
	out, err string
	code     int
}

func (c call) String() string {
	return fmt.Sprintf("%s: exit %d\nstdout: %s\nstderr: %s", strings.Join(c.args, " "), c.code, c.out, c.err)
}

// project is a folder with a Compose file, and its name.
type project struct {
	t    *testing.T
	e    *engine
	dir  string
	name string
	env  []string
}

// newProject writes files: the first is compose.yaml, then NAME, TEXT and so on.
func newProject(t *testing.T, yaml string, files ...string) *project {
	t.Helper()
	p := &project{t: t, e: shared, dir: t.TempDir()}
	p.name = strings.ToLower(regexp.MustCompile(`[^A-Za-z0-9]+`).ReplaceAllString(t.Name(), ""))
	p.write("compose.yaml", yaml)
	for i := 0; i+1 < len(files); i += 2 {
		p.write(files[i], files[i+1])
	}
	t.Cleanup(func() {
		if c := p.run("--profile", "*", "down", "-v", "-t", "0", "--remove-orphans"); c.code != 0 {
			t.Error(c)
		}
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", p.e.log())
		}
	})
	return p
}

func (p *project) write(name, text string) {
	p.t.Helper()
	file := filepath.Join(p.dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// command prepares a program with an environment that is the test's alone.
func (p *project) command(ctx context.Context, prog string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, prog, args...)
	cmd.Dir = p.dir
	cmd.Env = append([]string{"SERVIN_HOST=" + p.e.host, "DOCKER_HOST=" + p.e.host, "PATH=" + p.e.bin + ":" + os.Getenv("PATH"), "HOME=" + p.e.dir, "COMPOSE_PROJECT_NAME=" + p.name}, p.env...)
	return cmd
}

// run runs servin compose.
func (p *project) run(args ...string) call {
	p.t.Helper()
	return p.exec(filepath.Join(p.e.bin, "servin"), append([]string{"compose"}, args...)...)
}

func (p *project) exec(prog string, args ...string) call {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := p.command(ctx, prog, args...)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	err := cmd.Run()
	c := call{args: args, out: out.String(), err: errb.String(), code: cmd.ProcessState.ExitCode()}
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		p.t.Fatalf("%s: %v", c, err)
	}
	return c
}

// must runs servin compose, which has to succeed, and returns what it printed.
func (p *project) must(args ...string) string {
	p.t.Helper()
	c := p.run(args...)
	if c.code != 0 {
		p.t.Fatal(c)
	}
	return strings.TrimSpace(c.out)
}

// servin is must for servin itself.
func (p *project) servin(args ...string) string {
	p.t.Helper()
	c := p.exec(filepath.Join(p.e.bin, "servin"), args...)
	if c.code != 0 {
		p.t.Fatal(c)
	}
	return strings.TrimSpace(c.out)
}

// want runs servin compose and compares what it prints.
func (p *project) want(want string, args ...string) {
	p.t.Helper()
	if out := p.must(args...); out != want {
		p.t.Errorf("servin compose %s printed %q, want %q", strings.Join(args, " "), out, want)
	}
}

// fails runs servin compose, which has to fail with the code and say what matches.
func (p *project) fails(code int, pattern string, args ...string) {
	p.t.Helper()
	c := p.run(args...)
	if c.code != code || !regexp.MustCompile(pattern).MatchString(c.err+c.out) {
		p.t.Errorf("want exit %d and %q\n%s", code, pattern, c)
	}
}

// id finds a container by its service's name and number.
func (p *project) id(name string) string {
	p.t.Helper()
	return p.servin("inspect", "--format", "{{.Id}}", p.name+"-"+name)
}

func (p *project) eventually(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("not within 20 s: %s\n%s", what, p.e.log())
		}
	}
}

// background is a command that goes on.
type background struct {
	p   *project
	cmd *exec.Cmd
	out *output
}

// output can be read while it is written.
type output struct {
	mu  chan struct{}
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu <- struct{}{}
	defer func() { <-o.mu }()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu <- struct{}{}
	defer func() { <-o.mu }()
	return o.buf.String()
}

func (p *project) background(prog string, args ...string) *background {
	p.t.Helper()
	b := &background{p: p, out: &output{mu: make(chan struct{}, 1)}}
	b.cmd = p.command(context.Background(), filepath.Join(p.e.bin, prog), args...)
	b.cmd.Stdout, b.cmd.Stderr = b.out, b.out
	if err := b.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if b.cmd.ProcessState == nil {
			_ = b.cmd.Process.Kill()
			_ = b.cmd.Wait()
		}
	})
	return b
}

func (b *background) says(text string) {
	b.p.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !strings.Contains(b.out.String(), text) {
		if time.Now().After(deadline) {
			b.p.t.Fatalf("%q was not said within 20 s; it was\n%s\n%s", text, b.out, b.p.e.log())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// ends waits for the end and gives the exit code.
func (b *background) ends() int {
	b.p.t.Helper()
	done := make(chan struct{})
	go func() { _ = b.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		_ = b.cmd.Process.Kill()
		<-done
		b.p.t.Fatalf("it does not end; it said\n%s", b.out)
	}
	return b.cmd.ProcessState.ExitCode()
}
