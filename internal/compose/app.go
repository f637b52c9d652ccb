// Package compose is the program servin-compose, which `servin compose` runs:
// Docker Compose's commands over our client. model reads projects, plan decides,
// engine does, display shows; here are the commands and their flags. What acts
// on a single container is servin's own command line, called in process.
package compose

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/sirupsen/logrus"

	"github.com/cloudos-io/cloudos/internal/cli"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// Exit codes.
const (
	exitFailure   = 1
	exitUsage     = 1
	exitInterrupt = 130
)

// codeError ends the program with a code; with a nil err nothing is printed.
type codeError struct {
	code int
	err  error
}

func (e *codeError) Error() string {
	if e.err == nil {
		return "exit code " + strconv.Itoa(e.code)
	}
	return e.err.Error()
}

func (e *codeError) Unwrap() error { return e.err }

func exit(code int) error {
	if code == 0 {
		return nil
	}
	return &codeError{code: code}
}

// app is one run of the program.
type app struct {
	cli.Config
	out *bufio.Writer

	opt      model.Options
	progress string
	ansi     string
	parallel int
	dryRun   bool
	verbose  bool
	version  bool
	// env is the process's environment over the project's .env file.
	env types.Mapping

	conn *cli.Connection
	eng  *engine.Engine
}

// Main runs a command line and gives the exit code.
func Main(ctx context.Context, cfg cli.Config) int {
	a := &app{Config: cfg, out: bufio.NewWriter(cfg.Stdout), ansi: "auto", parallel: -1}
	model.RegisterRawEnv()
	logrus.SetOutput(cfg.Stderr)
	logrus.SetFormatter(warnings{})
	err := a.run(ctx)
	if ferr := a.out.Flush(); err == nil && ferr != nil {
		err = fmt.Errorf("cannot write: %w", ferr)
	}
	if a.conn != nil {
		a.conn.Client.Close()
	}
	return a.exit(err)
}

// warnings is how messages of compose-go look: as ours.
type warnings struct{}

func (warnings) Format(e *logrus.Entry) ([]byte, error) {
	return []byte("servin: " + strings.TrimSpace(e.Message) + "\n"), nil
}

func (a *app) run(ctx context.Context) error {
	root := a.root()
	inv, err := command.Parse(root, a.Args[1:])
	if err != nil {
		return err
	}
	if a.version {
		return a.showVersion("", false)
	}
	if inv.Help {
		return command.WriteHelp(a.out, inv.Command, inv.Path, inv.Command == root)
	}
	if a.env, err = a.opt.Environment(); err != nil && a.env == nil {
		a.env = types.NewMapping(a.Environ())
	}
	return inv.Command.Run(ctx, inv.Args)
}

func (a *app) exit(err error) int {
	if err == nil {
		return 0
	}
	code := exitFailure
	var ce *codeError
	var ue *command.UsageError
	switch {
	case errors.As(err, &ce):
		code = ce.code
		if ce.err == nil {
			return code
		}
	case errors.As(err, &ue) && ue.Flag:
		code = exitUsage
	case errors.Is(err, context.Canceled), errors.Is(err, engine.ErrInterrupted):
		return exitInterrupt
	}
	text := cli.Explain(err)
	if a.progress == string(display.JSON) {
		fmt.Fprintf(a.Stderr, "{\"error\":true,\"message\":%q}\n", text)
		return code
	}
	for _, l := range strings.Split(text, "\n") {
		fmt.Fprintf(a.Stderr, "servin: %s\n", l)
	}
	return code
}

// interruptible gives a context that Ctrl-C or a termination ends.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
}

// getenv reads a variable of the environment or the project's .env file.
func (a *app) getenv(key string) string {
	if v, ok := a.env[key]; ok {
		return v
	}
	return a.Getenv(key)
}

// engine connects.
func (a *app) engine() (*engine.Engine, error) {
	if a.eng != nil {
		return a.eng, nil
	}
	c, err := cli.Connect(a.Config)
	if err != nil {
		return nil, err
	}
	n := a.parallel
	if v := a.getenv("COMPOSE_PARALLEL_LIMIT"); n < 0 && v != "" {
		if n, err = strconv.Atoi(v); err != nil {
			return nil, fmt.Errorf("COMPOSE_PARALLEL_LIMIT is %q, not a number", v)
		}
	}
	a.conn = c
	a.eng = engine.New(engine.Config{Client: c.Client, Auth: c.Auth, Builder: a.builder, Separator: a.opt.Separator(), Parallel: n, DryRun: a.dryRun})
	return a.eng, nil
}

// project loads the project, with warnings shown.
func (a *app) project(ctx context.Context, services ...string) (*types.Project, error) {
	p, err := a.opt.Load(ctx, model.Details{}, services...)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// check refuses and warns before something is made of a project.
func (a *app) check(p *types.Project) error {
	list, err := model.Check(p)
	for _, w := range list {
		a.warn(w)
	}
	return err
}

func (a *app) warn(text string) { fmt.Fprintf(a.Stderr, "servin: warning: %s\n", text) }

// named gives a project for commands that can do without its files: loaded where
// files are found, else made up of what runs under the name.
func (a *app) named(ctx context.Context, services ...string) (*types.Project, error) {
	e, err := a.engine()
	if err != nil {
		return nil, err
	}
	if a.opt.Explicit() || a.opt.Name == "" {
		p, err := a.opt.Load(ctx, model.Details{KeepEnv: true}, services...)
		if err == nil {
			return p, nil
		}
		if name := a.getenv("COMPOSE_PROJECT_NAME"); name == "" || a.opt.Explicit() {
			return nil, err
		}
		return e.Named(ctx, strings.ToLower(a.getenv("COMPOSE_PROJECT_NAME")))
	}
	// Without files a name that no container has may be of one that is gone.
	return e.Named(ctx, strings.ToLower(a.opt.Name))
}

// projectName is all that some commands need.
func (a *app) projectName(ctx context.Context) (string, error) {
	if a.opt.Name != "" {
		return strings.ToLower(a.opt.Name), nil
	}
	if n := a.getenv("COMPOSE_PROJECT_NAME"); n != "" {
		return strings.ToLower(n), nil
	}
	p, err := a.opt.Load(ctx, model.Details{KeepEnv: true})
	if err != nil {
		return "", err
	}
	return p.Name, nil
}

// colors tells whether f should get colours.
func (a *app) colors(f io.Writer) bool {
	switch a.ansiMode() {
	case "never":
		return false
	case "always":
		return true
	}
	return terminal.Is(f) && a.Getenv("NO_COLOR") == ""
}

func (a *app) ansiMode() string {
	if a.ansi == "auto" {
		if v := a.getenv("COMPOSE_ANSI"); v != "" {
			return v
		}
	}
	return a.ansi
}

// show makes the display for what is done, on standard error.
func (a *app) show(title string) (display.Progress, error) {
	v := a.progress
	if v == "" {
		v = a.getenv("COMPOSE_PROGRESS")
	}
	m, err := display.ParseMode(v)
	if err != nil {
		return nil, err
	}
	var w io.Writer = a.Stderr
	if model.Truth(a.getenv("COMPOSE_STATUS_STDOUT")) {
		w = a.Stdout
	}
	o := display.Options{Mode: m, DryRun: a.dryRun, Color: a.colors(w), Title: title}
	if f, ok := w.(*os.File); ok && terminal.Is(f) && a.ansiMode() != "never" {
		o.Size = func() (int, int) { return terminal.Size(f) }
	}
	o.Lines = a.Stdout
	return display.New(w, o), nil
}

// servin runs a command of servin itself, with our streams.
func (a *app) servin(ctx context.Context, args ...string) error {
	if err := a.out.Flush(); err != nil {
		return err
	}
	cfg := a.Config
	cfg.Args = append([]string{"servin"}, args...)
	return exit(cli.Main(ctx, cfg))
}

// builder runs `servin build`.
func (a *app) builder(ctx context.Context, args, env []string, out io.Writer) (int, error) {
	cfg := a.Config
	cfg.Args = append([]string{"servin"}, args...)
	cfg.Stdout, cfg.Stderr = out, out
	cfg.Environ = func() []string { return env }
	return cli.Main(ctx, cfg), nil
}

// confirm asks; without a terminal the answer is no.
func (a *app) confirm(question string) bool {
	if !terminal.Is(a.Stdin) {
		return false
	}
	fmt.Fprintf(a.Stderr, "%s [y/N] ", question)
	line, _ := bufio.NewReader(a.Stdin).ReadString('\n')
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return true
	}
	return false
}

// workingDir shortens a path below the folder we are in.
func shorten(path string) string {
	wd, err := os.Getwd()
	if err != nil {
		return path
	}
	if rel, err := filepath.Rel(wd, path); err == nil && !strings.HasPrefix(rel, "..") {
		return rel
	}
	return path
}

func contains(list []string, s string) bool { return len(list) == 0 || slices.Contains(list, s) }

type shower = display.Progress

// shown does something with the engine while its progress is shown.
func (a *app) shown(ctx context.Context, title string, do func(ctx context.Context, e *engine.Engine, sh shower) error) error {
	e, err := a.engine()
	if err != nil {
		return err
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	pr, err := a.show(title)
	if err != nil {
		return err
	}
	defer pr.Close()
	return do(ctx, e, pr)
}
