package volume

import (
	"slices"
	"strconv"
	"strings"
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
	if d := f["driver"]; len(d) > 0 && !d[Driver] {
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
