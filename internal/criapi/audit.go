package criapi

import (
	"context"
	"net"
	"path"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/audit"
	"github.com/cloudos-io/cloudos/internal/caller"
)

// peerCredentials tell who is at the other end of a unix socket; they encrypt
// nothing.
type peerCredentials struct{}

// peerInfo is what they found out.
type peerInfo struct {
	credentials.CommonAuthInfo
	who caller.Caller
}

func (peerInfo) AuthType() string { return "peercred" }

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := peerInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}, who: caller.Caller{Edge: "cri"}}
	if u, ok := c.(*net.UnixConn); ok {
		if raw, err := u.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) {
				if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
					info.who.Local, info.who.UID, info.who.GID, info.who.PID = true, cred.Uid, cred.Gid, uint32(cred.Pid)
				}
			})
		}
	}
	return c, info, nil
}

func (peerCredentials) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, nil, nil
}
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }
func (peerCredentials) OverrideServerName(string) error           { return nil }

// withCaller puts who asks into the context, for policies and the audit log.
func withCaller(ctx context.Context) context.Context {
	who := caller.Caller{Edge: "cri"}
	if p, ok := peer.FromContext(ctx); ok {
		switch a := p.AuthInfo.(type) {
		case peerInfo:
			who = a.who
		case credentials.TLSInfo:
			if len(a.State.VerifiedChains) > 0 {
				who.Subject = a.State.VerifiedChains[0][0].Subject.String()
			}
			who.Address = p.Addr.String()
		}
	}
	return caller.With(ctx, &who)
}

// audited records a call; it is around s.unary.
func (s *Server) audited(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	ctx = withCaller(ctx)
	method := path.Base(info.FullMethod)
	err = s.cfg.Audit.Do(ctx, audit.Call{Method: "cri " + method, Object: object(req), Attrs: told(req), Read: readsOnly(method)},
		func(err error) int { return int(status.Code(err)) },
		func(ctx context.Context) error {
			var err error
			resp, err = next(ctx, req)
			return err
		})
	if err != nil {
		return resp, grpcError(err)
	}
	return resp, nil
}

// readsOnly tells what changes nothing by its name: the CRI's are regular.
func readsOnly(method string) bool {
	return strings.HasPrefix(method, "List") || strings.HasPrefix(method, "Get") || strings.HasSuffix(method, "Status") || strings.HasSuffix(method, "Stats") ||
		method == "Version" || method == "ImageFsInfo" || method == "RuntimeConfig"
}

// object is what a request is about.
func object(req any) string {
	if r, ok := req.(interface{ GetContainerId() string }); ok && r.GetContainerId() != "" {
		return r.GetContainerId()
	}
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		return r.GetPodSandboxId()
	}
	if r, ok := req.(interface{ GetImage() *v1.ImageSpec }); ok {
		return r.GetImage().GetImage()
	}
	if r, ok := req.(*v1.RunPodSandboxRequest); ok {
		m := r.GetConfig().GetMetadata()
		return m.GetNamespace() + "/" + m.GetName()
	}
	return ""
}

// told is what may be shown of a request: never environment or arguments.
func told(req any) map[string]string {
	switch r := req.(type) {
	case *v1.CreateContainerRequest:
		c := r.GetConfig()
		out := map[string]string{"name": c.GetMetadata().GetName(), "image": c.GetImage().GetImage()}
		if c.GetLinux().GetSecurityContext().GetPrivileged() {
			out["privileged"] = "true"
		}
		return out
	case *v1.ExecSyncRequest:
		return command(r.GetCmd())
	case *v1.ExecRequest:
		return command(r.GetCmd())
	}
	return nil
}

func command(argv []string) map[string]string {
	if len(argv) == 0 {
		return nil
	}
	return map[string]string{"command": path.Base(argv[0])}
}
