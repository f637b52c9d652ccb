package compose

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

func (a *app) cmdLogs() *command.Command {
	var noColor, noPrefix bool
	o := engine.LogOptions{Tail: "all"}
	index := 0
	return &command.Command{Name: "logs", Args: "[SERVICE...]", Short: "Show what containers wrote", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.Follow, "follow", "f", "Go on with what they write")
			f.Int(&index, "index", "", "Which container of the service")
			f.String(&o.Since, "since", "", "From this time on (2006-01-02T15:04:05Z) or so long ago (42m)")
			f.String(&o.Until, "until", "", "Up to this time or so long ago")
			f.Bool(&noColor, "no-color", "", "No colours")
			f.Bool(&noPrefix, "no-log-prefix", "", "No names before the lines")
			f.Bool(&o.Timestamps, "timestamps", "t", "Show when each line was written")
			f.String(&o.Tail, "tail", "n", "Lines from the end of each container's log")
		},
		Run: func(ctx context.Context, args []string) error {
			if index > 0 && len(args) != 1 {
				return errors.New("--index requires one service to be selected")
			}
			p, err := a.named(ctx, args...)
			if err != nil {
				return err
			}
			services := args
			if len(services) == 0 {
				for _, n := range p.ServiceNames() {
					if s := p.Services[n]; s.Attach == nil || *s.Attach {
						services = append(services, n)
					}
				}
			}
			list, err := a.eng.Containers(ctx, p.Name, true, engine.WithoutOneOff, services...)
			if err != nil {
				return err
			}
			if len(services) == 0 {
				return nil
			}
			if index > 0 {
				list = slices.DeleteFunc(list, func(c container.Summary) bool { return model.Number(&c) != index })
				if len(list) == 0 {
					return fmt.Errorf("service %q is not running container #%d", args[0], index)
				}
			}
			ctx, stop := interruptible(ctx)
			defer stop()
			logs := display.NewLogs(a.Stdout, a.Stderr, display.LogOptions{Color: !noColor && a.colors(a.Stdout), Prefix: !noPrefix})
			err = a.eng.Logs(ctx, p.Name, list, services, logs, o)
			if o.Follow && ctx.Err() != nil {
				return &codeError{code: exitInterrupt}
			}
			return err
		}}
}

func (a *app) cmdEvents() *command.Command {
	jsonOut := false
	var o client.EventsOptions
	return &command.Command{Name: "events", Args: "[SERVICE...]", Short: "Show what happens to containers", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&jsonOut, "json", "", "Print one object a line")
			f.String(&o.Since, "since", "", "From this time on")
			f.String(&o.Until, "until", "", "Up to this time")
		},
		Run: func(ctx context.Context, args []string) error {
			name, err := a.projectName(ctx)
			if err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := interruptible(ctx)
			defer stop()
			o.Filters = client.Filters{"label": {model.LabelProject + "=" + name}, "type": {"container"}}
			err = e.Client.Events(ctx, o, func(m events.Message) error {
				at := m.Actor.Attributes
				service := at[model.LabelService]
				if at[model.LabelOneOff] == "True" || !contains(args, service) {
					return nil
				}
				attrs := map[string]string{}
				for k, v := range at {
					if !strings.HasPrefix(k, "com.docker.compose.") {
						attrs[k] = v
					}
				}
				when := time.Unix(0, m.TimeNano)
				if jsonOut {
					b, err := json.Marshal(map[string]any{"time": when, "type": "container", "service": service, "id": m.Actor.ID, "action": m.Action, "attributes": attrs})
					if err != nil {
						return err
					}
					fmt.Fprintf(a.out, "%s\n", b)
				} else {
					var list []string
					for _, k := range slices.Sorted(maps.Keys(attrs)) {
						list = append(list, k+"="+attrs[k])
					}
					fmt.Fprintf(a.out, "%s container %s %s (%s)\n", when.Format("2006-01-02 15:04:05.000000"), m.Action, m.Actor.ID, strings.Join(list, ", "))
				}
				return a.out.Flush()
			})
			if ctx.Err() != nil {
				return &codeError{code: exitInterrupt}
			}
			return err
		}}
}
