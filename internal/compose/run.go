package compose

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/format"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/mattn/go-shellwords"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
)

// oneOff are the flags of run.
type oneOff struct {
	making
	detach, rm, noTTY, noDeps, aliases, servicePorts, quiet  bool
	interactive                                              bool
	env, envFiles, labels, capAdd, capDrop, volumes, publish []string
	name, user, workdir, entrypoint                          string
	entrypointSet                                            bool
}

func (a *app) cmdRun() *command.Command {
	o := oneOff{interactive: true}
	noTTY, tty, stdin := (*bool)(nil), (*bool)(nil), (*bool)(nil)
	return &command.Command{Name: "run", Args: "SERVICE [COMMAND] [ARG...]", Short: "Run a command in a new container of a service", Min: 1, Max: -1, Inner: true, Complete: []string{"service", ""},
		Example: `servin compose run --rm app npm test
servin compose run -e DEBUG=1 --service-ports web`,
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.detach, "detach", "d", "Run in the background and print the container's id")
			f.Strings(&o.env, "env", "e", "Set an environment variable")
			f.Strings(&o.envFiles, "env-from-file", "", "Read environment variables from a file").Of("file")
			f.Strings(&o.labels, "label", "l", "Add a label: KEY=VALUE")
			f.Bool(&o.rm, "rm", "", "Remove the container when it ends")
			f.OptBool(&noTTY, "no-TTY", "T", "No terminal (default: as standard input and output are)")
			f.OptBool(&noTTY, "no-tty", "", "").Hide()
			f.OptBool(&tty, "tty", "t", "").Hide()
			f.OptBool(&stdin, "interactive", "i", "Connect standard input (default true)")
			f.String(&o.name, "name", "", "Name of the container")
			f.String(&o.user, "user", "u", "User (name or id, [:group])")
			f.String(&o.workdir, "workdir", "w", "Working directory in the container")
			f.Add("entrypoint", "", "string", "Another entry point", func(s string) error { o.entrypoint, o.entrypointSet = s, true; return nil })
			f.Strings(&o.capAdd, "cap-add", "", "Add a capability")
			f.Strings(&o.capDrop, "cap-drop", "", "Drop a capability")
			f.Bool(&o.noDeps, "no-deps", "", "Do not start what the service depends on")
			f.Strings(&o.volumes, "volume", "v", "Mount a volume or folder")
			f.Strings(&o.volumes, "volumes", "", "").Hide()
			f.Strings(&o.publish, "publish", "p", "Publish a port")
			f.Bool(&o.aliases, "use-aliases", "", "Give the container the service's names in its networks")
			f.Bool(&o.servicePorts, "service-ports", "P", "Publish the service's ports")
			f.String(&o.pull, "pull", "", "Pull images: always, missing, never (default each service's policy)")
			f.Bool(&o.quiet, "quiet", "q", "Print nothing but what the command does")
			f.Bool(&o.quietBuild, "quiet-build", "", "Build without showing output")
			f.Bool(&o.quietPull, "quiet-pull", "", "Pull without showing progress")
			f.Bool(&o.build, "build", "", "Build the image first")
			f.Bool(&o.removeOrphans, "remove-orphans", "", "Remove containers of services that the file does not have")
		},
		Run: func(ctx context.Context, args []string) error {
			if len(o.publish) > 0 && o.servicePorts {
				return errors.New("--service-ports and --publish are incompatible")
			}
			if stdin != nil {
				o.interactive = *stdin
			}
			switch {
			case tty != nil && noTTY != nil:
				return errors.New("--tty and --no-TTY can't be used together")
			case tty != nil:
				o.noTTY = !*tty
			case noTTY != nil:
				o.noTTY = *noTTY
			default:
				o.noTTY = !terminal.Is(a.Stdout) || o.interactive && !terminal.Is(a.Stdin)
			}
			if o.quiet {
				a.progress = "quiet"
			}
			return a.runOneOff(ctx, &o, args[0], args[1:])
		}}
}

func (a *app) runOneOff(ctx context.Context, o *oneOff, service string, cmd []string) error {
	if err := o.validate(a); err != nil {
		return err
	}
	p, err := a.project(ctx, service)
	if err != nil {
		return err
	}
	if o.noDeps {
		if p, err = p.WithSelectedServices([]string{service}, types.IgnoreDependencies); err != nil {
			return err
		}
	}
	if err := o.making.apply(p); err != nil {
		return err
	}
	if err := a.check(p); err != nil {
		return err
	}
	s, err := p.GetService(service)
	if err != nil {
		return err
	}
	if err := o.change(&s, p, cmd); err != nil {
		return err
	}
	p.Services[service] = s
	ictx, stop := interruptible(ctx)
	id, err := a.prepare(ictx, p, o, service)
	stop()
	if err != nil || a.dryRun {
		return err
	}
	if o.detach {
		if err := a.eng.Client.ContainerStart(ctx, id, ""); err != nil {
			return err
		}
		fmt.Fprintln(a.out, id)
		return nil
	}
	args := []string{"start", "--attach"}
	if o.interactive {
		args = append(args, "--interactive")
	}
	return a.servin(ctx, append(args, id)...)
}

// change applies run's flags to the service.
func (o *oneOff) change(s *types.ServiceConfig, p *types.Project, cmd []string) error {
	s.Tty, s.StdinOpen, s.ContainerName = !o.noTTY, o.interactive, o.name
	if len(cmd) > 0 {
		s.Command = cmd
	}
	if o.entrypointSet {
		words, err := shellwords.Parse(o.entrypoint)
		if err != nil {
			return fmt.Errorf("cannot use the entry point: %w", err)
		}
		if words == nil {
			words = []string{}
		}
		s.Entrypoint = words
		if len(cmd) == 0 {
			s.Command = []string{}
		}
	}
	if o.user != "" {
		s.User = o.user
	}
	if o.workdir != "" {
		s.WorkingDir = o.workdir
	}
	if !o.servicePorts {
		s.Ports = nil
		for _, spec := range o.publish {
			ports, err := types.ParsePortConfig(spec)
			if err != nil {
				return fmt.Errorf("cannot publish %q: %w", spec, err)
			}
			s.Ports = append(s.Ports, ports...)
		}
	}
	for _, v := range o.volumes {
		vol, err := format.ParseVolume(v)
		if err != nil {
			return fmt.Errorf("cannot mount %q: %w", v, err)
		}
		s.Volumes = append(s.Volumes, vol)
	}
	in := func(list []string) func(string) bool { return func(c string) bool { return slices.Contains(list, c) } }
	s.CapAdd = append(slices.DeleteFunc(slices.Clone(s.CapAdd), in(o.capDrop)), o.capAdd...)
	s.CapDrop = append(slices.DeleteFunc(slices.Clone(s.CapDrop), in(o.capAdd)), o.capDrop...)
	env := types.NewMappingWithEquals(o.env).Resolve(p.Environment.Resolve).RemoveEmpty()
	for _, name := range o.envFiles {
		f, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("cannot read the environment file: %w", err)
		}
		vars, err := dotenv.ParseWithLookup(f, p.Environment.Resolve)
		f.Close()
		if err != nil {
			return fmt.Errorf("cannot read the environment file %s: %w", name, err)
		}
		for k, v := range vars {
			if _, ok := env[k]; !ok {
				env[k] = &v
			}
		}
	}
	if s.Environment == nil {
		s.Environment = types.MappingWithEquals{}
	}
	s.Environment.OverrideBy(env)
	for _, l := range o.labels {
		k, v, ok := strings.Cut(l, "=")
		if !ok {
			return errors.New("label must be set as KEY=VALUE")
		}
		s.Labels = s.Labels.Add(k, v)
	}
	one := 1
	s.Scale, s.Restart = &one, ""
	if s.Deploy != nil {
		d := *s.Deploy
		d.RestartPolicy, d.Replicas = nil, nil
		s.Deploy = &d
	}
	return nil
}

// prepare brings up what the service needs and makes the container.
func (a *app) prepare(ctx context.Context, p *types.Project, o *oneOff, service string) (string, error) {
	pr, err := a.show("Running")
	if err != nil {
		return "", err
	}
	defer pr.Close()
	e, err := a.engine()
	if err != nil {
		return "", err
	}
	s := p.Services[service]
	slug := make([]byte, 32)
	if _, err := io.ReadFull(rand.Reader, slug); err != nil {
		return "", err
	}
	id := hex.EncodeToString(slug)
	if s.ContainerName == "" {
		s.ContainerName = strings.Join([]string{p.Name, service, "run", id[:12]}, e.Separator)
	}
	s.CustomLabels = s.CustomLabels.Add(model.LabelSlug, id).Add(model.LabelOneOff, "True")
	deps := p.WithServicesDisabled(service)
	// The networks and volumes that the service itself uses are made with the rest.
	deps.Networks, deps.Volumes = p.Networks, p.Volumes
	pl, ob, err := a.converge(ctx, deps, pr, &o.making, o.making.plan(a, nil))
	if err != nil {
		return "", err
	}
	if err := e.Execute(ctx, deps, pl, ob, pr, engine.Options{Warn: a.warn}); err != nil {
		return "", err
	}
	only, err := p.WithSelectedServices([]string{service}, types.IgnoreDependencies)
	if err != nil {
		return "", err
	}
	only.Services[service] = s
	if err := e.EnsureImages(ctx, only, pr, o.making.images()); err != nil {
		return "", err
	}
	s = only.Services[service]
	p.Services[service] = s
	if ob, err = e.Observe(ctx, p); err != nil {
		return "", err
	}
	wait := plan.Waits(p, service)
	if err := e.Execute(ctx, p, wait, ob, pr, engine.Options{Warn: a.warn}); err != nil {
		return "", err
	}
	return e.CreateOneOff(ctx, p, s, ob, pr, engine.OneOffOptions{Aliases: o.aliases, AutoRemove: o.rm, AttachStdin: o.interactive})
}
