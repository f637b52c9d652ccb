package image

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestSearchTerm(t *testing.T) {
	for term, want := range map[string][2]string{
		"busybox":                      {"docker.io", "busybox"},
		"library/busybox":              {"docker.io", "busybox"},
		"someone/app":                  {"docker.io", "someone/app"},
		"docker.io/library/busybox":    {"docker.io", "busybox"},
		"registry.example/team/app":    {"registry.example", "team/app"},
		"localhost/app":                {"localhost", "app"},
		"127.0.0.1:5000/app":           {"127.0.0.1:5000", "app"},
		"index.docker.io/library/some": {"docker.io", "some"},
	} {
		if d, n := searchTerm(term); d != want[0] || n != want[1] {
			t.Errorf("%s: %s, %s", term, d, n)
		}
	}
}

func TestSearch(t *testing.T) {
	var asked []string
	index := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RequestURI())
		switch r.URL.Query().Get("q") {
		case "none":
			http.NotFound(w, r)
		case "broken":
			_, _ = w.Write([]byte("<html>"))
		default:
			_ = json.NewEncoder(w).Encode(registry.SearchResults{Results: []registry.SearchResult{
				{Name: "app", StarCount: 10, IsOfficial: true, IsAutomated: true}, {Name: "my/app", StarCount: 2}, {Name: "your/app"},
			}})
		}
	}))
	defer index.Close()
	s := newService(t, t.TempDir())
	host := strings.TrimPrefix(index.URL, "http://")
	ctx := context.Background()
	one := func(k, v string) map[string]map[string]bool { return map[string]map[string]bool{k: {v: true}} }

	for _, c := range []struct {
		term    string
		limit   int
		filters map[string]map[string]bool
		want    string
		kind    fault.Kind
	}{
		{term: "app", want: "app my/app your/app"},
		{term: "app", limit: 2, want: "app my/app"},
		{term: "app", filters: one("stars", "2"), want: "app my/app"},
		{term: "app", filters: one("is-official", "true"), want: "app"},
		{term: "app", filters: one("is-official", "0"), want: "my/app your/app"},
		{term: "app", filters: one("is-automated", "true"), want: ""},
		{term: "app", filters: one("is-automated", "maybe"), kind: fault.Invalid},
		{term: "app", filters: one("stars", "many"), kind: fault.Invalid},
		{term: "app", filters: one("colour", "red"), kind: fault.Invalid},
		{term: "app", limit: 101, kind: fault.Invalid},
		{term: "none", kind: fault.Unsupported},
		{term: "broken", kind: fault.Unavailable},
	} {
		l, err := s.Search(ctx, host+"/"+c.term, c.limit, c.filters, nil)
		var names []string
		for _, r := range l {
			names = append(names, r.Name)
			if r.IsAutomated { //nolint:staticcheck // it must not be told
				t.Errorf("%s is said to be automated", r.Name)
			}
		}
		if got := strings.Join(names, " "); got != c.want || c.kind != 0 && !fault.Is(err, c.kind) || c.kind == 0 && err != nil {
			t.Errorf("%+v: %q, %v", c, got, err)
		}
	}
	if asked[0] != "/v1/search?n=25&q=app" {
		t.Errorf("asked for %s", asked[0])
	}
	if _, err := s.Search(ctx, "http://x", 0, nil, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("a scheme: %v", err)
	}
}
