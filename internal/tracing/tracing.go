// Package tracing sends OpenTelemetry spans of the engine to a collector, if one
// is configured: nothing of the SDK is set up otherwise. Whoever makes spans
// (the HTTP edge, the engine, images) is given a tracer; the libraries below use
// the process's global one, which Start sets. The composition root imports it.
package tracing

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Config says where spans go.
type Config struct {
	// Endpoint is the collector: http[s]://host:4318[/path] for OTLP over HTTP,
	// grpc[s]://host:4317 over gRPC; "" takes OpenTelemetry's own variables
	// (OTEL_EXPORTER_OTLP_ENDPOINT and its like), and without those there is none.
	Endpoint string
	// Headers are sent along, for a collector that asks who is there.
	Headers map[string]string
	// Ratio of traces that are kept, of those that begin here; 0 is all. What a
	// client decided for its own trace holds.
	Ratio float64
	// Service names the program; "" is servind.
	Service  string
	Version  string
	Instance string
	Logger   *slog.Logger
}

// Provider makes tracers.
type Provider struct {
	sdk *sdk.TracerProvider
}

// Wanted tells whether anything says that spans are to be sent.
func (c Config) Wanted() bool {
	if os.Getenv("OTEL_SDK_DISABLED") == "true" || os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return false
	}
	return c.Endpoint != "" || os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != ""
}

// Check finds a collector's address that makes no sense.
func Check(endpoint string) error {
	if endpoint == "" {
		return nil
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" {
		return fault.New(fault.Invalid, "cannot send traces to %q: write http://host:4318 or grpc://host:4317", endpoint)
	}
	switch u.Scheme {
	case "http", "https", "grpc", "grpcs":
		return nil
	}
	return fault.New(fault.Invalid, "cannot send traces to %q: the scheme must be http, https, grpc or grpcs", endpoint)
}

// Start begins to send, or returns a provider that does nothing.
func Start(ctx context.Context, c Config) (*Provider, error) {
	if !c.Wanted() {
		return &Provider{}, nil
	}
	if err := Check(c.Endpoint); err != nil {
		return nil, err
	}
	client, err := exporter(c)
	if err != nil {
		return nil, err
	}
	// It connects when it has something to send: a collector that is away holds nothing up.
	ex, err := otlptrace.New(ctx, client)
	if err != nil {
		return nil, fmt.Errorf("cannot send traces: %w", err)
	}
	if c.Service == "" {
		c.Service = "servind"
	}
	res, err := resource.Merge(resource.Environment(), resource.NewSchemaless(
		attribute.String("service.name", c.Service), attribute.String("service.version", c.Version), attribute.String("service.instance.id", c.Instance)))
	if err != nil {
		res = resource.Default()
	}
	sampler := sdk.ParentBased(sdk.AlwaysSample())
	if c.Ratio > 0 && c.Ratio < 1 {
		sampler = sdk.ParentBased(sdk.TraceIDRatioBased(c.Ratio))
	}
	p := &Provider{sdk: sdk.NewTracerProvider(sdk.WithResource(res), sdk.WithSampler(sampler),
		sdk.WithBatcher(ex, sdk.WithBatchTimeout(2*time.Second), sdk.WithMaxQueueSize(2048), sdk.WithMaxExportBatchSize(256)))}
	otel.SetErrorHandler(&quiet{log: c.Logger})
	otel.SetTracerProvider(p.sdk)
	otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}))
	return p, nil
}

func exporter(c Config) (otlptrace.Client, error) {
	u, err := url.Parse(c.Endpoint)
	if err != nil {
		return nil, err
	}
	grpc := strings.HasPrefix(u.Scheme, "grpc")
	if c.Endpoint == "" {
		proto := os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
		if proto == "" {
			proto = os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")
		}
		grpc = proto == "grpc"
	}
	if grpc {
		var o []otlptracegrpc.Option
		if c.Endpoint != "" {
			o = append(o, otlptracegrpc.WithEndpoint(u.Host))
			if u.Scheme == "grpc" {
				o = append(o, otlptracegrpc.WithInsecure())
			}
		}
		if len(c.Headers) > 0 {
			o = append(o, otlptracegrpc.WithHeaders(c.Headers))
		}
		return otlptracegrpc.NewClient(o...), nil
	}
	var o []otlptracehttp.Option
	if c.Endpoint != "" {
		o = append(o, otlptracehttp.WithEndpoint(u.Host))
		if u.Path != "" && u.Path != "/" {
			o = append(o, otlptracehttp.WithURLPath(u.Path))
		}
		if u.Scheme == "http" {
			o = append(o, otlptracehttp.WithInsecure())
		}
	}
	if len(c.Headers) > 0 {
		o = append(o, otlptracehttp.WithHeaders(c.Headers))
	}
	return otlptracehttp.NewClient(o...), nil
}

// Tracer is the engine's own, nil if none is active: then nobody need do anything.
func (p *Provider) Tracer() trace.Tracer {
	if !p.Active() {
		return nil
	}
	return p.sdk.Tracer("github.com/cloudos-io/cloudos")
}

// Active tells whether spans are sent.
func (p *Provider) Active() bool { return p != nil && p.sdk != nil }

// Close sends what waits, for a moment at most.
func (p *Provider) Close() error {
	if !p.Active() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return p.sdk.Shutdown(ctx)
}

// quiet logs that the collector cannot be reached, but not every few seconds.
type quiet struct {
	log  *slog.Logger
	last atomic.Int64
}

func (q *quiet) Handle(err error) {
	now := time.Now().Unix()
	if last := q.last.Load(); q.log != nil && now-last >= 60 && q.last.CompareAndSwap(last, now) {
		q.log.Warn("cannot send traces", "cause", err)
	}
}
