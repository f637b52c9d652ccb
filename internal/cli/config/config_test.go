package config

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/registry"
)

func env(m map[string]string) func(string) string { return func(k string) string { return m[k] } }

func TestFileKeepsWhatItDoesNotKnow(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "config.json")
	os.WriteFile(p, []byte(`{"currentContext":"a","proxies":{"x":[1]},"auths":{"r":{"auth":"eA=="}}}`), 0o644)
	f, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	f.CurrentContext = ""
	f.DetachKeys = "ctrl-x"
	if err := f.Save(); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(p)
	var got map[string]any
	json.Unmarshal(b, &got)
	if _, ok := got["currentContext"]; ok || got["detachKeys"] != "ctrl-x" || got["proxies"] == nil || got["auths"] == nil {
		t.Errorf("%s", b)
	}
	if st, _ := os.Stat(p); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if l, _ := os.ReadDir(dir); len(l) != 1 {
		t.Errorf("left behind: %v", l)
	}
}

func TestLoad(t *testing.T) {
	if f, err := Load(t.TempDir()); err != nil || f == nil {
		t.Errorf("missing: %v", err)
	}
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "config.json"), []byte("{"), 0o600)
	if _, err := Load(dir); err == nil {
		t.Error("broken: no error")
	}
}

func TestSaveThroughSymlink(t *testing.T) {
	dir, real := t.TempDir(), filepath.Join(t.TempDir(), "real.json")
	os.WriteFile(real, []byte("{}"), 0o600)
	os.Symlink(real, filepath.Join(dir, "config.json"))
	f, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	f.CurrentContext = "x"
	if err := f.Save(); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Lstat(filepath.Join(dir, "config.json")); st.Mode()&os.ModeSymlink == 0 {
		t.Error("the link was replaced")
	}
	if b, _ := os.ReadFile(real); !strings.Contains(string(b), `"x"`) {
		t.Errorf("%s", b)
	}
}

func TestContexts(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"b", "a"} {
		if err := SaveContext(dir, &Context{Name: n, Host: "unix:///" + n}); err != nil {
			t.Fatal(err)
		}
	}
	os.WriteFile(filepath.Join(dir, "contexts", "..evil.json"), []byte("{}"), 0o600)
	l, err := Contexts(dir)
	if err != nil || len(l) != 2 || l[0].Name != "a" || l[1].Host != "unix:///b" {
		t.Errorf("%v %v", l, err)
	}
	if err := RemoveContext(dir, "a"); err != nil {
		t.Error(err)
	}
	if err := RemoveContext(dir, "a"); !errors.Is(err, ErrNoContext) {
		t.Error(err)
	}
	for _, n := range []string{"", "../b", "/etc/x", ".b", "-b", "a b", strings.Repeat("x", 200)} {
		if _, err := LoadContext(dir, n); err == nil || errors.Is(err, ErrNoContext) {
			t.Errorf("%q: %v", n, err)
		}
	}
}

func TestNames(t *testing.T) {
	for in, want := range map[string]string{"alpine": "docker.io", "lib/alpine": "docker.io", "quay.io/a": "quay.io", "localhost/a": "localhost", "h:5000/a/b:c": "h:5000", "Up/x": "Up"} {
		if got := RegistryOf(in); got != want {
			t.Errorf("RegistryOf(%q) = %q", in, got)
		}
	}
	for in, want := range map[string]string{"": DockerHub, "docker.io": DockerHub, "https://index.docker.io/v1/": DockerHub, "https://quay.io/": "quay.io", "h:5000/path": "h:5000"} {
		if got := ServerName(in); got != want {
			t.Errorf("ServerName(%q) = %q", in, got)
		}
	}
}

// fakeHelper keeps one secret.
type fakeHelper struct {
	calls []string
	kept  []byte
}

func (h *fakeHelper) run(_ context.Context, helper, verb string, in []byte) ([]byte, error) {
	h.calls = append(h.calls, helper+" "+verb)
	switch verb {
	case "store":
		h.kept = in
	case "erase":
		h.kept = nil
	case "get":
		if h.kept == nil {
			return nil, &noCredentials{}
		}
		return h.kept, nil
	}
	return nil, nil
}

func store(t *testing.T, own, docker string) (*Store, *fakeHelper) {
	dir, ddir := t.TempDir(), t.TempDir()
	if own != "" {
		os.WriteFile(filepath.Join(dir, "config.json"), []byte(own), 0o600)
	}
	if docker != "" {
		os.WriteFile(filepath.Join(ddir, "config.json"), []byte(docker), 0o600)
	}
	f, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := Credentials(f, env(map[string]string{"DOCKER_CONFIG": ddir}))
	h := &fakeHelper{}
	s.run = h.run
	return s, h
}

func TestCredentialsFromFiles(t *testing.T) {
	const ada = `{"auths":{"https://reg.example/v2/":{"auth":"YWRhOnMzYzpyZXQ="}}}` // ada:s3c:ret
	for name, x := range map[string][2]string{"own": {ada, ""}, "docker's": {"", ada}, "own first": {ada, `{"auths":{"reg.example":{"auth":"eDp5"}}}`}} {
		s, _ := store(t, x[0], x[1])
		a, err := s.Get(context.Background(), "reg.example")
		if err != nil || a == nil || a.Username != "ada" || a.Password != "s3c:ret" {
			t.Errorf("%s: %+v %v", name, a, err)
		}
		if a, err := s.Get(context.Background(), "other.example"); a != nil || err != nil {
			t.Errorf("%s: other: %+v %v", name, a, err)
		}
	}
	s, _ := store(t, `{"auths":{"r":{"auth":"!!"}}}`, "")
	if _, err := s.Get(context.Background(), "r"); err == nil || strings.Contains(err.Error(), "!!") {
		t.Errorf("broken: %v", err)
	}
	s, _ = store(t, "", "{ broken")
	if a, err := s.Get(context.Background(), "r"); a != nil || err != nil {
		t.Errorf("broken file of docker's: %v %v", a, err)
	}
}

func TestCredentialHelpers(t *testing.T) {
	ctx := context.Background()
	s, h := store(t, "", `{"credHelpers":{"reg.example":"one"},"credsStore":"two"}`)
	where, err := s.Put(ctx, registry.AuthConfig{ServerAddress: "reg.example", Username: "u", Password: "p"})
	if err != nil || where != "the credential helper one" || string(h.kept) != `{"ServerURL":"reg.example","Username":"u","Secret":"p"}` {
		t.Errorf("%s %v %s", where, err, h.kept)
	}
	a, err := s.Get(ctx, "reg.example")
	if err != nil || a == nil || a.Username != "u" || a.Password != "p" {
		t.Errorf("%+v %v", a, err)
	}
	if found, err := s.Erase(ctx, "reg.example"); !found || err != nil || h.kept != nil {
		t.Errorf("%v %v", found, err)
	}
	if found, err := s.Erase(ctx, "reg.example"); found || err != nil {
		t.Errorf("%v %v", found, err)
	}
	// An identity token goes under a name that says so.
	s.Put(ctx, registry.AuthConfig{ServerAddress: "docker.io", Username: "u", IdentityToken: "tok"})
	if h.calls[len(h.calls)-1] != "two store" || !strings.Contains(string(h.kept), `token`) || !strings.Contains(string(h.kept), DockerHub) {
		t.Errorf("%v %s", h.calls, h.kept)
	}
	a, err = s.Get(ctx, "docker.io")
	if err != nil || a.IdentityToken != "tok" || a.Username != "" || a.Password != "" {
		t.Errorf("%+v %v", a, err)
	}
}

func TestPutAndEraseInFile(t *testing.T) {
	ctx := context.Background()
	s, _ := store(t, "", "")
	if where, err := s.Put(ctx, registry.AuthConfig{ServerAddress: "r", Username: "u", Password: "p:q"}); err != nil || where != s.own.Path() {
		t.Fatal(where, err)
	}
	if a, _ := s.Get(ctx, "r"); a == nil || a.Password != "p:q" {
		t.Errorf("%+v", a)
	}
	if found, err := s.Erase(ctx, "https://r/"); !found || err != nil {
		t.Error(found, err)
	}
	if a, _ := s.Get(ctx, "r"); a != nil {
		t.Errorf("%+v", a)
	}
}

func TestRunHelper(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	os.WriteFile(filepath.Join(dir, "docker-credential-bad"), []byte("#!/bin/sh\necho secret-in-output; exit 1\n"), 0o755)
	if _, err := runHelper(context.Background(), "bad", "get", nil); err == nil || strings.Contains(err.Error(), "secret-in-output") {
		t.Error(err)
	}
	if _, err := runHelper(context.Background(), "missing", "get", nil); err == nil || !strings.Contains(err.Error(), "docker-credential-missing") {
		t.Error(err)
	}
	if _, err := runHelper(context.Background(), "../x", "get", nil); err == nil {
		t.Error("a path: no error")
	}
}

func TestDir(t *testing.T) {
	for want, m := range map[string]map[string]string{
		"/x":                {"SERVIN_CONFIG": "/x", "HOME": "/h"},
		"/c/servin":         {"XDG_CONFIG_HOME": "/c", "HOME": "/h"},
		"/h/.config/servin": {"HOME": "/h", "XDG_CONFIG_HOME": "relative"},
	} {
		if got := Dir(env(m)); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
