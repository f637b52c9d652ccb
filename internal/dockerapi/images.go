package dockerapi

import (
	"net/http"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/container"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/storage"
	"github.com/opencontainers/go-digest"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

// imagesAPI serves images; what transfers them is in transfer.go.
type imagesAPI struct {
	b   Images
	sys System
}

func (a imagesAPI) inUse(id digest.Digest) map[string]bool { return a.sys.ImageInUse(id.String()) }

// legacySummary is an image in a list up to 1.43.
type legacySummary struct {
	*mimage.Summary
	VirtualSize int64
}

func (a imagesAPI) list(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	if v := r.query.Get("filter"); v != "" && r.version < 25 && f["reference"] == nil {
		f["reference"] = map[string]bool{v: true}
	}
	manifests := r.version >= 47 && r.flag("manifests")
	if r.version >= 54 && r.flag("identity") && !manifests {
		return fault.New(fault.Invalid, "conflicting options: identity requires manifests=1")
	}
	l, err := a.b.List(r.Context(), f, r.flag("all"), r.version >= 42 && r.flag("shared-size"), manifests)
	if err != nil {
		return err
	}
	if l == nil {
		l = []mimage.Summary{}
	}
	for i := range l {
		if r.version >= 51 && l[i].Containers < 0 {
			l[i].Containers = int64(len(a.sys.ImageInUse(l[i].ID)))
		}
		shapeImage(&l[i], r.version)
	}
	return w.json(http.StatusOK, legacySummaries(l, r.version))
}

func shapeImage(s *mimage.Summary, v version) {
	if v < 43 && len(s.RepoTags) == 0 && len(s.RepoDigests) == 0 {
		s.RepoTags, s.RepoDigests = []string{"<none>:<none>"}, []string{"<none>@<none>"}
	}
	if s.RepoTags == nil {
		s.RepoTags = []string{}
	}
	if s.RepoDigests == nil {
		s.RepoDigests = []string{}
	}
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	if v < 48 {
		s.Descriptor = nil
	}
	if v < 51 {
		s.Containers = -1
	}
}

func legacySummaries(l []mimage.Summary, v version) any {
	if v >= 44 {
		return l
	}
	out := make([]legacySummary, len(l))
	for i := range l {
		out[i] = legacySummary{Summary: &l[i], VirtualSize: l[i].Size}
	}
	return out
}

// legacyImage is an image up to 1.51; nil fields are of still older versions.
type legacyImage struct {
	*mimage.InspectResponse
	Parent          string
	Comment         string
	DockerVersion   string
	Author          string
	Config          any
	VirtualSize     *int64            `json:",omitempty"` // up to 1.43
	Container       *string           `json:",omitempty"` // up to 1.44
	ContainerConfig *container.Config `json:",omitempty"` // up to 1.44
}

// legacyImageConfig is an image's configuration in 1.50 and 1.51.
type legacyImageConfig struct {
	User         string
	ExposedPorts map[string]struct{} `json:",omitempty"`
	Env          []string
	Cmd          []string
	Healthcheck  *container.HealthConfig `json:",omitempty"`
	ArgsEscaped  bool                    `json:",omitempty"`
	Volumes      map[string]struct{}
	WorkingDir   string
	Entrypoint   []string
	OnBuild      []string
	Labels       map[string]string
	StopSignal   string   `json:",omitempty"`
	Shell        []string `json:",omitempty"`
}

// olderImageConfig adds what up to 1.49 was shown though images never have it.
type olderImageConfig struct {
	Hostname     string
	Domainname   string
	AttachStdin  bool
	AttachStdout bool
	AttachStderr bool
	Tty          bool
	OpenStdin    bool
	StdinOnce    bool
	Image        string
	legacyImageConfig
}

func shapeImageInspect(i *mimage.InspectResponse, parent string, v version) any {
	if i.RepoTags == nil {
		i.RepoTags = []string{}
	}
	if i.RepoDigests == nil {
		i.RepoDigests = []string{}
	}
	if v < 53 {
		i.Identity = nil
	}
	if v >= 52 {
		return i
	}
	if v < 48 {
		i.Descriptor = nil
	}
	if i.GraphDriver == nil {
		i.GraphDriver = &storage.DriverData{Name: "overlay2"}
	}
	l := legacyImage{InspectResponse: i, Parent: parent, Comment: i.Comment, Author: i.Author}
	var c legacyImageConfig
	if ic := i.Config; ic != nil {
		c = legacyImageConfig{
			User: ic.User, ExposedPorts: ic.ExposedPorts, Env: ic.Env, Cmd: ic.Cmd,
			Healthcheck: ic.Healthcheck, ArgsEscaped: ic.ArgsEscaped, Volumes: ic.Volumes, //nolint:staticcheck // shown as it is
			WorkingDir: ic.WorkingDir, Entrypoint: ic.Entrypoint, OnBuild: ic.OnBuild,
			Labels: ic.Labels, StopSignal: ic.StopSignal, Shell: ic.Shell,
		}
	}
	l.Config = c
	if v < 50 {
		l.Config = olderImageConfig{legacyImageConfig: c}
	}
	if v < 45 {
		l.Container, l.ContainerConfig = new(string), &container.Config{}
	}
	if v < 44 {
		l.VirtualSize = &i.Size
		if i.Created == "" {
			i.Created = time.Time{}.Format(time.RFC3339Nano)
		}
	}
	return l
}

func (a imagesAPI) inspect(w *response, r *request) error {
	manifests := r.version >= 48 && r.flag("manifests")
	var platform string
	var err error
	if r.version >= 49 {
		if platform, err = parsePlatform(r.query.Get("platform")); err != nil {
			return err
		}
	}
	if manifests && platform != "" {
		return fault.New(fault.Invalid, "conflicting options: manifests and platform options cannot both be set")
	}
	i, err := a.b.Inspect(r.Context(), r.name, platform, manifests)
	if err != nil {
		return err
	}
	parent := ""
	if p, ok := a.b.(Parents); ok && r.version < 52 {
		parent = p.Parent(r.Context(), i.ID)
	}
	return w.json(http.StatusOK, shapeImageInspect(&i, parent, r.version))
}

func (a imagesAPI) history(w *response, r *request) error {
	var platform string
	var err error
	if r.version >= 48 {
		if platform, err = parsePlatform(r.query.Get("platform")); err != nil {
			return err
		}
	}
	h, err := a.b.History(r.Context(), r.name, platform)
	if err != nil {
		return err
	}
	if h == nil {
		h = []mimage.HistoryResponseItem{}
	}
	return w.json(http.StatusOK, h)
}

// tagReference joins repo and tag to a tagged name. "" where there is no repo.
func tagReference(repo, tag string) (string, error) {
	if repo == "" {
		return "", nil
	}
	n, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return "", fault.New(fault.Invalid, "invalid reference %q: %w", repo, err)
	}
	if _, ok := n.(reference.Digested); ok {
		return "", fault.New(fault.Invalid, "invalid reference %q: a digest cannot be given to an image", repo)
	}
	if tag != "" {
		if n, err = reference.WithTag(n, tag); err != nil {
			return "", fault.New(fault.Invalid, "invalid tag %q: %w", tag, err)
		}
	}
	return reference.TagNameOnly(n).String(), nil
}

func (a imagesAPI) tag(w *response, r *request) error {
	ref, err := tagReference(r.query.Get("repo"), r.query.Get("tag"))
	if err != nil {
		return err
	}
	if ref == "" {
		return fault.New(fault.Invalid, "invalid reference: repo cannot be empty")
	}
	if n, err := reference.ParseNormalizedNamed(ref); err == nil && reference.FamiliarName(n) == digest.Canonical.String() {
		return fault.New(fault.Invalid, "refusing to create an ambiguous tag using digest algorithm as name")
	}
	if err := a.b.Tag(r.Context(), r.name, ref); err != nil {
		return err
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (a imagesAPI) remove(w *response, r *request) error {
	if strings.TrimSpace(r.name) == "" {
		return fault.New(fault.Invalid, "image name cannot be blank")
	}
	if r.version >= 50 && len(r.query["platforms"]) > 0 {
		only, err := parsePlatformsJSON(r.query["platforms"])
		if err != nil {
			return err
		}
		p, ok := a.b.(PlatformRemover)
		if !ok {
			return fault.New(fault.Unsupported, "cannot remove single platforms of an image: remove the image, or pull it for one platform")
		}
		l, err := p.RemovePlatforms(r.Context(), r.name, only, image.RemoveOptions{Force: r.flag("force"), NoPrune: r.flag("noprune"), InUse: a.inUse})
		if err != nil {
			return err
		}
		return w.json(http.StatusOK, nonNil(l))
	}
	l, err := a.b.Remove(r.Context(), r.name, image.RemoveOptions{
		Force: r.flag("force"), NoPrune: r.flag("noprune"), InUse: a.inUse,
	})
	if err != nil {
		return err
	}
	if l == nil {
		l = []mimage.DeleteResponse{}
	}
	return w.json(http.StatusOK, l)
}

func (a imagesAPI) prune(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	rep, err := a.b.Prune(r.Context(), f, a.inUse)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, rep)
}

func (a imagesAPI) search(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	limit, err := r.number("limit")
	if err != nil {
		return err
	}
	n := 0
	if limit != nil {
		if n = *limit; n < 0 {
			return fault.New(fault.Invalid, "invalid limit specified: %d", n)
		}
	}
	s, ok := a.b.(Searcher)
	if !ok {
		return fault.New(fault.Unsupported, "cannot search: registries of the OCI distribution API have no search; look the image up on its registry's site")
	}
	res, err := s.Search(r.Context(), r.query.Get("term"), n, f, r.registryAuth())
	if err != nil {
		return err
	}
	if res == nil {
		res = []registry.SearchResult{}
	}
	return w.json(http.StatusOK, res)
}

func (a imagesAPI) attestations(w *response, r *request) error {
	list := r.query["platform"]
	if len(list) > 1 {
		return fault.New(fault.Invalid, "only one platform value is currently supported")
	}
	var platform string
	if len(list) == 1 {
		var err error
		if platform, err = parsePlatform(list[0]); err != nil {
			return err
		}
	}
	t, ok := a.b.(Attester)
	if !ok {
		return fault.New(fault.Unsupported, "cannot read attestations: the image store keeps none apart; inspect the image with manifests=1")
	}
	l, err := t.Attestations(r.Context(), r.name, platform, r.query["type"], r.flag("statement"))
	if err != nil {
		return err
	}
	if l == nil {
		l = []mimage.AttestationStatement{}
	}
	return w.json(http.StatusOK, l)
}

func (a imagesAPI) distribution(w *response, r *request) error {
	n, err := reference.ParseNormalizedNamed(r.name)
	if err != nil {
		return fault.New(fault.Invalid, "invalid reference %q: %w", r.name, err)
	}
	d, err := a.b.Distribution(r.Context(), reference.TagNameOnly(n).String(), r.registryAuth())
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, d)
}

func (a imagesAPI) login(w *response, r *request) error {
	var c registry.AuthConfig
	if err := r.decode(w, &c); err != nil {
		// The decoder's text may hold a piece of the password.
		if fault.Is(err, fault.Invalid) {
			return fault.New(fault.Invalid, "invalid JSON in the request body: expected credentials")
		}
		return err
	}
	res, err := a.b.Login(r.Context(), c)
	if err != nil {
		return err
	}
	if res.Status == "" {
		res.Status = "Login Succeeded"
	}
	return w.json(http.StatusOK, res)
}
