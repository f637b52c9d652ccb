package dockerapi

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"math"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Bounds on JSON bodies. The largest honest create request is some 100 KiB.
const (
	maxJSON      = 4 << 20
	maxJSONDepth = 64
	bodyTimeout  = 30 * time.Second
)

// body reads a JSON body. An empty one yields nil.
func (r *request) body(w *response) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		return nil, nil
	}
	if r.ContentLength > maxJSON {
		return nil, fault.As(fault.Invalid, &http.MaxBytesError{Limit: maxJSON})
	}
	if ct := r.Header.Get("Content-Type"); ct != "" {
		mt, _, err := mime.ParseMediaType(ct)
		if err != nil {
			return nil, fault.New(fault.Invalid, "malformed Content-Type header (%s): %w", ct, err)
		}
		if mt != "application/json" {
			return nil, fault.New(fault.Invalid, "unsupported Content-Type header (%s): must be 'application/json'", ct)
		}
	} else {
		return nil, fault.New(fault.Invalid, "malformed Content-Type header (): mime: no media type")
	}
	if !isUnix(r.Request) {
		// A peer on the network must not hold a request open for ever.
		rc := http.NewResponseController(w.ResponseWriter)
		_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
		defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	}
	rd := http.MaxBytesReader(w.ResponseWriter, r.Body, maxJSON)
	var b []byte
	var err error
	if n := r.ContentLength; n > 0 {
		b = make([]byte, n)
		_, err = io.ReadFull(rd, b)
	} else {
		b, err = io.ReadAll(rd)
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the request body: %w", err)
	}
	return b, nil
}

// decode reads a JSON body into v. Fields that are not known are ignored, as
// Docker does; wrong types, trailing text and absurd nesting are refused. An
// empty body leaves v as it is.
func (r *request) decode(w *response, v any) error {
	b, err := r.body(w)
	if err != nil {
		return err
	}
	if len(b) == 0 {
		return nil
	}
	return decodeJSON(b, v)
}

func decodeJSON(b []byte, v any) error {
	if depth(b) > maxJSONDepth {
		return fault.New(fault.Invalid, "invalid JSON: nested more than %d deep", maxJSONDepth)
	}
	// One value and nothing behind it. Which of the two is wrong is told apart,
	// and before any field is set.
	dec := json.NewDecoder(bytes.NewReader(b))
	var raw json.RawMessage
	if err := dec.Decode(&raw); err != nil {
		if errors.Is(err, io.EOF) {
			return fault.New(fault.Invalid, "invalid JSON: got EOF while reading request body")
		}
		return fault.New(fault.Invalid, "invalid JSON: %w", err)
	}
	if dec.More() {
		return fault.New(fault.Invalid, "unexpected content after JSON")
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fault.New(fault.Invalid, "invalid JSON: %w", err)
	}
	return nil
}

// depth is how deep arrays and objects of b are nested at most.
func depth(b []byte) int {
	deepest, now := 0, 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '{', '[':
			if now++; now > deepest {
				deepest = now
			}
		case '}', ']':
			now--
		case '"':
			for i++; i < len(b) && b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		}
	}
	return deepest
}

// flag reads a boolean the way Docker does: anything but "", 0, no, false and
// none is true.
func (r *request) flag(key string) bool { return r.flagOr(key, false) }

func (r *request) flagOr(key string, missing bool) bool {
	v, ok := r.query[key]
	if !ok {
		return missing
	}
	switch strings.ToLower(strings.TrimSpace(v[0])) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// number reads an optional integer; nil where it is missing.
func (r *request) number(key string) (*int, error) {
	v := r.query.Get(key)
	if v == "" {
		return nil, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		return nil, fault.New(fault.Invalid, "invalid value %q for %s: not an integer", v, key)
	}
	return &n, nil
}

// size reads a terminal's height or width, which must be there.
func (r *request) size(key, what string) (uint16, error) {
	v := r.query.Get(key)
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, fault.New(fault.Invalid, "invalid resize %s %q: invalid syntax", what, v)
	}
	if n < 0 || n > math.MaxUint16 {
		return 0, fault.New(fault.Invalid, "invalid resize %s %q: value out of range", what, v)
	}
	return uint16(n), nil
}

// filters reads the filters parameter in its map-of-map and its older
// map-of-list form.
func (r *request) filters() (Filters, error) { return parseFilters(r.query.Get("filters")) }

func parseFilters(s string) (Filters, error) {
	if strings.TrimSpace(s) == "" {
		return Filters{}, nil
	}
	b := []byte(s)
	bad := func(err error) (Filters, error) {
		return nil, fault.New(fault.Invalid, "invalid filter: %w", err)
	}
	if depth(b) > 4 {
		return nil, fault.New(fault.Invalid, "invalid filter: nested too deep")
	}
	var f Filters
	err := json.Unmarshal(b, &f)
	if err == nil {
		if f == nil {
			f = Filters{}
		}
		return f, nil
	}
	var lists map[string][]string
	if json.Unmarshal(b, &lists) != nil {
		return bad(err)
	}
	f = make(Filters, len(lists))
	for k, l := range lists {
		set := make(map[string]bool, len(l))
		for _, v := range l {
			set[v] = true
		}
		f[k] = set
	}
	return f, nil
}

// registryAuth reads X-Registry-Auth. As with Docker an unreadable one counts
// as none: clients in the field send all sorts of empty values.
func (r *request) registryAuth() *registry.AuthConfig {
	a, err := parseRegistryAuth(r.Header.Get(registry.AuthHeader))
	if err != nil {
		r.log.Debug("ignoring an unreadable X-Registry-Auth header", "path", r.URL.Path)
		return nil
	}
	return a
}

// parseRegistryAuth decodes base64url (or base64), padded or not, of a JSON
// AuthConfig. Its errors never hold any of the value.
func parseRegistryAuth(s string) (*registry.AuthConfig, error) {
	s = strings.TrimRight(strings.TrimSpace(s), "=")
	if s == "" {
		return nil, nil
	}
	if len(s) > 1<<16 {
		return nil, fault.New(fault.Invalid, "invalid X-Registry-Auth header: too long")
	}
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		if b, err = base64.RawStdEncoding.DecodeString(s); err != nil {
			return nil, fault.New(fault.Invalid, "invalid X-Registry-Auth header: not base64url")
		}
	}
	var a *registry.AuthConfig
	if depth(b) > 2 || json.Unmarshal(bytes.TrimSpace(b), &a) != nil {
		return nil, fault.New(fault.Invalid, "invalid X-Registry-Auth header: not a JSON object of credentials")
	}
	if a == nil || *a == (registry.AuthConfig{}) {
		return nil, nil
	}
	return a, nil
}

// platform reads a platform given as "linux/arm64" or as a JSON object and
// returns it in the former form, "" where none was given.
func parsePlatform(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	if !strings.HasPrefix(s, "{") {
		p, err := platforms.Parse(s)
		if err != nil {
			return "", fault.New(fault.Invalid, "invalid platform %q: %w", s, err)
		}
		return platforms.Format(p), nil
	}
	p, err := parsePlatformJSON(s)
	if err != nil {
		return "", err
	}
	return platforms.Format(p), nil
}

func parsePlatformJSON(s string) (ocispec.Platform, error) {
	var p ocispec.Platform
	if err := json.Unmarshal([]byte(s), &p); err != nil {
		return p, fault.New(fault.Invalid, "failed to parse platform: %w", err)
	}
	if p.OS == "" || p.Architecture == "" {
		return p, fault.New(fault.Invalid, "both OS and Architecture must be provided")
	}
	return p, nil
}

func parsePlatformsJSON(list []string) ([]ocispec.Platform, error) {
	var out []ocispec.Platform
	for _, s := range list {
		p, err := parsePlatformJSON(s)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// moment reads a time parameter; the zero time where it is missing or "0".
func (r *request) moment(key string) (time.Time, error) {
	v := r.query.Get(key)
	if v == "" || v == "0" {
		return time.Time{}, nil
	}
	t, err := parseTime(v, time.Now())
	if err != nil {
		return t, fault.New(fault.Invalid, "invalid value for %q: %w", key, err)
	}
	return t, nil
}

// Layouts of a time without a zone, which is taken as UTC, and with one.
var timeLayouts = []string{
	time.RFC3339Nano, "2006-01-02T15:04Z07:00", "2006-01-02T15Z07:00", "2006-01-02Z07:00",
	"2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02",
}

// parseTime reads a Unix time with up to nine decimals, a Go duration before
// now, or an RFC 3339 time or date.
func parseTime(v string, now time.Time) (time.Time, error) {
	sec, frac, _ := strings.Cut(v, ".")
	if s, err := strconv.ParseInt(sec, 10, 64); err == nil {
		if s > math.MaxInt64/int64(time.Second) || s < math.MinInt64/int64(time.Second) {
			return time.Time{}, fault.New(fault.Invalid, "%q is out of range", v)
		}
		if len(frac) > 9 {
			frac = frac[:9]
		}
		var n int64
		if frac != "" {
			for i := 0; i < len(frac); i++ {
				if frac[i] < '0' || frac[i] > '9' {
					return time.Time{}, fault.New(fault.Invalid, "%q is no time", v)
				}
			}
			n, _ = strconv.ParseInt(frac+"000000000"[len(frac):], 10, 64)
		}
		return time.Unix(s, n).UTC(), nil
	}
	if d, err := time.ParseDuration(v); err == nil {
		return now.Add(-d).UTC(), nil
	}
	for _, l := range timeLayouts {
		if t, err := time.Parse(l, v); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fault.New(fault.Invalid, "%q is no time, date, Unix time or duration", v)
}
