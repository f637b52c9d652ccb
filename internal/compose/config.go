package compose

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/template"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"go.yaml.in/yaml/v4"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/compose/model"
	"github.com/cloudos-io/cloudos/internal/compose/plan"
)

// configFlags of config.
type configFlags struct {
	model.Details
	format, output, hash                                                          string
	quiet, digests, lock                                                          bool
	services, volumes, networks, models, profiles, images, variables, environment bool
}

func (a *app) cmdConfig() *command.Command {
	var o configFlags
	return &command.Command{Name: "config", Aliases: []string{"convert"}, Args: "[SERVICE...]", Short: "Show the project as it is understood", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.String(&o.format, "format", "", "yaml or json")
			f.Bool(&o.digests, "resolve-image-digests", "", "Show images with their digests")
			f.Bool(&o.lock, "lock-image-digests", "", "Show an override file that holds the images' digests")
			f.Bool(&o.quiet, "quiet", "q", "Check only")
			f.Bool(&o.NoInterpolate, "no-interpolate", "", "Leave variables as they are")
			f.Bool(&o.NoNormalize, "no-normalize", "", "Do not fill in what is implied")
			f.Bool(&o.NoPaths, "no-path-resolution", "", "Leave relative paths as they are")
			f.Bool(&o.NoConsistency, "no-consistency", "", "Do not check whether the parts fit")
			f.Bool(&o.KeepEnv, "no-env-resolution", "", "Do not read env files")
			f.Bool(&o.services, "services", "", "List services")
			f.Bool(&o.volumes, "volumes", "", "List volumes")
			f.Bool(&o.networks, "networks", "", "List networks")
			f.Bool(&o.models, "models", "", "List models")
			f.Bool(&o.profiles, "profiles", "", "List profiles")
			f.Bool(&o.images, "images", "", "List images")
			f.String(&o.hash, "hash", "", "Show the hash of services: names, or *")
			f.Bool(&o.variables, "variables", "", "List the variables of the file and their defaults")
			f.Bool(&o.environment, "environment", "", "List the environment that variables come from")
			f.String(&o.output, "output", "o", "Write to a file").Of("file")
		},
		Run: func(ctx context.Context, args []string) error { return a.config(ctx, &o, args) }}
}

func (a *app) config(ctx context.Context, o *configFlags, services []string) error {
	if o.lock {
		o.digests = true
	}
	if a.opt.Compatibility {
		o.NoNormalize = true
	}
	if o.variables {
		return a.configVariables(ctx, o)
	}
	if o.NoInterpolate {
		return a.configRaw(ctx, o)
	}
	lists := o.services || o.volumes || o.networks || o.models || o.hash != "" || o.profiles || o.images || o.environment
	d := o.Details
	d.KeepEnv = d.KeepEnv || lists
	if lists && !o.profiles && !o.images && !o.environment {
		services = nil
	}
	p, err := a.opt.Load(ctx, d, services...)
	if err != nil {
		return err
	}
	if lists {
		return a.configList(p, o)
	}
	if !o.NoConsistency {
		if err := p.CheckContainerNameUnicity(); err != nil {
			return err
		}
	}
	if o.digests {
		if p, err = p.WithImagesResolved(a.resolver(ctx)); err != nil {
			return err
		}
	}
	if o.lock {
		only := types.Services{}
		for n, s := range p.Services {
			only[n] = types.ServiceConfig{ContainerSpec: types.ContainerSpec{Image: s.Image}}
		}
		p = &types.Project{Services: only}
	}
	var b []byte
	switch o.format {
	case "json":
		b, err = p.MarshalJSON()
	case "", "yaml":
		if b, err = p.MarshalYAML(); err == nil {
			b, err = inOrder(b)
		}
	default:
		err = fmt.Errorf("unsupported format %q: use yaml or json", o.format)
	}
	if err != nil {
		return err
	}
	// What is printed can be read again: dollars would be taken for variables.
	return a.emit(o, bytes.ReplaceAll(b, []byte("$"), []byte("$$")))
}

// inOrder puts the keys of services into the order that people know: profiles,
// then by name.
func inOrder(b []byte) ([]byte, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil || len(doc.Content) == 0 {
		return b, err
	}
	root := doc.Content[0]
	for i := 0; i+1 < len(root.Content); i += 2 {
		if root.Content[i].Value != "services" {
			continue
		}
		for j := 1; j < len(root.Content[i+1].Content); j += 2 {
			s := root.Content[i+1].Content[j]
			if s.Kind != yaml.MappingNode {
				continue
			}
			type pair [2]*yaml.Node
			var pairs []pair
			for k := 0; k+1 < len(s.Content); k += 2 {
				pairs = append(pairs, pair{s.Content[k], s.Content[k+1]})
			}
			key := func(p pair) string {
				if p[0].Value == "profiles" {
					return ""
				}
				return p[0].Value
			}
			slices.SortStableFunc(pairs, func(a, b pair) int { return strings.Compare(key(a), key(b)) })
			s.Content = s.Content[:0]
			for _, p := range pairs {
				s.Content = append(s.Content, p[0], p[1])
			}
		}
	}
	var buf bytes.Buffer
	enc := yaml.NewEncoder(&buf)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return nil, err
	}
	if err := enc.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func (a *app) emit(o *configFlags, b []byte) error {
	if o.quiet {
		return nil
	}
	if o.output != "" {
		return writeFile(o.output, b)
	}
	_, err := a.out.Write(b)
	return err
}

func (a *app) configList(p *types.Project, o *configFlags) error {
	var out []string
	switch {
	case o.services:
		// Dependencies first, as they would start.
		order, err := plan.Order(p)
		if err != nil {
			return err
		}
		out = order
	case o.volumes:
		out = p.VolumeNames()
	case o.networks:
		out = p.NetworkNames()
	case o.models:
		for _, n := range p.ModelNames() {
			if m := p.Models[n].Model; m != "" {
				out = append(out, m)
			}
		}
	case o.profiles:
		out = p.AllServices().GetProfiles()
		slices.Sort(out)
	case o.images:
		out = model.Images(p, a.opt.Separator())
	case o.environment:
		out = p.Environment.Values()
		slices.Sort(out)
	case o.hash != "":
		names := strings.Split(o.hash, ",")
		if o.hash == "*" {
			names = p.ServiceNames()
		}
		slices.Sort(names)
		for _, n := range names {
			s, err := p.GetService(n)
			if err != nil {
				return err
			}
			h, err := model.ServiceHash(s)
			if err != nil {
				return err
			}
			out = append(out, n+" "+h)
		}
	}
	for _, l := range out {
		fmt.Fprintln(a.out, l)
	}
	return nil
}

// configRaw prints the tree of the files, with variables as they are.
func (a *app) configRaw(ctx context.Context, o *configFlags) error {
	tree, err := a.opt.Raw(ctx, o.Details)
	if err != nil {
		return err
	}
	services, _ := tree["services"].(map[string]any)
	if o.services {
		for _, n := range slices.Sorted(maps.Keys(services)) {
			fmt.Fprintln(a.out, n)
		}
		return nil
	}
	if o.digests {
		resolve := a.resolver(ctx)
		for n, v := range services {
			s, _ := v.(map[string]any)
			img, _ := s["image"].(string)
			if img == "" {
				continue
			}
			pinned, err := (&types.Project{Services: types.Services{n: {ContainerSpec: types.ContainerSpec{Image: img}}}}).WithImagesResolved(resolve)
			if err != nil {
				return err
			}
			s["image"] = pinned.Services[n].Image
			if o.lock {
				services[n] = map[string]any{"image": s["image"]}
			}
		}
	}
	if o.lock {
		tree = map[string]any{"services": services}
	}
	var b []byte
	switch o.format {
	case "json":
		b, err = json.MarshalIndent(tree, "", "  ")
	case "", "yaml":
		var buf bytes.Buffer
		enc := yaml.NewEncoder(&buf)
		enc.SetIndent(2)
		if err = enc.Encode(tree); err == nil {
			err = enc.Close()
		}
		b = buf.Bytes()
	default:
		err = fmt.Errorf("unsupported format %q: use yaml or json", o.format)
	}
	if err != nil {
		return err
	}
	return a.emit(o, b)
}

func (a *app) configVariables(ctx context.Context, o *configFlags) error {
	o.NoInterpolate = true
	tree, err := a.opt.Raw(ctx, o.Details)
	if err != nil {
		return err
	}
	vars := template.ExtractVariables(tree, template.DefaultPattern)
	switch o.format {
	case "json":
		b, err := json.MarshalIndent(vars, "", "    ")
		if err != nil {
			return err
		}
		return a.emit(o, append(b, '\n'))
	case "yaml":
		b, err := yaml.Marshal(vars)
		if err != nil {
			return err
		}
		return a.emit(o, b)
	}
	lines := [][]string{{"NAME", "REQUIRED", "DEFAULT VALUE", "ALTERNATE VALUE"}}
	for _, n := range slices.Sorted(maps.Keys(vars)) {
		v := vars[n]
		lines = append(lines, []string{n, strconv.FormatBool(v.Required), v.DefaultValue, v.PresenceValue})
	}
	return format.Align(a.out, lines)
}

// resolver asks registries for the digests of images.
func (a *app) resolver(ctx context.Context) func(reference.Named) (digest.Digest, error) {
	return func(named reference.Named) (digest.Digest, error) {
		e, err := a.engine()
		if err != nil {
			return "", err
		}
		auth, err := e.Auth(ctx, named.String())
		if err != nil {
			return "", err
		}
		in, err := e.Client.DistributionInspect(ctx, named.String(), auth)
		if err != nil {
			return "", fmt.Errorf("failed to resolve digest for %s: %w", named, err)
		}
		return in.Descriptor.Digest, nil
	}
}
