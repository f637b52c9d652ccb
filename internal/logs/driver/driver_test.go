package driver

import (
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

type opts = map[string]string

func TestParse(t *testing.T) {
	d := Defaults{MaxSize: 10 << 20, MaxFiles: 3}
	for _, c := range []struct {
		name string
		o    opts
		want Settings
		err  string
	}{
		{JSONFile, nil, Settings{Format: "json-file", MaxSize: 10 << 20, MaxFiles: 3}, ""},
		{JSONFile, opts{"max-size": "0"}, Settings{Format: "json-file", MaxFiles: 3}, ""},
		{JSONFile, opts{"max-size": "1k", "max-file": "2", "compress": "true", "tag": "{{.Name}}"}, Settings{Format: "json-file", MaxSize: 1024, MaxFiles: 2}, ""},
		{Local, nil, Settings{Format: "json-file", MaxSize: 20 << 20, MaxFiles: 5}, ""},
		{K8sFile, nil, Settings{Format: "k8s-file", MaxSize: 10 << 20, MaxFiles: 3}, ""},
		{None, nil, Settings{Format: "none"}, ""},
		{Journald, opts{"tag": "x", "labels": "a", "cache-disabled": "true"}, Settings{Format: "json-file", MaxSize: 20 << 20, MaxFiles: 5, Unreadable: true}, ""},
		{Syslog, opts{"syslog-address": "udp://127.0.0.1:1514", "cache-max-size": "0", "cache-max-file": "1"}, Settings{Format: "json-file", MaxSize: 20 << 20, MaxFiles: 2}, ""},
		{Fluentd, opts{"mode": "non-blocking", "max-buffer-size": "4m"}, Settings{Format: "json-file", MaxSize: 20 << 20, MaxFiles: 5, NonBlocking: true, BufferSize: 4 << 20}, ""},

		{"gelf", nil, Settings{}, "failed to initialize logging driver: gelf is not supported: use fluentd"},
		{"none-such", nil, Settings{}, "logger: no log driver named 'none-such' is registered"},
		{JSONFile, opts{"foo": "1"}, Settings{}, "unknown log opt 'foo' for json-file log driver"},
		{Syslog, opts{"fluentd-address": "x"}, Settings{}, "unknown log opt 'fluentd-address' for syslog log driver"},
		{Local, opts{"foo": "1"}, Settings{}, "unknown log opt 'foo' for log driver local"},
		{None, opts{"max-size": "1m"}, Settings{}, "unknown log opt 'max-size' for none log driver"},
		{JSONFile, opts{"cache-max-size": "1m"}, Settings{}, "unknown log opt 'cache-max-size'"},
		{JSONFile, opts{"max-file": "0"}, Settings{}, "max-file cannot be less than 1"},
		{JSONFile, opts{"max-size": "big"}, Settings{}, "max-size"},
		{JSONFile, opts{"mode": "fast"}, Settings{}, "logger: logging mode not supported: fast"},
		{JSONFile, opts{"max-buffer-size": "1m"}, Settings{}, "logger: max-buffer-size option is only supported with 'mode=non-blocking'"},
		{JSONFile, opts{"tag": "{{.Name"}, Settings{}, "invalid log tag"},
		{JSONFile, opts{"env-regex": "("}, Settings{}, "env-regex"},
		{Syslog, opts{"syslog-facility": "nobody"}, Settings{}, "invalid syslog facility"},
		{Syslog, opts{"syslog-format": "rfc1"}, Settings{}, "Invalid syslog format"},
		{Syslog, opts{"syslog-address": "gopher://a"}, Settings{}, "unable to parse syslog-address"},
		{Syslog, opts{"syslog-address": "unix:///no/such/socket"}, Settings{}, "unable to stat syslog-address"},
		{Syslog, opts{"syslog-address": "tcp://a:99999"}, Settings{}, "invalid port"},
		{Fluentd, opts{"fluentd-address": "ftp://a"}, Settings{}, "invalid fluentd-address"},
		{Fluentd, opts{"fluentd-address": "tcp://a/b"}, Settings{}, "should not contain a path element"},
		{Fluentd, opts{"fluentd-async": "maybe"}, Settings{}, "fluentd-async"},
		{Fluentd, opts{"fluentd-async": "true", "fluentd-async-connect": "true"}, Settings{}, "conflicting options"},
		{Fluentd, opts{"fluentd-async-reconnect-interval": "1ms"}, Settings{}, "must be between 100ms and 10s"},
		{Fluentd, opts{"fluentd-buffer-limit": "x"}, Settings{}, "fluentd-buffer-limit"},
	} {
		got, err := Parse(c.name, c.o, d)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || !fault.Is(err, fault.Invalid) {
				t.Errorf("%s %v: got error %v, want %q", c.name, c.o, err, c.err)
			}
			continue
		}
		c.want.Driver = c.name
		if err != nil || got != c.want {
			t.Errorf("%s %v: got %+v, %v, want %+v", c.name, c.o, got, err, c.want)
		}
	}
}

func TestAddresses(t *testing.T) {
	for addr, want := range map[string]string{
		"": "tcp 127.0.0.1:24224", "host": "tcp host:24224", "host:1": "tcp host:1", "tcp://host": "tcp host:24224", "10.0.0.1:9": "tcp 10.0.0.1:9",
		"tls://h:2": "tls h:2", "unix:///run/f.sock": "unix /run/f.sock", "tcp://[::1]:5": "tcp [::1]:5", ":5": "tcp 127.0.0.1:5",
	} {
		f, err := ParseFluentd(opts{"fluentd-address": addr})
		if got := f.Network + " " + f.Address; err != nil || got != want {
			t.Errorf("fluentd-address %q: got %q, %v, want %q", addr, got, err, want)
		}
	}
	for addr, want := range map[string]string{
		"": " ", "udp://h": "udp h:514", "tcp://h:1": "tcp h:1", "tcp+tls://h:6514": "tcp+tls h:6514", "unix:///dev/null": "unix /dev/null", "udp://[::1]": "udp [::1]:514",
	} {
		s, err := ParseSyslog(opts{"syslog-address": addr})
		if got := s.Network + " " + s.Address; err != nil || got != want {
			t.Errorf("syslog-address %q: got %q, %v, want %q", addr, got, err, want)
		}
	}
	for name, want := range map[string]int{"": 3, "kern": 0, "local0": 16, "local7": 23, "5": 5, "authpriv": 10} {
		if s, err := ParseSyslog(opts{"syslog-facility": name}); err != nil || s.Facility != want {
			t.Errorf("facility %q: got %d, %v", name, s.Facility, err)
		}
	}
}

var example = Container{
	ContainerID: strings.Repeat("0123456789abcdef", 4), ContainerName: "/web", ContainerEntrypoint: "sh", ContainerArgs: []string{"-c", "x"},
	ContainerImageID: "sha256:" + strings.Repeat("f", 64), ContainerImageName: "nginx:1", ContainerCreated: time.Unix(0, 0),
	ContainerEnv: []string{"A=1", "B2=two", "C"}, ContainerLabels: map[string]string{"com.x": "y", "team": "red"}, DaemonName: "docker",
}

func TestTag(t *testing.T) {
	for text, want := range map[string]string{
		"":                                    "0123456789ab",
		"plain":                               "plain",
		"{{.ImageName}}/{{.Name}}/{{.ID}}":    "nginx:1/web/0123456789ab",
		"{{.FullID}}":                         example.ContainerID,
		"{{.ImageID}} {{.DaemonName}}":        "sha256:fffff docker",
		"{{upper .Name}}-{{.Command}}":        "WEB-sh -c x",
		`{{index .ContainerLabels "team"}}`:   "red",
		`{{join (split "a.b" ".") "/"}}`:      "a/b",
		`{{json .ContainerArgs}}`:             `["-c","x"]`,
		`{{truncate .Name 2}}{{pad "x" 1 1}}`: "we x ",
		`{{.Name | upper | printf "%s-%s" "a" | len}}{{/* why */}}`:                                  "5",
		`{{.Name | printf "%s:%s" .ID}}`:                                                             "0123456789ab:web",
		`{{if eq .Name "web" "db"}}yes{{else}}no{{end}}{{if not .LogPath}}!{{end}}`:                  "yes!",
		`{{if eq .Name "api"}}a{{else if ne .ID ""}}b{{end}}`:                                        "b",
		`{{with .ContainerLabels.team}}team {{.}} of {{$.Name}}{{else}}none{{end}}`:                  "team red of web",
		`{{with (index .ContainerLabels "none")}}x{{else}}{{title "nobody"}}{{end}}`:                 "Nobody",
		`{{len .ContainerEnv}} {{index .ContainerEnv 1}} {{.ContainerLabels.none}}{{print 1 "a" 2}}`: "3 B2=two 1a2",
		`{{and .Name .LogPath}}{{or .LogPath .Name}}{{(split "a:b" ":")}}`:                           "web[a b]",
		`{{- " x " -}} `: " x ",
	} {
		got, err := example.Tag(opts{"tag": text}, "{{.ID}}")
		if err != nil || got != want {
			t.Errorf("%q: got %q, %v, want %q", text, got, err, want)
		}
	}
	for _, text := range []string{"{{.Nothing}}", `{{printf "%999999d" 1}}`, `{{define "x"}}{{template "x"}}{{end}}{{template "x"}}`, "{{",
		`{{range .ContainerEnv}}{{.}}{{end}}`, `{{$x := .ID}}{{$x}}`, `{{.Name.Length}}`, `{{.Name 1}}`, `{{index .ContainerEnv 9}}`, `{{index .ContainerEnv "a"}}`,
		`{{upper 1}}`, `{{join "a" "b"}}`, `{{nothing .}}`, `{{truncate 1 "a"}}`, `{{and}}`, `{{nil}}`, `{{1.5}}`, `{{len 1}}`, `{{printf 1}}`, `{{eq 1}}`} {
		if got, err := example.Tag(opts{"tag": text}, ""); err == nil {
			t.Errorf("%q gives %q", text, got)
		}
	}
}

func TestCheckTag(t *testing.T) {
	for text, ok := range map[string]bool{
		"{{.ID}}": true, `{{index .ContainerEnv 3}}`: true, `{{.ContainerLabels.none}}`: true,
		"{{": false, "{{.Nothing}}": false, "{{nothing}}": false, "{{range .ContainerEnv}}{{end}}": false,
	} {
		if err := checkTag(text); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestAttrs(t *testing.T) {
	for _, c := range []struct {
		o    opts
		want opts
	}{
		{nil, opts{}},
		{opts{"labels": "team,none", "env": "A,C"}, opts{"team": "red", "A": "1"}},
		{opts{"labels-regex": "^com", "env-regex": "B."}, opts{"com.x": "y", "B2": "two"}},
	} {
		if got := example.Attrs(c.o, nil); !maps.Equal(got, c.want) {
			t.Errorf("%v: got %v", c.o, got)
		}
	}
	if got := example.Attrs(opts{"labels": "team"}, strings.ToUpper); !reflect.DeepEqual(got, opts{"TEAM": "red"}) {
		t.Errorf("got %v", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("syslog", "syslog-address", "tcp://a:1")
	f.Add("fluentd", "fluentd-address", ":1")
	f.Add("json-file", "tag", "{{.ID}}")
	f.Fuzz(func(t *testing.T, name, k, v string) {
		s, err := Parse(name, opts{k: v}, Defaults{MaxFiles: 1})
		if err == nil && (s.MaxFiles < 0 || s.MaxSize < 0 || Remote(name) && s.MaxSize == 0) {
			t.Errorf("%s %s=%q: %+v", name, k, v, s)
		}
	})
}
