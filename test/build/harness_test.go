// Package build drives builds as users do: docker's command line, with and
// without BuildKit, and servin's, against a daemon on folders of its own.
package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/cloudos-io/cloudos/test/harness"
)

// long reports whether the long campaigns were asked for (make test-long).
var long = harness.Long()

func TestMain(m *testing.M) { harness.Main(m) }

// engine is one daemon on folders of its own.
type engine struct {
	*harness.Daemon
	t *testing.T
}

// start begins a daemon with more lines of configuration and gives it the image
// "bb", a busybox.
func start(t *testing.T, conf string) *engine {
	t.Helper()
	e := &engine{Daemon: harness.New(t, "sb", "servin-buildd"), t: t}
	e.Config = conf
	t.Cleanup(e.close)
	e.Boot()
	e.importBusybox()
	return e
}

// close ends everything and looks for traces.
func (e *engine) close() {
	e.Close()
	if g := e.groups(); len(g) > 0 {
		e.t.Errorf("cgroups are left: %v", g)
	}
	if p := e.processes(); len(p) > 0 {
		e.t.Errorf("processes are left: %v", p)
	}
}

// instance is how names of this engine's things begin.
func (e *engine) instance() string {
	b, _ := exec.Command("sh", "-c", fmt.Sprintf(`printf '%s/root\0%s/run' | sha256sum | cut -c1-8`, e.Dir, e.Dir)).Output()
	return strings.TrimSpace(string(b))
}

// groups lists the cgroups of build steps.
func (e *engine) groups() []string {
	name := "servin-build-" + e.instance()
	a, _ := filepath.Glob("/sys/fs/cgroup/" + name)
	b, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	return append(a, b...)
}

// processes lists programs that were started with this engine's folders.
func (e *engine) processes() []string {
	var out []string
	for pid, args := range commands() {
		if strings.Contains(args, e.Dir) && pid != os.Getpid() {
			out = append(out, strconv.Itoa(pid)+" "+args)
		}
	}
	return out
}

// commands are the command lines of all processes.
func commands() map[int]string {
	out := map[int]string{}
	ents, _ := os.ReadDir("/proc")
	for _, x := range ents {
		if pid, err := strconv.Atoi(x.Name()); err == nil {
			if b, _ := os.ReadFile("/proc/" + x.Name() + "/cmdline"); len(b) > 0 {
				out[pid] = strings.ReplaceAll(string(b), "\x00", " ")
			}
		}
	}
	return out
}

// builder is the process id of the running servin-buildd, 0 if there is none.
func (e *engine) builder() int {
	for pid, args := range commands() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if strings.HasPrefix(args, "servin-buildd serve") && len(f) > 1 && f[1] == strconv.Itoa(e.Cmd.Process.Pid) {
			return pid
		}
	}
	return 0
}

// step is the process id of a build step whose command line begins so.
func step(prefix string) int {
	for pid, args := range commands() {
		if strings.HasPrefix(args, prefix) {
			return pid
		}
	}
	return 0
}

type result struct {
	out, err string
	code     int
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.code, r.out, r.err)
}

func (r result) all() string { return r.out + r.err }

// exec runs a program against the engine.
func (e *engine) exec(stdin io.Reader, env []string, argv ...string) result {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errb
	cmd.Env = append(append(os.Environ(), "DOCKER_HOST=unix://"+e.Sock(), "SERVIN_HOST=unix://"+e.Sock(), "SERVIN_CONFIG="+e.Dir+"/cli"), env...)
	err := cmd.Run()
	r := result{out: out.String(), err: errb.String()}
	var ee *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &ee):
		r.code = ee.ExitCode()
	default:
		e.t.Fatalf("%s: %v", strings.Join(argv, " "), err)
	}
	return r
}

func (e *engine) servin(args ...string) result {
	e.t.Helper()
	return e.exec(nil, nil, append([]string{filepath.Join(e.Bin, "servin")}, args...)...)
}

// must runs servin and returns what it printed.
func (e *engine) must(args ...string) string {
	e.t.Helper()
	r := e.servin(args...)
	if r.code != 0 {
		e.t.Fatalf("servin %s: %s", strings.Join(args, " "), r)
	}
	return strings.TrimSpace(r.out)
}

// classic runs docker build without BuildKit.
func (e *engine) classic(args ...string) result {
	e.t.Helper()
	return e.exec(nil, []string{"DOCKER_BUILDKIT=0", "DOCKER_CONFIG=" + e.Dir + "/docker"}, append([]string{"docker", "build"}, args...)...)
}

// context makes a directory of files, by path; a path that ends in a slash is a
// directory.
func (e *engine) context(files map[string]string) string {
	e.t.Helper()
	dir, err := os.MkdirTemp(e.Dir, "ctx")
	if err != nil {
		e.t.Fatal(err)
	}
	for name, body := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			e.t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(body), 0o644); err != nil {
			e.t.Fatal(err)
		}
	}
	return dir
}

// importBusybox makes the image "bb" of the host's static busybox.
func (e *engine) importBusybox() {
	e.t.Helper()
	root := harness.Busybox(e.t, "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh", "root:x:0:", false)
	if r := e.exec(root, nil, filepath.Join(e.Bin, "servin"), "import", "-", "bb"); r.code != 0 {
		e.t.Fatal(r)
	}
}

// startRegistry serves a registry on loopback.
func startRegistry(t *testing.T) string {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// contains checks that a text has all of some parts.
func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q is missing in:\n%s", p, text)
		}
	}
}
