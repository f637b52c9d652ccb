package image

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Registries is how registries are reached.
type Registries struct {
	// Hosts configures registries by name ("docker.io", "reg.example:5000"); "*"
	// stands for those not named.
	Hosts map[string]Registry
	// CertDirs hold a directory for each registry with *.crt (authorities),
	// *.cert and *.key (client certificates), as in /etc/docker/certs.d.
	CertDirs []string
	// Insecure are networks (CIDR) and host names whose registries may speak
	// plain http or show any certificate. Loopback may always speak plain http.
	Insecure  []string
	UserAgent string
}

// Registry is how one registry is reached.
type Registry struct {
	// Mirrors are base URLs, asked in order before the registry itself. They
	// never get its credentials.
	Mirrors    []string
	PlainHTTP  bool
	SkipVerify bool
}

const (
	dockerHub     = "docker.io"
	dockerHubHost = "registry-1.docker.io"
	dockerHubAuth = "https://index.docker.io/v1/"
)

// reach is what is needed to ask registries.
type reach struct {
	registries Registries
	transport  *http.Transport
	hostMu     sync.Mutex
	byHost     map[string]http.RoundTripper
}

func newReach(r Registries) *reach { return &reach{registries: r, transport: newTransport()} }

func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       20 * time.Second,
		TLSHandshakeTimeout:   15 * time.Second,
		ExpectContinueTimeout: 5 * time.Second,
		ResponseHeaderTimeout: 2 * time.Minute,
		ReadBufferSize:        64 << 10,
		// One stream for each blob: HTTP/2 would share one connection's window.
		TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{},
	}
}

// resolver reaches registries with one user's credentials; tracker, if any,
// follows uploads.
func (s *reach) resolver(auth *registry.AuthConfig, tracker docker.StatusTracker) remotes.Resolver {
	h := http.Header{}
	if s.registries.UserAgent != "" {
		h.Set("User-Agent", s.registries.UserAgent)
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: s.hosts(auth), Headers: h, Tracker: tracker})
}

// hosts lists the endpoints of a registry: mirrors, then the registry.
func (s *reach) hosts(auth *registry.AuthConfig) docker.RegistryHosts {
	return func(name string) ([]docker.RegistryHost, error) {
		conf, ok := s.registries.Hosts[name]
		if !ok {
			conf = s.registries.Hosts["*"]
		}
		var out []docker.RegistryHost
		for _, m := range conf.Mirrors {
			u, err := url.Parse(m)
			if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
				return nil, fault.New(fault.Invalid, "cannot use mirror %q of %s: it is no http or https address", m, name)
			}
			h, err := s.host(u.Host, nil, Registry{PlainHTTP: u.Scheme == "http", SkipVerify: s.registries.Hosts[u.Host].SkipVerify})
			if err != nil {
				return nil, err
			}
			h.Path = strings.TrimSuffix(u.Path, "/")
			if !strings.HasSuffix(h.Path, "/v2") {
				h.Path += "/v2"
			}
			h.Capabilities = docker.HostCapabilityPull | docker.HostCapabilityResolve
			out = append(out, h)
		}
		host := name
		if name == dockerHub {
			host = dockerHubHost
		}
		h, err := s.host(host, auth, conf)
		if err != nil {
			return nil, err
		}
		h.Capabilities = docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush | docker.HostCapabilityReferrers
		return append(out, h), nil
	}
}

func (s *reach) host(host string, auth *registry.AuthConfig, conf Registry) (docker.RegistryHost, error) {
	rt, err := s.roundTripper(host, conf)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	scheme := "https"
	if conf.PlainHTTP {
		scheme = "http"
	}
	client := &http.Client{Transport: rt, CheckRedirect: redirect}
	h := docker.RegistryHost{Client: client, Host: host, Scheme: scheme, Path: "/v2"}
	opts := []docker.AuthorizerOpt{docker.WithAuthClient(client)}
	if auth != nil {
		if auth.RegistryToken != "" {
			h.Header = http.Header{"Authorization": {"Bearer " + auth.RegistryToken}}
			return h, nil
		}
		opts = append(opts, docker.WithAuthCreds(func(string) (string, string, error) {
			if auth.IdentityToken != "" {
				return "", auth.IdentityToken, nil
			}
			return auth.Username, auth.Password, nil
		}))
	}
	h.Authorizer = docker.NewDockerAuthorizer(opts...)
	return h, nil
}

// redirect refuses to be led from a secure endpoint to an open one. Headers that
// carry credentials are dropped by net/http when the host changes.
func redirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	if via[0].URL.Scheme == "https" && req.URL.Scheme == "http" && !loopback(req.URL.Hostname()) {
		return fmt.Errorf("refused to go from https to %s", req.URL.Redacted())
	}
	return nil
}

// roundTripper gives the transport for a host with its certificates.
func (s *reach) roundTripper(host string, conf Registry) (http.RoundTripper, error) {
	insecure := conf.SkipVerify || s.insecure(host)
	conf.SkipVerify = insecure
	s.hostMu.Lock()
	defer s.hostMu.Unlock()
	key := fmt.Sprint(host, conf.PlainHTTP, conf.SkipVerify)
	if rt := s.byHost[key]; rt != nil {
		return rt, nil
	}
	tc, found, err := s.certificates(host)
	if err != nil {
		return nil, err
	}
	var rt http.RoundTripper = s.transport
	if found || insecure {
		t := newTransport()
		tc.InsecureSkipVerify = insecure
		t.TLSClientConfig = tc
		rt = t
	}
	// A loopback registry mostly speaks plain http; ask for TLS first all the same.
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	if !conf.PlainHTTP && (insecure || loopback(name)) {
		rt = docker.NewHTTPFallback(rt)
	}
	if s.byHost == nil || len(s.byHost) >= 64 {
		s.byHost = map[string]http.RoundTripper{}
	}
	s.byHost[key] = rt
	return rt, nil
}

func loopback(name string) bool {
	if name == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.IsLoopback()
}

func (s *reach) insecure(host string) bool {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	ip, ipErr := netip.ParseAddr(name)
	for _, in := range s.registries.Insecure {
		if in == host || in == name {
			return true
		}
		if p, err := netip.ParsePrefix(in); err == nil && ipErr == nil && p.Contains(ip) {
			return true
		}
	}
	return false
}

// certificates reads the directory of a host.
func (s *reach) certificates(host string) (*tls.Config, bool, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if strings.ContainsAny(host, "/\x00") || host == "." || host == ".." {
		return nil, false, fault.New(fault.Invalid, "cannot use registry %q: that is no host name", host)
	}
	found := false
	for _, base := range s.registries.CertDirs {
		dir := filepath.Join(base, host)
		ents, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, false, fmt.Errorf("cannot read the certificates of %s: %w", host, err)
		}
		for _, e := range ents {
			p := filepath.Join(dir, e.Name())
			switch filepath.Ext(e.Name()) {
			case ".crt":
				pem, err := os.ReadFile(p)
				if err != nil {
					return nil, false, fmt.Errorf("cannot read an authority of %s: %w", host, err)
				}
				if conf.RootCAs == nil {
					if conf.RootCAs, err = x509.SystemCertPool(); err != nil {
						conf.RootCAs = x509.NewCertPool()
					}
				}
				if !conf.RootCAs.AppendCertsFromPEM(pem) {
					return nil, false, fault.New(fault.Invalid, "cannot use %s: there is no certificate in it", p)
				}
				found = true
			case ".cert":
				pair, err := tls.LoadX509KeyPair(p, strings.TrimSuffix(p, ".cert")+".key")
				if err != nil {
					return nil, false, fault.New(fault.Invalid, "cannot use %s: %w", p, err)
				}
				conf.Certificates = append(conf.Certificates, pair)
				found = true
			}
		}
	}
	return conf, found, nil
}
