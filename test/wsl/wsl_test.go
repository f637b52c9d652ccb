//go:build linux

// Package wsl drives VM mode under WSL2 as a user of Windows does, as far as Linux goes: the shipped command line,
// the host's side with the driver for WSL2, and the real image in a distribution. wsl.exe is simulated; what runs in the distribution
// is not: our programs, below another first process, in namespaces as WSL makes them.
package wsl

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/host"
	"github.com/cloudos-io/cloudos/internal/vm/wsl"
	"github.com/cloudos-io/cloudos/test/wsl/wsltest"
)

func TestMain(m *testing.M) {
	wsltest.Main()
	os.Exit(m.Run())
}

func programs() string {
	if bin := os.Getenv("SERVIN_BIN"); bin != "" {
		return bin
	}
	bin, _ := filepath.Abs("../../bin")
	return bin
}

// build builds an image.
func build(t *testing.T, dir, version string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(programs(), "cloudos"), "image", "build", "-q", "--format", "wsl", "--version", version, "-o", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

// computer is a simulated Windows with a user.
type computer struct {
	t     *testing.T
	root  string
	place api.VMPlace
	cfg   wsl.Config
	image string

	stop context.CancelFunc
	done chan struct{}
	log  *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newComputer(t *testing.T) *computer {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: distributions are made in namespaces, as root")
	}
	for _, tool := range []string{"nsenter", "unshare", "apt-get"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIP: %s is not installed", tool)
		}
	}
	root, err := os.MkdirTemp("", "wsl") // sockets want a short path
	if err != nil {
		t.Fatal(err)
	}
	c := &computer{t: t, root: root, place: api.VMPlace{State: filepath.Join(root, "state"), Run: filepath.Join(root, "run")}, image: filepath.Join(root, "image"), log: &lockedBuffer{}}
	for _, d := range []string{"wsl", "drives/c/Users/ada/src", "drives/c/Windows"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	drives := filepath.Join(root, "drives")
	h := wsltest.Host{Dir: filepath.Join(root, "wsl"), Real: true, Drives: drives}
	c.cfg = wsl.Config{Program: self, Env: h.Env(), Home: c.place.State,
		// Here Windows' paths are those of its drives.
		Place: func(path string) (string, error) {
			if p, err := wsl.Place(path); err == nil {
				return p, nil // as the command line of Windows says it
			}
			rest, ok := strings.CutPrefix(path, drives+"/")
			if !ok {
				return "", fmt.Errorf("%s is on no drive", path)
			}
			return "/mnt/" + rest, nil
		},
		Origin: func(path string) (string, error) {
			rest, ok := strings.CutPrefix(path, "/mnt/")
			if !ok {
				return "", fmt.Errorf("%s is on no drive", path)
			}
			return filepath.Join(drives, rest), nil
		},
	}
	t.Cleanup(func() {
		if t.Failed() {
			console, _ := os.ReadFile(filepath.Join(c.place.State, "console.log"))
			t.Logf("servin-vmd:\n%s\nconsole:\n%s", c.log, console)
		}
		c.shutdown()
		d := wsl.New(c.cfg)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := d.Destroy(ctx, vm.Spec{State: c.place.State}); err != nil {
			t.Error(err)
		}
		if err := h.Shutdown(); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
	return c
}

// serve runs what servin-vmd is.
func (c *computer) serve() {
	c.t.Helper()
	h, err := host.New(host.Config{Place: c.place, Drivers: []vm.Driver{wsl.New(c.cfg)}, Computer: vm.Computer{CPUs: 2, MemoryMiB: 4096}, Image: c.image,
		Log: slog.New(slog.NewTextHandler(c.log, nil)), LogFile: filepath.Join(c.root, "vmd.log"), BootPatience: 2 * time.Minute})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stop, c.done = stop, make(chan struct{})
	go func() {
		defer close(c.done)
		if err := h.Run(ctx); err != nil {
			c.t.Error(err)
		}
	}()
	for range 500 {
		if conn, err := net.Dial("unix", c.place.Control()); err == nil {
			conn.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatal("servin-vmd does not serve")
}

// shutdown ends it, and leaves the machine.
func (c *computer) shutdown() {
	if c.stop != nil {
		c.stop()
		<-c.done
		c.stop = nil
	}
}

func (c *computer) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(programs(), "servin"), args...)
	cmd.Env = append(os.Environ(), "SERVIN_VM_ROOT="+c.root, "HOME="+filepath.Join(c.root, "drives/c/Users/ada"), "SERVIN_CONFIG="+filepath.Join(c.root, "config"), "SERVIN_HOST=unix://"+c.place.Engine(), "SERVIN_CONTEXT=")
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (c *computer) must(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("servin %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// TestMachine uses a machine under WSL2 from its first start to its end.
func TestMachine(t *testing.T) {
	c := newComputer(t)
	build(t, c.image, "1.0")
	c.serve()
	ada := filepath.Join(c.root, "drives/c/Users/ada")
	c.must("vm", "config", "--share", ada, "--idle-time", "0")
	if out := c.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Hello") {
		t.Errorf("hello: %s", out)
	}
	if out := c.must("vm", "status"); !strings.Contains(out, "wsl2, hyper-v") || !strings.Contains(out, "running") || !strings.Contains(out, ada) {
		t.Errorf("status: %s", out)
	}
	c.load()

	// What is kept, and what is published.
	c.must("volume", "create", "kept")
	c.must("run", "--rm", "-v", "kept:/kept", "tools", "sh", "-c", "echo yes > /kept/file")
	port := freePort(t)
	c.must("run", "-d", "--name", "web", "--stop-timeout", "1", "-p", "127.0.0.1:"+port+":8080", "-v", "kept:/kept", "tools", "sh", "-c", "while :; do echo served | nc -l -p 8080; done")
	if got := fetch(t, port); got != "served" {
		t.Errorf("what the container publishes: %q", got)
	}

	// Folders of Windows, named as Windows does; nothing but what is shared.
	if err := os.WriteFile(filepath.Join(ada, "src/file"), []byte("of windows"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := c.must("run", "--rm", "-v", `C:\Users\ada\src:/src`, "tools", "sh", "-c", "cat /src/file; echo back > /src/made"); out != "of windows" {
		t.Errorf("a shared folder: %q", out)
	}
	if b, err := os.ReadFile(filepath.Join(ada, "src/made")); err != nil || string(b) != "back\n" {
		t.Errorf("what a container wrote there: %q %v", b, err)
	}
	if out, err := c.try("run", "--rm", "-v", `C:\Windows:/w`, "tools", "true"); err == nil || !strings.Contains(out, "not shared") {
		t.Errorf("a folder that is not shared: %v %s", err, out)
	}
	if out := c.must("run", "--rm", "-v", "/run/cloudos/drives:/d", "tools", "ls", "-A", "/d"); out != "" {
		t.Errorf("the drives behind the shares: %q", out)
	}
	if out, err := c.try("run", "--rm", "-v", `D:\:/d`, "tools", "true"); err == nil {
		t.Errorf("a drive that is not there: %s", out)
	}

	// Another servin-vmd takes the machine over; containers run on.
	before := c.must("inspect", "-f", "{{.State.StartedAt}}", "web")
	c.shutdown()
	c.serve()
	if after := c.must("inspect", "-f", "{{.State.StartedAt}}", "web"); after != before {
		t.Errorf("the container was started again: %s, %s", before, after)
	}
	if got := fetch(t, port); got != "served" {
		t.Errorf("after another servin-vmd took over: %q", got)
	}

	// Stopped in order, and started with another image: all that is kept is there.
	c.must("vm", "stop")
	if out, err := c.try("vm", "status"); err == nil || !strings.Contains(out, "off") {
		t.Errorf("stopped: %v %s", err, out)
	}
	build(t, c.image, "2.0")
	c.must("start", "web")
	if out := c.must("run", "--rm", "-v", "kept:/kept", "tools", "cat", "/kept/file"); out != "yes" {
		t.Errorf("what was kept: %q", out)
	}
	if got := fetch(t, port); got != "served" {
		t.Errorf("with another image: %q", got)
	}
	if out := c.must("vm", "status"); !strings.Contains(out, "CloudOS 2.0") {
		t.Errorf("the image: %s", out)
	}

	// WSL is ended under it, as 'wsl --shutdown' does: a machine that ran containers comes back.
	d := wsl.New(c.cfg)
	m, err := d.Attach(t.Context(), vm.Record{Spec: vm.Spec{State: c.place.State}})
	if err != nil || m == nil {
		t.Fatalf("%v %v", m, err)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.Close()
	var out string
	for range 60 { // the first one may have been on its way
		if out, err = c.try("run", "--rm", "-v", "kept:/kept", "tools", "cat", "/kept/file"); err == nil {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	if out != "yes" || err != nil {
		t.Errorf("after the fall: %q %v", out, err)
	}
	if out := c.must("vm", "logs"); !strings.Contains(out, "the engine answers") {
		t.Errorf("console: %s", out)
	}
	if out := c.must("vm", "logs", "-s", "init"); !strings.Contains(out, "the engine answers") {
		t.Errorf("log: %s", out)
	}

	// A reset leaves nothing.
	c.must("vm", "stop")
	c.must("vm", "reset", "--force")
	if kept, err := d.Keeps(t.Context(), vm.Spec{State: c.place.State}); err != nil || kept {
		t.Errorf("after a reset: %v %v", kept, err)
	}
}

// load brings an image with a shell into the machine.
func (c *computer) load() {
	c.t.Helper()
	shell, err := exec.LookPath("busybox")
	if err != nil {
		c.t.Skip("SKIP: busybox is not installed")
	}
	b, err := os.ReadFile(shell)
	if err != nil {
		c.t.Fatal(err)
	}
	file := filepath.Join(c.root, "tools.tar")
	f, err := os.Create(file)
	if err != nil {
		c.t.Fatal(err)
	}
	out := tar.NewWriter(f)
	hdr := []tar.Header{{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o777}, {Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(b))}}
	for _, tool := range []string{"sh", "cat", "nc", "ls", "true", "echo", "ip", "wget"} {
		hdr = append(hdr, tar.Header{Name: "bin/" + tool, Typeflag: tar.TypeSymlink, Linkname: "busybox"})
	}
	for _, h := range hdr {
		if err := out.WriteHeader(&h); err != nil {
			c.t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := out.Write(b); err != nil {
				c.t.Fatal(err)
			}
		}
	}
	out.Close()
	f.Close()
	c.must("import", file, "tools")
}

func freePort(t *testing.T) string {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// fetch reads what is said on a port; it may be on its way.
func fetch(t *testing.T, port string) string {
	t.Helper()
	var last error
	for range 100 {
		conn, err := net.DialTimeout("tcp4", "127.0.0.1:"+port, 5*time.Second)
		if err == nil {
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			var b []byte
			b, err = io.ReadAll(io.LimitReader(conn, 100))
			conn.Close()
			if len(b) > 0 {
				return strings.TrimSpace(string(b))
			}
		}
		last = err
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("nothing is said on port %s: %v", port, last)
	return ""
}
