// Package caller says who asks: the edges put it into the context of a request,
// policies and the audit log read it there.
package caller

import (
	"context"
	"strconv"
)

// Caller is who is at the other end of a connection.
type Caller struct {
	// Edge is "docker" or "cri"; "engine" is the engine itself.
	Edge string
	// Local is set for a peer on a unix socket: its ids when it connected.
	Local         bool
	UID, GID, PID uint32
	// Subject is the name in a TLS client's certificate.
	Subject string
	// Address of a peer on the network.
	Address string
}

// String names the caller in a few words.
func (c Caller) String() string {
	switch {
	case c.Subject != "":
		return c.Subject
	case c.Local:
		return "uid " + strconv.FormatUint(uint64(c.UID), 10)
	case c.Address != "":
		return c.Address
	}
	return "the engine"
}

type key struct{}

// With puts the caller into a context.
func With(ctx context.Context, c *Caller) context.Context { return context.WithValue(ctx, key{}, c) }

// From finds it; the engine itself where nobody is there.
func From(ctx context.Context) Caller {
	if c, ok := ctx.Value(key{}).(*Caller); ok {
		return *c
	}
	return Caller{Edge: "engine"}
}
