package build

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/cloudos-io/cloudos/test/harness"
)

// TestTraces: the steps of a build are in the trace of whoever asked for it.
func TestTraces(t *testing.T) {
	var mu sync.Mutex
	seen := map[string][]string{} // trace to service: span
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := io.Reader(r.Body)
		if r.Header.Get("Content-Encoding") == "gzip" {
			body, _ = gzip.NewReader(r.Body)
		}
		b, _ := io.ReadAll(body)
		var req collector.ExportTraceServiceRequest
		if err := proto.Unmarshal(b, &req); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, rs := range req.ResourceSpans {
			service := ""
			for _, a := range rs.Resource.Attributes {
				if a.Key == "service.name" {
					service = a.Value.GetStringValue()
				}
			}
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					id := hex.EncodeToString(s.TraceId)
					seen[id] = append(seen[id], service+": "+s.Name)
				}
			}
		}
	}))
	defer srv.Close()
	e := start(t, "tracing: {endpoint: "+srv.URL+"}\n")
	ctx := e.context(map[string]string{"Dockerfile": "FROM bb\nARG N\nRUN echo $N > /f\n"})
	traces := map[string]string{"servin build": "0af7651916cd43dd8448eb211c80319c", "POST /build": "1bf7651916cd43dd8448eb211c80319d"}
	t.Setenv("TRACEPARENT", "00-"+traces["servin build"]+"-b7ad6b7169203331-01")
	e.must("build", "-q", "--build-arg", "N=1", ctx)
	context, err := exec.Command("tar", "-C", ctx, "-c", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	if r := e.exec(bytes.NewReader(context), nil, "curl", "-sS", "-f", "--unix-socket", e.Sock(), "-H", "Content-Type: application/x-tar",
		"-H", "traceparent: 00-"+traces["POST /build"]+"-b7ad6b7169203331-01", "--data-binary", "@-", "http://engine/build?buildargs=%7B%22N%22:%222%22%7D"); r.code != 0 || !strings.Contains(r.out, "Successfully built") {
		t.Fatal(r)
	}
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		t.Log(seen)
	}()
	for name, id := range traces {
		harness.Eventually(t, "the spans of "+name, 20*time.Second, func() bool {
			mu.Lock()
			defer mu.Unlock()
			all := strings.Join(seen[id], "\n")
			return strings.Contains(all, "servind: POST /") && strings.Contains(all, "servin-buildd: ") && strings.Contains(all, "] RUN echo ")
		})
	}
}
