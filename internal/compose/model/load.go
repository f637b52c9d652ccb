package model

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/types"
)

// Options say which project is meant, as the global flags do.
type Options struct {
	Name          string
	Files         []string
	Profiles      []string
	EnvFiles      []string
	Directory     string
	Compatibility bool
	// AllResources keeps networks and volumes that no service uses.
	AllResources bool
}

// Explicit tells that files were named, so that names alone do not do.
func (o *Options) Explicit() bool { return len(o.Files) > 0 }

// Details is what loading a project can leave out; the zero value is what most
// commands want.
type Details struct {
	NoInterpolate, NoNormalize, NoPaths, NoConsistency, NoEnv bool
	// KeepEnv leaves the services' env files alone.
	KeepEnv bool
}

func (o *Options) loader(d Details) (*cli.ProjectOptions, error) {
	fns := []cli.ProjectOptionsFn{
		cli.WithInterpolation(!d.NoInterpolate), cli.WithNormalization(!d.NoNormalize), cli.WithResolvedPaths(!d.NoPaths), cli.WithConsistency(!d.NoConsistency),
		cli.WithDiscardEnvFile, cli.WithoutEnvironmentResolution, cli.WithResourceLoader(remote{}),
		cli.WithWorkingDirectory(o.Directory), cli.WithOsEnv,
	}
	if _, ok := os.LookupEnv("PWD"); !ok {
		if wd, err := os.Getwd(); err == nil {
			fns = append(fns, cli.WithEnv([]string{"PWD=" + wd}))
		}
	}
	files := o.EnvFiles
	if len(files) == 0 {
		files = split(os.Getenv("COMPOSE_ENV_FILES"))
	}
	fns = append(fns, cli.WithEnvFiles(files...), cli.WithDotEnv, cli.WithConfigFileEnv, cli.WithDefaultConfigPath,
		// The project's directory is known now: its .env counts, too.
		cli.WithEnvFiles(files...), cli.WithDotEnv, cli.WithDefaultProfiles(o.Profiles...), cli.WithName(o.Name))
	return cli.NewProjectOptions(o.Files, fns...)
}

func split(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}

// Environment is the process's environment with the .env files under it.
func (o *Options) Environment() (types.Mapping, error) {
	l, err := o.loader(Details{})
	if l != nil && l.Environment != nil {
		return l.Environment, nil
	}
	return nil, err
}

// Load reads the project's files; services that are named have their profiles
// enabled, and with names everything else but their dependencies is left out.
func (o *Options) Load(ctx context.Context, d Details, services ...string) (*types.Project, error) {
	l, err := o.loader(d)
	if err != nil {
		return nil, err
	}
	p, err := l.LoadProject(ctx)
	if err != nil {
		return nil, err
	}
	if p.Name == "" {
		return nil, errors.New("the project has no name: give one with --project-name")
	}
	if p, err = p.WithServicesEnabled(services...); err != nil {
		return nil, err
	}
	for name, s := range p.Services {
		s.CustomLabels = types.Labels{
			LabelProject:     p.Name,
			LabelService:     name,
			LabelVersion:     Version,
			LabelWorkingDir:  p.WorkingDir,
			LabelConfigFiles: strings.Join(p.ComposeFiles, ","),
			LabelOneOff:      "False",
		}
		if len(o.EnvFiles) > 0 {
			s.CustomLabels[LabelEnvFile] = strings.Join(o.EnvFiles, ",")
		}
		p.Services[name] = s
	}
	if p, err = p.WithSelectedServices(services); err != nil {
		return nil, err
	}
	if !o.AllResources {
		p = p.WithoutUnnecessaryResources()
	}
	if d.KeepEnv {
		return p, nil
	}
	return p.WithServicesEnvironmentResolved(true)
}

// Raw reads the files as a tree, for printing without interpolation.
func (o *Options) Raw(ctx context.Context, d Details) (map[string]any, error) {
	l, err := o.loader(d)
	if err != nil {
		return nil, err
	}
	return l.LoadModel(ctx)
}

// Separator stands between the parts of a container's name.
func (o *Options) Separator() string {
	if o.Compatibility || Truth(os.Getenv("COMPOSE_COMPATIBILITY")) {
		return "_"
	}
	return "-"
}

// Truth reads a variable that is a switch.
func Truth(s string) bool {
	v, err := strconv.ParseBool(strings.ToLower(strings.TrimSpace(s)))
	return err == nil && v || s == "y" || strings.EqualFold(s, "yes") || strings.EqualFold(s, "on")
}

// ImageName is the image of a service: the one named, or the one that is built.
func ImageName(s *types.ServiceConfig, project, separator string) string {
	if s.Image != "" {
		return s.Image
	}
	return project + separator + s.Name
}

// ContainerName is the name of a service's nth container.
func ContainerName(project string, s *types.ServiceConfig, separator string, n int) string {
	if s.ContainerName != "" {
		return s.ContainerName
	}
	return project + separator + s.Name + separator + strconv.Itoa(n)
}

// Images lists the images that the services run from, sorted, each once.
func Images(p *types.Project, separator string) []string {
	var out []string
	for _, s := range p.Services {
		out = append(out, ImageName(&s, p.Name, separator))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// RegisterRawEnv makes env files with "format: raw" known: KEY=VALUE lines that
// are taken as they are.
func RegisterRawEnv() {
	dotenv.RegisterFormat("raw", rawEnv)
}

// Scale applies --scale flags.
func Scale(p *types.Project, flags []string) error {
	for _, f := range flags {
		name, num, ok := strings.Cut(f, "=")
		n, err := strconv.Atoi(num)
		if !ok || err != nil || n < 0 {
			return fmt.Errorf("cannot scale %q: write SERVICE=NUMBER", f)
		}
		s, err := p.GetService(name)
		if err != nil {
			return err
		}
		if s.Deploy != nil {
			d := *s.Deploy
			s.Deploy = &d
		}
		s.SetScale(n)
		p.Services[name] = s
	}
	return nil
}
