// Package client speaks to a Servin engine: the Docker Engine API and the
// engine's own routes under /servin/. It is what every user interface is built
// on, and others may import it.
//
//	c, err := client.New(client.Config{Host: "unix:///run/servin/servin.sock"})
//	list, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
//
// A Client is safe for concurrent use and holds nothing but a few idle
// connections (see Close). Every method takes a context first: when it ends, the
// exchange is cut and the context's error is returned.
//
// What the engine refuses comes back as an *Error with the HTTP status; what
// could not reach it as a *ConnectError. IsNotFound and its siblings look
// through wrapping.
//
// The package has its own small HTTP/1.1 exchange (http.go) instead of net/http:
// half of the requests here turn into raw streams, and a command line that lives
// for a few milliseconds should not pay for a general HTTP client's start-up.
package client

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/cloudos-io/cloudos/api"
)

// APIVersion is the Docker Engine API version that requests are made with.
const APIVersion = "1.52"

// Config says how to reach an engine.
type Config struct {
	// Host is unix:///path, tcp://host:port, npipe is not supported, or
	// ssh://[user@]host[:port], which runs `servin system dial-stdio` over ssh
	// there. Empty means DefaultHost().
	Host string
	// TLS turns a tcp host into TLS.
	TLS *TLS
	// UserAgent is sent with each request; empty means "servin-client".
	UserAgent string
	// Headers are sent with each request.
	Headers map[string]string
	// APIVersion of the requests, for engines that are older than this package;
	// empty means the package's own.
	APIVersion string
}

// TLS names the material of a TLS connection, as files in PEM format.
type TLS struct {
	CA, Cert, Key string
	// ServerName is what the engine's certificate must be for; empty takes the
	// host's name.
	ServerName string
	// SkipVerify accepts any certificate of the engine.
	SkipVerify bool
}

// Client talks to one engine.
type Client struct {
	host      string
	network   string // "unix", "tcp", "ssh"
	addr      string
	authority string // the Host header
	agent     string
	headers   map[string]string
	version   string
	tls       *TLS

	mu     sync.Mutex
	idle   []*conn
	tlsc   *tls.Config
	closed bool
}

// New returns a client for the engine that the config names. It does not
// connect yet.
func New(cfg Config) (*Client, error) {
	host := cfg.Host
	if host == "" {
		host = DefaultHost()
	}
	network, addr, err := ParseHost(host)
	if err != nil {
		return nil, err
	}
	c := &Client{host: host, network: network, addr: addr, authority: "servin", agent: cfg.UserAgent, headers: cfg.Headers, version: cfg.APIVersion, tls: cfg.TLS}
	if network == "tcp" {
		c.authority = addr
	} else if cfg.TLS != nil {
		return nil, fmt.Errorf("cannot use TLS with %s: only tcp:// hosts have it", host)
	}
	if c.agent == "" {
		c.agent = "servin-client"
	}
	if c.version == "" {
		c.version = APIVersion
	}
	return c, nil
}

// Host is the address that the client was made for.
func (c *Client) Host() string { return c.host }

// Close drops idle connections. Streams that are open stay open.
func (c *Client) Close() error {
	c.mu.Lock()
	idle := c.idle
	c.idle, c.closed = nil, true
	c.mu.Unlock()
	for _, k := range idle {
		k.Close()
	}
	return nil
}

// DefaultHost is where an engine listens when nothing else is said: the host's
// socket for root, the user's own under XDG_RUNTIME_DIR for anybody else when
// there is one.
func DefaultHost() string {
	if runtime.GOOS == "windows" {
		if dir := os.Getenv("LOCALAPPDATA"); dir != "" {
			return "unix://" + filepath.ToSlash(filepath.Join(dir, "servin", "servin.sock"))
		}
		return "tcp://127.0.0.1:2375"
	}
	if os.Geteuid() != 0 {
		p := filepath.Join(api.UserRuntimeDir(), "servin", "servin.sock")
		if _, err := os.Stat(p); err == nil {
			return "unix://" + p
		}
	}
	return "unix://" + api.DefaultSocket
}

// ParseHost splits an engine's address into what to dial: "unix" and a path,
// "tcp" and host:port, or "ssh" and [user@]host[:port].
func ParseHost(host string) (network, addr string, err error) {
	scheme, rest, ok := strings.Cut(host, "://")
	if !ok {
		if strings.HasPrefix(host, "/") {
			return "unix", host, nil
		}
		return "", "", fmt.Errorf("cannot use host %q: write unix:///path, tcp://host:port or ssh://user@host", host)
	}
	switch scheme {
	case "unix":
		if rest == "" {
			rest = api.DefaultSocket
		}
		if strings.HasPrefix(rest, "/") && len(rest) > 2 && rest[2] == ':' { // unix:///C:/…
			rest = rest[1:]
		}
		return "unix", rest, nil
	case "tcp", "http", "https":
		rest = strings.TrimSuffix(rest, "/")
		if strings.ContainsAny(rest, "/?#@") {
			return "", "", fmt.Errorf("cannot use host %q: a tcp host is tcp://host:port", host)
		}
		h, p, err := net.SplitHostPort(rest)
		if err != nil {
			h, p = strings.Trim(rest, "[]"), "2375"
			if scheme == "https" {
				p = "2376"
			}
		}
		if h == "" {
			h = "127.0.0.1"
		}
		if p == "" {
			return "", "", fmt.Errorf("cannot use host %q: the port is missing", host)
		}
		return "tcp", net.JoinHostPort(h, p), nil
	case "ssh":
		u, err := url.Parse(host)
		if err != nil || u.Hostname() == "" || strings.HasPrefix(u.Hostname(), "-") || strings.HasPrefix(u.User.Username(), "-") {
			return "", "", fmt.Errorf("cannot use host %q: an ssh host is ssh://[user@]host[:port]", host)
		}
		if _, has := u.User.Password(); has {
			return "", "", fmt.Errorf("cannot use an ssh host with a password in it: use a key or an agent")
		}
		return "ssh", strings.TrimSuffix(rest, "/"), nil
	}
	return "", "", fmt.Errorf("cannot use host %q: scheme %q is none of unix, tcp, ssh", host, scheme)
}

// dial opens a fresh connection.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	switch c.network {
	case "ssh":
		k, err := dialSSH(ctx, c.addr)
		if err != nil {
			return nil, &ConnectError{Host: c.host, Err: err}
		}
		return k, nil
	case "tcp":
		k, err := d.DialContext(ctx, "tcp", c.addr)
		if err != nil {
			return nil, &ConnectError{Host: c.host, Err: err}
		}
		if c.tls == nil {
			return k, nil
		}
		cfg, err := c.tlsConfig()
		if err != nil {
			k.Close()
			return nil, err
		}
		t := tls.Client(k, cfg)
		if err := t.HandshakeContext(ctx); err != nil {
			k.Close()
			return nil, &ConnectError{Host: c.host, Err: err}
		}
		return t, nil
	}
	k, err := d.DialContext(ctx, "unix", c.addr)
	if err != nil {
		return nil, &ConnectError{Host: c.host, Err: err}
	}
	return k, nil
}
