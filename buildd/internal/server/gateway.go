package server

import (
	"context"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/cloudos-io/cloudos/buildd/internal/engine"
)

// addHosts is the Dockerfile frontend's option for --add-host.
const addHosts = "add-hosts"

// hostGateway gives the address of the host to who asks for it by its name, as
// Docker's clients do with --add-host NAME:host-gateway.
func hostGateway(addr string) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		switch r := req.(type) {
		case *controlapi.SolveRequest:
			withGateway(r.FrontendAttrs, addr)
		case *gatewaypb.SolveRequest:
			withGateway(r.FrontendOpt, addr)
		}
		return next(ctx, req)
	}
}

// ownSessions notes whose the sessions are that come over the control API, until
// they end.
func ownSessions(callers *engine.Callers) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		if info.FullMethod == controlapi.Control_Session_FullMethodName {
			p, _ := peer.FromContext(ss.Context())
			md, _ := metadata.FromIncomingContext(ss.Context())
			if ids := md.Get(sessionHeader); p != nil && len(ids) == 1 {
				if who, ok := p.Addr.(peerAddr); ok {
					defer callers.Set(ids[0], who.caller)()
				}
			}
		}
		return next(srv, ss)
	}
}

func withGateway(attrs map[string]string, addr string) {
	v, ok := attrs[addHosts]
	if !ok || addr == "" || !strings.Contains(v, "host-gateway") {
		return
	}
	hosts := strings.Split(v, ",")
	for i, h := range hosts {
		if name, ok := strings.CutSuffix(h, "=host-gateway"); ok {
			hosts[i] = name + "=" + addr
		}
	}
	attrs[addHosts] = strings.Join(hosts, ",")
}
