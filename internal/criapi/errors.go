package criapi

import (
	"context"
	"errors"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// code is the gRPC code of a kind of error, as the kubelet expects it.
func code(k fault.Kind) codes.Code {
	switch k {
	case fault.Invalid:
		return codes.InvalidArgument
	case fault.Unauthorized:
		return codes.Unauthenticated
	case fault.Forbidden:
		return codes.PermissionDenied
	case fault.NotFound, fault.Gone:
		return codes.NotFound
	case fault.NotModified:
		return codes.OK
	case fault.Conflict:
		return codes.FailedPrecondition
	case fault.Unsupported:
		return codes.Unimplemented
	case fault.Unavailable:
		return codes.Unavailable
	case fault.Exhausted:
		return codes.ResourceExhausted
	case fault.DeadlineExceeded:
		return codes.DeadlineExceeded
	}
	return codes.Unknown
}

func grpcError(err error) error {
	if err == nil {
		return nil
	}
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	return status.Error(code(fault.Of(err)), err.Error())
}

// unary is around every call: errors get their code, and a defect of ours ends
// one call, not the engine.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	begin := time.Now()
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("a CRI call panicked", "call", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "%s failed; see the engine's log", info.FullMethod)
		}
		if err != nil {
			s.log.Debug("CRI call failed", "call", info.FullMethod, "took", time.Since(begin), "cause", err)
		}
	}()
	resp, err = next(ctx, req)
	return resp, grpcError(err)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("a CRI call panicked", "call", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			err = status.Errorf(codes.Internal, "%s failed; see the engine's log", info.FullMethod)
		}
	}()
	return grpcError(next(srv, ss))
}
