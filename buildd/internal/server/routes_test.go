package server

import (
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"
	"time"
)

func TestPruneOptions(t *testing.T) {
	get := func(q url.Values) (string, []string, time.Duration, error) {
		r := httptest.NewRequest("POST", "/build/prune?"+q.Encode(), nil)
		o, err := pruneOptions(r)
		size := ""
		if o.ReservedSpace == 1<<30 {
			size = "1g"
		}
		return size, o.Filter, o.KeepDuration, err
	}
	for name, c := range map[string]struct {
		q      url.Values
		size   string
		filter []string
		keep   time.Duration
		bad    bool
	}{
		"nothing":       {q: url.Values{}},
		"bytes":         {q: url.Values{"keep-storage": {"1073741824"}}, size: "1g"},
		"a size":        {q: url.Values{"reserved-space": {"1g"}}, size: "1g"},
		"no size":       {q: url.Values{"max-used-space": {"much"}}, bad: true},
		"until":         {q: url.Values{"filters": {`{"until":["24h"]}`}}, keep: 24 * time.Hour},
		"old form":      {q: url.Values{"filters": {`{"until":{"24h":true,"1h":false}}`}}, keep: 24 * time.Hour},
		"type":          {q: url.Values{"filters": {`{"type":["regular"]}`}}, filter: []string{`type=="regular"`}},
		"a quote":       {q: url.Values{"filters": {`{"id":["a\",inuse"]}`}}, filter: []string{`id=="a\",inuse"`}},
		"flags":         {q: url.Values{"filters": {`{"shared":["true"]}`}}, filter: []string{"shared"}},
		"no flag":       {q: url.Values{"filters": {`{"private":["false"]}`}}, filter: []string{"private==false"}},
		"unknown":       {q: url.Values{"filters": {`{"nosuch":["x"]}`}}, bad: true},
		"no JSON":       {q: url.Values{"filters": {`{`}}, bad: true},
		"no time":       {q: url.Values{"filters": {`{"until":["soon"]}`}}, bad: true},
		"wrong inside":  {q: url.Values{"filters": {`{"until":[1]}`}}, bad: true},
		"wrong outside": {q: url.Values{"filters": {`[]`}}, bad: true},
	} {
		size, filter, keep, err := get(c.q)
		if (err != nil) != c.bad || size != c.size || !slices.Equal(filter, c.filter) || keep != c.keep {
			t.Errorf("%s: %q %q %v %v", name, size, filter, keep, err)
		}
	}
}

func FuzzPruneFilters(f *testing.F) {
	for _, s := range []string{`{"until":["24h"]}`, `{"id":{"x":true}}`, `{`, `{"type":["a,b==\"c"]}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r := httptest.NewRequest("POST", "/build/prune?"+url.Values{"filters": {s}}.Encode(), nil)
		_, _ = pruneOptions(r)
	})
}
