package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/shim"
	mnetwork "github.com/moby/moby/api/types/network"
)

func withRelay(c *Config) { c.IPv6, c.Relay = "auto", shim.Open }

// relays are the processes of this network namespace's relays.
func relays(t *testing.T) (out []int) {
	t.Helper()
	own, err := os.Readlink("/proc/thread-self/ns/net") // the first thread may have been used up by newNS
	if err != nil {
		t.Fatal(err)
	}
	es, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		ns, _ := os.Readlink("/proc/" + e.Name() + "/ns/net")
		if string(b) == "servin-shim\x00relay\x00" && ns == own {
			out = append(out, pid)
		}
	}
	return out
}

// pipe serves data back in ns, and says at its end how much came.
func pipe(t *testing.T, ns *os.File, addr string) {
	t.Helper()
	var ln net.Listener
	in(t, ns, func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	})
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				n, _ := io.Copy(c, c)
				fmt.Fprint(c, n) // after the client's end: the halves close apart
			}()
		}
	}()
}

func TestRelay(t *testing.T) {
	for _, name := range []string{"IPv4", "both"} {
		t.Run(name, func(t *testing.T) {
			var m *Manager
			var wire *os.File
			if name == "both" {
				// With an address of the outside world the networks have IPv6.
				wire = outside(t)
				m = newManager(t, withRelay)
			} else {
				m = newManager(t, withRelay)
				wire = outside(t)
			}
			testRelay(t, m, wire, name == "both")
		})
	}
}

func testRelay(t *testing.T, m *Manager, wire *os.File, both bool) {
	ctx := context.Background()
	plain := newNS(t)
	attach(t, m, plain, "plain", "bridge", nil)
	if l := relays(t); len(l) != 0 {
		t.Fatalf("relays without a published port: %v", l)
	}
	c := newNS(t)
	a := attach(t, m, c, "c", "bridge", func(r *AttachRequest) { r.Ports = ports(t, "8080:80/tcp", "8080:80/udp", "8081:81/tcp") })
	if both != a.Settings.GlobalIPv6Address.IsValid() {
		t.Fatalf("got address %s", a.Settings.GlobalIPv6Address)
	}
	if got := len(a.Ports[mnetwork.MustParsePort("80/tcp")]); got != 2 {
		t.Errorf("published at %v", a.Ports)
	}
	echo(t, c, ":80")
	pipe(t, c, ":81")
	pids := relays(t)
	if len(pids) != 1 {
		t.Fatalf("relays: %v", pids)
	}
	gw4 := a.Settings.Gateway.String()
	// The relay is the client that the container sees.
	self, outer := gw4, gw4
	if both {
		self, outer = a.Settings.IPv6Gateway.String(), client6
	}
	check := func() {
		t.Helper()
		for _, x := range []struct {
			ns         *os.File
			addr, want string
		}{{nil, "127.0.0.1:8080", gw4}, {nil, "[::1]:8080", self}, {wire, host4 + ":8080", client4}, {wire, "[" + host6 + "]:8080", outer}} {
			got, err := askFor(x.ns, "tcp", x.addr, 4*time.Second)
			if err != nil || got != x.want {
				t.Errorf("%s: got %q, %v; want %q", x.addr, got, err, x.want)
			}
		}
	}
	check()
	// The host's input rules hold for it as for any process.
	policy(t, fmt.Sprintf(dropAllInput, "meta l4proto ipv6-icmp accept"))
	if _, err := askFor(wire, "tcp", "["+host6+"]:8080", 300*time.Millisecond); err == nil {
		t.Error("reached although the host's firewall drops")
	}
	policy(t, "")
	check()

	// Much data both ways, many at once, halves closed apart.
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { carried(t, "[::1]:8081") })
	}
	wg.Wait()

	// The engine goes, a connection and the port go on; the next engine takes
	// them over.
	open, err := net.Dial("tcp", "[::1]:8081")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	talk := func() {
		t.Helper()
		b := make([]byte, 4)
		open.SetDeadline(time.Now().Add(4 * time.Second))
		if _, err := open.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(open, b); err != nil || string(b) != "ping" {
			t.Fatalf("got %q, %v", b, err)
		}
	}
	talk()
	cfg := m.cfg
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	talk()
	check()
	m, err = New(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Destroy(ctx); err != nil {
			t.Error(err)
		}
		until(t, "the end of the relay", func() bool { return len(relays(t)) == 0 })
	}()
	if err := m.Restore(ctx, []Live{{ContainerID: "c", NetNS: c}, {ContainerID: "plain", NetNS: plain}}); err != nil {
		t.Fatal(err)
	}
	if l := relays(t); len(l) != 1 || l[0] != pids[0] {
		t.Fatalf("relays: %v, before: %v", l, pids)
	}
	talk()
	check()
	if _, err := net.Listen("tcp6", "[::]:8080"); err == nil {
		t.Error("a relayed port is free for others after a new start")
	}

	// It is replaced when it is killed.
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "a new relay", func() bool { l := relays(t); return len(l) == 1 && l[0] != pids[0] })
	check()

	// A port goes with its container, and its connections too.
	open2, err := net.Dial("tcp", "[::1]:8081")
	if err != nil {
		t.Fatal(err)
	}
	defer open2.Close()
	if err := m.Release(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	open2.SetDeadline(time.Now().Add(4 * time.Second))
	if _, err := open2.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection to a withdrawn port: %v", err)
	}
	if _, err := net.Dial("tcp", "[::1]:8080"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a withdrawn port: %v", err)
	}
	ln, err := net.Listen("tcp", "[::]:8080")
	if err != nil {
		t.Fatal("a withdrawn port is still taken:", err)
	}
	// And whoever has it is not pushed aside.
	_, err = m.Attach(ctx, AttachRequest{ContainerID: "d", ContainerName: "d", Network: "bridge", NetNS: newNS(t), Ephemeral: true, Ports: ports(t, "::1|8080:80/tcp")})
	if !fault.Is(err, fault.Conflict) {
		t.Errorf("got %v", err)
	}
	ln.Close()
	d := newNS(t)
	attach(t, m, d, "d", "bridge", func(r *AttachRequest) { r.Ports = ports(t, "::1|8080:80/tcp") })
	echo(t, d, ":80")
	if got, err := askFor(nil, "tcp", "[::1]:8080", 4*time.Second); err != nil || got != self {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := askFor(wire, "tcp", "["+host6+"]:8080", 300*time.Millisecond); err == nil {
		t.Error("a port of ::1 is reachable from elsewhere")
	}
}

// carried sends data and wants it back, the count behind.
func carried(t *testing.T, addr string) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	go func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.HasPrefix(got, sent) || strings.TrimPrefix(string(got[min(len(got), len(sent)):]), "") != fmt.Sprint(len(sent)) {
		t.Errorf("%d bytes came back of %d: %v", len(got), len(sent), err)
	}
}
