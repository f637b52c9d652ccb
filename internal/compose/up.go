package compose

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/compose-spec/compose-go/v2/types"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
)

// making are the flags of what makes containers.
type making struct {
	build, noBuild, quietPull, quietBuild bool
	pull                                  string
	force, never, deps, renew             bool
	removeOrphans, ignoreOrphans, yes     bool
	scale                                 []string
	timeout                               *int
}

func (m *making) declare(f *command.FlagSet) {
	f.Bool(&m.build, "build", "", "Build images before starting containers")
	f.Bool(&m.noBuild, "no-build", "", "Build nothing, even where an image is missing")
	f.String(&m.pull, "pull", "", "Pull images: always, missing, never, build (default each service's policy)")
	f.Bool(&m.quietPull, "quiet-pull", "", "Pull without showing progress")
	f.Bool(&m.force, "force-recreate", "", "Replace containers although nothing about them changed")
	f.Bool(&m.never, "no-recreate", "", "Leave containers that exist as they are")
	f.Bool(&m.removeOrphans, "remove-orphans", "", "Remove containers of services that the file does not have")
	f.Strings(&m.scale, "scale", "", "Run so many containers of a service: SERVICE=NUMBER")
	f.Bool(&m.yes, "yes", "y", "Answer yes to every question")
	f.Bool(&m.yes, "y", "", "").Hide()
}

func (m *making) validate(a *app) error {
	switch {
	case m.build && m.noBuild:
		return errors.New("--build and --no-build are incompatible")
	case m.force && m.never:
		return errors.New("--force-recreate and --no-recreate are incompatible")
	case m.renew && m.never:
		return errors.New("--no-recreate and --renew-anon-volumes are incompatible")
	case m.deps && m.never:
		return errors.New("--always-recreate-deps and --no-recreate are incompatible")
	case m.pull != "" && m.pull != "policy" && !slices.Contains([]string{types.PullPolicyAlways, types.PullPolicyNever, types.PullPolicyBuild, types.PullPolicyMissing, types.PullPolicyIfNotPresent}, m.pull):
		return fmt.Errorf("invalid --pull option %q", m.pull)
	}
	if !m.removeOrphans {
		m.removeOrphans = model.Truth(a.getenv("COMPOSE_REMOVE_ORPHANS"))
	}
	m.ignoreOrphans = model.Truth(a.getenv("COMPOSE_IGNORE_ORPHANS"))
	if m.ignoreOrphans && m.removeOrphans {
		return errors.New("cannot combine COMPOSE_IGNORE_ORPHANS and --remove-orphans")
	}
	return nil
}

// apply puts the flags into the project.
func (m *making) apply(p *types.Project) error {
	for n, s := range p.Services {
		if m.pull != "" && m.pull != "policy" {
			s.PullPolicy = m.pull
		}
		if m.build && s.Build != nil {
			s.PullPolicy = types.PullPolicyBuild
		}
		p.Services[n] = s
	}
	return model.Scale(p, m.scale)
}

func (m *making) images() engine.ImageOptions {
	o := engine.ImageOptions{QuietPull: m.quietPull}
	if !m.noBuild {
		o.Build = &engine.BuildOptions{Quiet: m.quietBuild}
	}
	return o
}

func (m *making) plan(a *app, services []string) plan.UpOptions {
	o := plan.UpOptions{Services: services, Separator: a.opt.Separator(), RemoveOrphans: m.removeOrphans, IgnoreOrphans: m.ignoreOrphans}
	switch {
	case m.never:
		o.Recreate, o.RecreateDeps = plan.Never, plan.Never
	case m.force, m.renew:
		o.Recreate = plan.Force
	}
	if m.deps {
		o.RecreateDeps = plan.Force
	}
	return o
}

// converge gets images, looks and plans.
func (a *app) converge(ctx context.Context, p *types.Project, pr display.Progress, m *making, o plan.UpOptions) (*plan.Plan, plan.Observed, error) {
	e, err := a.engine()
	if err != nil {
		return nil, plan.Observed{}, err
	}
	if err := e.EnsureImages(ctx, p, pr, m.images()); err != nil {
		return nil, plan.Observed{}, err
	}
	ob, err := e.Observe(ctx, p)
	if err != nil {
		return nil, ob, err
	}
	diverged, err := plan.DivergedVolumes(p, ob)
	if err != nil {
		return nil, ob, err
	}
	for _, key := range diverged {
		if m.yes || a.confirm(fmt.Sprintf("Volume %q exists but doesn't match the configuration in the Compose file. Make it anew (its data will be lost)?", p.Volumes[key].Name)) {
			o.RecreateVolumes = append(o.RecreateVolumes, key)
		} else {
			a.warn(fmt.Sprintf("volume %q does not match its configuration in the Compose file: it is used as it is", p.Volumes[key].Name))
		}
	}
	pl, err := plan.Up(p, ob, o)
	if err != nil {
		return nil, ob, err
	}
	for _, w := range pl.Warnings {
		a.warn(w)
	}
	if len(pl.Orphans) > 0 {
		a.warn(fmt.Sprintf("Found orphan containers ([%s]) for this project. If you removed or renamed this service in your compose file, you can run this command with the --remove-orphans flag to clean it up.", strings.Join(pl.Orphans, " ")))
	}
	return pl, ob, nil
}

func (a *app) cmdUp() *command.Command {
	var m making
	var detach, noStart, noDeps, onExit, onFailure, noColor, noPrefix, timestamps, attachDeps, wait, watch bool
	var from string
	var attach, noAttach []string
	var waitTimeout int
	var menu *bool
	return &command.Command{Name: "up", Args: "[SERVICE...]", Short: "Create and start the services", Max: -1, Complete: []string{"service"},
		Example: `servin compose up -d
servin compose up --build --watch
servin compose up --abort-on-container-exit --exit-code-from tests`,
		Flags: func(f *command.FlagSet) {
			m.declare(f)
			f.Bool(&detach, "detach", "d", "Run in the background")
			f.Bool(&noStart, "no-start", "", "Create everything and start nothing")
			f.Bool(&noDeps, "no-deps", "", "Leave out what the services depend on")
			f.Bool(&onExit, "abort-on-container-exit", "", "Stop all when a container ends")
			f.Bool(&onFailure, "abort-on-container-failure", "", "Stop all when a container fails")
			f.String(&from, "exit-code-from", "", "Leave with the exit code of this service (implies --abort-on-container-exit)")
			f.OptInt(&m.timeout, "timeout", "t", "Seconds to wait for containers that are stopped")
			f.Bool(&noColor, "no-color", "", "No colours")
			f.Bool(&noPrefix, "no-log-prefix", "", "No names before the lines of output")
			f.Bool(&timestamps, "timestamps", "", "Show when lines came")
			f.Bool(&m.deps, "always-recreate-deps", "", "Replace what the services depend on, too")
			f.Bool(&m.renew, "renew-anon-volumes", "V", "Make anonymous volumes anew instead of handing them on")
			f.Bool(&m.quietBuild, "quiet-build", "", "Build without showing output")
			f.Strings(&attach, "attach", "", "Show the output of these services only")
			f.Strings(&noAttach, "no-attach", "", "Do not show the output of these services")
			f.Bool(&attachDeps, "attach-dependencies", "", "Show the output of dependencies, too")
			f.Bool(&wait, "wait", "", "Wait until the services run and are healthy (implies --detach)")
			f.Int(&waitTimeout, "wait-timeout", "", "Seconds to wait at most")
			f.Bool(&watch, "watch", "w", "Watch files and bring changes into the containers")
			f.OptBool(&menu, "menu", "", "Offer keys: d detaches, w watches (default on a terminal)")
		},
		Run: func(ctx context.Context, args []string) error {
			if from != "" && !onFailure {
				onExit = true
			}
			switch {
			case onExit && onFailure:
				return errors.New("--abort-on-container-failure cannot be combined with --abort-on-container-exit")
			case wait && (attachDeps || onExit || onFailure || len(attach) > 0 || watch):
				return errors.New("--wait cannot be combined with --abort-on-container-exit, --abort-on-container-failure, --attach, --attach-dependencies or --watch")
			case detach && (attachDeps || onExit || onFailure || len(attach) > 0 || watch):
				return errors.New("--detach cannot be combined with --abort-on-container-exit, --abort-on-container-failure, --attach, --attach-dependencies or --watch")
			case len(attach) > 0 && attachDeps:
				return errors.New("cannot combine --attach and --attach-dependencies")
			case m.noBuild && watch:
				return errors.New("--no-build and --watch are incompatible")
			}
			if err := m.validate(a); err != nil {
				return err
			}
			p, err := a.project(ctx, args...)
			if err != nil {
				return err
			}
			if len(p.Services) == 0 && !a.opt.AllResources {
				return errors.New("no service selected")
			}
			if noDeps {
				if p, err = p.WithSelectedServices(args, types.IgnoreDependencies); err != nil {
					return err
				}
			}
			if err := m.apply(p); err != nil {
				return err
			}
			if err := a.check(p); err != nil {
				return err
			}
			if from != "" {
				if _, err := p.GetService(from); err != nil {
					return err
				}
			}
			o := m.plan(a, args)
			o.NoStart, o.Wait = noStart, wait
			opt := engine.Options{Timeout: m.timeout, RenewVolumes: m.renew, Warn: a.warn}
			if detach || wait || noStart || a.dryRun {
				return a.upDetached(ctx, p, &m, o, opt, time.Duration(waitTimeout)*time.Second)
			}
			shown, err := attachTo(p, args, attach, noAttach, attachDeps)
			if err != nil {
				return err
			}
			o.Barrier = true
			cascade := engine.Ignore
			if onExit {
				cascade = engine.OnExit
			} else if onFailure {
				cascade = engine.OnFailure
			}
			logs := display.NewLogs(a.Stdout, a.Stderr, display.LogOptions{Color: !noColor && a.colors(a.Stdout), Prefix: !noPrefix, Timestamps: timestamps})
			services := args
			if len(services) == 0 {
				services = shown
			}
			ao := engine.AttachedOptions{Options: opt, Services: services, Stop: args, AttachTo: shown, Cascade: cascade, ExitCodeFrom: from, Logs: logs}
			return a.upAttached(ctx, p, &m, o, ao, watch, menu)
		}}
}

func (a *app) upDetached(ctx context.Context, p *types.Project, m *making, o plan.UpOptions, opt engine.Options, limit time.Duration) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	pr, err := a.show("Running")
	if err != nil {
		return err
	}
	defer pr.Close()
	pl, ob, err := a.converge(ctx, p, pr, m, o)
	if err != nil {
		return err
	}
	ctx2, cancel := ctx, context.CancelFunc(func() {})
	if limit > 0 {
		ctx2, cancel = context.WithTimeout(ctx, limit)
	}
	defer cancel()
	err = a.eng.Execute(ctx2, p, pl, ob, pr, opt)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Errorf("application not healthy after %s", limit)
	}
	return err
}

func (a *app) upAttached(ctx context.Context, p *types.Project, m *making, o plan.UpOptions, ao engine.AttachedOptions, watch bool, menu *bool) error {
	pr, err := a.show("Running")
	if err != nil {
		return err
	}
	defer pr.Close()
	ictx, stop := interruptible(ctx)
	pl, ob, err := a.converge(ictx, p, pr, m, o)
	stop()
	if err != nil {
		return err
	}
	sig := make(chan os.Signal, 2)
	signal.Notify(sig, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(sig)
	ao.Interrupts, ao.Out = sig, a.Stdout
	logs := ao.Logs
	ao.HookOutput = func(service, container string) engine.Output {
		name := strings.TrimPrefix(container, p.Name+a.opt.Separator()) + " ->"
		return engine.Output{Stdout: logs.Stdout(name), Stderr: logs.Stderr(name)}
	}
	ao.Progress = func(title string) display.Progress {
		pr, err := a.show(title)
		if err != nil {
			pr = display.New(a.Stderr, display.Options{Mode: display.Plain})
		}
		return pr
	}
	w, werr := a.watcher(p, watchOptions{services: o.Services, prune: true, making: m}, logs)
	if watch && werr != nil {
		return werr
	}
	if watch {
		ao.Started = w.Run
	}
	var begin func(context.Context)
	kctx, end := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer end()
	if !watch && werr == nil {
		begin = func(ctx context.Context) {
			watching.Add(1)
			go func() {
				defer watching.Done()
				if err := w.Run(ctx); err != nil && ctx.Err() == nil {
					a.warn(err.Error())
				}
			}()
		}
	}
	keys := a.keys(kctx, menu, begin)
	defer keys.close()
	ao.Detach = keys.detach
	code, err := a.eng.Attached(ctx, p, pl, ob, pr, ao)
	if code != 0 {
		if errors.Is(err, engine.ErrInterrupted) {
			err = nil
		}
		return &codeError{code: code, err: err}
	}
	return err
}

// attachTo finds the services whose output is shown.
func attachTo(p *types.Project, asked, attach, except []string, deps bool) ([]string, error) {
	set := map[string]bool{}
	if len(attach) > 0 {
		for _, s := range attach {
			if _, ok := p.Services[s]; !ok {
				return nil, fmt.Errorf("cannot attach to services not included in up: %s", s)
			}
			set[s] = true
		}
	} else {
		with := types.IgnoreDependencies
		if deps {
			with = types.IncludeDependencies
		}
		err := p.ForEachService(asked, func(name string, s *types.ServiceConfig) error {
			if s.Attach == nil || *s.Attach {
				set[name] = true
			}
			return nil
		}, with)
		if err != nil {
			return nil, err
		}
	}
	for _, s := range except {
		delete(set, s)
	}
	var out []string
	for s := range set {
		out = append(out, s)
	}
	slices.Sort(out)
	return out, nil
}
