package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/patternmatcher/ignorefile"
	"golang.org/x/sync/errgroup"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// BuildOptions of Build, as the flags of "build" give them.
type BuildOptions struct {
	Args          []string // KEY=VALUE, or KEY for the environment's
	NoCache, Pull bool
	Quiet         bool
	Check         bool
	Memory        string
	// AllPlatforms builds for each platform that a service names, not only for
	// the one that it runs on.
	AllPlatforms bool
}

// Build builds the images of the services, those that others depend or build on
// first, and gives their ids by name.
func (e *Engine) Build(ctx context.Context, p *types.Project, pr display.Progress, services []string, o BuildOptions) (map[string]string, error) {
	done := map[string]chan struct{}{}
	for _, n := range services {
		done[n] = make(chan struct{})
	}
	out := map[string]string{}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range services {
		s := p.Services[n]
		g.Go(func() error {
			for _, dep := range buildsOn(&s) {
				if done[dep] == nil {
					continue
				}
				select {
				case <-done[dep]:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			release, err := e.slot(ctx)
			if err != nil {
				return err
			}
			defer release()
			name := model.ImageName(&s, p.Name, e.Separator)
			pr.Event(display.Event{ID: name, Status: "Building"})
			id, err := e.buildOne(ctx, p, &s, name, pr, o)
			if err != nil {
				pr.Event(display.Event{ID: name, Status: "Error", State: display.Failed})
				return fmt.Errorf("cannot build service %q: %w", n, err)
			}
			pr.Event(display.Event{ID: name, Status: "Built", State: display.Done})
			mu.Lock()
			out[name] = id
			mu.Unlock()
			close(done[n])
			return nil
		})
	}
	return out, g.Wait()
}

// buildsOn lists the services whose images that of s may need.
func buildsOn(s *types.ServiceConfig) []string {
	deps := slices.Collect(maps.Keys(s.DependsOn))
	if s.Build != nil {
		for _, c := range s.Build.AdditionalContexts {
			if dep, ok := strings.CutPrefix(c, types.ServicePrefix); ok {
				deps = append(deps, dep)
			}
		}
	}
	return deps
}

// WithBuildDependencies adds services whose images the builds of others start
// from.
func WithBuildDependencies(p *types.Project, services []string) []string {
	out := slices.Clone(services)
	all := p.AllServices()
	for i := 0; i < len(out); i++ {
		s := all[out[i]]
		if s.Build == nil {
			continue
		}
		for _, c := range s.Build.AdditionalContexts {
			if dep, ok := strings.CutPrefix(c, types.ServicePrefix); ok && all[dep].Build != nil && !slices.Contains(out, dep) {
				out = append(out, dep)
			}
		}
	}
	return out
}

func (e *Engine) buildOne(ctx context.Context, p *types.Project, s *types.ServiceConfig, name string, pr display.Progress, o BuildOptions) (string, error) {
	if s.Build == nil {
		return "", errors.New("it has no build section")
	}
	if e.DryRun {
		return "", nil
	}
	if e.Builder == nil {
		return "", errors.New("there is no builder")
	}
	dir, err := os.MkdirTemp("", "servin-compose")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	args, err := e.buildArgs(p, s, name, dir, o)
	if err != nil {
		return "", err
	}
	lines := &printer{print: pr.Print, quiet: o.Quiet}
	code, err := e.Builder(ctx, args, p.Environment.Values(), lines)
	lines.flush()
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err != nil:
		return "", err
	case code != 0 && lines.last != "":
		return "", errors.New(strings.TrimPrefix(lines.last, "servin: "))
	case code != 0:
		return "", fmt.Errorf("the build ended with %d", code)
	case o.Check:
		return "", nil
	}
	return e.imageID(ctx, name)
}

// buildArgs writes a service's build section as flags of `servin build`; dir is
// for files that the build needs.
func (e *Engine) buildArgs(p *types.Project, s *types.ServiceConfig, name, dir string, o BuildOptions) ([]string, error) {
	b := s.Build
	args := []string{"build", "--progress", "plain", "--tag", name}
	add := func(flag string, values ...string) {
		for _, v := range values {
			if v != "" {
				args = append(args, flag, v)
			}
		}
	}
	on := func(set bool, flag string) {
		if set {
			args = append(args, flag)
		}
	}
	add("--tag", b.Tags...)
	vars := types.MappingWithEquals{}
	maps.Copy(vars, b.Args)
	maps.Copy(vars, types.NewMappingWithEquals(o.Args))
	for _, k := range slices.Sorted(maps.Keys(vars)) {
		v := vars[k]
		if v == nil {
			if got, ok := p.Environment[k]; ok {
				v = &got
			}
		}
		if v != nil {
			args = append(args, "--build-arg", k+"="+*v)
		}
	}
	labels := map[string]string{model.LabelProject: p.Name, model.LabelService: s.Name, model.LabelVersion: model.Version}
	maps.Copy(labels, b.Labels)
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		args = append(args, "--label", k+"="+labels[k])
	}
	platforms, err := platforms(p, s, o.AllPlatforms)
	if err != nil {
		return nil, err
	}
	add("--platform", strings.Join(platforms, ","))
	add("--target", b.Target)
	add("--network", b.Network)
	add("--add-host", sorted(b.ExtraHosts.AsList(":"))...)
	add("--cache-from", b.CacheFrom...)
	add("--cache-to", b.CacheTo...)
	add("--no-cache-filter", b.NoCacheFilter...)
	add("--provenance", b.Provenance)
	add("--sbom", b.SBOM)
	add("--allow", b.Entitlements...)
	add("--memory", o.Memory)
	on(b.Privileged && !slices.Contains(b.Entitlements, "security.insecure"), "--allow=security.insecure")
	on(b.NoCache || o.NoCache, "--no-cache")
	on(b.Pull || o.Pull, "--pull")
	on(o.Check, "--check")
	if b.ShmSize > 0 {
		add("--shm-size", strconv.FormatInt(int64(b.ShmSize), 10))
	}
	for _, k := range slices.Sorted(maps.Keys(b.Ulimits)) {
		if u := b.Ulimits[k]; u.Soft != 0 || u.Hard != 0 {
			add("--ulimit", fmt.Sprintf("%s=%d:%d", k, u.Soft, u.Hard))
		} else {
			add("--ulimit", fmt.Sprintf("%s=%d", k, u.Single))
		}
	}
	for _, k := range b.SSH {
		if k.Path == "" {
			if k.ID == "default" && p.Environment["SSH_AUTH_SOCK"] == "" {
				return nil, errors.New("invalid empty ssh agent socket: make sure SSH_AUTH_SOCK is set")
			}
			add("--ssh", k.ID)
		} else {
			add("--ssh", k.ID+"="+k.Path)
		}
	}
	for _, r := range b.Secrets {
		flag, err := buildSecret(p, r, dir)
		if err != nil {
			return nil, err
		}
		add("--secret", flag)
	}
	for _, k := range slices.Sorted(maps.Keys(b.AdditionalContexts)) {
		v := b.AdditionalContexts[k]
		if dep, ok := strings.CutPrefix(v, types.ServicePrefix); ok {
			d, known := p.AllServices()[dep]
			if !known {
				return nil, fmt.Errorf("its context %s is the unknown service %q", k, dep)
			}
			v = "docker-image://" + model.ImageName(&d, p.Name, e.Separator)
		}
		add("--build-context", k+"="+v)
	}
	switch {
	case b.DockerfileInline != "":
		file := filepath.Join(dir, "Dockerfile")
		if err := os.WriteFile(file, []byte(b.DockerfileInline), 0o600); err != nil {
			return nil, err
		}
		add("--file", file)
	case b.Dockerfile != "" && !remote(b.Context):
		file := b.Dockerfile
		if !filepath.IsAbs(file) {
			file = filepath.Join(b.Context, file)
		}
		add("--file", file)
	default:
		add("--file", b.Dockerfile)
	}
	return append(args, "--", b.Context), nil
}

func sorted(l []string) []string {
	slices.Sort(l)
	return l
}

// remote tells of contexts that the builder fetches itself.
func remote(context string) bool {
	return strings.Contains(context, "://") || strings.HasPrefix(context, "git@") || strings.HasPrefix(context, "github.com/")
}

// platforms decides what to build for: all that the service names, or the one
// that it will run on.
func platforms(p *types.Project, s *types.ServiceConfig, all bool) ([]string, error) {
	b := s.Build
	one := s.Platform
	from := "platform"
	if one == "" {
		one, from = p.Environment["DOCKER_DEFAULT_PLATFORM"], "DOCKER_DEFAULT_PLATFORM"
	}
	if one != "" {
		if len(b.Platforms) > 0 && !slices.Contains(b.Platforms, one) {
			if from == "platform" {
				return nil, fmt.Errorf("service.build.platforms MUST include service.platform %q", one)
			}
			return nil, fmt.Errorf("service %q build.platforms does not support value set by %s: %s", s.Name, from, one)
		}
		if !all || len(b.Platforms) == 0 || from != "platform" {
			return []string{one}, nil
		}
	}
	if all {
		return b.Platforms, nil
	}
	return nil, nil
}

// buildSecret writes one secret of a build as a flag. Values go by a file that
// only we can read, never by arguments.
func buildSecret(p *types.Project, r types.ServiceSecretConfig, dir string) (string, error) {
	s, ok := p.Secrets[r.Source]
	if !ok {
		return "", fmt.Errorf("its build refers to the undefined secret %q", r.Source)
	}
	id := r.Target
	if id == "" {
		id = r.Source
	}
	switch {
	case s.File != "":
		return "id=" + id + ",src=" + s.File, nil
	case s.Environment != "":
		v, ok := p.Environment[s.Environment]
		if !ok {
			return "", fmt.Errorf("the environment variable %q of secret %q is not set", s.Environment, r.Source)
		}
		f, err := os.CreateTemp(dir, "secret")
		if err != nil {
			return "", err
		}
		_, err = io.WriteString(f, v)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		return "id=" + id + ",src=" + f.Name(), err
	}
	return "", fmt.Errorf("secret %q cannot be used in a build: it is neither a file nor a variable", r.Source)
}

// printer passes lines on.
type printer struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	print func(string)
	quiet bool
	last  string // the last line that says something
}

func (p *printer) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.buf.Write(b)
	for {
		i := bytes.IndexByte(p.buf.Bytes(), '\n')
		if i < 0 {
			return len(b), nil
		}
		p.line(strings.TrimRight(string(p.buf.Next(i+1)), "\r\n"))
	}
}

func (p *printer) line(s string) {
	if strings.TrimSpace(s) != "" {
		p.last = s
	}
	if !p.quiet {
		p.print(s)
	}
}

func (p *printer) flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.buf.Len() > 0 {
		p.line(p.buf.String())
		p.buf.Reset()
	}
}

// ReadIgnore reads the patterns that a build leaves out of its context: those of
// the Dockerfile's own ignore file, or of the context's.
func ReadIgnore(b *types.BuildConfig) ([]string, error) {
	file := b.Dockerfile
	if file == "" {
		file = "Dockerfile"
	}
	if !filepath.IsAbs(file) {
		file = filepath.Join(b.Context, file)
	}
	for _, p := range []string{file + ".dockerignore", filepath.Join(b.Context, ".dockerignore")} {
		f, err := os.Open(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer f.Close()
		list, err := ignorefile.ReadAll(f)
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", p, err)
		}
		return list, nil
	}
	return nil, nil
}

// PruneDangling removes images of a project that builds have replaced.
func (e *Engine) PruneDangling(ctx context.Context, project string, keep map[string]string) {
	list, err := e.Client.ImageList(ctx, client.ImageListOptions{Filters: client.Filters{"label": {model.LabelProject + "=" + project}, "dangling": {"true"}}})
	if err != nil {
		return
	}
	for i := range list {
		used := false
		for _, id := range keep {
			used = used || id == list[i].ID
		}
		if !used {
			// One that a container still uses stays: the engine refuses.
			e.Client.ImageRemove(ctx, list[i].ID, client.ImageRemoveOptions{})
		}
	}
}
