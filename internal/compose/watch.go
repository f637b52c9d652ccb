package compose

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/patternmatcher"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
	"github.com/cloudos-io/cloudos/internal/filesync"
)

// watchName is how the watch calls itself among the containers' output.
const watchName = "watch"

func (a *app) cmdWatch() *command.Command {
	var noUp, quiet bool
	prune := true
	return &command.Command{Name: "watch", Args: "[SERVICE...]", Short: "Watch files and bring changes into the containers", Max: -1, Complete: []string{"service"},
		Long: "Watch does what the develop.watch section of services says: copies files that changed, restarts containers, or builds images anew and replaces the containers.",
		Flags: func(f *command.FlagSet) {
			f.Bool(&noUp, "no-up", "", "Do not build and start the services first")
			f.Bool(&quiet, "quiet", "", "Build without showing output")
			f.Bool(&prune, "prune", "", "Remove images that builds have replaced")
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.project(ctx, args...)
			if err != nil {
				return err
			}
			if err := a.check(p); err != nil {
				return err
			}
			m := &making{quietBuild: quiet, removeOrphans: false}
			if err := m.validate(a); err != nil {
				return err
			}
			logs := display.NewLogs(a.Stdout, a.Stderr, display.LogOptions{Color: a.colors(a.Stdout), Prefix: true})
			w, err := a.watcher(p, watchOptions{services: args, prune: prune, making: m}, logs)
			if err != nil {
				return err
			}
			if !noUp {
				for n, s := range p.Services {
					if s.Build != nil {
						s.PullPolicy = types.PullPolicyBuild
						p.Services[n] = s
					}
				}
				if err := a.upDetached(ctx, p, m, m.plan(a, args), engine.Options{}, 0); err != nil {
					return err
				}
			} else if _, err := a.engine(); err != nil {
				return err
			}
			if a.dryRun {
				return nil
			}
			ctx, stop := interruptible(ctx)
			defer stop()
			return w.Run(ctx)
		}}
}

type watchOptions struct {
	services []string
	prune    bool
	making   *making
}

// watcher brings changes of files into a project's containers.
type watcher struct {
	a     *app
	p     *types.Project
	o     watchOptions
	logs  *display.Logs
	rules []*filesync.Rule
	// of says what each rule belongs to.
	of []trigger
}

type trigger struct {
	service string
	types.Trigger
}

func (t *trigger) syncs() bool {
	return t.Action == types.WatchActionSync || t.Action == types.WatchActionSyncRestart || t.Action == types.WatchActionSyncExec
}

func (a *app) watcher(p *types.Project, o watchOptions, logs *display.Logs) (*watcher, error) {
	w := &watcher{a: a, p: p, o: o, logs: logs}
	for _, n := range p.ServiceNames() {
		s := p.Services[n]
		if s.Develop == nil || !contains(o.services, n) {
			continue
		}
		excluded, err := dockerIgnored(s.Build)
		if err != nil {
			return nil, err
		}
		for _, t := range s.Develop.Watch {
			var old bool
			if ok, err := t.Extensions.Get("x-initialSync", &old); err == nil && ok && old {
				a.warn("x-initialSync is DEPRECATED, please use the official `initial_sync` attribute")
				t.InitialSync = true
			}
			tr := trigger{n, t}
			switch {
			case t.Action == types.WatchActionRebuild && s.Build == nil:
				return nil, fmt.Errorf("can't watch service %q with action rebuild without a build context", n)
			case t.Action == types.WatchActionRebuild && o.making.noBuild:
				return nil, fmt.Errorf("--no-build is incompatible with watch action rebuild in service %s", n)
			case t.Action == types.WatchActionSyncExec && len(t.Exec.Command) == 0:
				return nil, fmt.Errorf("can't watch with action %q on service %s without a command", t.Action, n)
			case tr.syncs() && t.Target == "":
				return nil, fmt.Errorf("can't watch with action %q on service %s without a target", t.Action, n)
			case tr.syncs() && bound(t.Path, s.Volumes):
				a.warn(fmt.Sprintf("path '%s' also declared by a bind mount volume, this path won't be monitored!", t.Path))
				continue
			}
			r := &filesync.Rule{Path: t.Path, Include: t.Include, Ignore: t.Ignore, Excluded: excluded}
			if tr.syncs() {
				r.Target = t.Target
			}
			if err := r.Compile(); err != nil {
				return nil, err
			}
			w.rules, w.of = append(w.rules, r), append(w.of, tr)
		}
	}
	if len(w.rules) == 0 {
		return nil, errors.New("none of the selected services is configured for watch, consider setting a 'develop' section")
	}
	return w, nil
}

// bound tells whether a container sees a path of the host anyway.
func bound(path string, volumes []types.ServiceVolumeConfig) bool {
	return slices.ContainsFunc(volumes, func(v types.ServiceVolumeConfig) bool {
		if v.Type != types.VolumeTypeBind {
			return false
		}
		rel, err := filepath.Rel(v.Source, path)
		return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
	})
}

// dockerIgnored leaves out what a build's .dockerignore does.
func dockerIgnored(b *types.BuildConfig) (func(string) bool, error) {
	if b == nil || b.Context == "" {
		return nil, nil
	}
	list, err := engine.ReadIgnore(b)
	if err != nil || len(list) == 0 {
		return nil, err
	}
	pm, err := patternmatcher.New(list)
	if err != nil {
		return nil, fmt.Errorf("cannot use .dockerignore: %w", err)
	}
	base := b.Context
	if p, err := filepath.EvalSymlinks(base); err == nil {
		base = p
	}
	return func(path string) bool {
		rel, err := filepath.Rel(base, path)
		if err != nil || rel == "." || strings.HasPrefix(rel, "..") {
			return false
		}
		skip, err := pm.MatchesOrParentMatches(filepath.ToSlash(rel))
		return err == nil && skip
	}, nil
}

func (w *watcher) say(format string, args ...any) {
	out := w.logs.Stdout(watchName)
	fmt.Fprintf(out, format+"\n", args...)
	out.Close()
}

// Run watches until the context ends.
func (w *watcher) Run(ctx context.Context) error {
	for i, t := range w.of {
		if !t.InitialSync || !t.syncs() {
			continue
		}
		list, err := w.rules[i].Everything()
		if err != nil {
			return err
		}
		if err := w.sync(ctx, t.service, list); err != nil {
			return err
		}
	}
	err := filesync.Watch(ctx, w.rules, func() { w.say("Watch enabled") }, func(ctx context.Context, paths []string) error {
		if err := w.batch(ctx, paths); err != nil && ctx.Err() == nil {
			w.say("Error handling changed files: %v", err)
		}
		if w.a.verbose {
			fmt.Fprintf(w.a.Stderr, "batch complete: count[%d]\n", len(paths))
		}
		return nil
	})
	w.say("Watch disabled")
	return err
}

// batch does what a group of changes asks for: build, else copy, run, restart.
func (w *watcher) batch(ctx context.Context, paths []string) error {
	files := map[string][]filesync.Change{}
	rebuild, restart := map[string]bool{}, map[string]bool{}
	execs := map[string][]types.ServiceHook{}
	for i, r := range w.rules {
		t := w.of[i]
		hit := false
		for _, p := range paths {
			ch, ok := r.Match(p)
			if !ok {
				continue
			}
			// A folder in which something changed has not changed itself.
			if fi, err := os.Lstat(p); err == nil && fi.IsDir() && t.Action == types.WatchActionRebuild {
				continue
			}
			hit = true
			if t.syncs() {
				files[t.service] = append(files[t.service], ch)
			}
		}
		if !hit {
			continue
		}
		switch t.Action {
		case types.WatchActionRebuild:
			rebuild[t.service] = true
		case types.WatchActionRestart, types.WatchActionSyncRestart:
			restart[t.service] = true
		case types.WatchActionSyncExec:
			execs[t.service] = append(execs[t.service], t.Exec)
		}
	}
	if len(rebuild) > 0 {
		return w.rebuild(ctx, keysOf(rebuild))
	}
	for s, list := range files {
		if err := w.sync(ctx, s, list); err != nil {
			return err
		}
	}
	for s, hooks := range execs {
		for _, h := range hooks {
			if err := w.exec(ctx, s, h); err != nil {
				return err
			}
		}
	}
	if len(restart) == 0 {
		return nil
	}
	names := keysOf(restart)
	ob, err := w.a.there(ctx, w.p, engine.WithoutOneOff)
	if err != nil {
		return err
	}
	pl, err := plan.Restarts(w.p, ob, plan.RestartOptions{Services: names, NoDeps: true})
	if err != nil {
		return err
	}
	if err := w.a.eng.Execute(ctx, w.p, pl, ob, display.New(nil, display.Options{Mode: display.Quiet}), engine.Options{Warn: w.a.warn}); err != nil {
		return err
	}
	w.say("service(s) %q restarted", names)
	return nil
}

func keysOf(m map[string]bool) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func (w *watcher) containers(ctx context.Context, service string) ([]container.Summary, error) {
	return w.a.eng.Containers(ctx, w.p.Name, true, engine.WithoutOneOff, service)
}

func (w *watcher) sync(ctx context.Context, service string, list []filesync.Change) error {
	cs, err := w.containers(ctx, service)
	if err != nil {
		return err
	}
	slices.SortFunc(list, func(a, b filesync.Change) int { return strings.Compare(a.Container, b.Container) })
	list = slices.CompactFunc(list, func(a, b filesync.Change) bool { return a.Container == b.Container })
	if len(list) == 1 {
		w.say("Syncing service %q after changes were detected: %s", service, shorten(list[0].Host))
	} else {
		w.say("Syncing service %q after %d changes were detected", service, len(list))
	}
	for i := range cs {
		if err := filesync.Sync(ctx, w.a.eng.Client, cs[i].ID, list); err != nil {
			return err
		}
	}
	return nil
}

func (w *watcher) exec(ctx context.Context, service string, h types.ServiceHook) error {
	cs, err := w.containers(ctx, service)
	if err != nil {
		return err
	}
	s := w.p.Services[service]
	for i := range cs {
		if cs[i].State != container.StateRunning {
			continue
		}
		out := engine.Output{Stdout: w.logs.Stdout(watchName), Stderr: w.logs.Stderr(watchName)}
		if err := w.a.eng.Hook(ctx, &s, h, cs[i].ID, out); err != nil {
			return err
		}
	}
	return nil
}

// rebuild builds images anew and replaces the containers.
func (w *watcher) rebuild(ctx context.Context, services []string) error {
	w.say("Rebuilding service(s) %q after changes were detected...", services)
	pr := linesTo{w}
	built, err := w.a.eng.Build(ctx, w.p, pr, services, engine.BuildOptions{Quiet: w.o.making.quietBuild})
	if err != nil {
		w.say("Build failed: %v", err)
		return nil
	}
	m := *w.o.making
	m.force = true // what was built may be the same, and was asked for
	p := w.p
	for n, s := range p.Services {
		s.PullPolicy = ""
		p.Services[n] = s
	}
	pl, ob, err := w.a.converge(ctx, p, pr, &m, m.plan(w.a, services))
	if err != nil {
		return err
	}
	if err := w.a.eng.Execute(ctx, p, pl, ob, pr, engine.Options{Warn: w.a.warn}); err != nil {
		return err
	}
	if w.o.prune {
		w.a.eng.PruneDangling(ctx, p.Name, built)
	}
	w.say("service(s) %q successfully built", services)
	return nil
}

// linesTo shows what a build prints among the output of containers.
type linesTo struct{ w *watcher }

func (l linesTo) Event(e display.Event) {
	if e.State == display.Failed || e.State == display.Warning {
		l.w.say("%s %s", e.ID, e.Status)
	}
}
func (l linesTo) Print(line string) { l.w.say("%s", line) }
func (linesTo) Close()              {}
