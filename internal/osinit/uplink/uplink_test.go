package uplink

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
)

// TestForget has a device go while its link is looked after, which notices that only when it is told to stop:
// what it says then is about a link that is still known.
func TestForget(t *testing.T) {
	n := New(Options{Resolv: filepath.Join(t.TempDir(), "resolv.conf"), Log: t.Logf, Changed: func() {}})
	ctx, stop := context.WithCancel(t.Context())
	k := &link{cfg: Link{Name: "went0"}, index: 1 << 30, stop: stop, done: make(chan struct{})}
	n.links["went0"] = k
	go func() {
		defer close(k.done)
		<-ctx.Done()
		n.problem("went0", errors.New("no DHCP server answered"))
		n.note("went0")
		n.remove(k.cfg, &lease{})
	}()
	n.forget()
	if len(n.links) != 0 {
		t.Errorf("there is still %v", n.links)
	}
}
