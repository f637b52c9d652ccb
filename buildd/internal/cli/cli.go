// Package cli is `servin build`: flags to BuildKit's options, a session with the
// builder behind the engine's API, and progress on the terminal.
package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"

	"github.com/containerd/console"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/progress/progressui"

	engine "github.com/cloudos-io/cloudos/client"
)

// Exit codes.
const (
	exitFailure = 1
	exitUsage   = 125
)

// Main runs the command and returns its exit code.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) int {
	err := run(ctx, args, stdin, stdout, stderr, getenv)
	var u usageError
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &u):
		fmt.Fprintf(stderr, "servin build: %v\nSee 'servin build --help'\n", err)
		return exitUsage
	}
	if ctx.Err() != nil {
		fmt.Fprintln(stderr, "servin build: canceled")
		return 130
	}
	for _, s := range errdefs.Sources(err) {
		_ = s.Print(stderr)
	}
	fmt.Fprintf(stderr, "servin build: %v\n", err)
	var e *gatewaypb.ExitError
	if errors.As(err, &e) && e.ExitCode > 0 && e.ExitCode < 125 {
		return int(e.ExitCode)
	}
	return exitFailure
}

type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) error {
	f, err := parseFlags(args, stdout)
	if err != nil || f.help {
		return err
	}
	p, err := makePlan(ctx, f, stdin, getenv)
	if err != nil {
		return err
	}
	defer p.close()
	d := dialer{getenv}
	ctx = inTrace(ctx, getenv)
	c, err := client.New(ctx, "", client.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return d.upgrade(ctx, "/grpc", nil)
	}), client.WithSessionDialer(func(ctx context.Context, _ string, meta map[string][]string) (net.Conn, error) {
		return d.upgrade(ctx, "/session", meta)
	}))
	if err != nil {
		return fmt.Errorf("cannot reach the builder: %w", err)
	}
	defer c.Close()
	if err := d.check(ctx); err != nil {
		return err
	}
	if f.call != "build" {
		return call(ctx, c, p, f, stdout)
	}
	res, err := solve(ctx, c, p, f, stderr)
	if err != nil {
		return err
	}
	return report(f, res, stdout)
}

// solve builds, and shows progress.
func solve(ctx context.Context, c *client.Client, p *plan, f *flags, stderr io.Writer) (*client.SolveResponse, error) {
	p.opt.Ref = identity.NewID()
	mode := progressui.DisplayMode(f.progress)
	var out io.Writer = stderr
	if file, ok := stderr.(console.File); ok {
		out = file
	}
	display, err := progressui.NewDisplay(out, mode)
	if err != nil {
		return nil, usageError{fmt.Errorf("--progress %q: %w", f.progress, err)}
	}
	ch := make(chan *client.SolveStatus)
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		// Not ended by ctx: what the builder says last is wanted, too.
		_, _ = display.UpdateFrom(context.WithoutCancel(ctx), ch)
	}()
	res, err := c.Solve(ctx, nil, p.opt, ch)
	<-shown
	return res, err
}

// report tells what came of the build.
func report(f *flags, res *client.SolveResponse, stdout io.Writer) error {
	id := res.ExporterResponse[exptypes.ExporterImageConfigDigestKey]
	if id == "" {
		id = res.ExporterResponse[exptypes.ExporterImageDigestKey]
	}
	if f.iidFile != "" {
		if err := os.WriteFile(f.iidFile, []byte(id), 0o644); err != nil {
			return fmt.Errorf("cannot write the image's id: %w", err)
		}
	}
	if f.metadataFile != "" {
		b, err := json.MarshalIndent(decoded(res.ExporterResponse), "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(f.metadataFile, append(b, '\n'), 0o644); err != nil {
			return fmt.Errorf("cannot write the build's answers: %w", err)
		}
	}
	if f.quiet && id != "" {
		fmt.Fprintln(stdout, id)
	}
	return nil
}

// call asks the frontend something instead of building.
func call(ctx context.Context, c *client.Client, p *plan, f *flags, stdout io.Writer) error {
	methods := map[string]string{"check": "frontend.lint", "lint": "frontend.lint", "outline": "frontend.outline", "targets": "frontend.targets"}
	method, ok := methods[f.call]
	if !ok {
		return usageError{fmt.Errorf("--call %q is none of build, check, outline and targets", f.call)}
	}
	p.opt.Exports, p.opt.CacheExports = nil, nil
	p.opt.FrontendAttrs["requestid"] = method
	p.opt.FrontendAttrs["frontend.caps"] = "moby.buildkit.frontend.subrequests"
	attrs, fe := p.opt.FrontendAttrs, p.opt.Frontend
	p.opt.Frontend, p.opt.FrontendAttrs = "", nil
	var text []byte
	status := 0
	_, err := c.Build(ctx, p.opt, "servin", func(ctx context.Context, g gateway.Client) (*gateway.Result, error) {
		res, err := g.Solve(ctx, gateway.SolveRequest{Frontend: fe, FrontendOpt: attrs})
		if err != nil {
			return nil, err
		}
		text = res.Metadata["result.txt"]
		_, _ = fmt.Sscan(string(res.Metadata["result.statuscode"]), &status)
		return gateway.NewResult(), nil
	}, nil)
	if err != nil {
		return err
	}
	fmt.Fprint(stdout, string(text))
	if len(text) == 0 && method == "frontend.lint" {
		fmt.Fprintln(stdout, "Check complete, no warnings found.")
	}
	if status != 0 {
		return exitCode(status)
	}
	return nil
}

// dialer connects to the engine that was chosen.
type dialer struct{ getenv func(string) string }

// dial opens a connection. The command line knows contexts, TLS and SSH; it joins
// us with the engine where that is not a plain socket.
func (d dialer) dial(ctx context.Context) (net.Conn, error) {
	host, self := d.getenv("SERVIN_HOST"), d.getenv("SERVIN_CLI")
	if self == "" || strings.HasPrefix(host, "unix://") && d.getenv("SERVIN_CONTEXT") == "" {
		c, err := engine.New(engine.Config{Host: host})
		if err != nil {
			return nil, err
		}
		return c.Dial(ctx)
	}
	return relay(exec.Command(self, "system", "dial-stdio"))
}

// upgrade asks for a connection to become one of BuildKit's.
func (d dialer) upgrade(ctx context.Context, path string, meta map[string][]string) (net.Conn, error) {
	conn, err := d.dial(ctx)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost"+path, nil)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	for k, v := range meta {
		req.Header[http.CanonicalHeaderKey(k)] = v
	}
	for _, k := range []string{"TRACEPARENT", "TRACESTATE"} {
		if v := d.getenv(k); v != "" {
			req.Header.Set(k, v)
		}
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "h2c")
	if err := req.Write(conn); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot ask the engine for %s: %w", path, err)
	}
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, req)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot ask the engine for %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer conn.Close()
		return nil, refused(resp)
	}
	return &afterHeader{Conn: conn, r: br}, nil
}

func refused(resp *http.Response) error {
	var e struct{ Message string }
	_ = json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&e)
	if e.Message == "" {
		e.Message = resp.Status
	}
	return errors.New(e.Message)
}

// check finds out early, and in words, whether the engine can build.
func (d dialer) check(ctx context.Context) error {
	conn, err := d.upgrade(ctx, "/grpc", nil)
	if err != nil {
		return err
	}
	return conn.Close()
}

// afterHeader reads first what came with the header.
type afterHeader struct {
	net.Conn
	r *bufio.Reader
}

func (c *afterHeader) Read(p []byte) (int, error) { return c.r.Read(p) }
