package vmmode

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestUDP: datagrams of several clients reach a container, and each its answers.
func TestUDP(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t)
	// Three commands at once start one machine.
	var wg sync.WaitGroup
	m.must("mode", "set", "vm", "--no-carry")
	m.must("vm", "stop")
	for range 3 {
		wg.Go(func() {
			if _, err := m.try("ps"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := qemus(t, m); n != 1 {
		t.Errorf("%d machines", n)
	}
	busybox(t, m)
	build := exec.Command("go", "build", "-o", filepath.Join(m.home, "echo"), "./testdata/echo")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	port := freePort(t)
	m.must("run", "-d", "--name", "echo", "-p", "127.0.0.1:"+port+":9999/udp", "-v", m.home+":/src:ro", "busybox:1", "/src/echo")
	for i := range 4 {
		c, err := net.Dial("udp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		want := bytes.Repeat([]byte{byte('a' + i)}, 1+i*400)
		got := make([]byte, 4096)
		ok := false
		for try := 0; try < 20 && !ok; try++ { // datagrams may be lost
			c.Write(want)
			c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			n, err := c.Read(got)
			ok = err == nil && bytes.Equal(got[:n], want)
		}
		if !ok {
			t.Errorf("client %d got no answer", i)
		}
	}
	// The console shows what the machine says.
	cmd := exec.Command(filepath.Join(programs(), "servin"), "vm", "console")
	cmd.Env = m.env()
	cmd.Stdin = strings.NewReader("\x1d")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("console: %v %s", err, out)
	}
	if out := m.must("vm", "logs", "-n", "50"); !strings.Contains(out, "engine answers") {
		t.Errorf("logs: %s", out)
	}
	if out := m.must("vm", "logs", "-s", "engine", "-n", "5"); !strings.Contains(out, "listening") {
		t.Errorf("engine's log: %s", out)
	}
}
