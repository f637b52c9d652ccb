package tracing

import (
	"context"
	"net"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
)

type sinkServer struct {
	collector.UnimplementedTraceServiceServer
	names chan string
}

func (s *sinkServer) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	for _, rs := range r.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, sp := range ss.Spans {
				s.names <- sp.Name
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func TestOverGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in := &sinkServer{names: make(chan string, 10)}
	srv := grpc.NewServer()
	collector.RegisterTraceServiceServer(srv, in)
	go func() { _ = srv.Serve(l) }()
	defer srv.Stop()
	p, err := Start(context.Background(), Config{Endpoint: "grpc://" + l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	_, span := p.Tracer().Start(context.Background(), "one")
	span.End()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case n := <-in.names:
		if n != "one" {
			t.Errorf("got %q", n)
		}
	case <-time.After(10 * time.Second):
		t.Error("no span came")
	}
}

func TestNothingIsSetUpUnlessAskedFor(t *testing.T) {
	for _, v := range []string{"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} {
		t.Setenv(v, "")
	}
	p, err := Start(context.Background(), Config{})
	if err != nil || p.Active() || p.Tracer() != nil || p.Close() != nil {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestCheck(t *testing.T) {
	for endpoint, ok := range map[string]bool{"": true, "http://a:4318": true, "grpcs://a": true, "a:4317": false, "ftp://a": false, "http://": false} {
		if err := Check(endpoint); (err == nil) != ok {
			t.Errorf("%q: %v", endpoint, err)
		}
	}
}
