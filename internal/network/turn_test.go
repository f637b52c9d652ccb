package network

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Engines that start at the same moment must not choose the same subnet.
func TestEnginesStartTogether(t *testing.T) {
	const engines = 8
	ms := make([]*Manager, engines)
	var wg sync.WaitGroup
	for i := range ms {
		cfg := Config{Root: t.TempDir(), RunRoot: t.TempDir(), Instance: fmt.Sprintf("together%d", i), IPv6: "off",
			Logger: slog.New(slog.NewTextHandler(testLog{t}, nil))}
		wg.Go(func() {
			m, err := New(context.Background(), cfg)
			if err != nil {
				t.Error(err)
				return
			}
			m.up()
			ms[i] = m
		})
	}
	wg.Wait()
	seen := map[netip.Prefix]int{}
	for i, m := range ms {
		if m == nil {
			continue
		}
		t.Cleanup(func() {
			if err := m.Destroy(context.Background()); err != nil {
				t.Error(err)
			}
		})
		for _, s := range m.subnets() {
			if o, taken := seen[s]; taken {
				t.Errorf("engines %d and %d chose %s", o, i, s)
			}
			seen[s] = i
		}
	}
	if len(seen) < engines {
		t.Errorf("%d subnets for %d engines", len(seen), engines)
	}
}

// Who holds the choice for good only delays.
func TestTurnHeld(t *testing.T) {
	m := newManager(t, nil)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: turnName}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m.turn(ctx)() // a caller who left is not kept either
	m.turn(t.Context())()
}
