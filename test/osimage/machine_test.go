// Package osimage builds images of the operating system and boots them under QEMU,
// with TCG: what a machine does is seen on its console and over its port.
package osimage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage"
	hostvm "github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// programs is the folder with what make build made.
func programs(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	for _, p := range []string{"servind", "cloudos-init", "cloudos-modprobe"} {
		if _, err := os.Stat(filepath.Join(bin, p)); err != nil {
			t.Fatalf("no programs in %s: run make build first", bin)
		}
	}
	return bin
}

func needs(t *testing.T, tools ...string) {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("SKIP: the images of these tests are for amd64")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			if _, err := os.Stat(tool); err != nil {
				t.Skipf("SKIP: %s is not installed", tool)
			}
		}
	}
}

func long(t *testing.T) {
	t.Helper()
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: further boots are part of make test-long")
	}
}

// build builds an image into a folder of the test's.
func build(t *testing.T, format string, change func(*osimage.Options)) string {
	t.Helper()
	needs(t, "apt-get", "dpkg-deb")
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = t.TempDir()
	}
	o := osimage.Options{
		Arch: "amd64", Format: format, Output: t.TempDir(), Programs: programs(t), Version: "test",
		Cache: filepath.Join(cache, "servin-test", "packages"), Log: t.Logf,
	}
	if change != nil {
		change(&o)
	}
	if _, err := osimage.Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return o.Output
}

var vmOnce struct {
	sync.Mutex
	dir string
}

// vmImage is one image in the VM format for all tests.
func vmImage(t *testing.T) string {
	t.Helper()
	vmOnce.Lock()
	defer vmOnce.Unlock()
	if vmOnce.dir == "" {
		from := build(t, "vm", nil)
		dir, err := os.MkdirTemp("", "osimage")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
		vmOnce.dir = dir
	}
	return vmOnce.dir
}

func TestMain(m *testing.M) {
	code := m.Run()
	if vmOnce.dir != "" {
		os.RemoveAll(vmOnce.dir)
	}
	removeISO()
	if diskOnce.dir != "" {
		os.RemoveAll(diskOnce.dir)
	}
	os.Exit(code)
}

// machine is a running QEMU.
type machine struct {
	t       *testing.T
	cmd     *exec.Cmd
	dir     string
	session *vmwire.Session
	runs    atomic.Int32
	done    chan error
	// restarts counts how often the machine was seen to start again.
	restarts int
	// serial is the console of startConsole.
	serial net.Conn

	mu      sync.Mutex
	console bytes.Buffer
}

func (m *machine) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.console.Write(p)
}

func (m *machine) said() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.console.String()
}

// start starts a machine with a port.
func start(t *testing.T, limit time.Duration, args ...string) *machine {
	t.Helper()
	return startWith(t, limit, "stdio", args...)
}

// startWith is start with QEMU's word for where the serial console is.
func startWith(t *testing.T, limit time.Duration, serial string, args ...string) *machine {
	t.Helper()
	// A /dev/kvm that is there need not run a guest: TCG is sure.
	return emulate(t, limit, serial, append([]string{"qemu-system-x86_64", "-cpu", "max"}, args...)...)
}

// emulate starts a machine with a port under one of QEMU's programs.
func emulate(t *testing.T, limit time.Duration, serial string, args ...string) *machine {
	t.Helper()
	needs(t, args[0])
	dir, err := os.MkdirTemp("", "m")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	m := &machine{t: t, dir: dir, done: make(chan error, 1)}
	m.cmd = exec.CommandContext(ctx, args[0], append([]string{
		"-accel", "tcg", "-smp", "2", "-m", "1024", "-nodefaults", "-no-reboot", "-display", "none", "-serial", serial,
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci,free-page-reporting=on",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=p,path=" + dir + "/port,server=on,wait=off", "-device", "virtserialport,chardev=p,name=" + vmwire.Port,
	}, args[1:]...)...)
	m.cmd.Stdout, m.cmd.Stderr = m, m
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { m.done <- m.cmd.Wait() }()
	t.Cleanup(func() {
		m.cmd.Process.Kill()
		select {
		case <-m.done:
		case <-time.After(10 * time.Second):
		}
		cancel()
		os.RemoveAll(dir)
		if t.Failed() {
			t.Logf("the console said:\n%s", m.said())
		}
	})
	return m
}

// vm starts an image in the VM format.
func vm(t *testing.T, image, disk, words string, more ...string) *machine {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(image, vmwire.Manifest))
	if err != nil {
		t.Fatal(err)
	}
	var img vmwire.Image
	if err := json.Unmarshal(b, &img); err != nil {
		t.Fatal(err)
	}
	ready := func(role string) string {
		path := filepath.Join(image, img.Files[role].Name)
		if img.Files[role].Format != vmwire.Packed {
			return path
		}
		to := filepath.Join(t.TempDir(), role)
		if err := hostvm.Unpack(path, img.Files[role].SHA256, to); err != nil {
			t.Fatal(err)
		}
		return to
	}
	args := []string{
		"-kernel", ready("kernel"), "-initrd", filepath.Join(image, img.Files["initrd"].Name), "-append", strings.TrimSpace(img.CommandLine + " " + words),
		"-drive", "file=" + ready("root") + ",format=raw,if=none,id=root,readonly=on", "-device", "virtio-blk-pci,drive=root,serial=" + vmwire.SerialRoot,
	}
	if disk != "" {
		args = append(args, "-drive", "file="+disk+",format=raw,if=none,id=data,discard=unmap,detect-zeroes=unmap", "-device", "virtio-blk-pci,drive=data,serial="+vmwire.SerialData)
	}
	run := []string{"qemu-system-x86_64", "-cpu", "max"}
	if img.Arch == "arm64" {
		run = armBoard
	}
	m := emulate(t, 5*time.Minute, "stdio", append(append(slices.Clone(run), args...), more...)...)
	m.connect()
	return m
}

// connect begins the conversation over the port.
func (m *machine) connect() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 4*time.Minute)
	defer cancel()
	for {
		c, err := net.Dial("unix", m.dir+"/port")
		if err == nil {
			s, err := vmwire.Host(ctx, c)
			if err != nil {
				m.t.Fatal(err)
			}
			m.mu.Lock()
			m.session = s
			m.mu.Unlock()
			return
		}
		if ctx.Err() != nil {
			m.t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ctl asks the control API.
func (m *machine) ctl(method, path string, body, answer any) error {
	m.t.Helper()
	var in io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		in = strings.NewReader(b)
	default:
		j, err := json.Marshal(b)
		if err != nil {
			m.t.Fatal(err)
		}
		in = bytes.NewReader(j)
	}
	ctx, cancel := context.WithTimeout(m.t.Context(), 4*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://machine"+path, in)
	if err != nil {
		m.t.Fatal(err)
	}
	c := m.session.Client(vmwire.Control)
	defer c.CloseIdleConnections()
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode >= 300 {
		var p vmwire.Problem
		json.Unmarshal(b, &p)
		return fmt.Errorf("%s: %s", res.Status, p.Message)
	}
	if s, ok := answer.(*string); ok {
		*s = string(b)
	} else if answer != nil {
		return json.Unmarshal(b, answer)
	}
	return nil
}

// settled waits until the machine is no longer starting.
func (m *machine) settled() vmwire.Status {
	m.t.Helper()
	var s vmwire.Status
	if err := m.ctl("GET", "/v1/status?wait=200", nil, &s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// servin runs the command line against the machine's engine, through the port.
func (m *machine) servin(args ...string) (string, error) {
	m.t.Helper()
	// A socket for each run: several may go on at once.
	socket := filepath.Join(m.dir, fmt.Sprintf("e%d", m.runs.Add(1)))
	l := m.pass(socket, func() (vmwire.Stream, error) {
		return m.session.Open(m.t.Context(), vmwire.Purpose{Kind: vmwire.API})
	})
	defer l.Close()
	ctx, cancel := context.WithTimeout(m.t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(programs(m.t), "servin"), args...)
	cmd.Env = append(os.Environ(), "SERVIN_HOST=unix://"+socket)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// must is servin that has to succeed.
func (m *machine) must(args ...string) string {
	m.t.Helper()
	out, err := m.servin(args...)
	if err != nil {
		m.t.Fatalf("servin %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// keep puts a file f that says x into the volume kept.
func (m *machine) keep() {
	m.t.Helper()
	f := filepath.Join(m.dir, "f")
	if err := os.WriteFile(f, []byte("x"), 0o644); err != nil {
		m.t.Fatal(err)
	}
	m.must("create", "--name", "writer", "-v", "kept:/v", "servin/hello")
	m.must("cp", f, "writer:/v/f")
	m.must("rm", "writer")
}

// off stops the machine in order.
func (m *machine) off() {
	m.t.Helper()
	if err := m.ctl("POST", "/v1/shutdown", vmwire.Shutdown{TimeoutSeconds: 30}, nil); err != nil {
		m.t.Fatal(err)
	}
	select {
	case err := <-m.done:
		m.done <- err
		if err != nil {
			m.t.Fatalf("the machine ended with %v", err)
		}
	case <-time.After(2 * time.Minute):
		m.t.Fatal("the machine does not stop")
	}
}

// await waits for a text on the console.
func (m *machine) await(text string, limit time.Duration) {
	m.t.Helper()
	for end := time.Now().Add(limit); !strings.Contains(m.said(), text); time.Sleep(50 * time.Millisecond) {
		select {
		case err := <-m.done:
			m.done <- err
			if !strings.Contains(m.said(), text) {
				m.t.Fatalf("the machine ended (%v) before it said %q", err, text)
			}
			return
		default:
		}
		if time.Now().After(end) {
			m.t.Fatalf("the machine did not say %q within %v", text, limit)
		}
	}
}

// disk makes an empty disk.
func disk(t *testing.T, size int64) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "data")
	if err := errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, size)); err != nil {
		t.Fatal(err)
	}
	return p
}

// dial connects through the port, whatever the address.
func dial(m *machine, p vmwire.Purpose) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := m.session.Open(ctx, p)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
}

func fetch(t *testing.T, c *http.Client) string {
	t.Helper()
	var last error
	for range 50 {
		res, err := c.Get("http://published/")
		if err == nil {
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		last = err
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal(last)
	return ""
}
