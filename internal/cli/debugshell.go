package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/cli/command"
)

func (a *App) cmdDebugShell() *command.Command {
	return &command.Command{Name: "debug-shell", Short: "Who may open a shell on a CloudOS machine", Sub: func() []*command.Command {
		return []*command.Command{a.cmdDebugShellStatus(), a.cmdDebugShellEnable(), a.cmdDebugShellDisable()}
	}}
}

func (a *App) cmdDebugShellStatus() *command.Command {
	asJSON := false
	return &command.Command{Name: "status", Short: "Tell whether a shell may be opened, and which are open", Max: 0,
		Flags: func(f *command.FlagSet) { f.Bool(&asJSON, "json", "", "Print JSON") },
		Run: func(ctx context.Context, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.DebugShell(ctx)
			if err != nil {
				return err
			}
			return a.printDebugShell(s, asJSON)
		}}
}

func (a *App) cmdDebugShellEnable() *command.Command {
	in := debugshell.Request{For: "1h"}
	return &command.Command{Name: "enable", Short: "Let shells be opened on the machine for a while", Max: 0,
		Long: `Let shells be opened on the machine for a while (servin debug @host).

It is recorded, as is each shell. Shells that are open when the time is over are
ended.`,
		Example: `servin system debug-shell enable --for 30m --reason "disk fills up, ticket 4711"
servin debug @host`,
		Flags: func(f *command.FlagSet) {
			f.String(&in.For, "for", "", "How long, 24h at most (default 1h)")
			f.String(&in.Reason, "reason", "", "What for, one line")
		},
		Run: func(ctx context.Context, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.DebugShellEnable(ctx, in)
			if err != nil {
				return err
			}
			return a.printDebugShell(s, false)
		}}
}

func (a *App) cmdDebugShellDisable() *command.Command {
	return &command.Command{Name: "disable", Short: "End that, and the shells that are open", Max: 0,
		Run: func(ctx context.Context, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.DebugShellDisable(ctx)
			if err != nil {
				return err
			}
			return a.printDebugShell(s, false)
		}}
}

func (a *App) printDebugShell(s debugshell.Status, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(a.out).Encode(s)
	}
	switch {
	case !s.On:
		fmt.Fprintln(a.out, "off")
	case s.Until.IsZero():
		fmt.Fprintf(a.out, "on until the machine starts again, by %s: %s\n", s.By, s.Reason)
	default:
		fmt.Fprintf(a.out, "on until %s, by %s: %s\n", s.Until.Local().Format(time.DateTime), s.By, s.Reason)
	}
	for _, x := range s.Sessions {
		fmt.Fprintf(a.out, "%.12s opened %s by %s\n", x.ID, x.Since.Local().Format(time.DateTime), x.By)
	}
	return nil
}
