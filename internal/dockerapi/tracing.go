package dockerapi

import (
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// traced begins the span of a request, within the trace that its traceparent
// header (W3C Trace Context) names.
func (s *server) traced(r *request, c *compiled) (end func(w *response, err error)) {
	ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	ctx, span := s.tracer.Start(ctx, r.Method+" "+c.pattern, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
		attribute.String("http.request.method", r.Method), attribute.String("http.route", c.pattern),
		attribute.String("user_agent.original", r.UserAgent()), attribute.String("servin.object", r.name)))
	r.Request = r.WithContext(ctx)
	return func(w *response, err error) {
		switch {
		case err != nil:
			status := statusOf(err)
			span.SetAttributes(attribute.Int("http.response.status_code", status))
			if status >= http.StatusInternalServerError {
				span.SetStatus(codes.Error, err.Error())
			}
			span.RecordError(err)
		case w.hijacked:
			span.SetAttributes(attribute.Int("http.response.status_code", http.StatusSwitchingProtocols))
		}
		span.End()
	}
}
