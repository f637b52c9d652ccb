package network

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// turnName is bound, as an abstract address, by the engine that is choosing
	// a subnet. Abstract addresses belong to the network namespace, as the
	// routes that a choice depends on do, and go with their process.
	turnName = "@servin-subnets"
	// turnWait bounds the wait: anybody in the namespace may hold the name.
	turnWait = 5 * time.Second
	turnPoll = 5 * time.Millisecond
)

// turn waits until no other engine in this network namespace is between
// looking for a free subnet and giving it to a bridge, where the next one sees
// it. A name that is held for long keeps nobody: the choice is then made
// without it.
func (m *Manager) turn(ctx context.Context) (done func()) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return func() {}
	}
	done = func() { _ = unix.Close(fd) }
	until := time.Now().Add(turnWait)
	for {
		if err = unix.Bind(fd, &unix.SockaddrUnix{Name: turnName}); err != unix.EADDRINUSE {
			return done
		}
		if time.Now().After(until) {
			m.log.Warn("another process holds the choice of subnets; it was not waited for any longer", "address", turnName)
			return done
		}
		select {
		case <-ctx.Done():
			return done
		case <-time.After(turnPoll):
		}
	}
}
