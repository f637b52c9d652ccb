package server

import (
	"context"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc"
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
