package network

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/dhcp"
	"golang.org/x/sys/unix"
)

// The tests run in a network namespace of their own: the binary starts itself
// anew in a fresh one, whose loopback is all it has.
func TestMain(m *testing.M) {
	if code, ours := dhcp.Main(); ours {
		os.Exit(code)
	}
	if os.Getenv("SERVIN_TEST_NETNS") == "" {
		if os.Getuid() != 0 {
			fmt.Println("SKIP: making network namespaces needs root")
			return
		}
		c := exec.Command("/proc/self/exe", os.Args[1:]...)
		c.Env = append(os.Environ(), "SERVIN_TEST_NETNS=1")
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if err := c.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	l, err := bridge.New()
	if err == nil {
		err = l.Up("lo")
		l.Close()
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
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		// The thread is not given back: it ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- result{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		ch <- result{f, err}
	}()
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.f.Close() })
	return r.f
}

func in(t testing.TB, ns *os.File, fn func() error) {
	t.Helper()
	if err := bridge.Inside(ns, fn); err != nil {
		t.Fatal(err)
	}
}

type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func newManager(t testing.TB, edit func(*Config)) *Manager {
	t.Helper()
	cfg := Config{Root: t.TempDir(), RunRoot: t.TempDir(), Instance: strings.NewReplacer("/", "_", "=", "", ",", "").Replace(t.Name()), IPv6: "off",
		Logger: slog.New(slog.NewTextHandler(testLog{t}, nil))}
	if edit != nil {
		edit(&cfg)
	}
	m, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.up()
	if m.broken != nil {
		t.Fatal(m.broken)
	}
	t.Cleanup(func() {
		if !m.closed {
			if err := m.Destroy(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return m
}

func attach(t testing.TB, m *Manager, ns *os.File, name, netw string, edit func(*AttachRequest)) Attachment {
	t.Helper()
	req := AttachRequest{ContainerID: name, ContainerName: name, Network: netw, NetNS: ns, Ephemeral: true, DNS: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	if edit != nil {
		edit(&req)
	}
	a, err := m.Attach(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// echo serves "who are you" inside ns: every connection is told its source.
func echo(t testing.TB, ns *os.File, addr string) { serve(t, ns, addr, "") }

// serve says something to every connection inside ns, or its source.
func serve(t testing.TB, ns *os.File, addr, say string) {
	t.Helper()
	var ln net.Listener
	var pc net.PacketConn
	in(t, ns, func() (err error) {
		if ln, err = net.Listen("tcp", addr); err != nil {
			return err
		}
		pc, err = net.ListenPacket("udp", addr)
		return err
	})
	t.Cleanup(func() { ln.Close(); pc.Close() })
	answer := func(from string) []byte {
		if say != "" {
			return []byte(say)
		}
		return []byte(netip.MustParseAddrPort(from).Addr().Unmap().String())
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Write(answer(c.RemoteAddr().String()))
			c.Close()
		}
	}()
	go func() {
		b := make([]byte, 1500)
		for {
			_, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(answer(from.String()), from)
		}
	}()
}

func ruleset() string {
	b, _ := exec.Command("nft", "list", "ruleset").CombinedOutput()
	return string(b)
}

func insideErr(ns *os.File, fn func() error) error { return bridge.Inside(ns, fn) }
