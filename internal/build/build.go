// Package build runs servin-buildd, the program that builds images: started when
// a request needs it, gone when idle. The builder opens no database of the
// engine; this package serves it the engine's content, layers, leases, images and
// networks over a socket that it inherits, and hands API requests on to it.
package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/build"
	mnetwork "github.com/moby/moby/api/types/network"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/network"
)

// Networks connects build steps.
type Networks interface {
	Attach(ctx context.Context, req network.AttachRequest) (network.Attachment, error)
	Release(ctx context.Context, containerID string) error
	Inspect(ctx context.Context, nameOrID string) (mnetwork.Inspect, error)
}

// Rules decide which images builds may use.
type Rules interface {
	// Active tells whether there is any rule.
	Active() bool
	// AdmitBase asks about an image for who builds. Before a registry was asked the
	// digests are ""; more tells that they must be judged, too.
	AdmitBase(ctx context.Context, who caller.Caller, ref, target, manifest string) (more bool, err error)
}

// Config of a Builder.
type Config struct {
	// Program is the path of servin-buildd; "" looks beside this program and then
	// on the PATH.
	Program  string
	Images   *image.Service
	Networks Networks // nil is none
	Rules    Rules    // nil is none
	Settings contract.Settings
	// Idle is how long a builder without requests stays; 0 is a minute.
	Idle   time.Duration
	Logger *slog.Logger
}

// Builder keeps servin-buildd. It is an http.Handler for the API's requests that
// concern builds.
type Builder struct {
	cfg   Config
	log   *slog.Logger
	proxy *httputil.ReverseProxy

	mu     sync.Mutex
	child  *child
	users  int
	idle   *time.Timer
	closed bool

	callers callers
}

// New makes a Builder; nothing is started yet.
func New(cfg Config) *Builder {
	if cfg.Idle == 0 {
		cfg.Idle = time.Minute
	}
	b := &Builder{cfg: cfg, log: cfg.Logger}
	b.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", "buildd", "buildd"
			// A client that names them in its header Connection would take them away.
			for _, h := range []string{contract.VersionHeader, contract.CallerHeader, contract.ConfinedHeader} {
				if v := r.In.Header.Values(h); len(v) > 0 {
					r.Out.Header[h] = v
				}
			}
			// What the builder does is part of the request's trace.
			otel.GetTextMapPropagator().Inject(r.In.Context(), propagation.HeaderCarrier(r.Out.Header))
		},
		// Each request has a connection of its own: what is hijacked takes it along.
		Transport:     &http.Transport{DialContext: b.dial, DisableKeepAlives: true, DisableCompression: true},
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
		ErrorHandler:  b.failed,
	}
	return b
}

// Installed tells whether there is a builder.
func (b *Builder) Installed() bool {
	_, err := b.program()
	return err == nil
}

func (b *Builder) program() (string, error) {
	if b.cfg.Program != "" {
		return b.cfg.Program, nil
	}
	if exe, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(exe), "servin-buildd")
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	p, err := exec.LookPath("servin-buildd")
	if err != nil {
		return "", fault.New(fault.Unsupported, "cannot build: servin-buildd is neither beside servind nor on its PATH; install it there")
	}
	return p, nil
}

// ServeHTTP hands a request on. The path is without a version; the header
// contract.VersionHeader has that.
func (b *Builder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c, done, err := b.use()
	if err != nil {
		b.failed(w, r, err)
		return
	}
	defer done()
	token, forget := b.callers.add(caller.From(r.Context()))
	defer forget()
	r.Header.Set(contract.CallerHeader, token)
	request, err := wholeRequest(r)
	if request == nil && err == nil {
		b.proxy.ServeHTTP(w, r)
		return
	}
	if err != nil {
		b.failed(w, r, err)
		return
	}
	b.hand(w, r, c.handed, request)
}

func (b *Builder) failed(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		return
	}
	status := http.StatusServiceUnavailable
	if fault.Is(err, fault.Unsupported) {
		status = http.StatusNotImplemented
	}
	b.log.Error("cannot reach the builder", "path", r.URL.Path, "cause", err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": "cannot build: " + err.Error()})
}

// use makes sure of a builder until done is called.
func (b *Builder) use() (_ *child, done func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, nil, fault.New(fault.Unavailable, "the engine is being stopped")
	}
	if c := b.child; c != nil && c.stopping {
		b.mu.Unlock()
		<-c.gone
		b.mu.Lock()
		if b.closed { // meanwhile
			return nil, nil, fault.New(fault.Unavailable, "the engine is being stopped")
		}
	}
	if b.child == nil || isClosed(b.child.gone) {
		if b.child, err = b.start(); err != nil {
			return nil, nil, err
		}
	}
	b.users++
	if b.idle != nil {
		b.idle.Stop()
	}
	return b.child, sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.users--
		if b.users == 0 && !b.closed {
			b.idle = time.AfterFunc(b.cfg.Idle, b.retire)
		}
	}), nil
}

func (b *Builder) retire() {
	b.mu.Lock()
	c := b.child
	if c == nil || b.users > 0 || isClosed(c.gone) {
		b.mu.Unlock()
		return
	}
	c.stopping = true
	b.mu.Unlock()
	c.stop(time.Minute)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (b *Builder) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", b.socket())
}

func (b *Builder) dir() string    { return filepath.Join(b.cfg.Settings.RunRoot, "build") }
func (b *Builder) socket() string { return filepath.Join(b.dir(), "buildd.sock") }

// usageFile is where a builder leaves what its cache takes.
func (b *Builder) usageFile() string { return filepath.Join(b.cfg.Settings.Root, "usage.json") }

// Usage tells what the build cache takes: asked of the builder if it runs, or
// what it said last.
func (b *Builder) Usage(ctx context.Context) (build.DiskUsage, error) {
	var du build.DiskUsage
	b.mu.Lock()
	running := b.child != nil && !b.child.stopping && !isClosed(b.child.gone)
	b.mu.Unlock()
	if running {
		_, done, err := b.use()
		if err != nil {
			return du, err
		}
		defer done()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://buildd/usage", nil)
		if err != nil {
			return du, err
		}
		resp, err := b.proxy.Transport.RoundTrip(req)
		if err != nil {
			return du, fmt.Errorf("cannot ask the builder what its cache takes: %w", err)
		}
		defer resp.Body.Close()
		return du, json.NewDecoder(resp.Body).Decode(&du)
	}
	raw, err := os.ReadFile(b.usageFile())
	if errors.Is(err, fs.ErrNotExist) {
		return du, nil
	}
	if err != nil {
		return du, fmt.Errorf("cannot read what the build cache takes: %w", err)
	}
	if err := json.Unmarshal(raw, &du); err != nil {
		return build.DiskUsage{}, nil // torn: the next builder writes it anew
	}
	return du, nil
}

// HasCache tells whether there is anything to prune.
func (b *Builder) HasCache() bool {
	_, err := os.Stat(filepath.Join(b.cfg.Settings.Root, "metadata_v2.db"))
	return err == nil
}

// Prune asks the builder to drop cache; query is that of POST /build/prune.
func (b *Builder) Prune(ctx context.Context, query string) (build.CachePruneReport, error) {
	var rep build.CachePruneReport
	if !b.HasCache() {
		return rep, nil
	}
	_, done, err := b.use()
	if err != nil {
		return rep, err
	}
	defer done()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://buildd/build/prune?"+query, nil)
	if err != nil {
		return rep, err
	}
	resp, err := b.proxy.Transport.RoundTrip(req)
	if err != nil {
		return rep, fmt.Errorf("cannot ask the builder to prune: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var e struct{ Message string }
		_ = json.NewDecoder(resp.Body).Decode(&e)
		return rep, fault.New(fault.Invalid, "cannot prune the build cache: %s", e.Message)
	}
	return rep, json.NewDecoder(resp.Body).Decode(&rep)
}

// Run removes what the builder of a killed engine left, and ends the builder when
// ctx ends.
func (b *Builder) Run(ctx context.Context) error {
	b.sweep()
	<-ctx.Done()
	b.mu.Lock()
	b.closed = true
	c := b.child
	if b.idle != nil {
		b.idle.Stop()
	}
	b.mu.Unlock()
	if c != nil {
		c.stop(5 * time.Second)
	}
	return nil
}

// sweep removes the cgroups of build steps whose builder is gone: their processes
// went with it.
func (b *Builder) sweep() {
	if p := b.cfg.Settings.CgroupParent; p != "" {
		sweepCgroups(p)
	}
	_ = os.Remove(b.socket())
}

// child is a running servin-buildd.
type child struct {
	cmd      *exec.Cmd
	handed   *net.UnixConn // takes clients' connections
	gone     chan struct{}
	stopping bool // guarded by Builder.mu
}

// stop ends it: kindly first, so that it can write down what its cache takes.
func (c *child) stop(patience time.Duration) {
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.gone:
	case <-time.After(patience):
		_ = c.cmd.Process.Kill()
		<-c.gone
	}
}

// start runs the program. Its mount and process namespaces are its own: whatever
// way it ends, the kernel ends its build steps and takes its mounts away.
func (b *Builder) start() (_ *child, err error) {
	prog, err := b.program()
	if err != nil {
		return nil, err
	}
	var closers []func() error
	defer func() {
		if err != nil {
			for _, f := range closers {
				_ = f()
			}
		}
	}()
	if err := os.MkdirAll(b.dir(), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the builder's directory: %w", err)
	}
	if err := b.prepareRoot(); err != nil {
		return nil, err
	}
	_ = os.Remove(b.socket())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: b.socket(), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cannot listen for the builder: %w", err)
	}
	l.SetUnlinkOnClose(false)
	lf, err := l.File()
	_ = l.Close()
	if err != nil {
		return nil, err
	}
	defer lf.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make a socket for the builder: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "buildd")
	defer theirs.Close()
	ours := os.NewFile(uintptr(fds[0]), "engine")
	conn, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, err
	}
	closers = append(closers, conn.Close)
	handed, theirHanded, err := handPair()
	if err != nil {
		return nil, err
	}
	defer theirHanded.Close()
	closers = append(closers, handed.Close)

	cmd := exec.Command(prog, "serve")
	cmd.Args[0] = "servin-buildd"
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs, lf, theirHanded}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", prog, err)
	}
	c := &child{cmd: cmd, handed: handed, gone: make(chan struct{})}
	srv := &services{cfg: b.cfg, callers: &b.callers, log: b.log, pid: cmd.Process.Pid, nets: map[string]struct{}{}}
	gs := srv.server()
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = gs.Serve(&oneConn{conn: conn, done: make(chan struct{})})
	}()
	go func() {
		defer close(c.gone)
		err := cmd.Wait()
		_ = handed.Close()
		gs.Stop()
		<-served
		srv.release()
		b.sweep()
		b.mu.Lock()
		asked := c.stopping || b.closed
		b.mu.Unlock()
		if err != nil && !asked {
			b.log.Error("the builder ended", "cause", err)
		}
	}()
	return c, nil
}

// dirtyFile holds the boot id of the machine while a builder's cache may not be
// on the disk.
func (b *Builder) dirtyFile() string { return filepath.Join(b.cfg.Settings.Root, "boot") }

// prepareRoot throws the cache away when the machine stopped while a builder ran:
// its layers may be torn, and a cache can be made again.
func (b *Builder) prepareRoot() error {
	root := b.cfg.Settings.Root
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("cannot read the boot id: %w", err)
	}
	old, err := os.ReadFile(b.dirtyFile())
	torn := err == nil && string(old) != string(boot)
	if _, err := os.Stat(filepath.Join(root, "metadata_v2.db")); torn || errors.Is(err, fs.ErrNotExist) {
		if torn {
			b.log.Warn("the machine stopped during a build: the build cache is thrown away")
		}
		if err := os.RemoveAll(root); err != nil {
			return fmt.Errorf("cannot throw the build cache away: %w", err)
		}
		if err := b.cfg.Images.SweepBuilder(context.Background(), image.Namespace); err != nil {
			return fmt.Errorf("cannot throw the build cache away: %w", err)
		}
	}
	// Builders kept their history with the engine once.
	if err := b.cfg.Images.SweepBuilder(context.Background(), contract.HistoryNamespace); err != nil {
		return fmt.Errorf("cannot remove an older builder's records: %w", err)
	}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return fmt.Errorf("cannot make the builder's directory: %w", err)
	}
	return os.WriteFile(b.dirtyFile(), boot, 0o600)
}

// oneConn is a listener that yields one connection and then waits for its end.
type oneConn struct {
	mu   sync.Mutex
	conn net.Conn
	done chan struct{}
	once sync.Once
}

func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	c := l.conn
	l.conn = nil
	l.mu.Unlock()
	if c != nil {
		return c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{Net: "unix"} }

var _ grpc.ServiceRegistrar = (*grpc.Server)(nil)
