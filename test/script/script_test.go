// Package script drives the shipped command line by scripts (testdata/*.txtar),
// each against a daemon and a registry of its own. Besides testscript's commands:
//
//	servin ARG...            runs the command line; it must succeed
//	status N ARG...          runs it and wants the exit code N
//	tty [-in FILE] N ARG...  runs it on a terminal, types FILE's lines one by one
//	                         and wants the exit code N; output goes to stdout
//	eventually ARG...        runs it until it succeeds and matches nothing else:
//	                         eventually REGEXP ARG... wants output too
//	engine kill|stop|start   does that to the daemon; one that somebody else looks after is not
//	                         stopped, and is back after start
//	tarball FILE ENTRY...    writes a tar; an entry is name, name/, name->target,
//	                         name=text or name=>hardlink
//
// $REGISTRY is the registry's address; $LOCKED one that wants user "ada" and
// password "secret". $RUNTIME is another OCI runtime that the engine knows.
//
// Conditions:
//
//	idmap    where the work folder is, mounts can map ids: not on a share of a machine's host
//	         (virtiofs in Linux 6.1 cannot). What remains there tests that the engine then does without.
//	runtime  there is a $RUNTIME: runc where it is installed, and in a machine, whose image has none, our
//	         servin-runtime in its place, which the engine runs from the shared folder like any other
//	own      the engine is the script's own: nobody else starts it again
package script

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/test/harness"
)

func TestScripts(t *testing.T) {
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	for _, p := range []string{"servin", "servind"} {
		if _, err := os.Stat(filepath.Join(bin, p)); err != nil {
			t.Fatalf("no %s in %s: run make build first", p, bin)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: the scripts need root")
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		WorkdirRoot:         os.Getenv("SERVIN_TEST_WORK"),
		Setup:               func(env *testscript.Env) error { return setup(t, env, bin) },
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "idmap": // a share of a machine's host maps no ids
				return sharedSocket == "", nil
			case "runtime":
				return otherRuntime() != "", nil
			case "own":
				return sharedSocket == "", nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"servin":     servin,
			"status":     status,
			"tty":        onTTY,
			"eventually": eventually,
			"engine":     engineCmd,
			"tarball":    tarball,
		},
	})
}

// daemon is the engine of one script.
type daemon struct {
	bin, dir string
	cmd      *exec.Cmd
	done     chan struct{}
	// shared is the socket of an engine that is not the script's own; killed is its process that a script ended last.
	shared, killed string
}

type daemonKey struct{}

func (d *daemon) sock() string {
	if d.shared != "" {
		return d.shared
	}
	return d.dir + "/s.sock"
}

func (d *daemon) start() error {
	out, err := os.OpenFile(d.dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	// Specs of made-up devices are looked for where a script puts them.
	if err := os.WriteFile(d.dir+"/config.yaml", []byte("version: 1\ncdiSpecDirs: ["+d.dir+"/cdi]\n"), 0o600); err != nil {
		return err
	}
	d.cmd = exec.Command(d.bin+"/servind", "--config", d.dir+"/config.yaml", "--root", d.dir+"/root", "--run-root", d.dir+"/run", "--listen", "unix://"+d.sock())
	d.cmd.Stdout, d.cmd.Stderr = out, out
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.cmd.Start(); err != nil {
		return err
	}
	d.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { cmd.Wait(); close(done) }(d.cmd, d.done)
	for deadline := time.Now().Add(harness.Slow() * 20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		select {
		case <-d.done:
			return fmt.Errorf("the daemon ended:\n%s", d.log())
		default:
		}
		if c, err := net.Dial("unix", d.sock()); err == nil {
			c.Close()
			return nil
		}
	}
	_ = d.cmd.Process.Signal(syscall.SIGQUIT) // it says what it is at
	<-d.done
	return fmt.Errorf("the daemon does not listen:\n%s", d.log())
}

func (d *daemon) log() string {
	b, _ := os.ReadFile(d.dir + "/log")
	if len(b) > 4000 {
		b = b[len(b)-4000:]
	}
	return string(b)
}

func (d *daemon) running() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// close leaves no trace.
func (d *daemon) close(t *testing.T) {
	if !d.running() {
		if err := d.start(); err != nil {
			t.Error(err)
			return
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, d.bin+"/servin", "--host", "unix://"+d.sock(), "system", "shutdown", "--force").CombinedOutput(); err != nil {
		t.Errorf("shutdown: %v: %s", err, out)
	}
	select {
	case <-d.done:
	case <-time.After(30 * time.Second):
		t.Errorf("the daemon does not end:\n%s", d.log())
		d.cmd.Process.Kill()
		<-d.done
	}
	if err := os.RemoveAll(d.dir); err != nil {
		t.Error(err)
	}
}

func setup(t *testing.T, env *testscript.Env, bin string) error {
	if sharedSocket != "" {
		return setupShared(t, env, bin)
	}
	dir, err := os.MkdirTemp("", "sv") // short: socket names have 107 bytes
	if err != nil {
		return err
	}
	d := &daemon{bin: bin, dir: dir}
	if err := d.start(); err != nil {
		return err
	}
	env.Defer(func() { d.close(t) })
	if err := importBusybox(d); err != nil {
		return err
	}
	env.Values[daemonKey{}] = d
	open, locked := registries(env)
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("CDI", dir+"/cdi")
	env.Setenv("RUNTIME", otherRuntime())
	env.Setenv("TZ", "UTC")
	env.Setenv("SERVIN_HOST", "unix://"+d.sock())
	env.Setenv("REGISTRY", open)
	env.Setenv("LOCKED", locked)
	env.Setenv("PATH", env.WorkDir+"/bin"+string(os.PathListSeparator)+bin+string(os.PathListSeparator)+env.Getenv("PATH"))
	return nil
}

// otherRuntime is the name of an OCI runtime besides the native one; empty is none.
func otherRuntime() string {
	if sharedSocket != "" {
		return os.Getenv("SERVIN_TEST_RUNTIME")
	}
	if _, err := exec.LookPath("runc"); err != nil {
		return ""
	}
	return "runc"
}

// registries serves an open and a locked registry on this host's loopback until the script is over,
// and returns their addresses.
func registries(env *testscript.Env) (openAt, lockedAt string) {
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	open := httptest.NewServer(reg)
	env.Defer(open.Close)
	locked := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); !ok || u != "ada" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
			w.WriteHeader(http.StatusUnauthorized)
			io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
			return
		}
		reg.ServeHTTP(w, r)
	}))
	env.Defer(locked.Close)
	return open.Listener.Addr().String(), locked.Listener.Addr().String()
}

// busybox is a static one: the image "bb" is made of it.
const busybox = "/usr/bin/busybox"

// importBusybox gives the daemon the image "bb": a shell and its tools, user web.
func importBusybox(d *daemon) error {
	prog, err := os.ReadFile(busybox)
	if err != nil {
		return fmt.Errorf("%w: install busybox-static (scripts/deps test)", err)
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data []byte) {
		h.Size = int64(len(data))
		w.WriteHeader(&h)
		w.Write(data)
	}
	for _, n := range []string{"bin/", "etc/", "tmp/", "root/", "dev/", "proc/", "sys/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: n, Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, prog)
	for _, n := range strings.Fields(string(applets)) {
		if n != "busybox" {
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + n, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/tmp:/bin/sh\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\nweb:x:1000:\n"))
	w.Close()
	cmd := exec.Command(d.bin+"/servin", "--host", "unix://"+d.sock(), "import", "-c", `CMD ["/bin/sh"]`, "-", "bb")
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot import busybox: %w: %s", err, out)
	}
	return nil
}

func servin(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("servin", args...)
	if (err != nil) != neg {
		if err == nil {
			ts.Fatalf("servin %s: no failure", strings.Join(args, " "))
		}
		ts.Fatalf("servin %s: %v", strings.Join(args, " "), err)
	}
}

func status(ts *testscript.TestScript, neg bool, args []string) {
	want := number(ts, args)
	got := exitCode(ts, ts.Exec("servin", args[1:]...))
	if (got == want) == neg {
		ts.Fatalf("servin %s: exit code %d", strings.Join(args[1:], " "), got)
	}
}

func number(ts *testscript.TestScript, args []string) int {
	if len(args) < 2 {
		ts.Fatalf("want a number and a command")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	return n
}

func exitCode(ts *testscript.TestScript, err error) int {
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		ts.Fatalf("%v", err)
	}
	if ee == nil {
		return 0
	}
	return ee.ExitCode()
}

func eventually(ts *testscript.TestScript, neg bool, args []string) {
	re, err := regexp.Compile(args[0])
	ts.Check(err)
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := ts.Exec("servin", args[1:]...)
		if err == nil && re.MatchString(ts.ReadFile("stdout")+ts.ReadFile("stderr")) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("servin %s never printed %s", strings.Join(args[1:], " "), args[0])
		}
	}
}

func engineCmd(ts *testscript.TestScript, neg bool, args []string) {
	d := ts.Value(daemonKey{}).(*daemon)
	if d.shared != "" {
		d.command(ts, args[0])
		return
	}
	switch args[0] {
	case "kill":
		ts.Check(d.cmd.Process.Kill())
		<-d.done
	case "stop":
		ts.Check(d.cmd.Process.Signal(syscall.SIGTERM))
		<-d.done
	case "start":
		ts.Check(d.start())
	default:
		ts.Fatalf("engine kill, stop or start")
	}
}

// keyPause is the time between two typed lines: for what they start to be there.
func keyPause() time.Duration { return harness.Slow() * 400 * time.Millisecond }

func onTTY(ts *testscript.TestScript, neg bool, args []string) {
	var keys []string
	if len(args) > 2 && args[0] == "-in" {
		keys = strings.SplitAfter(ts.ReadFile(args[1]), "\n")
		args = args[2:]
	}
	want := number(ts, args)
	path, err := exec.LookPath(filepath.Join(ts.Value(daemonKey{}).(*daemon).bin, "servin"))
	ts.Check(err)
	cmd := exec.Command(path, args[1:]...)
	cmd.Dir = ts.Getenv("WORK")
	cmd.Env = []string{"HOME=" + ts.Getenv("HOME"), "PATH=" + ts.Getenv("PATH"), "SERVIN_HOST=" + ts.Getenv("SERVIN_HOST"), "TERM=xterm"}
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 99})
	ts.Check(err)
	defer f.Close()
	var out bytes.Buffer
	read := make(chan struct{})
	go func() { io.Copy(&out, f); close(read) }()
	if strings.HasPrefix(strings.Join(args[1:], " "), "attach ") || slices.Contains(args, "-it") {
		awaitRaw(f)
	}
	for _, k := range keys {
		if k == "" {
			continue
		}
		time.Sleep(keyPause())
		k = strings.NewReplacer("^C\n", "\x03", "^D\n", "\x04", "^P^Q\n", "\x10\x11").Replace(k)
		io.WriteString(f, k)
	}
	timer := time.AfterFunc(harness.Slow()*time.Minute, func() { cmd.Process.Kill() })
	err = cmd.Wait()
	timer.Stop()
	<-read
	ts.Stdout().Write(out.Bytes())
	ts.Check(os.WriteFile(ts.MkAbs("tty.out"), out.Bytes(), 0o600))
	if got := exitCode(ts, err); (got == want) == neg {
		ts.Fatalf("servin %s on a terminal: exit code %d", strings.Join(args[1:], " "), got)
	}
}

// awaitRaw returns once the terminal is the container's: keys typed before are
// this side's line editing's. What never takes it over gets them in the end.
func awaitRaw(f *os.File) {
	for deadline := time.Now().Add(harness.Slow() * 20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if tio, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil && tio.Lflag&unix.ICANON == 0 {
			return
		}
	}
}

func tarball(ts *testscript.TestScript, neg bool, args []string) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range args[1:] {
		h := &tar.Header{Mode: 0o644, ModTime: time.Unix(1e9, 0)}
		text := ""
		switch {
		case strings.Contains(e, "=>"):
			h.Name, h.Linkname, _ = strings.Cut(e, "=>")
			h.Typeflag = tar.TypeLink
		case strings.Contains(e, "->"):
			h.Name, h.Linkname, _ = strings.Cut(e, "->")
			h.Typeflag = tar.TypeSymlink
		case strings.Contains(e, "="):
			h.Name, text, _ = strings.Cut(e, "=")
			h.Typeflag, h.Size = tar.TypeReg, int64(len(text))
		case strings.HasSuffix(e, "/"):
			h.Name, h.Typeflag, h.Mode = e, tar.TypeDir, 0o755
		default:
			h.Name, h.Typeflag = e, tar.TypeReg
		}
		ts.Check(w.WriteHeader(h))
		_, err := io.WriteString(w, text)
		ts.Check(err)
	}
	ts.Check(w.Close())
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b.Bytes(), 0o600))
}
