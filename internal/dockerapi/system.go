package dockerapi

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// systemAPI serves what is about the engine as a whole.
type systemAPI struct {
	b      System
	builds Builds
}

// ping tells clients what they talk to. It must not wait for anything.
func ping(w *response, r *request) error {
	h := w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Builder-Version", string(build.BuilderBuildKit))
	h.Set("Swarm", "inactive")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		w.WriteHeader(http.StatusOK)
		return nil
	}
	_, err := w.Write([]byte("OK"))
	return err
}

func (a systemAPI) version(w *response, r *request) error {
	v, err := a.b.Version(r.Context())
	if err != nil {
		return err
	}
	v.APIVersion, v.MinAPIVersion = MaxAPIVersion, MinAPIVersion
	v.Components = slices.Clone(v.Components)
	for i, c := range v.Components {
		if c.Name == "Engine" { // docker version prints this one's details
			d := maps.Clone(c.Details)
			if d == nil {
				d = map[string]string{}
			}
			d["ApiVersion"], d["MinAPIVersion"] = MaxAPIVersion, MinAPIVersion
			v.Components[i].Details = d
		}
	}
	return w.json(http.StatusOK, v)
}

// legacyInfo is GET /info up to 1.49.
type legacyInfo struct {
	*system.Info
	RegistryConfig    *legacyRegistry `json:",omitempty"`
	ContainerdCommit  legacyCommit
	RuncCommit        legacyCommit
	InitCommit        legacyCommit
	BridgeNfIptables  bool
	BridgeNfIp6tables bool
}

type legacyRegistry struct {
	*registry.ServiceConfig
	AllowNondistributableArtifactsCIDRs     []string
	AllowNondistributableArtifactsHostnames []string
}

type legacyCommit struct {
	system.Commit
	Expected *string `json:",omitempty"` // up to 1.48
}

func shapeInfo(i *system.Info, v version) any {
	i.Labels = nonNil(i.Labels)
	if v < 44 && i.Runtimes != nil {
		i.Runtimes = maps.Clone(i.Runtimes)
		for k, rt := range i.Runtimes {
			rt.Status = nil
			i.Runtimes[k] = rt
		}
	}
	if v < 46 {
		i.Containerd = nil
	}
	if v < 49 {
		i.FirewallBackend = nil
	}
	if v < 50 {
		i.DiscoveredDevices = nil
	}
	if v < 53 {
		i.NRI = nil
	}
	if v >= 50 {
		return i
	}
	l := legacyInfo{Info: i}
	if i.RegistryConfig != nil {
		l.RegistryConfig = &legacyRegistry{ServiceConfig: i.RegistryConfig}
	}
	commit := func(c system.Commit) legacyCommit {
		if v >= 49 {
			return legacyCommit{Commit: c}
		}
		return legacyCommit{Commit: c, Expected: &c.ID}
	}
	l.ContainerdCommit, l.RuncCommit, l.InitCommit = commit(i.ContainerdCommit), commit(i.RuncCommit), commit(i.InitCommit)
	return l
}

func (a systemAPI) info(w *response, r *request) error {
	i, err := a.b.Info(r.Context())
	if err != nil {
		return err
	}
	c := *i // the engine may keep it
	return w.json(http.StatusOK, shapeInfo(&c, r.version))
}

// legacyUsage is disk usage as it was up to 1.51. Newer answers carry it too
// unless the client asks for verbose, which only a client that knows the new
// form does.
type legacyUsage struct {
	LayersSize int64               `json:"LayersSize,omitempty"`
	Images     any                 `json:"Images,omitzero"`
	Containers []container.Summary `json:"Containers,omitzero"`
	Volumes    []volume.Volume     `json:"Volumes,omitzero"`
	BuildCache []build.CacheRecord `json:"BuildCache,omitzero"`
}

var usageTypes = []string{
	string(system.ContainerObject), string(system.ImageObject),
	string(system.VolumeObject), string(system.BuildCacheObject),
}

func (a systemAPI) diskUsage(w *response, r *request) error {
	types := r.query["type"]
	if r.version < 42 || len(types) == 0 {
		types = usageTypes
	}
	for _, t := range types {
		if !slices.Contains(usageTypes, t) {
			return fault.New(fault.Invalid, "unknown object type: %s", t)
		}
	}
	verbose := r.version >= 52 && r.flag("verbose")
	du, err := a.b.DiskUsage(r.Context(), types, true)
	if err != nil {
		return err
	}
	wantCache := slices.Contains(types, string(system.BuildCacheObject))
	if wantCache && a.builds != nil {
		u, err := a.builds.Usage(r.Context())
		if err != nil {
			return err
		}
		du.BuildCacheUsage = &u
	}
	if wantCache && du.BuildCacheUsage == nil {
		du.BuildCacheUsage = &build.DiskUsage{}
	}
	var l legacyUsage
	if u := du.ImageUsage; u != nil {
		for i := range u.Items {
			shapeImage(&u.Items[i], max(r.version, 51))
		}
		l.LayersSize = u.TotalSize
		l.Images = legacySummaries(nonNil(u.Items), r.version)
	}
	if u := du.ContainerUsage; u != nil {
		shapeSummaries(u.Items, r.version)
		l.Containers = nonNil(u.Items)
	}
	if u := du.VolumeUsage; u != nil {
		l.Volumes = nonNil(u.Items)
	}
	if u := du.BuildCacheUsage; u != nil {
		l.BuildCache = nonNil(u.Items)
	}
	if r.version < 52 {
		return w.json(http.StatusOK, l)
	}
	if verbose {
		return w.json(http.StatusOK, du)
	}
	// Brief: totals in the new form, objects in the old one.
	dropItems(&du)
	return w.json(http.StatusOK, struct {
		legacyUsage
		system.DiskUsage
	}{l, du})
}

func nonNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func dropItems(du *system.DiskUsage) {
	if u := du.ImageUsage; u != nil {
		u.Items = []mimage.Summary(nil)
	}
	if u := du.ContainerUsage; u != nil {
		u.Items = nil
	}
	if u := du.VolumeUsage; u != nil {
		u.Items = nil
	}
	if u := du.BuildCacheUsage; u != nil {
		u.Items = nil
	}
}

// Content types of the events stream.
const (
	typeJSONLines = "application/jsonl"
	typeNDJSON    = "application/x-ndjson"
	typeJSONSeq   = "application/json-seq"
)

// eventsType picks the form of the stream: what the client names in Accept
// (wildcards do not count), or the version's default.
func eventsType(r *request) string {
	for _, h := range r.Header.Values("Accept") {
		for _, part := range strings.Split(h, ",") {
			t, _, _ := strings.Cut(part, ";")
			switch t = strings.ToLower(strings.TrimSpace(t)); t {
			case typeJSONLines, typeNDJSON, typeJSONSeq:
				return t
			}
		}
	}
	if r.version < 52 {
		return "application/json"
	}
	return typeJSONLines
}

func (a systemAPI) events(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	since, err := r.moment("since")
	if err != nil {
		return err
	}
	until, err := r.moment("until")
	if err != nil {
		return err
	}
	if since.IsZero() && (r.query.Get("since") != "" || !until.IsZero()) {
		since = time.Unix(0, 0) // all that is remembered, not "from now on"
	}
	if !until.IsZero() && until.Before(since) {
		return fault.New(fault.Invalid, "`since` time (%s) cannot be after `until` time (%s)", r.query.Get("since"), r.query.Get("until"))
	}
	contentType := eventsType(r)
	ctx := r.Context()
	if !until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until.Add(time.Second))
		defer cancel()
	}
	s := newStream(w, contentType, patience)
	defer s.end()
	err = a.b.Events(ctx, since, until, f, func(m events.Message) error {
		if r.version < 46 && m.Type == events.ImageEventType && m.Action == events.ActionCreate {
			return nil
		}
		b, err := encodeLine(shapeEvent(m, r.version))
		if err != nil {
			return err
		}
		if contentType == typeJSONSeq {
			b = append([]byte{0x1e}, b...)
		}
		return s.send(b)
	})
	if err == nil || errors.Is(err, context.DeadlineExceeded) {
		s.begin()
		return nil
	}
	return err
}
