package dockerapi

import (
	"context"
	"net"
	"strings"
	"testing"
)

type endless struct{}

func (endless) Read(p []byte) (int, error) { return copy(p, strings.Repeat("x", len(p))), nil }

// TestLeavingUnread ends a stream whose client reads nothing when the daemon leaves.
func TestLeavingUnread(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	d := &duplex{conn: ours, in: ours}
	ctx, cancel := context.WithCancel(context.Background())
	begun, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		close(begun)
		d.pump(ctx, Attached{Stdout: endless{}}, true, nil, nil)
		d.finish()
	}()
	<-begun
	if _, err := theirs.Read(make([]byte, 1)); err != nil { // it writes, and nobody reads on
		t.Fatal(err)
	}
	cancel()
	<-done
}
