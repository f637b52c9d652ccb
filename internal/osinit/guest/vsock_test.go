package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// TestAccept has a host converse twice over a listener as a vsock's is, and a stranger refused between.
func TestAccept(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := &Port{Log: t.Logf, Engine: func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		go func() { io.Copy(b, b); b.Close() }()
		return a, nil
	}}
	var stranger atomic.Bool
	ended := make(chan error, 1)
	go func() { ended <- p.accept(ctx, l, func(net.Addr) bool { return !stranger.Load() }) }()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	talk := func() {
		t.Helper()
		s, err := vmwire.Host(ctx, dial())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		c, err := s.Open(ctx, vmwire.Purpose{Kind: vmwire.API})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
			t.Fatalf("%q, %v", b, err)
		}
	}
	talk()
	stranger.Store(true)
	c := dial()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("a stranger is answered: %d, %v", n, err)
	}
	c.Close()
	stranger.Store(false)
	talk()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
}
