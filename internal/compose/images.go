package compose

import (
	"context"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
)

func (a *app) cmdPull() *command.Command {
	var o engine.PullOptions
	var deps, unused bool
	policy := ""
	return &command.Command{Name: "pull", Args: "[SERVICE...]", Short: "Pull the services' images", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.Quiet, "quiet", "q", "Do not show progress")
			f.Bool(&deps, "include-deps", "", "Pull images of dependencies, too")
			f.Bool(&o.IgnoreFailures, "ignore-pull-failures", "", "Pull what can be pulled")
			f.Bool(&o.IgnoreBuildable, "ignore-buildable", "", "Leave out images that can be built")
			f.String(&policy, "policy", "", "missing or always")
			f.Bool(&unused, "parallel", "", "").Hide()
			f.Bool(&unused, "no-parallel", "", "").Hide()
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.selected(ctx, args, deps)
			if err != nil {
				return err
			}
			for n, s := range p.Services {
				if policy != "" && s.Image != "" {
					s.PullPolicy = policy
					p.Services[n] = s
				}
			}
			return a.shown(ctx, "Pulling", func(ctx context.Context, e *engine.Engine, sh shower) error { return e.Pull(ctx, p, sh, o) })
		}}
}

// selected loads the project with the services that are named alone, or with
// what they depend on.
func (a *app) selected(ctx context.Context, services []string, deps bool) (*types.Project, error) {
	p, err := a.project(ctx, services...)
	if err != nil || deps {
		return p, err
	}
	return p.WithSelectedServices(services, types.IgnoreDependencies)
}

func (a *app) cmdPush() *command.Command {
	var o engine.PushOptions
	deps := false
	return &command.Command{Name: "push", Args: "[SERVICE...]", Short: "Push images that services are built to", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.Quiet, "quiet", "q", "Do not show progress")
			f.Bool(&deps, "include-deps", "", "Push images of dependencies, too")
			f.Bool(&o.IgnoreFailures, "ignore-push-failures", "", "Push what can be pushed")
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.selected(ctx, args, deps)
			if err != nil {
				return err
			}
			return a.shown(ctx, "Pushing", func(ctx context.Context, e *engine.Engine, sh shower) error { return e.Push(ctx, p, sh, o) })
		}}
}

func (a *app) cmdBuild() *command.Command {
	var o engine.BuildOptions
	var deps, push, unused bool
	var builder, ssh, provenance, sbom string
	return &command.Command{Name: "build", Args: "[SERVICE...]", Short: "Build the services' images", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Strings(&o.Args, "build-arg", "", "Set a build argument: KEY=VALUE")
			f.Bool(&o.NoCache, "no-cache", "", "Do not use the build cache")
			f.Bool(&o.Pull, "pull", "", "Look for newer base images")
			f.Bool(&push, "push", "", "Push the images then")
			f.Bool(&o.Quiet, "quiet", "q", "Do not show output")
			f.Bool(&deps, "with-dependencies", "", "Build dependencies, too")
			f.Bool(&o.Check, "check", "", "Check the Dockerfiles, do not build")
			f.String(&o.Memory, "memory", "m", "Memory limit for build containers")
			f.String(&builder, "builder", "", "").Hide()
			f.Add("ssh", "", "string", "", func(s string) error {
				if ssh = s; s == "" {
					ssh = "default"
				}
				return nil
			}).Hide()
			f.String(&provenance, "provenance", "", "").Hide()
			f.String(&sbom, "sbom", "", "").Hide()
			f.String(&a.progress, "progress", "", "How to show progress: auto, tty, plain, json, quiet").Hide()
			f.Bool(&unused, "parallel", "", "").Hide()
			f.Bool(&unused, "compress", "", "").Hide()
			f.Bool(&unused, "force-rm", "", "").Hide()
			f.Bool(&unused, "no-rm", "", "").Hide()
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.selected(ctx, args, deps)
			if err != nil {
				return err
			}
			o.AllPlatforms = true
			var names []string
			for n, s := range p.Services {
				if s.Build == nil {
					continue
				}
				names = append(names, n)
				b := *s.Build
				if ssh != "" {
					id, path, _ := strings.Cut(ssh, "=")
					b.SSH = append(slices.Clone(b.SSH), types.SSHKey{ID: id, Path: path})
				}
				if provenance != "" {
					b.Provenance = provenance
				}
				if sbom != "" {
					b.SBOM = sbom
				}
				s.Build = &b
				p.Services[n] = s
			}
			slices.Sort(names)
			names = engine.WithBuildDependencies(p, names)
			for _, n := range names {
				if _, ok := p.Services[n]; !ok { // of a profile that is not enabled, or not named
					p.Services[n] = p.AllServices()[n]
				}
			}
			return a.shown(ctx, "Building", func(ctx context.Context, e *engine.Engine, sh shower) error {
				if _, err := e.Build(ctx, p, sh, names, o); err != nil || !push {
					return err
				}
				return e.Push(ctx, p, sh, engine.PushOptions{Quiet: o.Quiet})
			})
		}}
}
