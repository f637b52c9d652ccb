package dockerapi

import (
	"encoding/base64"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestFilters(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Filters
	}{
		{"", Filters{}},
		{"null", Filters{}},
		{"{}", Filters{}},
		{`{"a":{"x":true,"y":false}}`, Filters{"a": {"x": true, "y": false}}},
		{`{"a":["x","y"]}`, Filters{"a": {"x": true, "y": true}}},
		{`{"a":{}}`, Filters{"a": {}}},
		{`{"a":"x"}`, nil},
		{`["a"]`, nil},
		{`{"a":{"x":1}}`, nil},
		{`{"a":["x"]} trailing`, nil},
		{strings.Repeat("[", 1<<16), nil},
	} {
		got, err := parseFilters(c.in)
		if (err != nil) != (c.want == nil) || (err == nil && !reflect.DeepEqual(got, c.want)) {
			t.Errorf("%.40q: %v, %v; want %v", c.in, got, err, c.want)
		}
	}
}

func TestRegistryAuth(t *testing.T) {
	const creds = `{"username":"user","password":"sekret??>>"}`
	for name, c := range map[string]struct {
		in   string
		user string
		bad  bool
	}{
		"url, padded":   {base64.URLEncoding.EncodeToString([]byte(creds)), "user", false},
		"url, unpadded": {base64.RawURLEncoding.EncodeToString([]byte(creds)), "user", false},
		"std, padded":   {base64.StdEncoding.EncodeToString([]byte(creds)), "user", false},
		"none":          {"", "", false},
		"empty object":  {"e30=", "", false},
		"null":          {base64.URLEncoding.EncodeToString([]byte("null")), "", false},
		"no base64":     {"sekret!", "", true},
		"no JSON":       {base64.URLEncoding.EncodeToString([]byte("sekret")), "", true},
		"two":           {base64.URLEncoding.EncodeToString([]byte(creds + creds)), "", true},
		"huge":          {strings.Repeat("a", 1<<20), "", true},
	} {
		a, err := parseRegistryAuth(c.in)
		if (err != nil) != c.bad {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "sekret") {
			t.Errorf("%s: the error shows the secret: %v", name, err)
		}
		if (a == nil) != (c.user == "") || a != nil && (a.Username != c.user || a.Password != "sekret??>>") {
			t.Errorf("%s: got %+v", name, a)
		}
	}
}

func TestTimes(t *testing.T) {
	now := time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]string{
		"1136073600":                "2006-01-01T00:00:00Z",
		"1136073600.000000001":      "2006-01-01T00:00:00.000000001Z",
		"1136073600.5":              "2006-01-01T00:00:00.5Z",
		"1136073600.0000000019":     "2006-01-01T00:00:00.000000001Z",
		"10m":                       "2024-01-02T02:54:05Z",
		"1h30m":                     "2024-01-02T01:34:05Z",
		"2006-01-02":                "2006-01-02T00:00:00Z",
		"2006-01-02T15:04":          "2006-01-02T15:04:00Z",
		"2006-01-02T15:04:05+07:00": "2006-01-02T08:04:05Z",
		"2006-01-02T15:04:05.1Z":    "2006-01-02T15:04:05.1Z",
		"2006-01-02T15:04:05.25":    "2006-01-02T15:04:05.25Z",
		"-5":                        "1969-12-31T23:59:55Z",
		"yesterday":                 "",
		"1.x":                       "",
		"99999999999999999999":      "",
		"9223372036854775807":       "",
		"1.-5":                      "",
	} {
		got, err := parseTime(in, now)
		s := ""
		if err == nil {
			s = got.Format(time.RFC3339Nano)
		}
		if s != want {
			t.Errorf("%s: got %q (%v), want %q", in, s, err, want)
		}
	}
}

func TestDetachKeys(t *testing.T) {
	for in, want := range map[string]string{
		"":                             "\x10\x11",
		"a":                            "a",
		"ctrl-a":                       "\x01",
		"ctrl-@,ctrl-[,x":              "\x00\x1bx",
		"ctrl-\\,ctrl-],ctrl-^,ctrl-_": "\x1c\x1d\x1e\x1f",
		"DEL":                          "\x7f",
		"ctrl-":                        "!",
		"ctrl-A":                       "!",
		"ab":                           "!",
		"a,":                           "!",
		",":                            "!",
	} {
		got, err := parseDetachKeys(in)
		if (err != nil) != (want == "!") || err == nil && string(got) != want {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestEscaper(t *testing.T) {
	for _, c := range []struct {
		keys     string
		in       []string
		out      string
		detached bool
	}{
		{"pq", []string{"abc"}, "abc", false},
		{"pq", []string{"apq", "z"}, "a", true},
		{"pq", []string{"ap", "qz"}, "a", true},
		{"pq", []string{"ap", "rpq"}, "apr", true},
		{"pq", []string{"ppq"}, "p", true},
		{"aab", []string{"aaab"}, "a", true},
		{"aab", []string{"aa", "aa", "ac"}, "aaaaac", false},
		{"abab", []string{"abacabab"}, "abac", true},
		{"pq", []string{"p"}, "p", false},
	} {
		e := &escaper{keys: []byte(c.keys)}
		var out []byte
		detached := false
		for _, in := range c.in {
			var got []byte
			got, detached = e.filter(nil, []byte(in))
			out = append(out, got...)
			if detached {
				break
			}
		}
		if !detached {
			out = append(out, e.rest()...)
		}
		if string(out) != c.out || detached != c.detached {
			t.Errorf("%s in %q: %q %t, want %q %t", c.keys, c.in, out, detached, c.out, c.detached)
		}
	}
}

func TestDepth(t *testing.T) {
	for in, want := range map[string]int{
		"": 0, "1": 0, "{}": 1, `{"a":[{}]}`: 3, `"[[["`: 0, `["\"[", {}]`: 2, `]]]`: 0,
	} {
		if got := depth([]byte(in)); got != want {
			t.Errorf("%s: %d, want %d", in, got, want)
		}
	}
}

func FuzzCreateJSON(f *testing.F) {
	f.Add([]byte(`{"Image":"x","HostConfig":{"PortBindings":{"80/tcp":[]},"Mounts":[{"Type":"bind"}]},"NetworkingConfig":{"EndpointsConfig":{"a":null}}}`), 24)
	f.Add([]byte(`{"Image":"x","MacAddress":"02:00:00:00:00:01","HostConfig":{"Sysctls":{"net.ipv4.conf.eth0.x":"1"}}}`), 44)
	f.Fuzz(func(t *testing.T, b []byte, v int) {
		var body createBody
		if decodeJSON(b, &body) != nil || body.Config == nil {
			return
		}
		c := &created{CreateRequest: CreateRequest{Config: body.Config, HostConfig: body.HostConfig, Networking: body.NetworkingConfig}}
		ver := minVersion + version(uint(v)%uint(maxVersion-minVersion+1))
		if c.complete() != nil || c.adapt(ver) != nil || c.mainMAC(ver, body.MacAddress) != nil || c.interfaceSysctls(ver) != nil {
			return
		}
		c.emptyBindings(ver)
		if c.HostConfig == nil || c.Networking == nil || c.HostConfig.NetworkMode == "" {
			t.Fatalf("incomplete: %+v", c)
		}
		for k, ep := range c.Networking.EndpointsConfig {
			if ep == nil {
				t.Fatalf("endpoint %q is nil", k)
			}
		}
	})
}

func FuzzFilters(f *testing.F) {
	f.Add(`{"a":{"x":true}}`)
	f.Add(`{"a":["x"]}`)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseFilters(s)
		if err != nil {
			return
		}
		if got == nil {
			t.Fatal("nil without an error")
		}
		b, _ := json.Marshal(got)
		again, err := parseFilters(string(b))
		if err != nil || !reflect.DeepEqual(again, got) {
			t.Fatalf("%q: %v, again %v (%v)", s, got, again, err)
		}
	})
}

func FuzzRegistryAuth(f *testing.F) {
	f.Add("e30=")
	f.Add(base64.URLEncoding.EncodeToString([]byte(`{"username":"u"}`)))
	f.Fuzz(func(t *testing.T, s string) {
		if a, err := parseRegistryAuth(s); err != nil && a != nil {
			t.Fatal("both a value and an error")
		}
	})
}

func FuzzDetachKeys(f *testing.F) {
	f.Add("ctrl-p,ctrl-q", "ab\x10\x11c", 3)
	f.Add("a,a,b", "aaab", 2)
	f.Fuzz(func(t *testing.T, spec, input string, cut int) {
		keys, err := parseDetachKeys(spec)
		if err != nil {
			return
		}
		if len(keys) == 0 {
			t.Fatal("no keys and no error")
		}
		// The filter, fed in two pieces, must do what a search in the whole does.
		e := &escaper{keys: keys}
		n := 0
		if len(input) > 0 {
			n = int(uint(cut) % uint(len(input)+1))
		}
		a, d := e.filter(nil, []byte(input[:n]))
		out := string(a)
		if !d {
			var b []byte
			b, d = e.filter(nil, []byte(input[n:]))
			out += string(b)
		}
		if !d {
			out += string(e.rest())
		}
		want, _, found := strings.Cut(input, string(keys))
		if d != found || out != want {
			t.Fatalf("keys %q in %q: %q %t, want %q %t", keys, input, out, d, want, found)
		}
	})
}

func FuzzVersionAndRoute(f *testing.F) {
	f.Add("GET", "/v1.40/images/a/b:c/json")
	f.Add("DELETE", "//v1/containers")
	rt := newRouter(routes(Config{}))
	f.Fuzz(func(t *testing.T, method, path string) {
		_, rest, _ := cutVersion(path)
		if c, name := rt.find(method, rest); c != nil && c.suffix+c.prefix != "" && name == "" {
			t.Fatalf("%s: an empty name for %s", path, c.pattern)
		}
	})
}
