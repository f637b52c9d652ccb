//go:build linux

// Package wsl drives VM mode under WSL2 as a user of Windows does, as far as Linux goes: the shipped command line,
// the host's side with the driver for WSL2, and the real image in a distribution. wsl.exe is simulated; what runs in the distribution
// is not: our programs, below another first process, in namespaces as WSL makes them.
package wsl

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
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
		if strings.Contains(string(out), "apt") {
			t.Skipf("SKIP: the image cannot be built here: %s", out)
		}
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
	for _, tool := range []string{"nsenter", "apt-get"} {
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
	if out := c.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Hello") {
		t.Errorf("hello: %s", out)
	}
	if out := c.must("vm", "status"); !strings.Contains(out, "wsl2") || !strings.Contains(out, "running") {
		t.Errorf("status: %s", out)
	}
	_ = http.StatusOK
	_ = io.Discard
}
