package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
	"github.com/cloudos-io/cloudos/internal/cli/progress"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

func (a *App) cmdRun() *command.Command {
	var o createFlags
	detach, sigProxy := false, true
	return &command.Command{
		Name: "run", Args: "IMAGE [COMMAND] [ARG...]", Short: "Make a container of an image and start it",
		Long: `Make a container of an image and start it.

The image is pulled when it is missing. Unless --detach is given, the container's
output is shown and its exit code becomes this command's: 125 when the engine
refused, 126 when the command cannot be executed, 127 when it is not found.`,
		Example: `servin run --rm alpine echo hello
servin run -it --rm debian bash
servin run -d --name web -p 8080:80 nginx`,
		Min: 1, Max: -1, Inner: true, Complete: []string{"image"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&detach, "detach", "d", "Leave it in the background and print its id")
			f.Bool(&sigProxy, "sig-proxy", "", "Pass signals on to the container")
			f.String(&o.detachKeys, "detach-keys", "", "Keys that leave the container running (default ctrl-p,ctrl-q)")
			o.declare(f)
		},
		Run: func(ctx context.Context, args []string) error {
			return a.runContainer(ctx, &o, args, detach, sigProxy)
		},
	}
}

func (a *App) runContainer(ctx context.Context, o *createFlags, args []string, detach, sigProxy bool) error {
	s, err := a.build(o, args)
	if err != nil {
		return err
	}
	if err := checkPull(o.pull); err != nil {
		return err
	}
	req := &api.RunRequest{Name: o.name, Platform: o.platform, Config: s.config, HostConfig: s.host, Networking: s.net, Extra: s.extra}
	if err := a.attachments(o, req, detach); err != nil {
		return err
	}
	if o.tty {
		s.host.ConsoleSize = a.consoleSize()
		if err := a.checkTTY(!detach, req.Stdin); err != nil {
			return err
		}
		if req.DetachKeys, err = a.detachKeys(o.detachKeys); err != nil {
			return err
		}
	}
	cid, err := newCIDFile(o.cidfile)
	if err != nil {
		return err
	}
	defer cid.close()
	c, err := a.client()
	if err != nil {
		return engineError(err)
	}
	var id string
	ready := make(chan struct{})
	if !detach && sigProxy && !(o.tty && terminal.Is(a.Stdin)) {
		kill := func(ctx context.Context, sig string) error { return c.ContainerKill(ctx, id, sig) }
		defer a.proxySignals(ctx, ready, kill, func() string { return short(id) })()
	}
	r, err := a.startRun(ctx, c, o, req)
	if err != nil {
		return engineError(err)
	}
	defer r.Close()
	id = r.Started.ID
	close(ready)
	a.warn(r.Started.Warnings)
	if err := cid.write(id); err != nil {
		return exitWith(exitEngine, err)
	}
	if detach {
		fmt.Fprintln(a.out, id)
		return nil
	}
	return a.follow(ctx, c, r, req, o)
}

// attachments decides which streams are wanted.
func (a *App) attachments(o *createFlags, req *api.RunRequest, detach bool) error {
	if detach {
		if len(o.attach) > 0 {
			return usagef("--detach and --attach exclude each other")
		}
		return nil
	}
	for _, s := range o.attach {
		switch strings.ToLower(s) {
		case "stdin":
			req.Stdin = true
		case "stdout":
			req.Stdout = true
		case "stderr":
			req.Stderr = true
		default:
			return usagef("cannot attach to %q: it is none of stdin, stdout, stderr", s)
		}
	}
	if len(o.attach) == 0 {
		req.Stdin, req.Stdout, req.Stderr = o.stdin, true, true
	}
	c := req.Config
	c.AttachStdin, c.AttachStdout, c.AttachStderr = req.Stdin, req.Stdout, req.Stderr
	c.OpenStdin = c.OpenStdin || req.Stdin
	c.StdinOnce = req.Stdin
	return nil
}

// detachKeys takes the flag's, then the configuration's.
func (a *App) detachKeys(keys string) (string, error) {
	if keys == "" {
		f, err := a.file()
		if err != nil {
			return "", err
		}
		if keys = f.DetachKeys; keys == "" {
			return "", nil
		}
	}
	if _, err := notation.DetachKeys(keys); err != nil {
		return "", usagef("cannot use the detach keys: %v", err)
	}
	return keys, nil
}

func checkPull(p string) error {
	switch p {
	case "", "always", "missing", "never":
		return nil
	}
	return usagef("cannot use --pull %s: it is none of always, missing, never", p)
}

// startRun asks for the run; a missing image is pulled and the run asked again.
func (a *App) startRun(ctx context.Context, c *client.Client, o *createFlags, req *api.RunRequest) (*client.RunStream, error) {
	image := req.Config.Image
	if o.pull == "always" {
		if err := a.pullFor(ctx, c, image, o); err != nil {
			return nil, err
		}
	}
	r, err := c.Run(ctx, req)
	if err == nil || !client.IsNotFound(err) || o.pull == "never" {
		return r, err
	}
	if !a.imageMissing(ctx, c, image, o.platform) {
		return r, err // something else is missing
	}
	if o.pull == "" || o.pull == "missing" {
		fmt.Fprintf(a.Stderr, "The image %s is not here yet: pulling it\n", image)
	}
	if err := a.pullFor(ctx, c, image, o); err != nil {
		return nil, err
	}
	return c.Run(ctx, req)
}

func (a *App) imageMissing(ctx context.Context, c *client.Client, image, platform string) bool {
	_, _, err := c.ImageInspect(ctx, image, platform)
	return client.IsNotFound(err)
}

// pullFor pulls with progress on standard error; an interrupt breaks it off.
func (a *App) pullFor(ctx context.Context, c *client.Client, image string, o *createFlags) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	return a.pull(ctx, c, image, client.PullOptions{Platform: o.platform}, o.quiet, a.Stderr)
}

func (a *App) pull(ctx context.Context, c *client.Client, image string, po client.PullOptions, quiet bool, w io.Writer) error {
	var err error
	if po.Auth, err = a.auth(ctx, image); err != nil {
		return err
	}
	if quiet {
		return c.ImagePull(ctx, image, po, nil)
	}
	p := a.progress(w)
	err = c.ImagePull(ctx, image, po, p.Show)
	if ferr := p.Flush(); err == nil {
		err = ferr
	}
	return err
}

// progress shows messages on w.
func (a *App) progress(w io.Writer) *progress.Writer {
	f, ok := w.(*os.File)
	if !ok || !terminal.Is(f) {
		return progress.New(w, nil)
	}
	terminal.EnableVT(f)
	return progress.New(w, func() (int, int) { return terminal.Size(f) })
}

// follow joins the streams until the container ends and gives its exit code.
func (a *App) follow(ctx context.Context, c *client.Client, r *client.RunStream, req *api.RunRequest, o *createFlags) error {
	id := r.Started.ID
	var end *api.RunExited
	ses := &session{app: a, stream: r.Stream, tty: o.tty, stdin: req.Stdin,
		resize: func(ctx context.Context, w, h uint16) error { return c.ContainerResize(ctx, id, w, h) }}
	err := ses.run(ctx, func(stdout, stderr io.Writer) (err error) {
		end, err = r.Copy(stdout, stderr)
		return err
	})
	var we *client.WriteError
	switch {
	case end != nil && end.Detached:
		fmt.Fprintf(a.Stderr, "\nservin: detached; come back with 'servin attach %s'\n", pick(o.name, short(id)))
		return nil
	case end != nil && end.Error != "":
		return exitWith(pickCode(end.ExitCode), errors.New(end.Error))
	case end != nil:
		return exitWithCode(end.ExitCode)
	case errors.As(err, &we):
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && !errors.Is(err, client.ErrConnectionLost):
		return engineError(err)
	}
	return a.lost(ctx, c, id)
}

// lost waits for an engine that went away while the container went on, and for
// the container's end.
func (a *App) lost(ctx context.Context, c *client.Client, id string) error {
	deadline := time.Now().Add(30 * time.Second)
	told := false
	for {
		info, _, err := c.ContainerInspect(ctx, id, false)
		var ce *client.ConnectError
		switch {
		case err == nil && info.State != nil && info.State.Running:
			w, err := c.ContainerWait(ctx, id, container.WaitConditionNotRunning)
			if err == nil {
				return exitWithCode(int(w.StatusCode))
			}
		case err == nil && info.State != nil:
			return exitWithCode(info.State.ExitCode)
		case client.IsNotFound(err):
			return exitWith(exitEngine, errors.New("the engine went away while the container ran, and the container is gone: its exit code is not known"))
		case errors.As(err, &ce) || errors.Is(err, client.ErrConnectionLost):
			if !told {
				told = true
				fmt.Fprintln(a.Stderr, "servin: the engine went away; waiting for it, the container goes on")
			}
		case err != nil:
			return engineError(err)
		}
		if time.Now().After(deadline) {
			return exitWith(exitEngine, fmt.Errorf("the engine has not come back; the container %s may still run", short(id)))
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func pickCode(code int) int {
	if code == 0 {
		return exitEngine
	}
	return code
}

// exitWithCode is a container's own exit code.
func exitWithCode(code int) error {
	if code == 0 {
		return nil
	}
	return exitWith(code, nil)
}

// engineError gives a refusal the code that the engine named, or 125.
func engineError(err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	var e *client.Error
	if errors.As(err, &e) && e.ExitCode != 0 {
		return exitWith(e.ExitCode, err)
	}
	return exitWith(exitEngine, err)
}

// short is an id as people read it.
func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// cidFile is the file of --cidfile: made before, removed if it stays empty.
type cidFile struct {
	f       *os.File
	written bool
}

func newCIDFile(path string) (*cidFile, error) {
	if path == "" {
		return &cidFile{}, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		return nil, usagef("the id file %s exists already: remove it, or another container may be lost from sight", path)
	}
	if err != nil {
		return nil, exitWith(exitEngine, fmt.Errorf("cannot make the id file: %w", err))
	}
	return &cidFile{f: f}, nil
}

func (c *cidFile) write(id string) error {
	if c.f == nil {
		return nil
	}
	if _, err := c.f.WriteString(id); err != nil {
		return fmt.Errorf("cannot write the id file: %w", err)
	}
	c.written = true
	return nil
}

func (c *cidFile) close() {
	if c.f == nil {
		return
	}
	c.f.Close()
	if !c.written {
		os.Remove(c.f.Name())
	}
}
