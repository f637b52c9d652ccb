package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

func (a *App) cmdAlerts() *command.Command {
	return &command.Command{Name: "alerts", Short: "Alert rules of the engine",
		Long: `Alert rules of the engine.

Rules are in the file that the engine's configuration names with "alerts:".`,
		Sub: func() []*command.Command { return []*command.Command{a.cmdAlertsLs(), a.cmdAlertsTest()} }}
}

func (a *App) cmdAlertsLs() *command.Command {
	var o listFlags
	return &command.Command{Name: "ls", Aliases: []string{"list"}, Short: "List rules and what they say now",
		Flags: func(f *command.FlagSet) {
			o.declareFormat(f)
			f.Bool(&o.quiet, "quiet", "q", "Show names only")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			l, err := c.Alerts(ctx)
			if err != nil {
				return err
			}
			if l.Error != "" {
				fmt.Fprintf(a.Stderr, "servin: the rules are older than the file: %s\n", l.Error)
			}
			for _, x := range l.Actions {
				if x.Error != "" {
					fmt.Fprintf(a.Stderr, "servin: action %s failed: %s\n", x.Name, x.Error)
				}
			}
			if o.json {
				return format.JSONLines(a.out, l.Rules)
			}
			return alertColumns().Print(a.out, l.Rules, o.options())
		}}
}

func alertColumns() *format.List[api.AlertRule] {
	type R = api.AlertRule
	return &format.List[R]{Quiet: "Name", Table: []string{"Name", "State", "Of", "When", "For", "Actions"},
		Columns: []format.Column[R]{
			{Name: "Name", Heading: "RULE", Text: func(r R) string { return r.Name }},
			{Name: "State", Heading: "STATE", Text: func(r R) string { return r.State }},
			{Name: "Of", Heading: "OF", Text: func(r R) string {
				var l []string
				for _, x := range r.Alarms {
					if x.Container != "" {
						l = append(l, x.Container)
					}
				}
				return strings.Join(l, ",")
			}},
			{Name: "When", Heading: "WHEN", Text: func(r R) string { return r.When }},
			{Name: "For", Heading: "FOR", Text: func(r R) string {
				if r.For == 0 {
					return ""
				}
				return r.For.Round(time.Second).String()
			}},
			{Name: "Actions", Heading: "ACTIONS", Text: func(r R) string { return strings.Join(r.Actions, ",") }},
		}}
}

func (a *App) cmdAlertsTest() *command.Command {
	return &command.Command{Name: "test", Args: "RULE|ACTION", Short: "Carry out the actions of a rule, or an action, as a test", Min: 1, Max: 1,
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			l, err := c.TestAlert(ctx, args[0])
			if err != nil {
				return err
			}
			failed := false
			for _, x := range l {
				if x.Error != "" {
					failed = true
					fmt.Fprintf(a.out, "%s: failed: %s\n", x.Action, x.Error)
				} else {
					fmt.Fprintf(a.out, "%s: done\n", x.Action)
				}
			}
			if failed {
				return errors.New("an action failed")
			}
			return nil
		}}
}
