package dockerapi

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"runtime/debug"
	"strings"

	"go.opentelemetry.io/otel/trace"

	"github.com/cloudos-io/cloudos/internal/audit"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Config is what an API handler is made of.
type Config struct {
	Containers Containers
	Images     Images
	Networks   Networks
	Volumes    Volumes
	// VolumeCopies serves backups and the like of volumes.
	VolumeCopies VolumeCopies
	// Checkpoints serves checkpoints of containers.
	Checkpoints Checkpoints
	Secrets     Secrets
	System      System
	// Builds builds images; nil is an engine that cannot.
	Builds Builds
	// Logger gets failed requests; nil is slog.Default().
	Logger *slog.Logger
	// Version of the engine, for the Server header and /servin/health.
	Version string
	// Problems, if not nil, tells /servin/health what runs worse than it should.
	// It must not wait for anything.
	Problems func() []string
	// Alerts watches alert rules; nil if there are none.
	Alerts Alerts
	// OS passes calls about the system itself on, on a CloudOS machine; nil elsewhere.
	OS http.Handler
	// Audit records calls; nil records none.
	Audit *audit.Log
	// Policy shows and tests the policy in force.
	Policy Policy
	// DebugShell decides about shells on the machine; nil is a computer that has none.
	DebugShell DebugShell
	// Tracer makes a span of each request; nil makes none.
	Tracer trace.Tracer
}

type server struct {
	log    *slog.Logger
	routes *router
	banner string
	tracer trace.Tracer
	audit  *audit.Log
}

// New returns the handler of the whole API.
func New(c Config) http.Handler {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return &server{
		log:    c.Logger,
		tracer: c.Tracer,
		audit:  c.Audit,
		routes: newRouter(routes(c)),
		banner: "Servin/" + c.Version + " (" + runtime.GOOS + ")",
	}
}

// request is an http.Request with what the edge found out about it.
type request struct {
	*http.Request
	version version
	name    string // the value of the pattern's variable
	query   url.Values
	log     *slog.Logger
	entry   *audit.Entry // nil if the call is not recorded
}

// streaming gives a context for a connection that is taken over. net/http ends a
// request's when it reads an end of file, but a client that has no more input
// half-closes its end, perhaps along with the request. What is left to end it is
// the server.
func (r *request) streaming() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	srv, ok := r.Context().Value(http.ServerContextKey).(*http.Server)
	if !ok || srv.BaseContext == nil {
		return ctx, cancel
	}
	stop := context.AfterFunc(srv.BaseContext(nil), cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

func (s *server) ServeHTTP(hw http.ResponseWriter, hr *http.Request) {
	h := hw.Header()
	h["Api-Version"] = headerVersion
	h["Docker-Experimental"] = headerTrue // docker checkpoint is offered by it
	h["Ostype"] = headerOS
	h["Server"] = []string{s.banner}

	w := &response{ResponseWriter: hw}
	r := &request{Request: withSubject(hr), version: maxVersion, log: s.log}
	defer s.recovered(w, r)
	if err := s.serve(w, r); err != nil {
		s.fail(w, r, err)
	}
}

// Header values are shared by all responses; nobody may change them in place.
var (
	headerVersion = []string{MaxAPIVersion}
	headerTrue    = []string{"true"}
	headerOS      = []string{runtime.GOOS}
	headerJSON    = []string{"application/json"}
)

func (s *server) serve(w *response, r *request) error {
	if err := guard(r.Request); err != nil {
		return err
	}
	v, path, err := cutVersion(r.URL.Path)
	r.version = v
	if err != nil {
		return err
	}
	if r.Method == http.MethodOptions {
		optionsOK(w)
		return nil
	}
	c, name := s.routes.find(r.Method, path)
	if c == nil {
		return errNoPage
	}
	if v < c.since {
		return fault.New(fault.Invalid, "%s %s requires minimum API version %s", c.method, c.pattern, c.since)
	}
	if err := checkName(name); err != nil {
		return err
	}
	r.name = name
	if r.URL.RawQuery != "" {
		if r.query, err = url.ParseQuery(r.URL.RawQuery); err != nil {
			return fault.New(fault.Invalid, "invalid query: %w", err)
		}
	}
	if s.tracer == nil {
		return s.audited(w, r, c)
	}
	end := s.traced(r, c)
	err = s.audited(w, r, c)
	end(w, err)
	return err
}

// fail turns an error into the response, or ends a response that has begun so
// that the client cannot take it for a complete one.
func (s *server) fail(w *response, r *request, err error) {
	if w.hijacked {
		s.log.Debug("stream ended with an error", "method", r.Method, "path", r.URL.Path, "error", err)
		return
	}
	if r.Context().Err() != nil && (errors.Is(err, context.Canceled) || w.began) {
		s.log.Debug("client went away", "method", r.Method, "path", r.URL.Path)
		panic(http.ErrAbortHandler)
	}
	if w.began {
		s.log.Warn("response cut short", "method", r.Method, "path", r.URL.Path, "error", err)
		panic(http.ErrAbortHandler)
	}
	status := statusOf(err)
	if status >= 500 && status != http.StatusNotImplemented && status != http.StatusServiceUnavailable {
		s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if status == http.StatusNotModified {
		w.WriteHeader(status)
		return
	}
	if r.version < minVersion {
		// Clients of that age expect plain text.
		http.Error(w, err.Error(), status)
		return
	}
	_ = w.json(status, errorBody{Message: printable(err.Error())})
}

// printable replaces control characters: what an image or a request says is
// shown on terminals, which must not take orders from it.
func printable(s string) string {
	control := func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 }
	if !strings.ContainsFunc(s, control) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if control(r) {
			return '\ufffd'
		}
		return r
	}, s)
}

type errorBody struct {
	Message string `json:"message"`
}

func (s *server) recovered(w *response, r *request) {
	p := recover()
	if p == nil {
		return
	}
	if p == http.ErrAbortHandler {
		panic(p)
	}
	s.log.Error("panic in handler", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	if w.hijacked {
		return
	}
	if w.began {
		panic(http.ErrAbortHandler)
	}
	_ = w.json(http.StatusInternalServerError, errorBody{Message: "internal error: the engine's log has the details"})
}

// statusOf is where fault kinds become HTTP statuses.
func statusOf(err error) int {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return http.StatusRequestEntityTooLarge
	}
	return fault.Of(err).Status()
}

// guard keeps web pages out. Over plain TCP a page in a browser of the same
// machine could reach us, directly (it then sends an Origin) or by a name that
// it made resolve to a loopback address (the Host is then foreign). With TLS a
// browser may hold the client certificate, so an Origin must be our own.
func guard(r *http.Request) error {
	origin := r.Header.Get("Origin")
	if isUnix(r) {
		return nil
	}
	if r.TLS != nil {
		if origin == "" {
			return nil
		}
		if u, err := url.Parse(origin); err != nil || u.Scheme != "https" || u.Host != r.Host {
			return fault.New(fault.Forbidden, "requests from web pages of another origin are refused")
		}
		return nil
	}
	if origin != "" {
		return fault.New(fault.Forbidden, "requests with an Origin header are refused on a plain TCP listener")
	}
	// A browser always says a host; buildx, where it asks for BuildKit, says none.
	if r.Host != "" && !loopbackHost(r.Host) {
		return fault.New(fault.Forbidden, "requests for host %q are refused on a plain TCP listener: use 127.0.0.1, [::1] or localhost", r.Host)
	}
	return nil
}

func isUnix(r *http.Request) bool {
	a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return ok && a.Network() == "unix"
}

func loopbackHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
