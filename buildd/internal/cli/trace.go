package cli

import (
	"context"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
)

// inTrace makes a build part of the trace of whoever runs us (W3C Trace Context in
// the environment). We make no spans of our own; BuildKit's client hands it on.
func inTrace(ctx context.Context, getenv func(string) string) context.Context {
	t := getenv("TRACEPARENT")
	if t == "" {
		return ctx
	}
	p := propagation.TraceContext{}
	otel.SetTextMapPropagator(p)
	return p.Extract(ctx, propagation.MapCarrier{"traceparent": t, "tracestate": getenv("TRACESTATE")})
}
