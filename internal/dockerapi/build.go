package dockerapi

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"

	"github.com/moby/moby/api/types/build"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Builds is the builder of images: its handler serves paths without a version.
type Builds interface {
	http.Handler
	// Installed tells whether there is one.
	Installed() bool
	// HasCache tells whether there is anything to prune.
	HasCache() bool
	// Prune drops cache; query is that of POST /build/prune.
	Prune(ctx context.Context, query string) (build.CachePruneReport, error)
	// Usage tells what the build cache takes without starting the builder.
	Usage(ctx context.Context) (build.DiskUsage, error)
}

// apiVersionHeader tells the builder the version that a client asked for.
const apiVersionHeader = "Servin-Api-Version"

// confinedHeader tells it why a client may not have steps with the host's privileges or network.
const confinedHeader = "Servin-Confined"

type buildsAPI struct {
	b   Builds
	sys System
}

func (a buildsAPI) there() bool { return a.b != nil && a.b.Installed() }

func (a buildsAPI) build(w *response, r *request) error {
	if !a.there() {
		return noBuilds(w, r)
	}
	return a.hand(w, r, "/build")
}

func (a buildsAPI) cancel(w *response, r *request) error {
	if !a.there() {
		return noBuilds(w, r)
	}
	return a.hand(w, r, "/build/cancel")
}

func (a buildsAPI) prune(w *response, r *request) error {
	if !a.there() || !a.b.HasCache() {
		return pruneBuildCache(w, r)
	}
	return a.hand(w, r, "/build/prune")
}

func (a buildsAPI) session(w *response, r *request) error {
	if !a.there() {
		return noSession(w, r)
	}
	return a.handUpgraded(w, r, "/session")
}

func (a buildsAPI) grpc(w *response, r *request) error {
	if !a.there() {
		return noSession(w, r)
	}
	return a.handUpgraded(w, r, "/grpc")
}

// handUpgraded hands over a request whose connection becomes one of HTTP/2. As with
// Docker the header Upgrade is enough to ask for that; proxies want Connection too.
func (a buildsAPI) handUpgraded(w *response, r *request, path string) error {
	switch proto := r.Header.Get("Upgrade"); {
	case proto == "":
		return fault.New(fault.Invalid, "no upgrade proto in request")
	case !strings.EqualFold(proto, "h2c"):
		return fault.New(fault.Invalid, "protocol %s not supported", proto)
	}
	r.Header.Set("Connection", "Upgrade")
	return a.hand(w, r, path)
}

// hand gives a request to the builder, both directions at once.
func (a buildsAPI) hand(w *response, r *request, path string) error {
	_ = http.NewResponseController(w).EnableFullDuplex()
	req := r.Request.Clone(r.Context())
	req.URL.Path, req.URL.RawPath = path, ""
	req.RequestURI = strings.TrimSuffix(path+"?"+req.URL.RawQuery, "?")
	req.Header.Set(apiVersionHeader, r.version.String())
	req.Header.Del(confinedHeader)
	if err := a.sys.MayActAsHost(r.Context()); err != nil {
		req.Header.Set(confinedHeader, url.QueryEscape(err.Error()))
	}
	a.b.ServeHTTP(w, req)
	return nil
}

// pruneCache drops the build cache that a prune of everything is about: what no
// image shares, or with All the rest too.
func pruneCache(ctx context.Context, b Builds, o api.PruneRequest, rep *api.PruneReport) error {
	if b == nil || !b.Installed() || !b.HasCache() {
		return nil
	}
	q := url.Values{}
	if o.All {
		q.Set("all", "1")
	}
	if until := o.Filters["until"]; len(until) > 0 {
		f, err := json.Marshal(map[string]map[string]bool{"until": until})
		if err != nil {
			return err
		}
		q.Set("filters", string(f))
	}
	got, err := b.Prune(ctx, q.Encode())
	if err != nil {
		return err
	}
	rep.BuildCache = got.CachesDeleted
	rep.SpaceReclaimed += got.SpaceReclaimed
	return nil
}
