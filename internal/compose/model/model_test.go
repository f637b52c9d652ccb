package model

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
)

func project(t *testing.T, yaml string, services ...string) (*types.Project, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
	o := Options{Files: []string{file}, Name: "p"}
	return o.Load(context.Background(), Details{}, services...)
}

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct{ yaml, warn, fail string }{
		"fine":            {"services:\n  a: {image: a}", "", ""},
		"placement":       {"services:\n  a: {image: a, deploy: {placement: {constraints: [x]}}}", "deploy.placement is for a swarm", ""},
		"update":          {"services:\n  a: {image: a, deploy: {update_config: {parallelism: 1}}}", "deploy.update_config is for a swarm", ""},
		"global":          {"services:\n  a: {image: a, deploy: {mode: global}}", "mode global is for a swarm", ""},
		"provider":        {"services:\n  a: {provider: {type: cloud}}", "", "provider plugins are not supported"},
		"model":           {"services:\n  a: {image: a, models: [m]}\nmodels: {m: {model: x}}", "", "models need a model runner"},
		"external secret": {"services:\n  a: {image: a, secrets: [s]}\nsecrets: {s: {external: true}}", "", ""},
		"config driver":   {"services:\n  a: {image: a, configs: [s]}\nconfigs: {s: {file: ./x, template_driver: golang}}", "", "a swarm's"},
		"overlay":         {"services:\n  a: {image: a, networks: [n]}\nnetworks: {n: {driver: overlay}}", "", "needs a swarm"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := project(t, c.yaml)
			if err != nil {
				t.Fatal(err)
			}
			warn, err := Check(p)
			if (c.fail == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.fail) {
				t.Errorf("got %v, want %q", err, c.fail)
			}
			if got := strings.Join(warn, "\n"); (c.warn == "") != (got == "") || !strings.Contains(got, c.warn) {
				t.Errorf("warned %q, want %q", got, c.warn)
			}
		})
	}
}

func TestHashes(t *testing.T) {
	hash := func(yaml string) string {
		t.Helper()
		p, err := project(t, yaml)
		if err != nil {
			t.Fatal(err)
		}
		h, err := ServiceHash(p.Services["a"])
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	base := hash("services:\n  a: {image: a}\n  b: {image: b}")
	for name, c := range map[string]struct {
		yaml string
		same bool
	}{
		"scale":       {"services:\n  a: {image: a, scale: 3}\n  b: {image: b}", true},
		"profiles":    {"services:\n  a: {image: a, depends_on: [b]}\n  b: {image: b}", true},
		"pull policy": {"services:\n  a: {image: a, pull_policy: always}\n  b: {image: b}", true},
		"image":       {"services:\n  a: {image: c}\n  b: {image: b}", false},
		"environment": {"services:\n  a: {image: a, environment: [A=1]}\n  b: {image: b}", false},
	} {
		if got := hash(c.yaml); (got == base) != c.same {
			t.Errorf("%s: the hash is the same: %t", name, !c.same)
		}
	}
	p, err := project(t, "services:\n  a: {image: a, deploy: {replicas: 2}}")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ServiceHash(p.Services["a"]); err != nil {
		t.Fatal(err)
	}
	if s := p.Services["a"]; s.Deploy.Replicas == nil || *s.Deploy.Replicas != 2 {
		t.Error("hashing changed the service")
	}
}

// TestHashIsDockers has what `docker compose config --hash` of 2.40.3 prints.
func TestHashIsDockers(t *testing.T) {
	p, err := project(t, `services:
  a:
    image: a
    command: [x, y]
    environment: {B: "2"}
    healthcheck: {test: ["CMD", "true"], interval: 5s}
    volumes: ["/srv:/srv:ro", "data:/data"]
    ports: ["8080:80"]
    networks: {default: {aliases: [z]}}
    deploy: {replicas: 2, resources: {limits: {memory: 50M}}}
    develop: {watch: [{path: /srv, action: restart}]}
    stop_grace_period: 3s
    post_start: [{command: ["true"]}]
volumes: {data: {}}
`)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ServiceHash(p.Services["a"])
	if want := "dd95e3c71cb4c46bb33e73771a161e37c1f1476335beb43fd6e0df64c993db9a"; got != want || err != nil {
		t.Errorf("got %s, %v; want %s", got, err, want)
	}
}

func TestSelection(t *testing.T) {
	const yaml = "services:\n  a: {image: a, depends_on: [b]}\n  b: {image: b}\n  c: {image: c}\n  d: {image: d, profiles: [x]}"
	for want, services := range map[string][]string{"a b c": nil, "a b": {"a"}, "d": {"d"}} {
		p, err := project(t, yaml, services...)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(p.ServiceNames(), " "); got != want {
			t.Errorf("%v: got %q, want %q", services, got, want)
		}
	}
	if _, err := project(t, yaml, "nonsense"); err == nil || !strings.Contains(err.Error(), "no such service: nonsense") {
		t.Errorf("got %v", err)
	}
}

func TestScale(t *testing.T) {
	p, err := project(t, "services:\n  a: {image: a}")
	if err != nil {
		t.Fatal(err)
	}
	if err := Scale(p, []string{"a=3"}); err != nil {
		t.Fatal(err)
	}
	if s := p.Services["a"]; s.GetScale() != 3 {
		t.Errorf("got %d", s.GetScale())
	}
	for _, bad := range []string{"a", "a=", "a=-1", "a=x", "b=1"} {
		if Scale(p, []string{bad}) == nil {
			t.Errorf("%q passes", bad)
		}
	}
}

func TestOneNameForSeveral(t *testing.T) {
	p, err := project(t, "services:\n  a: {image: a, container_name: name}")
	if err != nil {
		t.Fatal(err)
	}
	if err := Scale(p, []string{"a=2"}); err != nil {
		t.Fatal(err)
	}
	if _, err := Check(p); err == nil || !strings.Contains(err.Error(), "all would have the name") {
		t.Errorf("got %v", err)
	}
}

func TestNames(t *testing.T) {
	c := &container.Summary{ID: "0123456789abcdef", Names: []string{"/other/link", "/p-web-1"}, Labels: map[string]string{LabelProject: "p", LabelService: "web", LabelNumber: "1"}}
	if Name(c) != "p-web-1" || ShortName(c) != "web-1" {
		t.Errorf("got %q %q", Name(c), ShortName(c))
	}
	c.Names = []string{"/special"}
	if ShortName(c) != "special" {
		t.Errorf("got %q", ShortName(c))
	}
}

func TestFromContainers(t *testing.T) {
	list := []container.Summary{
		{ID: "1", Labels: map[string]string{LabelService: "web", LabelDependsOn: "db:service_healthy:true,gone:service_started:false"}},
		{ID: "2", Labels: map[string]string{LabelService: "db"}},
		{ID: "3", Labels: map[string]string{LabelService: "db"}},
		{ID: "4", Labels: map[string]string{LabelService: "db", LabelOneOff: "True"}},
	}
	p, err := FromContainers("p", list)
	if err != nil {
		t.Fatal(err)
	}
	web, db := p.Services["web"], p.Services["db"]
	if d := web.DependsOn["db"]; len(web.DependsOn) != 1 || d.Condition != types.ServiceConditionHealthy || !d.Restart {
		t.Errorf("got %v", web.DependsOn)
	}
	if db.GetScale() != 2 {
		t.Errorf("got %d", db.GetScale())
	}
	if _, err := FromContainers("p", list, "nonsense"); err == nil {
		t.Error("an unknown service passes")
	}
}

func TestRawEnv(t *testing.T) {
	got := map[string]string{}
	err := rawEnv(strings.NewReader("# c\n\nA=1\n B=\"x $Y\"\nC\nD\nE=a=b\n"), "f", got, func(k string) (string, bool) { return "env", k == "C" })
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"A": "1", "B": `"x $Y"`, "C": "env", "E": "a=b"}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
	}
	if err := rawEnv(strings.NewReader("=x"), "f", got, nil); err == nil {
		t.Error("an empty name passes")
	}
}

func FuzzRawEnv(f *testing.F) {
	f.Add("A=1\nB\n#x\n")
	f.Fuzz(func(t *testing.T, text string) {
		vars := map[string]string{}
		if rawEnv(strings.NewReader(text), "f", vars, func(string) (string, bool) { return "", false }) != nil {
			return
		}
		for k := range vars {
			if k == "" || strings.ContainsAny(k, " \t\n=") {
				t.Errorf("%q gives the name %q", text, k)
			}
		}
	})
}

func FuzzDependencies(f *testing.F) {
	f.Add("a:service_healthy:true,b")
	f.Fuzz(func(t *testing.T, label string) {
		d := dependencies(label)
		again := dependencies(DependsOnLabel(d))
		if len(again) > len(d) {
			t.Errorf("%q grows from %v to %v", label, d, again)
		}
	})
}

func TestRemoteFilesAreRefused(t *testing.T) {
	for _, yaml := range []string{
		"include: ['https://example.com/a.git']\nservices: {}",
		"include: ['oci://example.com/a']\nservices: {}",
		"services: {a: {extends: {file: 'git@example.com:a.git', service: a}}}",
	} {
		if _, err := project(t, yaml); err == nil || !strings.Contains(err.Error(), "from disk only") {
			t.Errorf("%s: got %v", yaml, err)
		}
	}
	for _, path := range []string{"a.yaml", "./https:/a", "/git@x", "github.com.yaml", "c://a"} {
		if (remote{}).Accept(path) {
			t.Errorf("%s was taken for an address", path)
		}
	}
}

func TestConfigsHash(t *testing.T) {
	hash := func(yaml string) string {
		t.Helper()
		p, err := project(t, yaml)
		if err != nil {
			t.Fatal(err)
		}
		h, err := ConfigsHash(p, new(p.Services["a"]))
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	const service = "services:\n  a: {image: a, configs: [c], secrets: [s]}\nsecrets: {s: {environment: PATH}}\n"
	one := hash(service + "configs: {c: {content: one}}")
	if one == "" || one == hash(service+"configs: {c: {content: two}}") || one != hash(service+"configs: {c: {content: one}, other: {content: x}}") {
		t.Error("it does not tell contents apart, or counts others")
	}
	if h := hash(service + "configs: {c: {file: ./f}}"); h != "" {
		t.Errorf("a bound file counts: %s", h)
	}
}
