package dockerapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/user"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Time limits of connections. Requests themselves have none: a wait or an
// attach may last for days.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	stopGrace         = 5 * time.Second
	dialTimeout       = 2 * time.Second
)

// ListenOptions tell how to open a listener.
type ListenOptions struct {
	// Group owns the unix socket besides root, by name or number; "" is the
	// process's own. The socket's mode is 0660.
	Group string
	// CA, Cert and Key are PEM files for TLS on tcp; clients must show a
	// certificate signed by CA.
	CA, Cert, Key string
	// InsecureTCP allows plain tcp on a loopback address.
	InsecureTCP bool
}

// Listen opens unix:///path or tcp://host:port.
func Listen(address string, o ListenOptions) (net.Listener, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot listen on %q: %w", address, err)
	}
	switch u.Scheme {
	case "unix":
		if u.Host != "" || u.Path == "" {
			return nil, fault.New(fault.Invalid, "cannot listen on %q: write unix:///path", address)
		}
		return listenUnix(u.Path, o.Group)
	case "tcp":
		return listenTCP(u.Host, o)
	}
	return nil, fault.New(fault.Invalid, "cannot listen on %q: only unix:// and tcp:// are known", address)
}

// unixListener removes its socket on Close, if it is still its own.
type unixListener struct {
	*net.UnixListener
	path string
	info fs.FileInfo
	once sync.Once
}

func (l *unixListener) Close() error {
	l.once.Do(func() {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.info) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// listenUnix makes the socket under another name, gives it mode and group and
// renames it: nobody can connect in between. A socket that a dead process left
// is replaced, one that answers is not.
func listenUnix(path, group string) (_ net.Listener, err error) {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	case fi.Mode()&fs.ModeSocket == 0:
		return nil, fault.New(fault.Conflict, "cannot listen on %s: it is there and no socket", path)
	default:
		c, err := net.DialTimeout("unix", path, dialTimeout)
		if err == nil {
			_ = c.Close()
			return nil, fault.New(fault.Conflict, "cannot listen on %s: another process serves it; stop that or choose another --listen", path)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("cannot tell whether %s is in use: %w", path, err)
		}
	}
	gid := -1
	if group != "" {
		if gid, err = groupID(group); err != nil {
			return nil, err
		}
	}
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	defer func() {
		if err != nil {
			_ = l.Close()
			_ = os.Remove(temp)
		}
	}()
	if err := os.Chmod(temp, 0o660); err != nil {
		return nil, fmt.Errorf("cannot set the mode of %s: %w", path, err)
	}
	if gid >= 0 {
		if err := os.Lchown(temp, -1, gid); err != nil {
			return nil, fmt.Errorf("cannot give %s to group %s: %w", path, group, err)
		}
	}
	info, err := os.Lstat(temp)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	return &unixListener{UnixListener: l, path: path, info: info}, nil
}

func groupID(group string) (int, error) {
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fault.New(fault.NotFound, "cannot find the group %q of the socket: %w", group, err)
	}
	n, err := strconv.Atoi(g.Gid)
	return n, err
}

func listenTCP(hostport string, o ListenOptions) (net.Listener, error) {
	withTLS := o.CA != "" || o.Cert != "" || o.Key != ""
	var conf *tls.Config
	if withTLS {
		c, err := tlsConfig(o)
		if err != nil {
			return nil, err
		}
		conf = c
	} else {
		if !o.InsecureTCP {
			return nil, fault.New(fault.Invalid, "cannot listen on tcp://%s without TLS: give --tls-ca, --tls-cert and --tls-key, or --insecure-tcp for a loopback address", hostport)
		}
		if !loopbackHost(hostport) {
			return nil, fault.New(fault.Invalid, "cannot listen on tcp://%s without TLS: --insecure-tcp is for loopback addresses alone; whoever can connect is root here", hostport)
		}
	}
	l, err := net.Listen("tcp", hostport)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on tcp://%s: %w", hostport, err)
	}
	if conf != nil {
		return tls.NewListener(l, conf), nil
	}
	// The name localhost is whatever the resolver says.
	if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		_ = l.Close()
		return nil, fault.New(fault.Invalid, "cannot listen on tcp://%s without TLS: it is no loopback address", hostport)
	}
	return l, nil
}

func tlsConfig(o ListenOptions) (*tls.Config, error) {
	if o.CA == "" || o.Cert == "" || o.Key == "" {
		return nil, fault.New(fault.Invalid, "cannot use TLS: the CA, the certificate and the key must all be given")
	}
	pair, err := tls.LoadX509KeyPair(o.Cert, o.Key)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot load the TLS certificate: %w", err)
	}
	pem, err := os.ReadFile(o.CA)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the TLS CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fault.New(fault.Invalid, "cannot read the TLS CA: %s holds no certificate", o.CA)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		NextProtos:   []string{"http/1.1"}, // streams take connections over
	}, nil
}

// Serve serves the handler on the listeners until ctx is done, then closes them
// and gives requests a few seconds to end. It returns when no handler runs any
// more, streams taken over from HTTP too.
func Serve(ctx context.Context, listeners []net.Listener, h http.Handler) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var handlers sync.WaitGroup
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handlers.Add(1)
			defer handlers.Done()
			h.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: readHeaderTimeout,
		ConnContext:       peer,
		IdleTimeout:       idleTimeout,
		BaseContext:       func(net.Listener) context.Context { return base },
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- srv.Serve(l) }()
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	// Long requests (events, logs -f, wait, attach) end with their context.
	grace, stop := context.WithTimeout(context.Background(), stopGrace)
	defer stop()
	timer := time.AfterFunc(100*time.Millisecond, cancel)
	defer timer.Stop()
	if serr := srv.Shutdown(grace); serr != nil {
		_ = srv.Close()
	}
	cancel()
	done := make(chan struct{})
	go func() { handlers.Wait(); close(done) }()
	select {
	case <-done:
	case <-grace.Done():
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("cannot serve: %w", err)
	}
	return nil
}
