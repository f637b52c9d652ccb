package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests run in network and mount namespaces of their own.
func TestMain(m *testing.M) {
	if os.Getenv("SERVIN_TEST_ENGINE") != "" {
		os.Exit(engineChild())
	}
	if os.Getenv("SERVIN_TEST_NETNS") == "" {
		if os.Getuid() != 0 {
			fmt.Println("SKIP: making network namespaces needs root")
			return
		}
		c := exec.Command("/proc/self/exe", os.Args[1:]...)
		c.Env = append(os.Environ(), "SERVIN_TEST_NETNS=1")
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		if err := c.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// newNS makes a network namespace that lives as long as its file is open.
func newNS(t testing.TB) *os.File {
	t.Helper()
	ch := make(chan *os.File, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- nil
			return
		}
		f, _ := os.Open("/proc/thread-self/ns/net")
		ch <- f
	}()
	f := <-ch
	if f == nil {
		t.Fatal("cannot make a network namespace")
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// inside runs fn in a namespace.
func inside(t testing.TB, ns *os.File, fn func() error) {
	t.Helper()
	ch := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			ch <- err
			return
		}
		ch <- fn()
	}()
	if err := <-ch; err != nil {
		t.Fatal(err)
	}
}

type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// bed is a Service on folders of its own.
type bed struct {
	*Service
	t    testing.TB
	dir  string
	conf string
	bin  string
}

func newBed(t testing.TB, edit func(*Config)) *bed {
	t.Helper()
	b := &bed{t: t, dir: t.TempDir()}
	b.conf, b.bin = filepath.Join(b.dir, "net.d"), filepath.Join(b.dir, "bin")
	for _, d := range []string{b.conf, b.bin} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.open(edit)
	t.Cleanup(func() {
		if err := b.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return b
}

// open makes the Service, again if need be: what an engine's restart does.
func (b *bed) open(edit func(*Config)) {
	b.t.Helper()
	c := Config{
		ConfDir: b.conf, BinDirs: []string{b.bin}, Root: filepath.Join(b.dir, "root"), RunRoot: filepath.Join(b.dir, "run"),
		Logger: slog.New(slog.NewTextHandler(testLog{b.t}, nil)), Limits: Limits{Grace: time.Second, RetryFirst: 20 * time.Millisecond, RetryLast: 50 * time.Millisecond},
	}
	if edit != nil {
		edit(&c)
	}
	var err error
	if b.Service, err = New(c); err != nil {
		b.t.Fatal(err)
	}
}

// run runs the Service until the test ends.
func (b *bed) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	s := b.Service
	go func() { done <- s.Run(ctx) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Error(err)
		}
	})
}

// list writes a configuration and reads it.
func (b *bed) list(file, content string) {
	b.t.Helper()
	write(b.t, filepath.Join(b.conf, file), content)
	b.reload()
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// script makes a plugin of a shell script. It finds LOG, a file, in $L, and each
// call is noted there: COMMAND name id.
func (b *bed) script(name, body string) {
	b.t.Helper()
	head := "#!/bin/sh\nL=" + b.dir + "/log\nconf=$(cat)\necho $CNI_COMMAND " + name + " $CNI_CONTAINERID >>$L\n"
	p := filepath.Join(b.bin, name)
	if err := os.WriteFile(p, []byte(head+body+"\n"), 0o755); err != nil {
		b.t.Fatal(err)
	}
}

// good is what a well-behaved script prints.
const good = `[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/x"}],"ips":[{"address":"10.1.2.3/24","gateway":"10.1.2.1","interface":0}]}'
exit 0`

func (b *bed) calls() []string {
	data, _ := os.ReadFile(filepath.Join(b.dir, "log"))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

func (b *bed) ask(id string, ns *os.File) Request {
	return Request{Owner: Containers, ContainerID: id, IfName: "eth0", NS: ns}
}

// records are the files that attachments have left.
func (b *bed) records() []string {
	es, err := os.ReadDir(filepath.Join(b.dir, "root", "attachments"))
	if err != nil {
		b.t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Name())
	}
	return out
}

// clean fails the test unless nothing is left.
func (b *bed) clean() {
	b.t.Helper()
	if r := b.records(); len(r) > 0 {
		b.t.Errorf("records stay: %v", r)
	}
	// An attachment is forgotten first, its namespace given up right after.
	var es []os.DirEntry
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if es, _ = os.ReadDir(filepath.Join(b.dir, "run", "netns")); len(es) == 0 {
			break
		}
	}
	if len(es) > 0 {
		b.t.Errorf("bound namespaces stay: %v", es)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), b.dir) {
		b.t.Errorf("mounts stay: %v\n%s", err, mounts)
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func chain(version, name string, plugins ...string) string {
	var ps []json.RawMessage
	for _, p := range plugins {
		if !strings.HasPrefix(p, "{") {
			p = `{"type":"` + p + `"}`
		}
		ps = append(ps, json.RawMessage(p))
	}
	b, err := json.Marshal(map[string]any{"cniVersion": version, "name": name, "plugins": ps})
	if err != nil {
		panic(err)
	}
	return string(b)
}
