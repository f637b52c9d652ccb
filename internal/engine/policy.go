package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/policy"
	vol "github.com/cloudos-io/cloudos/internal/volume"
)

// policed tells whether any rule is in force; nothing is gathered otherwise.
func (e *Engine) policed() bool { return e.cfg.Policy != nil && e.cfg.Policy.Active() }

// mayCreate asks whether a container may be made, before anything of it is.
func (e *Engine) mayCreate(ctx context.Context, cfg *mcontainer.Config, hc *mcontainer.HostConfig, img image.Resolved, endpoints map[string]*network.EndpointSettings) error {
	c, err := e.policyContainer(ctx, cfg, hc, img, endpoints)
	if err != nil {
		return err
	}
	return policy.Refuse(e.cfg.Policy.Create(ctx, c))
}

func (e *Engine) policyContainer(ctx context.Context, cfg *mcontainer.Config, hc *mcontainer.HostConfig, img image.Resolved, endpoints map[string]*network.EndpointSettings) (policy.Container, error) {
	c := policy.Container{
		Caller: caller.From(ctx), Image: cfg.Image, ImageID: img.ID.String(), Digest: img.Manifest.Digest.String(),
		Names: e.imageNames(ctx, img), Config: cfg, HostConfig: hc, Networks: networkNames(hc, endpoints),
	}
	points, err := vol.Resolve(cfg, hc, e.volumesOf)
	if err != nil {
		return c, err
	}
	for _, p := range points {
		c.Mounts = append(c.Mounts, e.policyMount(ctx, p))
	}
	return c, nil
}

// imageNames are all names that an image has here.
func (e *Engine) imageNames(ctx context.Context, img image.Resolved) []string {
	if img.ID == "" {
		return nil
	}
	i, err := e.cfg.Images.Inspect(ctx, img.ID.String(), "", false)
	if err != nil {
		return []string{img.Ref}
	}
	return append(slices.Clone(i.RepoTags), i.RepoDigests...)
}

func networkNames(hc *mcontainer.HostConfig, endpoints map[string]*network.EndpointSettings) []string {
	out := slices.Sorted(maps.Keys(endpoints))
	if hc.NetworkMode.IsContainer() {
		out = append(out, string(hc.NetworkMode))
	}
	return out
}

// policyMount describes a mount; a volume by what it really mounts.
func (e *Engine) policyMount(ctx context.Context, p vol.Point) policy.Mount {
	m := policy.Mount{Type: string(p.Type), Source: p.Source, Target: p.Target, ReadOnly: p.ReadOnly}
	switch p.Type {
	case mount.TypeBind:
		m.Source = realPath(p.Source)
	case mount.TypeVolume:
		m.Source = p.Name
		opts, driver := p.DriverOpts, p.Driver
		if p.Name != "" {
			if v, err := e.cfg.Volumes.Inspect(ctx, p.Name); err == nil {
				opts, driver = v.Options, v.Driver
			}
		}
		describeVolume(&m, p.Name, driver, opts)
	}
	return m
}

// describeVolume tells what a volume of the local driver mounts.
func describeVolume(m *policy.Mount, name, driver string, opts map[string]string) {
	if driver != "" && driver != vol.Driver || opts["device"] == "" {
		return
	}
	if vol.IsBind(opts) {
		m.Type, m.Source, m.Volume = "bind", realPath(opts["device"]), name
		return
	}
	m.Device = opts["type"] + ":" + opts["device"]
}

// realPath follows links as far as the path exists; what is missing below is made
// there.
func realPath(p string) string {
	p = filepath.Clean(p)
	rest := ""
	for at := p; ; at = filepath.Dir(at) {
		real, err := filepath.EvalSymlinks(at)
		if err == nil {
			return filepath.Join(real, rest)
		}
		if !errors.Is(err, os.ErrNotExist) || at == "/" {
			return p
		}
		rest = filepath.Join(filepath.Base(at), rest)
	}
}

// asked is a container that exists, as policies see it.
func asked(c caller.Caller, r *container.Record) policy.Container {
	return policy.Container{
		Caller: c, Image: r.Config.Image, ImageID: r.Image.ID, Digest: r.Image.Manifest.Digest.String(), Names: []string{r.Image.Ref},
		Config: r.Config, HostConfig: r.HostConfig,
	}
}

func (e *Engine) mayExec(ctx context.Context, r *container.Record, user string, privileged bool) error {
	return policy.Refuse(e.cfg.Policy.Exec(ctx, policy.Exec{Container: asked(caller.From(ctx), r), User: user, Privileged: privileged}))
}

func (e *Engine) mayLimit(ctx context.Context, r *container.Record, hc *mcontainer.HostConfig) error {
	c := asked(caller.From(ctx), r)
	c.HostConfig = hc
	return policy.Refuse(e.cfg.Policy.Resources(c))
}

func (e *Engine) mayConnect(ctx context.Context, r *container.Record, network string) error {
	c := asked(caller.From(ctx), r)
	c.Networks = []string{network}
	return policy.Refuse(e.cfg.Policy.Networks(c))
}

// mayMakeVolume asks about volumes that mount something of the host's.
func (e *Engine) mayMakeVolume(ctx context.Context, req volume.CreateRequest) error {
	m := policy.Mount{Type: "volume", Source: req.Name}
	describeVolume(&m, req.Name, req.Driver, req.DriverOpts)
	if m.Type == "volume" && m.Device == "" {
		return nil
	}
	return policy.Refuse(e.cfg.Policy.Mounts(policy.Container{
		Caller: caller.From(ctx), Config: &mcontainer.Config{}, HostConfig: &mcontainer.HostConfig{}, Mounts: []policy.Mount{m},
	}))
}

// mayBind opens the source of a bind when a container starts and asks about where
// it really lies, on behalf of who made the container: it may have become a link
// since. The mount is made of the descriptor.
func (e *Engine) mayBind(r *container.Record, p vol.Point) (*os.File, error) {
	f, err := os.OpenFile(p.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot bind %s: %w", p.Source, err)
	}
	at, err := os.Readlink(fdPath(f))
	if err == nil {
		c := asked(r.Creator, r)
		c.Mounts = []policy.Mount{{Type: "bind", Source: at, Target: p.Target, ReadOnly: p.ReadOnly}}
		err = policy.Refuse(e.cfg.Policy.Mounts(c))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// PolicyTest tells what the policy says to a request, without carrying it out.
func (e *Engine) PolicyTest(ctx context.Context, req CreateRequest) ([]policy.Violation, error) {
	if !e.policed() {
		return nil, nil
	}
	cfg, hc := req.Config, req.HostConfig
	if hc == nil {
		hc = &mcontainer.HostConfig{}
	}
	if _, err := oci.Validate(cfg, hc, e.cfg.Host); err != nil {
		return nil, err
	}
	var img image.Resolved
	if cfg.Image != "" {
		var err error
		// An image that is not here can be judged by its name and nothing else.
		if img, err = e.cfg.Images.Resolve(ctx, cfg.Image, req.Platform); err != nil && !fault.Is(err, fault.NotFound) {
			return nil, err
		}
	}
	if img.ID != "" {
		if err := oci.Merge(cfg, img); err != nil {
			return nil, err
		}
	}
	oci.ApplyDefaults(hc, e.cfg.Host, e.cfg.Defaults)
	if req.Extra.UsernsAuto {
		hc.UsernsMode = "auto"
	}
	endpoints, err := e.endpoints(hc, req.Networking)
	if err != nil {
		return nil, err
	}
	c, err := e.policyContainer(ctx, cfg, hc, img, endpoints)
	if err != nil {
		return nil, err
	}
	return e.cfg.Policy.Create(ctx, c), nil
}

// mayAdd asks about what more adds to a container that is judged elsewhere.
func (e *Engine) mayAdd(ctx context.Context, cfg *mcontainer.Config, hc, more *mcontainer.HostConfig) error {
	if !e.policed() {
		return nil
	}
	plain, err := e.policyContainer(ctx, cfg, hc, image.Resolved{}, nil)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, v := range e.cfg.Policy.Create(ctx, plain) {
		known[fmt.Sprintf("%+v", v)] = true
	}
	with := plain
	with.HostConfig, with.Networks = more, networkNames(more, nil)
	return policy.Refuse(slices.DeleteFunc(e.cfg.Policy.Create(ctx, with), func(v policy.Violation) bool { return known[fmt.Sprintf("%+v", v)] }))
}

// MayActAsHost asks whether who calls may do what makes him root of this host by another way than
// a container: it is the question of a privileged container in the host's network.
func (s *SystemService) MayActAsHost(ctx context.Context) error {
	err := s.e.mayAdd(ctx, &mcontainer.Config{}, &mcontainer.HostConfig{}, &mcontainer.HostConfig{Privileged: true, NetworkMode: network.NetworkHost})
	if err != nil {
		return fault.New(fault.Of(err), "this takes the right to run privileged containers in the host's network: %w", err)
	}
	return nil
}
