package engine

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/patternmatcher"
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
	Memory        int64
}

// Build builds the images of the services, those that others build on first, and
// gives their ids by name.
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
			for _, c := range s.Build.AdditionalContexts {
				if dep, ok := strings.CutPrefix(c, types.ServicePrefix); ok && done[dep] != nil {
					select {
					case <-done[dep]:
					case <-ctx.Done():
						return ctx.Err()
					}
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

func (e *Engine) buildOne(ctx context.Context, p *types.Project, s *types.ServiceConfig, name string, pr display.Progress, o BuildOptions) (string, error) {
	b := s.Build
	if err := unsupportedBuild(b); err != nil {
		return "", err
	}
	if e.DryRun {
		return "", nil
	}
	opt := client.BuildOptions{Tags: append([]string{name}, b.Tags...), Args: map[string]*string{}, CacheFrom: b.CacheFrom, Target: b.Target,
		NetworkMode: b.Network, ExtraHosts: b.ExtraHosts.AsList(":"), NoCache: b.NoCache || o.NoCache, Pull: b.Pull || o.Pull,
		ShmSize: int64(b.ShmSize), Memory: o.Memory, Platform: s.Platform}
	if len(b.Platforms) == 1 {
		opt.Platform = b.Platforms[0]
	}
	slices.Sort(opt.ExtraHosts)
	for k, v := range b.Args {
		opt.Args[k] = v
	}
	for k, v := range types.NewMappingWithEquals(o.Args) {
		opt.Args[k] = v
	}
	for k, v := range opt.Args {
		if v == nil {
			if got, ok := p.Environment[k]; ok {
				opt.Args[k] = &got
			}
		}
	}
	opt.Labels = map[string]string{model.LabelProject: p.Name, model.LabelService: s.Name, model.LabelVersion: model.Version}
	for k, v := range b.Labels {
		opt.Labels[k] = v
	}
	for u, l := range b.Ulimits {
		x := &container.Ulimit{Name: u, Soft: int64(l.Single), Hard: int64(l.Single)}
		if l.Soft != 0 || l.Hard != 0 {
			x.Soft, x.Hard = int64(l.Soft), int64(l.Hard)
		}
		opt.Ulimits = append(opt.Ulimits, x)
	}
	r, dockerfile, err := e.buildContext(b)
	if err != nil {
		return "", err
	}
	defer r.Close()
	opt.Dockerfile = dockerfile
	id := ""
	err = e.Client.ImageBuild(ctx, r, opt, func(m client.Progress) error {
		if m.Aux != nil {
			var aux struct{ ID string }
			if json.Unmarshal(*m.Aux, &aux) == nil && aux.ID != "" {
				id = aux.ID
			}
		}
		if o.Quiet {
			return nil
		}
		if t := strings.TrimRight(m.Stream, "\n"); t != "" {
			pr.Print(t)
		} else if m.Status != "" && m.Progress == nil {
			pr.Print(strings.TrimSpace(m.ID + " " + m.Status))
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if id == "" {
		id, err = e.imageID(ctx, name)
	}
	return id, err
}

// unsupportedBuild names what the engine's /build cannot be told.
func unsupportedBuild(b *types.BuildConfig) error {
	switch {
	case b == nil:
		return errors.New("it has no build section")
	case len(b.Secrets) > 0, len(b.SSH) > 0:
		return errors.New("build secrets and ssh need a BuildKit session: build it with 'docker buildx bake', which speaks to this engine too")
	case len(b.Platforms) > 1:
		return errors.New("several platforms at once need a BuildKit session: build it with 'docker buildx bake', which speaks to this engine too")
	case len(b.AdditionalContexts) > 0:
		return errors.New("additional_contexts need a BuildKit session: build it with 'docker buildx bake', which speaks to this engine too")
	case b.Provenance != "" && b.Provenance != "false", b.SBOM != "" && b.SBOM != "false":
		return errors.New("attestations need a BuildKit session: build it with 'docker buildx bake', which speaks to this engine too")
	}
	return nil
}

// inlineDockerfile is the name in the context of a Dockerfile that is not there.
const inlineDockerfile = ".dockerfile.compose"

// buildContext opens a build's context as a tar stream and gives the name of the
// Dockerfile in it.
func (e *Engine) buildContext(b *types.BuildConfig) (io.ReadCloser, string, error) {
	dir := b.Context
	if strings.Contains(dir, "://") || strings.HasPrefix(dir, "git@") || strings.HasPrefix(dir, "github.com/") {
		return nil, "", fmt.Errorf("cannot use the context %s: remote contexts need a BuildKit session; clone it and give the folder", dir)
	}
	if st, err := os.Stat(dir); err != nil {
		return nil, "", fmt.Errorf("cannot use the build context: %w", err)
	} else if !st.IsDir() {
		return nil, "", fmt.Errorf("cannot use the build context %s: it is no folder", dir)
	}
	name, inline := b.Dockerfile, []byte(b.DockerfileInline)
	if name == "" {
		name = "Dockerfile"
	}
	abs := name
	if !filepath.IsAbs(abs) {
		abs = filepath.Join(dir, name)
	}
	rel, err := filepath.Rel(dir, abs)
	switch {
	case len(inline) > 0:
		name = inlineDockerfile
	case err != nil || rel == ".." || strings.HasPrefix(rel, ".."+string(filepath.Separator)):
		if inline, err = os.ReadFile(abs); err != nil {
			return nil, "", fmt.Errorf("cannot read the Dockerfile: %w", err)
		}
		name = inlineDockerfile
	default:
		if _, err := os.Stat(abs); err != nil {
			return nil, "", fmt.Errorf("cannot read the Dockerfile: %w", err)
		}
		name = filepath.ToSlash(rel)
	}
	ignore, err := readIgnore(dir, abs)
	if err != nil {
		return nil, "", err
	}
	pm, err := patternmatcher.New(ignore)
	if err != nil {
		return nil, "", fmt.Errorf("cannot use .dockerignore: %w", err)
	}
	r, w := io.Pipe()
	go func() {
		bw := bufio.NewWriterSize(w, 64<<10)
		err := packContext(bw, dir, name, inline, pm)
		if err == nil {
			err = bw.Flush()
		}
		w.CloseWithError(err)
	}()
	return r, name, nil
}

// ReadIgnore reads the patterns that a build leaves out of its context.
func ReadIgnore(b *types.BuildConfig) ([]string, error) {
	file := b.Dockerfile
	if file == "" {
		file = "Dockerfile"
	}
	if !filepath.IsAbs(file) {
		file = filepath.Join(b.Context, file)
	}
	return readIgnore(b.Context, file)
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

// readIgnore reads the patterns of the Dockerfile's own ignore file, or of the
// context's.
func readIgnore(dir, dockerfile string) ([]string, error) {
	for _, p := range []string{dockerfile + ".dockerignore", filepath.Join(dir, ".dockerignore")} {
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

func packContext(w io.Writer, dir, dockerfile string, inline []byte, pm *patternmatcher.PatternMatcher) error {
	tw := tar.NewWriter(w)
	if len(inline) > 0 {
		if err := tw.WriteHeader(&tar.Header{Name: dockerfile, Mode: 0o644, Size: int64(len(inline))}); err != nil {
			return err
		}
		if _, err := tw.Write(inline); err != nil {
			return err
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if p == "." {
			return nil
		}
		// The build needs these two, whatever is ignored.
		if p != dockerfile && p != ".dockerignore" {
			skip, err := pm.MatchesOrParentMatches(p)
			if err != nil {
				return err
			}
			if skip {
				if d.IsDir() && !pm.Exclusions() {
					return fs.SkipDir
				}
				if !d.IsDir() || !strings.HasPrefix(dockerfile, p+"/") {
					return nil
				}
			}
		}
		return packEntry(tw, root, p, d)
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func packEntry(tw *tar.Writer, root *os.Root, p string, d fs.DirEntry) error {
	fi, err := d.Info()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	link := ""
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		if link, err = root.Readlink(p); err != nil {
			return err
		}
	case !fi.Mode().IsRegular() && !fi.IsDir():
		return nil // sockets, pipes and devices are no content
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return err
	}
	h.Name = path.Clean(p)
	if fi.IsDir() {
		h.Name += "/"
	}
	// Who owns them here says nothing there, and caches would miss.
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	if err := tw.WriteHeader(h); err != nil || !fi.Mode().IsRegular() {
		return err
	}
	f, err := root.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(tw, io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		err = fmt.Errorf("%s became shorter while it was read", p)
	}
	return err
}
