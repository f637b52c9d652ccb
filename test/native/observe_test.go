package native

import (
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/cloudos-io/cloudos/test/harness"
)

type seenSpan struct{ name, trace, id, parent, image string }

func TestTracesFollowTheClientsContext(t *testing.T) {
	var mu sync.Mutex
	var spans []seenSpan
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := io.Reader(r.Body)
		if r.Header.Get("Content-Encoding") == "gzip" {
			body, _ = gzip.NewReader(r.Body)
		}
		b, _ := io.ReadAll(body)
		var req collector.ExportTraceServiceRequest
		if err := proto.Unmarshal(b, &req); err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL.Path, err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, rs := range req.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					x := seenSpan{s.Name, hex.EncodeToString(s.TraceId), hex.EncodeToString(s.SpanId), hex.EncodeToString(s.ParentSpanId), ""}
					for _, a := range s.Attributes {
						if a.Key == "container.image.name" {
							x.image = a.Value.GetStringValue()
						}
					}
					spans = append(spans, x)
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	defer srv.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", srv.URL)
	e := start(t)
	const trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	t.Setenv("TRACEPARENT", "00-"+trace+"-"+parent+"-01")
	e.must("run", "--rm", "bb", "true")
	e.run("pull", "127.0.0.1:1/no/such")
	byName := func() map[string]seenSpan {
		mu.Lock()
		defer mu.Unlock()
		m := map[string]seenSpan{}
		for _, s := range spans {
			if s.trace == trace {
				m[s.name] = s
			}
		}
		return m
	}
	want := map[string]string{ // span and its parent
		"POST /servin/run": "", "container.create": "POST /servin/run", "container.start": "POST /servin/run", "container.prepare": "container.start",
		"runtime.start": "container.start", "network.attach": "container.start", "POST /images/create": "", "image.pull": "POST /images/create",
	}
	harness.Eventually(t, "every span arrives", 20*time.Second, func() bool {
		m := byName()
		for n := range want {
			if _, ok := m[n]; !ok {
				return false
			}
		}
		return true
	})
	m := byName()
	for n, p := range want {
		id := parent
		if p != "" {
			id = m[p].id
		}
		if m[n].parent != id {
			t.Errorf("%s has the parent %s instead of %s %s", n, m[n].parent, p, id)
		}
	}
	if m["container.start"].image != "bb" {
		t.Errorf("container.start is of image %q", m["container.start"].image)
	}
}

func TestMetricsOfContainers(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "busy", "--memory", "64m", "bb", "sh", "-c", "while :; do :; done")
	e.run("run", "--name", "over", "bb", "sh", "-c", "exit 3")
	resp, err := e.HTTP().Get("http://engine/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p := expfmt.NewTextParser(model.UTF8Validation)
	got, err := p.TextToMetricFamilies(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	value := func(metric, name string) float64 {
		for _, m := range got[metric].GetMetric() {
			for _, l := range m.Label {
				if l.GetName() == "name" && l.GetValue() == name {
					return m.GetGauge().GetValue() + m.GetCounter().GetValue()
				}
			}
		}
		t.Errorf("%s has no sample of %s", metric, name)
		return -1
	}
	for metric, ok := range map[string]func(float64) bool{
		"servin_container_running":                      func(v float64) bool { return v == 1 },
		"servin_container_cpu_seconds_total":            func(v float64) bool { return v > 0 },
		"servin_container_memory_limit_bytes":           func(v float64) bool { return v == 64<<20 },
		"servin_container_memory_bytes":                 func(v float64) bool { return v > 0 },
		"servin_container_pids":                         func(v float64) bool { return v == 1 },
		"servin_container_network_transmit_bytes_total": func(v float64) bool { return v >= 0 },
		"servin_container_start_time_seconds":           func(v float64) bool { return v > 1e9 },
	} {
		if v := value(metric, "busy"); !ok(v) {
			t.Errorf("%s is %g", metric, v)
		}
	}
	if value("servin_container_exit_code", "over") != 3 || value("servin_container_running", "over") != 0 {
		t.Error("the ended container is not told as such")
	}
	if strings.Contains(e.Log(), "panic") {
		t.Error(e.Log())
	}
}

func TestAlerts(t *testing.T) {
	var mu sync.Mutex
	var got []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var n struct {
			Status, Rule string
			Container    struct{ Name string }
		}
		if err := json.NewDecoder(r.Body).Decode(&n); err != nil {
			t.Error(err)
		}
		mu.Lock()
		got = append(got, n.Status+" "+n.Rule+" "+n.Container.Name)
		mu.Unlock()
	}))
	defer srv.Close()
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/rules.yaml", []byte(`version: 1
interval: 1s
rules:
  - {name: sick, when: health == unhealthy, actions: [hook]}
  - {name: hot, when: cpu >= 0 and pids >= 1, for: 1s, match: {name: "b*"}, actions: [hook]}
  - {name: failed, when: event == die and exit_code != 0, actions: [hook]}
actions:
  hook: {webhook: "`+srv.URL+`", perMinute: 100}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/conf.yaml", []byte("version: 1\nshutdownTimeout: 1s\nalerts: "+dir+"/rules.yaml\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := start(t, "--config", dir+"/conf.yaml")
	e.must("run", "-d", "--network", "none", "--name", "busy", "bb", "sh", "-c", "while :; do :; done")
	e.must("run", "-d", "--network", "none", "--name", "ill", "--health-cmd", "test -e /well", "--health-interval", "100ms", "--health-start-interval", "100ms", "--health-retries", "1", "bb", "sleep", "1000")
	e.run("run", "--rm", "--network", "none", "--name", "fails", "bb", "false")
	told := func(want string) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return slices.Contains(got, want) }
	}
	harness.Eventually(t, "the exit is told", 20*time.Second, told("firing failed fails"))
	harness.Eventually(t, "the sick one is told", 20*time.Second, told("firing sick ill"))
	harness.Eventually(t, "the hot one is told", 20*time.Second, told("firing hot busy"))
	if ls := e.must("system", "alerts", "ls", "--format", "{{.Name}} {{.State}} {{.Of}}"); !strings.Contains(ls, "sick firing ill") || !strings.Contains(ls, "hot firing busy") {
		t.Errorf("alerts ls: %s", ls)
	}
	if r := e.must("system", "alerts", "test", "sick"); r != "hook: done" {
		t.Errorf("alerts test: %s", r)
	}
	e.must("exec", "ill", "touch", "/well")
	harness.Eventually(t, "the recovery is told", 20*time.Second, told("resolved sick ill"))
	e.must("rm", "-f", "busy")
	harness.Eventually(t, "the end is told", 20*time.Second, told("resolved hot busy"))
}
