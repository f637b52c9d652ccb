package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config/types"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/cmd/buildctl/build"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/tonistiigi/fsutil"

	"github.com/cloudos-io/cloudos/buildd/internal/upload"
	"github.com/cloudos-io/cloudos/internal/cli/config"
)

// plan turns flags into what BuildKit is asked for. Closing it lets go of what
// was read from standard input.
type plan struct {
	opt   client.SolveOpt
	trees []*upload.Tree
}

func (p *plan) close() {
	for _, t := range p.trees {
		_ = t.Close()
	}
}

func makePlan(ctx context.Context, f *flags, stdin io.Reader, getenv func(string) string) (_ *plan, err error) {
	p := &plan{opt: client.SolveOpt{Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{}, LocalMounts: map[string]fsutil.FS{}}}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if err := p.context(ctx, f, stdin); err != nil {
		return nil, err
	}
	for _, step := range []func(*flags, func(string) string) error{p.values, p.limits, p.further, p.attestations, p.outputs, p.cache, p.session} {
		if err := step(f, getenv); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// isURL tells a context that the builder fetches.
func isURL(s string) bool {
	for _, prefix := range []string{"http://", "https://", "git://", "ssh://", "github.com/", "git@"} {
		if strings.HasPrefix(s, prefix) {
			return true
		}
	}
	return false
}

// context finds the context and the Dockerfile.
func (p *plan) context(ctx context.Context, f *flags, stdin io.Reader) error {
	at := f.args[0]
	attrs := p.opt.FrontendAttrs
	if f.file == "-" {
		if at == "-" {
			return usageError{errors.New("standard input cannot be both the context and the Dockerfile")}
		}
		b, err := io.ReadAll(io.LimitReader(stdin, maxDockerfile+1))
		if err != nil {
			return fmt.Errorf("cannot read the Dockerfile: %w", err)
		}
		if err := p.dockerfile(b); err != nil {
			return err
		}
	}
	switch {
	case at == "-":
		return p.standardInput(ctx, f, stdin)
	case isURL(at):
		attrs["context"] = at
		if f.file == "-" {
			attrs["dockerfilekey"] = "dockerfile"
		} else if f.file != "" {
			attrs["filename"] = f.file
		}
		return nil
	}
	dir, err := fsutil.NewFS(at)
	if err != nil {
		return fmt.Errorf("cannot use %s as a context: %w", at, err)
	}
	p.opt.LocalMounts["context"] = dir
	if abs, err := filepath.Abs(at); err == nil {
		p.opt.SharedKey = abs
	}
	if f.file == "-" {
		return nil
	}
	file := f.file
	if file == "" {
		file = filepath.Join(at, "Dockerfile")
		if _, err := os.Lstat(file); os.IsNotExist(err) {
			if _, err := os.Lstat(filepath.Join(at, "dockerfile")); err == nil {
				file = filepath.Join(at, "dockerfile")
			}
		}
	}
	if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("cannot read the Dockerfile: %w", err)
	}
	in, err := fsutil.NewFS(filepath.Dir(file))
	if err != nil {
		return fmt.Errorf("cannot read the Dockerfile: %w", err)
	}
	p.opt.LocalMounts["dockerfile"] = in
	attrs["filename"] = filepath.Base(file)
	return nil
}

const maxDockerfile = 16 << 20

// dockerfile offers a Dockerfile that has no file.
func (p *plan) dockerfile(b []byte) error {
	if len(b) > maxDockerfile {
		return fmt.Errorf("the Dockerfile is longer than %d bytes", maxDockerfile)
	}
	t, err := upload.Empty(os.TempDir())
	if err != nil {
		return err
	}
	p.trees = append(p.trees, t)
	if err := t.Put("Dockerfile", b); err != nil {
		return err
	}
	p.opt.LocalMounts["dockerfile"] = t
	p.opt.FrontendAttrs["filename"] = "Dockerfile"
	return nil
}

// standardInput is a Dockerfile or the tar of a context.
func (p *plan) standardInput(ctx context.Context, f *flags, stdin io.Reader) error {
	br := bufio.NewReaderSize(stdin, 64<<10)
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("cannot read the context: %w", err)
	}
	if !upload.IsArchive(head) {
		b, err := io.ReadAll(io.LimitReader(br, maxDockerfile+1))
		if err != nil {
			return fmt.Errorf("cannot read the Dockerfile: %w", err)
		}
		if err := p.dockerfile(b); err != nil {
			return err
		}
		// A Dockerfile alone has nothing to copy.
		empty, err := upload.Empty(os.TempDir())
		if err != nil {
			return err
		}
		p.trees = append(p.trees, empty)
		p.opt.LocalMounts["context"] = empty
		return nil
	}
	t, err := upload.Read(ctx, br, os.TempDir())
	if err != nil {
		return err
	}
	p.trees = append(p.trees, t)
	p.opt.LocalMounts["context"], p.opt.LocalMounts["dockerfile"] = t, t
	if f.file != "" {
		p.opt.FrontendAttrs["filename"] = f.file
	}
	return nil
}

// values are what the Dockerfile sees.
func (p *plan) values(f *flags, _ func(string) string) error {
	a := p.opt.FrontendAttrs
	for _, v := range f.buildArgs {
		name, value, ok := strings.Cut(v, "=")
		if !ok {
			if value, ok = os.LookupEnv(name); !ok {
				continue
			}
		}
		a["build-arg:"+name] = value
	}
	for _, v := range f.labels {
		name, value, _ := strings.Cut(v, "=")
		a["label:"+name] = value
	}
	if f.target != "" {
		a["target"] = f.target
	}
	var ps []string
	for _, v := range f.platforms {
		if v != "local" {
			if _, err := platforms.Parse(v); err != nil {
				return usageError{fmt.Errorf("--platform %q: %w", v, err)}
			}
		} else {
			v = platforms.DefaultString()
		}
		ps = append(ps, v)
	}
	if len(ps) > 0 {
		a["platform"] = strings.Join(ps, ",")
	}
	if f.noCache {
		a["no-cache"] = ""
	} else if len(f.noCacheFilter) > 0 {
		a["no-cache"] = strings.Join(f.noCacheFilter, ",")
	}
	a["image-resolve-mode"] = "local"
	if f.pull {
		a["image-resolve-mode"] = "pull"
	}
	return nil
}

// limits are what RUN may use.
func (p *plan) limits(f *flags, _ func(string) string) error {
	a := p.opt.FrontendAttrs
	switch f.network {
	case "", "default", "bridge":
	case "none":
		a["force-network-mode"] = f.network
	case "host":
		a["force-network-mode"] = f.network
		p.opt.AllowedEntitlements = append(p.opt.AllowedEntitlements, string(entitlements.EntitlementNetworkHost))
	default:
		return usageError{fmt.Errorf("--network %q is not supported for builds: default, none and host are", f.network)}
	}
	for _, v := range f.allow {
		if _, _, err := entitlements.Parse(v); err != nil {
			return usageError{fmt.Errorf("--allow %q: %w", v, err)}
		}
		p.opt.AllowedEntitlements = append(p.opt.AllowedEntitlements, v)
	}
	var hosts []string
	for _, v := range f.addHosts {
		name, ip, ok := strings.Cut(v, "=")
		if !ok {
			name, ip, ok = strings.Cut(v, ":")
		}
		if !ok {
			return usageError{fmt.Errorf("--add-host %q is not HOST:IP", v)}
		}
		hosts = append(hosts, name+"="+strings.Trim(ip, "[]"))
	}
	if len(hosts) > 0 {
		a["add-hosts"] = strings.Join(hosts, ",")
	}
	if len(f.ulimits) > 0 {
		a["ulimit"] = strings.Join(f.ulimits, ",")
	}
	for _, x := range []struct{ flag, v, attr string }{{"shm-size", f.shmSize, "shm-size"}, {"memory", f.memory, "memory"}, {"memory-swap", f.memorySwap, "memswap"}} {
		if x.v == "" {
			continue
		}
		n, err := size(x.flag, x.v)
		if err != nil {
			return err
		}
		a[x.attr] = n
	}
	for attr, n := range map[string]int64{"cpushares": f.cpuShares, "cpuperiod": f.cpuPeriod, "cpuquota": f.cpuQuota} {
		if n != 0 {
			a[attr] = strconv.FormatInt(n, 10)
		}
	}
	for attr, v := range map[string]string{"cpusetcpus": f.cpusetCPUs, "cpusetmems": f.cpusetMems, "cgroup-parent": f.cgroupParent} {
		if v != "" {
			a[attr] = v
		}
	}
	return nil
}

// further contexts are named in the Dockerfile.
func (p *plan) further(f *flags, _ func(string) string) error {
	for _, v := range f.contexts {
		name, value, err := pair("build-context", v)
		if err != nil {
			return err
		}
		if named, err := reference.ParseNormalizedNamed(name); err == nil {
			name = strings.TrimSuffix(reference.FamiliarString(named), ":latest")
		}
		switch scheme, rest, _ := strings.Cut(value, "://"); {
		case scheme == "oci-layout":
			path, ref, _ := strings.Cut(rest, "@")
			stores, err := build.ParseOCILayout([]string{name + "=" + path})
			if err != nil {
				return fmt.Errorf("cannot use --build-context %s: %w", v, err)
			}
			p.opt.OCIStores = stores
			p.opt.FrontendAttrs["context:"+name] = "oci-layout://" + name + "@" + ref
		case isURL(value) || scheme == "docker-image" || scheme == "target":
			p.opt.FrontendAttrs["context:"+name] = value
		default:
			dir, err := fsutil.NewFS(value)
			if err != nil {
				return fmt.Errorf("cannot use --build-context %s: %w", v, err)
			}
			local := "context-" + strconv.Itoa(len(p.opt.LocalMounts))
			p.opt.LocalMounts[local] = dir
			p.opt.FrontendAttrs["context:"+name] = "local:" + local
		}
	}
	return nil
}

// attestations are put beside the image.
func (p *plan) attestations(f *flags, _ func(string) string) error {
	for _, v := range f.attests {
		fields := strings.Split(v, ",")
		kind := ""
		var rest []string
		for _, x := range fields {
			if t, ok := strings.CutPrefix(x, "type="); ok {
				kind = t
			} else {
				rest = append(rest, x)
			}
		}
		if kind == "" {
			return usageError{fmt.Errorf("--attest %q names no type", v)}
		}
		p.opt.FrontendAttrs["attest:"+kind] = strings.Join(rest, ",")
	}
	for kind, v := range map[string]string{"sbom": f.sbom, "provenance": f.provenance} {
		switch v {
		case "", "false":
		case "true":
			p.opt.FrontendAttrs["attest:"+kind] = ""
		default:
			p.opt.FrontendAttrs["attest:"+kind] = v
		}
	}
	return nil
}

// outputs say where the result goes.
func (p *plan) outputs(f *flags, _ func(string) string) error {
	var names []string
	for _, t := range f.tags {
		named, err := reference.ParseNormalizedNamed(t)
		if err != nil {
			return usageError{fmt.Errorf("--tag %q: %w", t, err)}
		}
		names = append(names, reference.TagNameOnly(named).String())
	}
	outs := f.outputs
	if f.push {
		outs = append(outs, "type=registry")
	}
	if f.load || len(outs) == 0 {
		outs = append(outs, "type=moby")
	}
	for i, o := range outs {
		switch {
		case o == "-":
			outs[i] = "type=tar,dest=-"
		case !strings.Contains(o, "="):
			outs[i] = "type=local,dest=" + o
		case o == "type=docker": // without a destination it is the engine
			outs[i] = "type=moby"
		case o == "type=registry" || strings.HasPrefix(o, "type=registry,"):
			outs[i] = "type=image,push=true" + strings.TrimPrefix(o, "type=registry")
		}
	}
	list, err := build.ParseOutput(outs)
	if err != nil {
		return usageError{err}
	}
	for _, e := range list {
		switch e.Type {
		case "cacheonly": // nothing is written
			continue
		case "moby", client.ExporterImage, client.ExporterOCI, client.ExporterDocker:
			if e.Attrs["name"] == "" && len(names) > 0 {
				e.Attrs["name"] = strings.Join(names, ",")
			}
			if e.Attrs["push"] == "true" && e.Attrs["name"] == "" {
				return usageError{errors.New("a name is needed to push the image: --tag")}
			}
			for _, v := range f.annotations {
				name, value, err := pair("annotation", v)
				if err != nil {
					return err
				}
				if !strings.Contains(name, ":") {
					name = "manifest:" + name
				}
				level, key, _ := strings.Cut(name, ":")
				e.Attrs["annotation-"+level+"."+key] = value
			}
		}
		p.opt.Exports = append(p.opt.Exports, e)
	}
	return nil
}

// cache is taken from and left elsewhere.
func (p *plan) cache(f *flags, _ func(string) string) error {
	plain := func(list []string) []string {
		var out []string
		for _, v := range list {
			if !strings.Contains(v, "type=") {
				v = "type=registry,ref=" + v
			}
			out = append(out, v)
		}
		return out
	}
	var err error
	if p.opt.CacheImports, err = build.ParseImportCache(plain(f.cacheFrom)); err != nil {
		return usageError{err}
	}
	if p.opt.CacheExports, err = build.ParseExportCache(plain(f.cacheTo)); err != nil {
		return usageError{err}
	}
	return nil
}

// session is what the builder may ask of this side.
func (p *plan) session(f *flags, getenv func(string) string) error {
	own, err := config.Load(config.Dir(getenv))
	if err != nil {
		return err
	}
	creds := config.Credentials(own, getenv)
	p.opt.Session = []session.Attachable{authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
		AuthConfigProvider: func(ctx context.Context, host string, _ []string, _ authprovider.ExpireCachedAuthCheck) (types.AuthConfig, error) {
			if host == "registry-1.docker.io" {
				host = "docker.io"
			}
			a, err := creds.Get(ctx, host)
			if err != nil || a == nil {
				return types.AuthConfig{}, err
			}
			return types.AuthConfig{Username: a.Username, Password: a.Password, Auth: a.Auth, ServerAddress: a.ServerAddress,
				IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}, nil
		},
	})}
	if len(f.secrets) > 0 {
		s, err := build.ParseSecret(f.secrets)
		if err != nil {
			return usageError{err}
		}
		p.opt.Session = append(p.opt.Session, s)
	}
	if len(f.ssh) > 0 {
		agents, err := build.ParseSSH(f.ssh)
		if err != nil {
			return usageError{err}
		}
		s, err := sshprovider.NewSSHAgentProvider(agents)
		if err != nil {
			return fmt.Errorf("cannot offer SSH: %w", err)
		}
		p.opt.Session = append(p.opt.Session, s)
	}
	return nil
}
