// Package plugin finds and speaks to plugins of Docker's first kind: processes of
// their own that serve JSON over HTTP, on a unix socket that lies in a known
// directory or at an address that a file there names.
//
// A plugin is *found* by its name: DIR/NAME.sock, DIR/NAME/NAME.sock, NAME.spec
// (an address) or NAME.json (an address with TLS). It is *activated* by asking
// what it implements, such as "VolumeDriver", the first time that somebody needs
// it and again when its socket is another one. Whoever can put files into those
// directories as root is trusted to be a plugin; its answers are not trusted to be
// small, quick or sensible. Package volume imports it.
package plugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

const (
	maxSpec     = 64 << 10 // of a .spec or .json file
	maxPlugins  = 256      // looked at in one directory
	activation  = 10 * time.Second
	negativeFor = 5 * time.Second // how long a failed activation is believed by Names
)

// Its length is bounded where it is used: a counting expression takes a hundred
// kilobytes.
var nameRule = pattern.New(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// Dirs are where Docker's plugins are found.
var Dirs = [...]string{"/run/docker/plugins", "/etc/docker/plugins", "/usr/lib/docker/plugins"}

// Config of a set of plugins.
type Config struct {
	// Dirs are searched in order.
	Dirs []string
	// Patience is how long a plugin that does not accept connections is waited
	// for, 15 s by default.
	Patience time.Duration
	Logger   *slog.Logger
}

// Set is the plugins of a host. Its methods are safe for concurrent use.
type Set struct {
	dirs     []string
	patience time.Duration
	log      *slog.Logger

	mu    sync.Mutex
	known map[string]*Plugin
	bad   map[string]time.Time // names whose activation failed just now
}

// New makes a set; it looks at nothing yet.
func New(c Config) *Set {
	s := &Set{dirs: c.Dirs, patience: c.Patience, log: c.Logger, known: map[string]*Plugin{}, bad: map[string]time.Time{}}
	if s.patience == 0 {
		s.patience = 15 * time.Second
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s
}

// origin tells one plugin's socket or file from a later one of the same name.
type origin struct {
	path     string
	dev, ino uint64
	changed  int64
}

// Plugin is an activated plugin.
type Plugin struct {
	Name   string
	origin origin
	base   string // of its URLs
	http   *http.Client
	kinds  []string
	wait   time.Duration
}

// Find gives the plugin of a name that implements a kind, activated.
func (s *Set) Find(ctx context.Context, kind, name string) (*Plugin, error) {
	none := fault.New(fault.NotFound, "plugin %q not found", name)
	if len(name) > 128 || !nameRule.MatchString(name) {
		return nil, none
	}
	p, err := s.locate(name)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return nil, none
	}
	s.mu.Lock()
	old := s.known[name]
	s.mu.Unlock()
	if old != nil && old.origin == p.origin {
		p = old
	} else {
		if err := p.activate(ctx, s.patience); err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.known[name] = p
		delete(s.bad, name)
		s.mu.Unlock()
	}
	if !slices.Contains(p.kinds, kind) {
		return nil, fault.New(fault.NotFound, "plugin %q found, but it does not implement %s", name, kind)
	}
	return p, nil
}

// Names lists the plugins of a kind. One that does not answer at once is left out.
func (s *Set) Names(ctx context.Context, kind string) []string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var out []string
	for _, name := range s.scan() {
		s.mu.Lock()
		again := time.Since(s.bad[name]) > negativeFor
		s.mu.Unlock()
		if !again {
			continue
		}
		p, err := s.locate(name)
		if err != nil || p == nil {
			continue
		}
		s.mu.Lock()
		old := s.known[name]
		s.mu.Unlock()
		if old != nil && old.origin == p.origin {
			p = old
		} else {
			if err := p.activate(ctx, 0); err != nil {
				s.log.Debug("a plugin does not answer", "plugin", name, "cause", err)
				s.mu.Lock()
				s.bad[name] = time.Now()
				s.mu.Unlock()
				continue
			}
			s.mu.Lock()
			s.known[name] = p
			s.mu.Unlock()
		}
		if slices.Contains(p.kinds, kind) {
			out = append(out, name)
		}
	}
	return out
}

// Any tells whether there may be a plugin at all, at the price of opening the
// directories.
func (s *Set) Any() bool { return len(s.scan()) > 0 }

// scan lists names, each once, in order.
func (s *Set) scan() []string {
	var out []string
	for _, dir := range s.dirs {
		d, err := os.Open(dir)
		if err != nil {
			continue
		}
		entries, _ := d.ReadDir(maxPlugins)
		d.Close()
		for _, e := range entries {
			name := e.Name()
			if !e.IsDir() {
				ext := filepath.Ext(name)
				if ext != ".sock" && ext != ".spec" && ext != ".json" {
					continue
				}
				name = strings.TrimSuffix(name, ext)
			}
			if len(name) <= 128 && nameRule.MatchString(name) && !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return out
}

// locate looks for a plugin's socket or file; nil without an error if there is
// none. Sockets come first, wherever they lie.
func (s *Set) locate(name string) (*Plugin, error) {
	for _, ext := range []string{".sock", ".spec", ".json"} {
		for _, dir := range s.dirs {
			for _, path := range []string{filepath.Join(dir, name+ext), filepath.Join(dir, name, name+ext)} {
				var st unix.Stat_t
				if err := unix.Stat(path, &st); err != nil {
					continue
				}
				if why := distrust(&st, ext); why != "" {
					s.log.Warn("a plugin is ignored", "path", path, "cause", why)
					continue
				}
				p := &Plugin{Name: name, origin: origin{path, st.Dev, st.Ino, st.Mtim.Nano()}, wait: s.patience}
				if err := p.address(path, ext); err != nil {
					return nil, fault.New(fault.Invalid, "cannot use plugin %s: %w", name, err)
				}
				return p, nil
			}
		}
	}
	return nil, nil
}

// distrust says why a file must not name a plugin: mounts are made for whoever
// answers, so it must be root's, or the engine's user's.
func distrust(st *unix.Stat_t, ext string) string {
	kind := st.Mode & unix.S_IFMT
	switch {
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return "it belongs to neither root nor the engine's user"
	case ext == ".sock" && kind != unix.S_IFSOCK:
		return "it is no socket"
	case ext != ".sock" && kind != unix.S_IFREG:
		return "it is no regular file"
	case ext != ".sock" && st.Mode&0o022 != 0:
		return "others may write to it"
	}
	return ""
}

// file is a .json specification.
type file struct {
	Name, Addr string
	TLSConfig  *struct {
		InsecureSkipVerify        bool
		CAFile, CertFile, KeyFile string
	}
}

func (p *Plugin) address(path, ext string) error {
	var f file
	switch ext {
	case ".sock":
		f.Addr = "unix://" + path
	default:
		b, err := readSmall(path)
		if err != nil {
			return err
		}
		if ext == ".spec" {
			f.Addr = strings.TrimSpace(string(b))
		} else if err := json.Unmarshal(b, &f); err != nil {
			return err
		}
	}
	u, err := url.Parse(f.Addr)
	if err != nil || u.Scheme == "" {
		return errors.New("its address must be unix:///path, tcp://host:port or http(s)://host:port")
	}
	t := &http.Transport{MaxIdleConns: 2, IdleConnTimeout: 10 * time.Second, DisableCompression: true}
	switch u.Scheme {
	case "unix":
		sock := u.Path
		if !filepath.IsAbs(sock) {
			return errors.New("the socket's path must be absolute")
		}
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", sock)
		}
		p.base = "http://plugin"
	case "tcp", "http", "https":
		if u.Host == "" || u.Path != "" && u.Path != "/" || u.User != nil {
			return errors.New("its address must be a host and a port alone")
		}
		p.base = "http://" + u.Host
		if f.TLSConfig != nil || u.Scheme == "https" {
			p.base = "https://" + u.Host
		}
	default:
		return errors.New("its address must be unix:///path, tcp://host:port or http(s)://host:port")
	}
	if c := f.TLSConfig; c != nil {
		if t.TLSClientConfig, err = clientTLS(c.CAFile, c.CertFile, c.KeyFile, c.InsecureSkipVerify); err != nil {
			return err
		}
	}
	// What a plugin answers must not lead elsewhere.
	p.http = &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return nil
}

func clientTLS(ca, cert, key string, skip bool) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: skip}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New(ca + " holds no certificate")
		}
	}
	if cert != "" || key != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

func readSmall(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSpec+1))
	if err == nil && len(b) > maxSpec {
		err = fs.ErrInvalid
	}
	return b, err
}

// activate asks what the plugin implements.
func (p *Plugin) activate(ctx context.Context, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, activation+patience)
	defer cancel()
	var out struct{ Implements []string }
	q := *p
	q.wait = patience
	if err := q.Call(ctx, "Plugin.Activate", nil, &out); err != nil {
		return err
	}
	if len(out.Implements) > 64 {
		return fault.New(fault.Unavailable, "cannot activate plugin %s: its answer makes no sense", p.Name)
	}
	p.kinds = out.Implements
	return nil
}
