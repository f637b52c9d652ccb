package engine

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/cloudos-io/cloudos/internal/container"
)

// span begins a span; end takes the error that the use case comes to. Without a
// collector it does nothing.
func (e *Engine) span(ctx context.Context, name string) (_ context.Context, end func(*error)) {
	ctx, s := e.cfg.Tracer.Start(ctx, name)
	return ctx, func(err *error) {
		if err != nil && *err != nil {
			s.RecordError(*err)
			s.SetStatus(codes.Error, (*err).Error())
		}
		s.End()
	}
}

// ofContainer tells the current span which container it is about.
func ofContainer(ctx context.Context, r *container.Record) {
	if s := trace.SpanFromContext(ctx); s.IsRecording() {
		s.SetAttributes(attribute.String("container.id", r.ID), attribute.String("container.name", r.Name), attribute.String("container.image.name", r.Config.Image))
	}
}
