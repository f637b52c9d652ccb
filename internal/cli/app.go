// Package cli is the command line `servin`: a tree of commands over the engine's
// client. It links no part of the engine, so that it starts in a millisecond or
// two and builds wherever Go does. cmd/servin and the reference generator import
// it.
//
// The tree is in root.go; each command is one function that returns its entry:
// flags bound to local variables and a closure that runs. Commands print to the
// App's streams and return errors; exit codes are decided in one place (exit.go).
package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"strings"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/config"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// Config is what the surrounding process gives a command line.
type Config struct {
	Args   []string // with the program's name
	Stdin  *os.File
	Stdout io.Writer
	Stderr io.Writer
	Getenv func(string) string
	// LookupEnv tells unset from empty; Environ lists all.
	LookupEnv func(string) (string, bool)
	Environ   func() []string
	Version   string
	Commit    func() string
}

// App is one run of the command line.
type App struct {
	Config
	out *bufio.Writer // stdout of lists, flushed at the end

	host      string
	ctxName   string
	configDir string
	debug     bool
	version   bool
	tls       client.TLS
	useTLS    bool
	verifyTLS bool

	cfg *config.File
	cl  *client.Client
	// machine is set when the engine to talk to is the one in this user's virtual machine.
	machine bool
}

// Main runs a command line and gives the exit code.
func Main(ctx context.Context, cfg Config) int {
	a := &App{Config: cfg, out: bufio.NewWriterSize(cfg.Stdout, 16<<10)}
	err := a.run(ctx)
	if ferr := a.out.Flush(); err == nil && ferr != nil {
		err = fmt.Errorf("cannot write: %w", ferr)
	}
	if a.cl != nil {
		a.cl.Close()
	}
	return a.exit(err)
}

func (a *App) run(ctx context.Context) error {
	root := a.root()
	args := a.Args[1:]
	inv, err := command.Parse(root, args)
	if err != nil {
		if u, ok := err.(*command.UnknownError); ok && !u.Nested {
			if done, perr := a.runPlugin(ctx, u.Name, u.Rest); done {
				return perr
			}
		}
		return err
	}
	if a.version {
		fmt.Fprintf(a.out, "servin version %s, build %s\n", a.Version, a.Commit())
		return nil
	}
	if inv.Help {
		return a.help(root, inv)
	}
	return inv.Command.Run(ctx, inv.Args)
}

func (a *App) help(root *command.Command, inv *command.Invocation) error {
	if inv.Command != root {
		return command.WriteHelp(a.out, inv.Command, inv.Path, false)
	}
	var extra []command.Section
	if items := a.pluginList(); len(items) > 0 {
		extra = append(extra, command.Section{Title: "Plugins", Items: items})
	}
	return command.WriteHelp(a.out, root, root.Name, true, extra...)
}

// file is the configuration, read once.
func (a *App) file() (*config.File, error) {
	if a.cfg == nil {
		f, err := config.Load(a.dir())
		if err != nil {
			return nil, err
		}
		a.cfg = f
	}
	return a.cfg, nil
}

func (a *App) dir() string {
	if a.configDir == "" {
		a.configDir = config.Dir(a.Getenv)
	}
	return a.configDir
}

// context finds the engine to talk to: --host, --context, SERVIN_HOST,
// SERVIN_CONTEXT, the context in use, the default.
func (a *App) context() (*config.Context, error) {
	if a.host != "" && a.ctxName != "" {
		return nil, usagef("give --host or --context, not both")
	}
	c := &config.Context{Name: config.DefaultContext}
	name := a.ctxName
	switch {
	case a.host != "":
		c.Host = a.host
	case name == "" && a.Getenv("SERVIN_HOST") != "":
		c.Host = a.Getenv("SERVIN_HOST")
	default:
		if name == "" {
			name = a.Getenv("SERVIN_CONTEXT")
		}
		if name == "" {
			f, err := a.file()
			if err != nil {
				return nil, err
			}
			name = f.CurrentContext
		}
		if name != "" && name != config.DefaultContext {
			var err error
			if c, err = config.LoadContext(a.dir(), name); err != nil {
				return nil, err
			}
		}
	}
	if c.Host == "" {
		return c, a.modeHost(c)
	}
	return c, nil
}

// client makes the client at first use.
func (a *App) client() (*client.Client, error) {
	if a.cl != nil {
		return a.cl, nil
	}
	c, err := a.context()
	if err != nil {
		return nil, err
	}
	cfg := client.Config{Host: c.Host, UserAgent: "servin/" + a.Version + " (" + runtime.GOOS + ")"}
	f, err := a.file()
	if err != nil {
		return nil, err
	}
	cfg.Headers = f.Headers
	if t := os.Getenv("TRACEPARENT"); t != "" { // W3C Trace Context of who runs us
		cfg.Headers = maps.Clone(f.Headers)
		if cfg.Headers == nil {
			cfg.Headers = map[string]string{}
		}
		cfg.Headers["Traceparent"] = t
	}
	if strings.HasPrefix(c.Host, "tcp://") || strings.HasPrefix(c.Host, "https://") {
		cfg.TLS = a.material(c)
	}
	if a.machine {
		if err := a.machineUp(); err != nil {
			return nil, err
		}
	}
	a.cl, err = client.New(cfg)
	return a.cl, err
}

// material gathers TLS files from the context, flags and environment.
func (a *App) material(c *config.Context) *client.TLS {
	t := client.TLS{CA: c.CA, Cert: c.Cert, Key: c.Key, ServerName: c.ServerName, SkipVerify: c.SkipTLSVerify}
	on := c.TLS() || strings.HasPrefix(c.Host, "https://")
	if a.useTLS || a.verifyTLS || a.tls.CA != "" || a.tls.Cert != "" || a.tls.Key != "" {
		on = true
		t.SkipVerify = a.useTLS && !a.verifyTLS
	}
	if d := a.Getenv("SERVIN_CERT_PATH"); d != "" {
		on = true
		t.CA, t.Cert, t.Key = pick(t.CA, d+"/ca.pem"), pick(t.Cert, d+"/cert.pem"), pick(t.Key, d+"/key.pem")
	}
	t.CA, t.Cert, t.Key = pick(a.tls.CA, t.CA), pick(a.tls.Cert, t.Cert), pick(a.tls.Key, t.Key)
	if !on {
		return nil
	}
	return &t
}

func pick(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// stdoutFile is standard output if it is a file, else nil.
func (a *App) stdoutFile() *os.File {
	f, _ := a.Stdout.(*os.File)
	return f
}

// outIsTerminal and errIsTerminal tell whether redrawing makes sense.
func (a *App) outIsTerminal() bool { return terminal.Is(a.Stdout) }
func (a *App) errIsTerminal() bool { return terminal.Is(a.Stderr) }

// warn prints warnings of the engine.
func (a *App) warn(ws []string) {
	for _, w := range ws {
		fmt.Fprintln(a.Stderr, "WARNING:", w)
	}
}

// eachName runs fn for each name, prints those that went well, goes on after
// failures and reports them all.
func (a *App) eachName(names []string, fn func(name string) error) error {
	var errs []error
	for _, n := range names {
		if err := fn(n); err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(a.out, n)
	}
	return joined(errs)
}

func (a *App) inIsTerminal() bool { return terminal.Is(a.Stdin) }
