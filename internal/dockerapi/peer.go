package dockerapi

import (
	"context"
	"net"
	"net/http"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/caller"
)

// peer finds out, once a connection, who is at its other end.
func peer(ctx context.Context, c net.Conn) context.Context {
	who := &caller.Caller{Edge: "docker"}
	if u, ok := c.(*net.UnixConn); ok {
		if raw, err := u.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) {
				if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
					who.Local, who.UID, who.GID, who.PID = true, cred.Uid, cred.Gid, uint32(cred.Pid)
				}
			})
		}
	} else if a := c.RemoteAddr(); a != nil {
		who.Address = a.String()
	}
	return caller.With(ctx, who)
}

// withSubject adds the name in a TLS client's certificate, which is known once the
// handshake is done.
func withSubject(r *http.Request) *http.Request {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return r
	}
	who := caller.From(r.Context())
	who.Edge = "docker"
	who.Subject = r.TLS.VerifiedChains[0][0].Subject.String()
	return r.WithContext(caller.With(r.Context(), &who))
}
