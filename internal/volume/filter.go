package volume

import (
	"slices"
	"strconv"
	"strings"
	"time"
)

func checkFilters(f Filters, known ...string) error {
	for k := range f {
		if !slices.Contains(known, k) {
			return invalid("invalid filter '%s'", k)
		}
	}
	return nil
}

// truth reads a filter with one boolean value; nil where it is not given.
func truth(f Filters, key string) (*bool, error) {
	var out *bool
	for v, on := range f[key] {
		if !on {
			continue
		}
		b, err := strconv.ParseBool(v)
		if err != nil || out != nil && *out != b {
			return nil, invalid("invalid filter '%s=%s'", key, v)
		}
		out = &b
	}
	return out, nil
}

func matches(r stored, f Filters) bool {
	if d := f["driver"]; len(d) > 0 && !d[r.driver()] {
		return false
	}
	if names := f["name"]; len(names) > 0 {
		found := false
		for n, on := range names {
			found = found || on && strings.Contains(r.Name, n)
		}
		if !found {
			return false
		}
	}
	for l, on := range f["label"] {
		if on && !hasLabel(r.Labels, l) {
			return false
		}
	}
	for l, on := range f["label!"] {
		if on && hasLabel(r.Labels, l) {
			return false
		}
	}
	return true
}

func hasLabel(labels map[string]string, want string) bool {
	k, v, exact := strings.Cut(want, "=")
	got, ok := labels[k]
	return ok && (!exact || got == v)
}

// before reads the filter until: a Unix time, a duration before now or an RFC 3339
// time; zero where it is not given.
func before(f Filters, now time.Time) (time.Time, error) {
	var out time.Time
	for v, on := range f["until"] {
		if !on {
			continue
		}
		t, err := time.Parse(time.RFC3339Nano, v)
		if d, derr := time.ParseDuration(v); derr == nil {
			t, err = now.Add(-d), nil
		} else if n, nerr := strconv.ParseFloat(v, 64); nerr == nil && n > 0 && n < 1e11 {
			t, err = time.Unix(int64(n), 0), nil
		} else if day, perr := time.Parse(time.DateOnly, v); perr == nil {
			t, err = day, nil
		}
		if err != nil || !out.IsZero() {
			return out, invalid("invalid filter 'until=%s': write one duration such as 24h, a date or a time", v)
		}
		out = t
	}
	return out, nil
}
