package engine

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	mcontainer "github.com/moby/moby/api/types/container"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/container"
)

// ContainerList lists containers, the newest first. It reads published records
// alone: no lock of a container, no I/O unless sizes are asked for.
func (e *Engine) ContainerList(ctx context.Context, o ListOptions) ([]mcontainer.Summary, error) {
	f, err := e.listFilter(o)
	if err != nil {
		return nil, err
	}
	e.mu.RLock()
	records := make([]*container.Record, 0, len(e.units))
	for _, u := range e.units {
		records = append(records, u.rec.Load())
	}
	e.mu.RUnlock()
	slices.SortFunc(records, func(a, b *container.Record) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
	linked := e.linkNames(records)
	now := time.Now()
	named := imageNames{images: e.cfg.Images}
	out := make([]mcontainer.Summary, 0, len(records))
	for _, r := range records {
		if o.Limit > 0 && len(out) == o.Limit {
			break
		}
		if !f.match(r) {
			continue
		}
		s := summary(r, now)
		s.Image = named.name(ctx, r)
		s.Names = append(s.Names, linked[r.ID]...)
		if r.Pod != nil {
			e.markMember(&s, r)
		}
		if o.Size {
			s.SizeRw, s.SizeRootFs = e.sizes(ctx, r)
		}
		out = append(out, s)
	}
	return out, nil
}

func summary(r *container.Record, now time.Time) mcontainer.Summary {
	s := mcontainer.Summary{
		ID: r.ID, Names: []string{"/" + r.Name}, Image: r.Image.Ref, ImageID: r.Image.ID, Command: command(r),
		Created: r.Created.Unix(), Ports: portSummary(r), Labels: r.Config.Labels, State: r.State.Status, Status: status(r.State, now),
		NetworkSettings: &mcontainer.NetworkSettingsSummary{Networks: sharedEndpoints(r)}, Mounts: mountPoints(r),
	}
	s.HostConfig.NetworkMode = string(r.HostConfig.NetworkMode)
	s.HostConfig.Annotations = r.HostConfig.Annotations
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	h := mcontainer.HealthSummary{Status: mcontainer.NoHealthcheck}
	if r.State.Health != nil {
		h = mcontainer.HealthSummary{Status: r.State.Health.Status, FailingStreak: r.State.Health.FailingStreak}
	}
	s.Health = &h
	if r.Image.Manifest.Digest != "" {
		s.ImageManifestDescriptor = manifestOf(r)
	}
	return s
}

// manifestOf is the manifest that the container was made of.
func manifestOf(r *container.Record) *ocispec.Descriptor {
	d := r.Image.Manifest
	d.Platform = &ocispec.Platform{Architecture: r.Image.Platform.Architecture, OS: r.Image.Platform.OS, Variant: r.Image.Platform.Variant}
	return &d
}

// command is the command line as lists show it.
func command(r *container.Record) string {
	if len(r.Args) == 0 {
		return r.Path
	}
	var b strings.Builder
	b.WriteString(r.Path)
	for _, a := range r.Args {
		b.WriteByte(' ')
		if strings.Contains(a, " ") {
			b.WriteByte('\'')
			b.WriteString(a)
			b.WriteByte('\'')
		} else {
			b.WriteString(a)
		}
	}
	return b.String()
}

// portSummary lists exposed and published ports while the container runs.
func portSummary(r *container.Record) []mcontainer.PortSummary {
	out := []mcontainer.PortSummary{}
	if !r.State.Running() || len(r.Config.ExposedPorts)+len(r.Ports) == 0 {
		return out
	}
	for p := range r.Config.ExposedPorts {
		if len(r.Ports[p]) == 0 {
			out = append(out, mcontainer.PortSummary{PrivatePort: p.Num(), Type: string(p.Proto())})
		}
	}
	for p, bindings := range r.Ports {
		for _, b := range bindings {
			hp, _ := parsePort(b.HostPort)
			out = append(out, mcontainer.PortSummary{IP: b.HostIP, PrivatePort: p.Num(), PublicPort: hp, Type: string(p.Proto())})
		}
	}
	slices.SortFunc(out, func(a, b mcontainer.PortSummary) int {
		return cmp.Or(cmp.Compare(a.PrivatePort, b.PrivatePort), cmp.Compare(a.Type, b.Type), compareAddr(a.IP, b.IP), cmp.Compare(a.PublicPort, b.PublicPort))
	})
	return out
}

func compareAddr(a, b netip.Addr) int { return a.Compare(b) }

// imageNames tells what the images of containers are called: as they were asked
// for, unless that name is by now another image's. It asks once for each name.
type imageNames struct {
	images Images
	ids    map[string]string
}

func (n *imageNames) name(ctx context.Context, r *container.Record) string {
	ref, id := r.Image.Ref, r.Image.ID
	if ref == "" || ref == id {
		return id
	}
	k, ok := n.images.(interface {
		IDOf(ctx context.Context, ref, platform string) string
	})
	if !ok {
		return ref
	}
	p := ""
	if r.Image.Platform.OS != "" {
		p = platforms.Format(r.Image.Platform)
	}
	key := p + " " + ref
	now, known := n.ids[key]
	if !known {
		now = k.IDOf(ctx, ref, p)
		if n.ids == nil {
			n.ids = map[string]string{}
		}
		n.ids[key] = now
	}
	if now != id {
		return id
	}
	return ref
}
