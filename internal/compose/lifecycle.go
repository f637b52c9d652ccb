package compose

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
)

// execute carries a plan out and shows it.
func (a *app) execute(ctx context.Context, title string, p *types.Project, pl *plan.Plan, ob plan.Observed, o engine.Options) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	pr, err := a.show(title)
	if err != nil {
		return err
	}
	defer pr.Close()
	o.Warn = a.warn
	return a.eng.Execute(ctx, p, pl, ob, pr, o)
}

// there lists what a project has of containers.
func (a *app) there(ctx context.Context, p *types.Project, one engine.OneOff) (ob plan.Observed, err error) {
	ob.Containers, err = a.eng.Containers(ctx, p.Name, true, one)
	return ob, err
}

func (a *app) cmdCreate() *command.Command {
	var m making
	return &command.Command{Name: "create", Args: "[SERVICE...]", Short: "Create the services' containers without starting them", Max: -1, Complete: []string{"service"},
		Flags: m.declare,
		Run: func(ctx context.Context, args []string) error {
			if err := m.validate(a); err != nil {
				return err
			}
			p, err := a.project(ctx, args...)
			if err != nil {
				return err
			}
			if err := m.apply(p); err != nil {
				return err
			}
			if err := a.check(p); err != nil {
				return err
			}
			o := m.plan(a, args)
			o.NoStart = true
			return a.upDetached(ctx, p, &m, o, engine.Options{}, 0)
		}}
}

func (a *app) cmdScale() *command.Command {
	noDeps := false
	return &command.Command{Name: "scale", Args: "SERVICE=NUMBER...", Short: "Run another number of containers of services", Min: 1, Max: -1,
		Flags: func(f *command.FlagSet) { f.Bool(&noDeps, "no-deps", "", "Leave out what the services depend on") },
		Run: func(ctx context.Context, args []string) error {
			var names []string
			for _, s := range args {
				n, _, ok := strings.Cut(s, "=")
				if !ok {
					return fmt.Errorf("cannot scale %q: write SERVICE=NUMBER", s)
				}
				names = append(names, n)
			}
			p, err := a.project(ctx, names...)
			if err != nil {
				return err
			}
			if noDeps {
				if p, err = p.WithSelectedServices(names, types.IgnoreDependencies); err != nil {
					return err
				}
			}
			m := making{scale: args}
			if err := m.apply(p); err != nil {
				return err
			}
			if err := a.check(p); err != nil {
				return err
			}
			return a.upDetached(ctx, p, &m, m.plan(a, names), engine.Options{}, 0)
		}}
}

func (a *app) cmdDown() *command.Command {
	var volumes, orphans bool
	var timeout *int
	rmi := ""
	return &command.Command{Name: "down", Args: "[SERVICE...]", Short: "Stop and remove containers and networks", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&orphans, "remove-orphans", "", "Remove containers of services that the file does not have")
			f.OptInt(&timeout, "timeout", "t", "Seconds to wait before containers are killed")
			f.Bool(&volumes, "volumes", "v", "Remove the volumes of the file and anonymous ones, with their data")
			f.Bool(&volumes, "volume", "", "").Hide()
			f.String(&rmi, "rmi", "", "Remove images: all, or local ones, which have no name of their own")
		},
		Run: func(ctx context.Context, args []string) error {
			if rmi != "" && rmi != "all" && rmi != "local" {
				return fmt.Errorf("invalid value for --rmi: %q", rmi)
			}
			orphans = orphans || model.Truth(a.getenv("COMPOSE_REMOVE_ORPHANS"))
			p, err := a.named(ctx, args...)
			if err != nil {
				return err
			}
			if len(args) > 0 && a.opt.Name == "" {
				if err := plan.CheckServices(p, args); err != nil {
					return err
				}
			}
			return a.down(ctx, p, args, timeout, volumes, orphans, rmi)
		}}
}

func (a *app) down(ctx context.Context, p *types.Project, services []string, timeout *int, volumes, orphans bool, rmi string) error {
	e, err := a.engine()
	if err != nil {
		return err
	}
	ob, err := e.Observe(ctx, p)
	if err != nil {
		return err
	}
	o := plan.DownOptions{Services: services, Volumes: volumes, RemoveOrphans: orphans}
	for key, n := range p.Networks {
		if found, ok := ob.Networks[key]; ok && !bool(n.External) && (found.Labels[model.LabelProject] == p.Name) {
			o.NetworksFound = append(o.NetworksFound, key)
		}
	}
	for key, v := range p.Volumes {
		if _, ok := ob.Volumes[key]; ok && !bool(v.External) {
			o.VolumesFound = append(o.VolumesFound, key)
		}
	}
	slices.Sort(o.NetworksFound)
	slices.Sort(o.VolumesFound)
	if rmi != "" {
		if o.Images, err = e.ImagesToRemove(ctx, p, rmi, orphans); err != nil {
			return err
		}
	}
	pl, err := plan.Down(p, ob, o)
	if err != nil {
		return err
	}
	if !pl.Changes() {
		a.warn(fmt.Sprintf("No resource found to remove for project %q.", p.Name))
		return nil
	}
	return a.execute(ctx, "Running", p, pl, ob, engine.Options{Timeout: timeout, RemoveVolumes: volumes})
}

func (a *app) cmdStart() *command.Command {
	var wait bool
	var limit int
	return &command.Command{Name: "start", Args: "[SERVICE...]", Short: "Start containers that exist", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&wait, "wait", "", "Wait until the services run and are healthy")
			f.Int(&limit, "wait-timeout", "", "Seconds to wait at most")
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.named(ctx, args...)
			if err != nil {
				return err
			}
			ob, err := a.there(ctx, p, engine.WithoutOneOff)
			if err != nil {
				return err
			}
			for _, n := range p.ServiceNames() {
				s := p.Services[n]
				if s.GetScale() > 0 && !slices.ContainsFunc(ob.Containers, func(c container.Summary) bool { return model.Service(&c) == n }) && contains(args, n) {
					return fmt.Errorf("service %q has no container to start", n)
				}
			}
			pl, err := plan.Up(p, ob, plan.UpOptions{Separator: a.opt.Separator(), NoCreate: true, Wait: wait})
			if err != nil {
				return err
			}
			if limit > 0 {
				c, cancel := context.WithTimeout(ctx, time.Duration(limit)*time.Second)
				defer cancel()
				ctx = c
			}
			err = a.execute(ctx, "Running", p, pl, ob, engine.Options{})
			if errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("application not healthy after %ds", limit)
			}
			return err
		}}
}

func (a *app) cmdStop() *command.Command {
	var timeout *int
	return &command.Command{Name: "stop", Args: "[SERVICE...]", Short: "Stop containers and keep them", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.OptInt(&timeout, "timeout", "t", "Seconds to wait before containers are killed")
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.named(ctx, args...)
			if err != nil {
				return err
			}
			return a.stop(ctx, p, args, timeout)
		}}
}

func (a *app) stop(ctx context.Context, p *types.Project, services []string, timeout *int) error {
	ob, err := a.there(ctx, p, engine.WithoutOneOff)
	if err != nil {
		return err
	}
	pl, err := plan.Stops(p, ob, services)
	if err != nil {
		return err
	}
	return a.execute(ctx, "Stopping", p, pl, ob, engine.Options{Timeout: timeout})
}

func (a *app) cmdRestart() *command.Command {
	var timeout *int
	noDeps := false
	return &command.Command{Name: "restart", Args: "[SERVICE...]", Short: "Restart containers", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.OptInt(&timeout, "timeout", "t", "Seconds to wait before containers are killed")
			f.Bool(&noDeps, "no-deps", "", "Leave out those that depend on the services")
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.named(ctx)
			if err != nil {
				return err
			}
			if err := plan.CheckServices(p, args); err != nil {
				return err
			}
			ob, err := a.there(ctx, p, engine.WithoutOneOff)
			if err != nil {
				return err
			}
			pl, err := plan.Restarts(p, ob, plan.RestartOptions{Services: args, NoDeps: noDeps})
			if err != nil {
				return err
			}
			return a.execute(ctx, "Restarting", p, pl, ob, engine.Options{Timeout: timeout})
		}}
}

// each does the same to the containers of services that pass.
func (a *app) each(ctx context.Context, kind plan.Kind, title string, services []string, o engine.Options, one engine.OneOff, pass func(*container.Summary) bool) (n int, err error) {
	p, err := a.named(ctx, services...)
	if err != nil {
		return 0, err
	}
	ob, err := a.there(ctx, p, one)
	if err != nil {
		return 0, err
	}
	pl := plan.Each(kind, ob.Containers, func(c *container.Summary) bool {
		_, known := p.Services[model.Service(c)]
		return pass(c) && contains(services, model.Service(c)) && (known || o.Signal == "" || len(services) > 0)
	})
	if len(pl.Steps) == 0 {
		return 0, nil
	}
	return len(pl.Steps), a.execute(ctx, title, p, pl, ob, o)
}

func (a *app) cmdKill() *command.Command {
	orphans, signal := false, "SIGKILL"
	return &command.Command{Name: "kill", Args: "[SERVICE...]", Short: "Send a signal to containers", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&orphans, "remove-orphans", "", "Include containers of services that the file does not have")
			f.String(&signal, "signal", "s", "Signal to send")
		},
		Run: func(ctx context.Context, args []string) error {
			n, err := a.each(ctx, plan.Kill, "Killing", args, engine.Options{Signal: signal}, engine.WithOneOff, func(c *container.Summary) bool {
				return c.State == container.StateRunning || c.State == container.StatePaused
			})
			if err == nil && n == 0 {
				fmt.Fprintln(a.Stderr, "no container to kill")
			}
			return err
		}}
}

func (a *app) cmdPause() *command.Command {
	return &command.Command{Name: "pause", Args: "[SERVICE...]", Short: "Freeze containers", Max: -1, Complete: []string{"service"},
		Run: func(ctx context.Context, args []string) error {
			_, err := a.each(ctx, plan.Pause, "Pausing", args, engine.Options{}, engine.WithoutOneOff, func(c *container.Summary) bool {
				return c.State == container.StateRunning || c.State == container.StatePaused
			})
			return err
		}}
}

func (a *app) cmdUnpause() *command.Command {
	return &command.Command{Name: "unpause", Args: "[SERVICE...]", Short: "Let frozen containers go on", Max: -1, Complete: []string{"service"},
		Run: func(ctx context.Context, args []string) error {
			_, err := a.each(ctx, plan.Unpause, "Unpausing", args, engine.Options{}, engine.WithoutOneOff, func(c *container.Summary) bool { return c.State == container.StatePaused })
			return err
		}}
}

func (a *app) cmdRm() *command.Command {
	var force, stop, volumes, all bool
	return &command.Command{Name: "rm", Args: "[SERVICE...]", Short: "Remove stopped containers", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&force, "force", "f", "Do not ask")
			f.Bool(&stop, "stop", "s", "Stop containers first")
			f.Bool(&volumes, "volumes", "v", "Remove their anonymous volumes, too")
			f.Bool(&all, "all", "a", "").Hide()
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.named(ctx, args...)
			if err != nil {
				return err
			}
			if stop {
				if err := a.stop(ctx, p, args, nil); err != nil {
					return err
				}
			}
			ob, err := a.there(ctx, p, engine.WithOneOff)
			if err != nil {
				return err
			}
			var names []string
			pl := plan.Each(plan.Remove, ob.Containers, func(c *container.Summary) bool {
				idle := c.State != container.StateRunning && c.State != container.StatePaused && c.State != container.StateRestarting
				known := contains(args, model.Service(c)) && (stop || idle || a.dryRun && stop)
				if known && len(args) == 0 {
					_, known = p.Services[model.Service(c)]
				}
				if known {
					names = append(names, model.Name(c))
				}
				return known
			})
			if len(names) == 0 {
				fmt.Fprintln(a.Stderr, "No stopped containers")
				return nil
			}
			if !force && !a.confirm("Going to remove "+strings.Join(names, ", ")+". Do it?") {
				fmt.Fprintln(a.Stderr, "nothing removed: confirm, or say --force")
				return nil
			}
			return a.execute(ctx, "Removing", p, pl, ob, engine.Options{RemoveVolumes: volumes})
		}}
}

func (a *app) cmdWait() *command.Command {
	down := false
	return &command.Command{Name: "wait", Args: "SERVICE [SERVICE...]", Short: "Wait until containers end and leave with the code of the last", Min: 1, Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) { f.Bool(&down, "down-project", "", "Take the project down then") },
		Run: func(ctx context.Context, args []string) error {
			p, err := a.named(ctx)
			if err != nil {
				return err
			}
			list, err := a.eng.Containers(ctx, p.Name, false, engine.WithOneOff, args...)
			if err != nil {
				return err
			}
			if len(list) == 0 {
				return fmt.Errorf("no containers for project %q", p.Name)
			}
			wctx, stop := interruptible(ctx)
			defer stop()
			type end struct {
				id   string
				code int64
				err  error
			}
			ends := make(chan end)
			for i := range list {
				go func() {
					w, err := a.eng.Client.ContainerWait(wctx, list[i].ID, "")
					ends <- end{list[i].ID, w.StatusCode, err}
				}()
			}
			code := int64(0)
			for range list {
				x := <-ends
				if x.err != nil {
					err = x.err
					continue
				}
				fmt.Fprintf(a.out, "container %q exited with status code %d\n", x.id, x.code)
				code = x.code
			}
			if err != nil {
				return err
			}
			if down {
				if err := a.down(ctx, p, nil, nil, false, true, ""); err != nil {
					return err
				}
			}
			return exit(int(code))
		}}
}
