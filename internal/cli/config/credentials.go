package config

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/moby/moby/api/types/registry"
)

// DockerHub is the name under which Docker keeps its hub's credentials.
const DockerHub = "https://index.docker.io/v1/"

// ServerName gives the key that credentials for a registry are kept under.
func ServerName(registryHost string) string {
	h := strings.TrimSuffix(registryHost, "/")
	if h == "" || h == "docker.io" || h == "index.docker.io" || h == "registry-1.docker.io" || h == strings.TrimSuffix(DockerHub, "/") {
		return DockerHub
	}
	h = strings.TrimPrefix(strings.TrimPrefix(h, "https://"), "http://")
	h, _, _ = strings.Cut(h, "/")
	return h
}

// RegistryOf gives the registry that an image's name begins with, "docker.io"
// when it begins with none.
func RegistryOf(image string) string {
	first, _, ok := strings.Cut(image, "/")
	if ok && (strings.ContainsAny(first, ".:") || first == "localhost" || strings.ToLower(first) != first) {
		return first
	}
	return "docker.io"
}

// Store looks up and keeps credentials: in our file, then in Docker's.
type Store struct {
	own    *File
	docker *File // nil when there is none
	run    func(ctx context.Context, helper, verb string, stdin []byte) ([]byte, error)
}

// Credentials opens the store. A configuration of Docker's that does not parse
// is passed over.
func Credentials(own *File, getenv func(string) string) *Store {
	s := &Store{own: own, run: runHelper}
	dir := getenv("DOCKER_CONFIG")
	if dir == "" {
		if h := Home(getenv); h != "" {
			dir = filepath.Join(h, ".docker")
		}
	}
	if dir != "" && filepath.Join(dir, "config.json") != own.path {
		if d, err := Load(dir); err == nil {
			s.docker = d
		}
	}
	return s
}

// Get finds the credentials for a registry; none is no error.
func (s *Store) Get(ctx context.Context, registryHost string) (*registry.AuthConfig, error) {
	server := ServerName(registryHost)
	for _, f := range []*File{s.own, s.docker} {
		if f == nil {
			continue
		}
		a, err := s.lookup(ctx, f, server)
		if a != nil || err != nil {
			return a, err
		}
	}
	return nil, nil
}

func helperOf(f *File, server string) string {
	if h := f.CredHelpers[server]; h != "" {
		return h
	}
	if server == DockerHub {
		for _, n := range []string{"docker.io", "index.docker.io"} {
			if h := f.CredHelpers[n]; h != "" {
				return h
			}
		}
	}
	return f.CredsStore
}

func (s *Store) lookup(ctx context.Context, f *File, server string) (*registry.AuthConfig, error) {
	if h := helperOf(f, server); h != "" {
		a, err := s.helperGet(ctx, h, server)
		if a != nil || err != nil {
			return a, err
		}
	}
	for name, e := range f.Auths {
		if name != server && ServerName(name) != server {
			continue
		}
		a, err := e.config(server)
		if a != nil || err != nil {
			return a, err
		}
	}
	return nil, nil
}

func (e Auth) config(server string) (*registry.AuthConfig, error) {
	a := &registry.AuthConfig{ServerAddress: server, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken}
	if e.Auth != "" {
		b, err := base64.StdEncoding.DecodeString(e.Auth)
		if err != nil {
			return nil, fmt.Errorf("cannot read the stored credentials for %s: log in again", server)
		}
		a.Username, a.Password, _ = strings.Cut(strings.TrimRight(string(b), "\x00"), ":")
	}
	if a.Username == "" && a.IdentityToken == "" && a.RegistryToken == "" {
		return nil, nil
	}
	return a, nil
}

// tokenUser is what a helper gives as the user of an identity token.
const tokenUser = "<token>"

func (s *Store) helperGet(ctx context.Context, helper, server string) (*registry.AuthConfig, error) {
	out, err := s.run(ctx, helper, "get", []byte(server))
	if err != nil {
		var none *noCredentials
		if errors.As(err, &none) {
			return nil, nil
		}
		return nil, err
	}
	var c struct{ Username, Secret string }
	if err := json.Unmarshal(out, &c); err != nil {
		return nil, fmt.Errorf("cannot read the answer of credential helper %s: it is not JSON", helper)
	}
	a := &registry.AuthConfig{ServerAddress: server, Username: c.Username, Password: c.Secret}
	if c.Username == tokenUser {
		a.Username, a.Password, a.IdentityToken = "", "", c.Secret
	}
	return a, nil
}

// Put keeps credentials: with the credential helper where one is configured,
// else in our file. It tells where.
func (s *Store) Put(ctx context.Context, a registry.AuthConfig) (where string, err error) {
	server := ServerName(a.ServerAddress)
	h := helperOf(s.own, server)
	if h == "" && s.docker != nil {
		h = helperOf(s.docker, server)
	}
	if h != "" {
		user, secret := a.Username, a.Password
		if a.IdentityToken != "" {
			user, secret = tokenUser, a.IdentityToken
		}
		in, _ := json.Marshal(struct{ ServerURL, Username, Secret string }{server, user, secret})
		if _, err := s.run(ctx, h, "store", in); err != nil {
			return "", err
		}
		return "the credential helper " + h, nil
	}
	e := Auth{IdentityToken: a.IdentityToken}
	if a.IdentityToken == "" {
		e.Auth = base64.StdEncoding.EncodeToString([]byte(a.Username + ":" + a.Password))
	}
	if s.own.Auths == nil {
		s.own.Auths = map[string]Auth{}
	}
	s.own.Auths[server] = e
	return s.own.path, s.own.Save()
}

// Erase forgets a registry's credentials and tells whether there were any of
// ours.
func (s *Store) Erase(ctx context.Context, registryHost string) (bool, error) {
	server := ServerName(registryHost)
	found := false
	for _, f := range []*File{s.own, s.docker} {
		if f == nil {
			continue
		}
		if h := helperOf(f, server); h != "" {
			if a, err := s.helperGet(ctx, h, server); err != nil || a == nil {
				continue
			}
			if _, err := s.run(ctx, h, "erase", []byte(server)); err != nil {
				return found, err
			}
			found = true
		}
	}
	changed := false
	for name := range s.own.Auths {
		if ServerName(name) == server {
			delete(s.own.Auths, name)
			changed = true
		}
	}
	if changed {
		return true, s.own.Save()
	}
	return found, nil
}

// noCredentials is a helper's word for "nothing kept".
type noCredentials struct{}

func (*noCredentials) Error() string { return "no credentials" }

// notFoundText is fixed by the helpers' protocol: it has no code for it.
const notFoundText = "credentials not found in native keychain"

// runHelper runs docker-credential-NAME. What it prints may be secret: only the
// text of its failure reaches an error, and only that of get and list's kind.
func runHelper(ctx context.Context, helper, verb string, stdin []byte) ([]byte, error) {
	if strings.ContainsAny(helper, `/\`) {
		return nil, fmt.Errorf("credential helper %q is not a plain name", helper)
	}
	cmd := exec.CommandContext(ctx, "docker-credential-"+helper, verb)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.Output()
	if err == nil {
		return out, nil
	}
	if strings.TrimSpace(string(out)) == notFoundText {
		return nil, &noCredentials{}
	}
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("cannot find docker-credential-%s on the PATH: the configuration names it as credential helper", helper)
	}
	return nil, fmt.Errorf("credential helper %s failed to %s: %v", helper, verb, err)
}
