package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/config"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

func (a *App) contexts() []*command.Command {
	return []*command.Command{a.cmdContextLs(), a.cmdContextCreate(), a.cmdContextUse(), a.cmdContextRm(), a.cmdContextShow(), a.cmdContextInspect()}
}

// contextRow is a context and whether it is the one in use.
type contextRow struct {
	config.Context
	Current bool
	Error   string `json:",omitempty"`
}

func (a *App) currentContext() (string, error) {
	if a.ctxName != "" {
		return a.ctxName, nil
	}
	if n := a.Getenv("SERVIN_CONTEXT"); n != "" {
		return n, nil
	}
	f, err := a.file()
	if err != nil {
		return "", err
	}
	return pick(f.CurrentContext, config.DefaultContext), nil
}

func defaultContext() *config.Context {
	return &config.Context{Name: config.DefaultContext, Description: "The engine of this host", Host: client.DefaultHost()}
}

func (a *App) findContext(name string) (*config.Context, error) {
	if name == config.DefaultContext {
		return defaultContext(), nil
	}
	return config.LoadContext(a.dir(), name)
}

func (a *App) cmdContextLs() *command.Command {
	var o listFlags
	return &command.Command{Name: "ls", Aliases: []string{"list"}, Short: "List contexts",
		Flags: func(f *command.FlagSet) {
			o.declareFormat(f)
			f.Bool(&o.quiet, "quiet", "q", "Show names only")
		},
		Run: func(ctx context.Context, args []string) error {
			current, err := a.currentContext()
			if err != nil {
				return err
			}
			list, err := config.Contexts(a.dir())
			if err != nil {
				return err
			}
			rows := []contextRow{{Context: *defaultContext(), Current: current == config.DefaultContext}}
			for _, c := range list {
				if c.Name != config.DefaultContext {
					rows = append(rows, contextRow{Context: *c, Current: c.Name == current})
				}
			}
			if o.json {
				return format.JSONLines(a.out, rows)
			}
			if err := contextColumns().Print(a.out, rows, o.options()); err != nil {
				return err
			}
			if h := pick(a.host, a.Getenv("SERVIN_HOST")); h != "" && !o.quiet && o.format == "" {
				fmt.Fprintf(a.Stderr, "servin: commands go to %s now: --host and SERVIN_HOST come before contexts\n", h)
			}
			return nil
		}}
}

func contextColumns() *format.List[contextRow] {
	type R = contextRow
	return &format.List[R]{Quiet: "Name", Table: []string{"marked", "Description", "DockerEndpoint"},
		Columns: []format.Column[R]{
			{Name: "marked", Heading: "NAME", Text: func(r R) string {
				if r.Current {
					return r.Name + " *"
				}
				return r.Name
			}},
			{Name: "Name", Heading: "NAME", Text: func(r R) string { return r.Name }},
			{Name: "Description", Heading: "DESCRIPTION", Text: func(r R) string { return r.Description }},
			{Name: "DockerEndpoint", Heading: "ENGINE", Text: func(r R) string { return r.Host }},
			{Name: "Host", Heading: "ENGINE", Text: func(r R) string { return r.Host }},
			{Name: "Current", Heading: "CURRENT", Text: func(r R) string {
				if r.Current {
					return "true"
				}
				return "false"
			}},
			{Name: "Error", Heading: "ERROR", Text: func(r R) string { return r.Error }},
		}}
}

func (a *App) cmdContextCreate() *command.Command {
	var c config.Context
	from, host := "", ""
	return &command.Command{Name: "create", Args: "CONTEXT", Short: "Name an engine", Min: 1, Max: 1,
		Example: `servin context create build --host ssh://me@build.example.com
servin context create lab --host tcp://10.0.0.5:2376 --ca ca.pem --cert cert.pem --key key.pem`,
		Flags: func(f *command.FlagSet) {
			f.String(&host, "host", "", "Address of the engine: unix:///path, tcp://host:port, ssh://user@host")
			f.String(&c.Description, "description", "", "What the context is for")
			f.String(&c.CA, "ca", "", "Authority that the engine's certificate must come from").Of("file")
			f.String(&c.Cert, "cert", "", "Certificate to show to the engine").Of("file")
			f.String(&c.Key, "key", "", "Key of that certificate").Of("file")
			f.String(&c.ServerName, "server-name", "", "Name that the engine's certificate must have")
			f.Bool(&c.SkipTLSVerify, "skip-tls-verify", "", "Accept any certificate of the engine")
			f.String(&from, "from", "", "Begin with the settings of this context").Of("context")
		},
		Run: func(ctx context.Context, args []string) error {
			name := args[0]
			if !config.ValidName(name) || name == config.DefaultContext {
				return usagef("%q cannot be a context's name: use letters, digits, ., _, + and -, and not %q", name, config.DefaultContext)
			}
			if _, err := config.LoadContext(a.dir(), name); err == nil {
				return fmt.Errorf("a context %s exists already: remove it first with 'servin context rm %s'", name, name)
			} else if !errors.Is(err, config.ErrNoContext) {
				return err
			}
			if from != "" {
				b, err := a.findContext(from)
				if err != nil {
					return err
				}
				c = config.Context{Description: pick(c.Description, b.Description), Host: b.Host, CA: pick(c.CA, b.CA), Cert: pick(c.Cert, b.Cert),
					Key: pick(c.Key, b.Key), ServerName: pick(c.ServerName, b.ServerName), SkipTLSVerify: c.SkipTLSVerify || b.SkipTLSVerify}
			}
			c.Name, c.Host = name, pick(host, pick(c.Host, a.host))
			if c.Host == "" {
				return usagef("a context needs the address of an engine: give --host")
			}
			if _, _, err := client.ParseHost(c.Host); err != nil {
				return exitWith(exitEngine, err)
			}
			for _, p := range []*string{&c.CA, &c.Cert, &c.Key} {
				if *p == "" {
					continue
				}
				abs, err := filepath.Abs(*p)
				if err != nil {
					return err
				}
				if _, err := os.Stat(abs); err != nil {
					return fmt.Errorf("cannot use the TLS file: %w", err)
				}
				*p = abs
			}
			if err := config.SaveContext(a.dir(), &c); err != nil {
				return err
			}
			fmt.Fprintln(a.out, name)
			fmt.Fprintf(a.Stderr, "servin: made; use it with 'servin context use %s'\n", name)
			return nil
		}}
}

func (a *App) cmdContextUse() *command.Command {
	return &command.Command{Name: "use", Args: "CONTEXT", Short: "Send commands to this engine from now on", Min: 1, Max: 1, Complete: []string{"context"},
		Run: func(ctx context.Context, args []string) error {
			if _, err := a.findContext(args[0]); err != nil {
				return err
			}
			f, err := a.file()
			if err != nil {
				return err
			}
			f.CurrentContext = args[0]
			if args[0] == config.DefaultContext {
				f.CurrentContext = ""
			}
			if err := f.Save(); err != nil {
				return err
			}
			fmt.Fprintln(a.out, args[0])
			if h := a.Getenv("SERVIN_HOST"); h != "" {
				fmt.Fprintf(a.Stderr, "servin: SERVIN_HOST is set and comes first: unset it for the context to count\n")
			}
			return nil
		}}
}

func (a *App) cmdContextRm() *command.Command {
	force := false
	return &command.Command{Name: "rm", Aliases: []string{"remove"}, Args: "CONTEXT [CONTEXT...]", Short: "Forget contexts", Min: 1, Max: -1, Complete: []string{"context"},
		Flags: func(f *command.FlagSet) { f.Bool(&force, "force", "f", "Forget the one in use too") },
		Run: func(ctx context.Context, args []string) error {
			f, err := a.file()
			if err != nil {
				return err
			}
			return a.eachName(args, func(n string) error {
				if n == config.DefaultContext {
					return errors.New("the default context cannot be removed")
				}
				if n == f.CurrentContext {
					if !force {
						return fmt.Errorf("context %s is in use: use another first, or say --force", n)
					}
					f.CurrentContext = ""
					if err := f.Save(); err != nil {
						return err
					}
				}
				err := config.RemoveContext(a.dir(), n)
				if force && errors.Is(err, config.ErrNoContext) {
					return nil
				}
				return err
			})
		}}
}

func (a *App) cmdContextShow() *command.Command {
	return &command.Command{Name: "show", Short: "Print the name of the context in use",
		Run: func(ctx context.Context, args []string) error {
			n, err := a.currentContext()
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, n)
			return nil
		}}
}

func (a *App) cmdContextInspect() *command.Command {
	var o inspectFlags
	return &command.Command{Name: "inspect", Args: "[CONTEXT...]", Short: "Show all about contexts", Max: -1, Complete: []string{"context"},
		Flags: o.declare,
		Run: func(ctx context.Context, args []string) error {
			if len(args) == 0 {
				n, err := a.currentContext()
				if err != nil {
					return err
				}
				args = []string{n}
			}
			var list []*config.Context
			for _, n := range args {
				c, err := a.findContext(n)
				if err != nil {
					return err
				}
				list = append(list, c)
			}
			return printObjects(a, list, &o)
		}}
}
