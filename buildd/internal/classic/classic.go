// Package classic is POST /build of Docker's API: a context comes as a tar or an
// address, options come in the query, and what happens goes out as lines of JSON,
// in words for clients that know no BuildKit (version=1) or as BuildKit's own
// status (version=2).
package classic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"

	"github.com/cloudos-io/cloudos/buildd/internal/upload"
	"github.com/cloudos-io/cloudos/internal/build/contract"
	"go.opentelemetry.io/otel"
)

// Config of a Builder.
type Config struct {
	Control  *control.Controller
	Sessions *session.Manager
	// Dial connects to the control API in this process.
	Dial    func(context.Context, string) (net.Conn, error)
	Images  images.Store
	Content content.InfoProvider
	Callers Callers
	Scratch string // a directory for spooled contexts
	Logger  *slog.Logger
}

// Callers are told whose the sessions are that builds have here.
type Callers interface {
	Set(session, caller string) (forget func())
}

// Builder answers /build.
type Builder struct {
	cfg Config

	mu      sync.Mutex
	running map[string]context.CancelFunc // by build id
	client  *client.Client
}

// New makes a Builder.
func New(cfg Config) *Builder { return &Builder{cfg: cfg, running: map[string]context.CancelFunc{}} }

// control connects to BuildKit, once.
func (b *Builder) control(ctx context.Context) (*client.Client, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.client != nil {
		return b.client, nil
	}
	c, err := client.New(context.WithoutCancel(ctx), "", client.WithContextDialer(b.cfg.Dial), client.WithTracerProvider(otel.GetTracerProvider()))
	if err != nil {
		return nil, fmt.Errorf("cannot reach BuildKit: %w", err)
	}
	b.client = c
	return c, nil
}

// Cancel is POST /build/cancel.
func (b *Builder) Cancel(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	if id == "" {
		fail(w, http.StatusBadRequest, errors.New("build ID not provided"))
		return
	}
	b.mu.Lock()
	cancel := b.running[id]
	b.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	w.WriteHeader(http.StatusOK)
}

func fail(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": err.Error()})
}

// What is read of a context that is no longer wanted.
const (
	drainBytes = 64 << 20
	drainTime  = 3 * time.Second
)

// drain sends the answer, then takes what still comes of the context: a sender
// whose connection ends while it writes may see that instead of the answer.
func drain(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	if c.Flush() != nil || r.Context().Err() != nil || c.SetReadDeadline(time.Now().Add(drainTime)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, r.Body, drainBytes)
}

// noDockerfile is Docker's text, which its clients look for.
const noDockerfile = "Cannot locate specified Dockerfile"

// Build is POST /build.
func (b *Builder) Build(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).EnableFullDuplex()
	defer drain(w, r)
	o, err := parse(r)
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	if why := r.Header.Get(contract.ConfinedHeader); why != "" && len(o.entitlements) > 0 {
		if text, err := url.QueryUnescape(why); err == nil {
			why = text
		}
		fail(w, http.StatusForbidden, fmt.Errorf("cannot build with %v: %s", o.entitlements, why))
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	if o.id != "" {
		b.mu.Lock()
		if b.running[o.id] != nil {
			b.mu.Unlock()
			fail(w, http.StatusConflict, fmt.Errorf("build %s is running", o.id))
			return
		}
		b.running[o.id] = cancel
		b.mu.Unlock()
		defer func() {
			b.mu.Lock()
			delete(b.running, o.id)
			b.mu.Unlock()
		}()
	}
	c, err := b.control(ctx)
	if err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	if o.remote == "upload-request" {
		fail(w, http.StatusNotImplemented, errors.New("cannot take a context in a request of its own: send it with the build"))
		return
	}
	var tree *upload.Tree
	if o.remote == "" {
		if err := os.MkdirAll(b.cfg.Scratch, 0o700); err != nil {
			fail(w, http.StatusInternalServerError, err)
			return
		}
		if tree, err = upload.Read(ctx, r.Body, b.cfg.Scratch); err != nil {
			fail(w, http.StatusBadRequest, err)
			return
		}
		defer tree.Close()
		if name := o.attrs["filename"]; !tree.Has(name) {
			fail(w, http.StatusBadRequest, fmt.Errorf("%s: %s", noDockerfile, name))
			return
		}
	}
	out := newOutput(w)
	var sc *script
	if tree != nil && o.version == 1 {
		var no refused
		switch sc, err = scriptOf(tree, o); {
		case errors.As(err, &no) && no.late:
			out.fail(no, "")
			return
		case err != nil:
			fail(w, http.StatusBadRequest, err)
			return
		}
	}
	if o.version == 2 {
		b.traced(ctx, c, o, tree, out)
		return
	}
	b.inWords(ctx, c, o, tree, sc, out)
}

// inWords builds for clients that show lines.
func (b *Builder) inWords(ctx context.Context, c *client.Client, o *options, tree *upload.Tree, sc *script, out *output) {
	began := time.Now()
	so := client.SolveOpt{
		Ref: identity.NewID(), Frontend: "dockerfile.v0", FrontendAttrs: o.attrs, CacheImports: o.cacheFrom, AllowedEntitlements: o.entitlements,
		Exports: []client.ExportEntry{{Type: "moby", Attrs: map[string]string{"name": o.names()}}},
		Session: []session.Attachable{o.auth()},
		// Who builds so has no way to ask for the history of builds, and it costs as much
		// as the rest of a build from the cache.
		Internal: true,
	}
	if tree != nil {
		so.LocalMounts = map[string]fsutil.FS{"context": tree, "dockerfile": tree}
	}
	own, err := session.NewSession(ctx, o.sharedKey(tree))
	if err != nil {
		out.fail(err, "")
		return
	}
	so.SharedSession = own
	defer b.cfg.Callers.Set(own.ID(), o.caller)()
	ch := make(chan *client.SolveStatus)
	told := make(chan struct{})
	var n voice = &narrator{out: out, quiet: o.quiet}
	if sc != nil {
		n = newTeller(out, o.quiet, sc, tree)
	}
	go func() {
		defer close(told)
		for s := range ch {
			n.tell(s)
		}
	}()
	res, err := c.Solve(ctx, nil, so, ch)
	<-told
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		out.fail(err, n.explain(err))
		return
	}
	id := res.ExporterResponse[exptypes.ExporterImageConfigDigestKey]
	if id == "" {
		id = res.ExporterResponse[exptypes.ExporterImageDigestKey]
	}
	n.end(id, b.older(ctx, id, began))
	if o.quiet {
		out.stream(id + "\n")
		return
	}
	out.aux("", map[string]string{"ID": id})
	out.stream("Successfully built " + short(id) + "\n")
	for _, t := range o.tags {
		out.stream("Successfully tagged " + t.familiar + "\n")
	}
}

// voice tells people of a build.
type voice interface {
	tell(*client.SolveStatus)
	// explain says why the build ended, and tells what led there.
	explain(error) string
	// end tells that an image was made; known, that it had been there before.
	end(id string, known bool)
}

// scriptOf reads the Dockerfile of a context; nil is one that cannot be told of.
func scriptOf(tree *upload.Tree, o *options) (*script, error) {
	f, err := tree.Open(o.attrs["filename"])
	if err != nil {
		return nil, nil // BuildKit says what of it
	}
	defer f.Close()
	dt, err := io.ReadAll(io.LimitReader(f, maxDockerfile+1))
	if err != nil || len(dt) > maxDockerfile {
		return nil, err
	}
	return readScript(o.attrs["filename"], dt, o)
}

// older tells whether the engine had an image before a time.
func (b *Builder) older(ctx context.Context, id string, began time.Time) bool {
	d, err := digest.Parse(id)
	if err != nil {
		return false
	}
	i, err := b.cfg.Content.Info(ctx, d)
	return err == nil && i.CreatedAt.Before(began)
}

// isExit tells whether a step ended the build by its exit code.
func isExit(err error) bool {
	var e *gateway.ExitError
	return errors.As(err, &e)
}

// exitCode is that of the step that ended the build, or 1.
func exitCode(err error) int {
	var e *gateway.ExitError
	if errors.As(err, &e) && e.ExitCode < 256 {
		return int(e.ExitCode)
	}
	return 1
}
