package server

import (
	"context"
	"net/url"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// confine refuses entitlements to clients whom a policy of the engine's denies the host's privileges or network. Without them BuildKit refuses the steps.
func confine(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if r, ok := req.(*controlapi.SolveRequest); ok && len(r.Entitlements) > 0 {
		if p, ok := peer.FromContext(ctx); ok {
			if c, ok := p.Addr.(peerAddr); ok && c.confined != "" {
				why, err := url.QueryUnescape(c.confined)
				if err != nil {
					why = "a policy forbids it"
				}
				return nil, status.Errorf(codes.PermissionDenied, "cannot build with %v: %s", r.Entitlements, why)
			}
		}
	}
	return next(ctx, req)
}
