package dockerapi

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

// progressInterval bounds how often a moving counter is reported.
const progressInterval = 100 * time.Millisecond

// message is one line of a progress stream.
type message struct {
	Stream   string           `json:"stream,omitempty"`
	Status   string           `json:"status,omitempty"`
	Detail   *detail          `json:"progressDetail,omitempty"`
	Progress string           `json:"progress,omitempty"`
	ID       string           `json:"id,omitempty"`
	Error    *messageError    `json:"errorDetail,omitempty"`
	ErrorMsg string           `json:"error,omitempty"`
	Aux      *json.RawMessage `json:"aux,omitempty"`
}

type detail struct {
	Current int64 `json:"current,omitempty"`
	Total   int64 `json:"total,omitempty"`
}

type messageError struct {
	Code    int    `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
}

// progress writes a stream of messages. Errors go into the stream once it has
// begun; before that they are ordinary ones.
type progress struct {
	s       *stream
	version version

	mu   sync.Mutex
	last map[string]sent
}

type sent struct {
	action string
	at     time.Time
}

func newProgress(w *response, r *request) *progress {
	return &progress{s: newStream(w, "application/json", 0), version: r.version, last: map[string]sent{}}
}

func (p *progress) send(m message) {
	b, err := json.Marshal(m)
	if err != nil {
		return
	}
	// A client that is gone ends the request's context; nothing to do here.
	_ = p.s.send(append(b, "\r\n"...))
}

// report is the callback for package image; several goroutines call it.
func (p *progress) report(pr image.Progress) {
	if pr.Total > 0 && pr.Current > 0 && pr.Current < pr.Total {
		now := time.Now()
		p.mu.Lock()
		l := p.last[pr.ID]
		skip := l.action == pr.Action && now.Sub(l.at) < progressInterval
		if !skip {
			p.last[pr.ID] = sent{pr.Action, now}
		}
		p.mu.Unlock()
		if skip {
			return
		}
	}
	m := message{ID: pr.ID, Status: pr.Action}
	if pr.ID != "" && !strings.HasPrefix(pr.Action, "Pulling from") {
		m.Detail = &detail{Current: pr.Current, Total: pr.Total}
	}
	if p.version < 52 && pr.Current > 0 {
		m.Progress = bar(pr.Current, pr.Total)
	}
	p.send(m)
}

// bar draws a counter the way clients of old expect it.
func bar(current, total int64) string {
	if total <= 0 || current > total {
		return units.HumanSize(float64(current))
	}
	n := int(current * 50 / total)
	arrow := ">"
	if n >= 50 {
		n, arrow = 49, ">"
	}
	return "[" + strings.Repeat("=", n) + arrow + strings.Repeat(" ", 49-n) + "]  " +
		units.HumanSize(float64(current)) + "/" + units.HumanSize(float64(total))
}

// end closes the stream with what came of the work.
func (p *progress) end(err error) error {
	defer p.s.end()
	if err == nil {
		p.s.begin()
		return nil
	}
	if !p.s.begun() {
		return err
	}
	e := &messageError{Message: err.Error()}
	if fault.Of(err) == fault.Unauthorized {
		e.Code = http.StatusUnauthorized
	}
	p.send(message{Error: e, ErrorMsg: err.Error()})
	return nil
}

// create is POST /images/create: a pull or an import.
func (a imagesAPI) create(w *response, r *request) error {
	var platform string
	var err error
	if r.version >= 32 {
		if platform, err = parsePlatform(r.query.Get("platform")); err != nil {
			return err
		}
	}
	if img := r.query.Get("fromImage"); img != "" {
		return a.pull(w, r, img, platform)
	}
	return a.imports(w, r, platform)
}

// pullReference joins name and tag, which may be a digest.
func pullReference(name, tag string) (reference.Named, error) {
	n, err := reference.ParseNormalizedNamed(strings.TrimSuffix(name, ":"))
	if err == nil && tag != "" {
		if d, derr := digest.Parse(tag); derr == nil {
			n, err = reference.WithDigest(reference.TrimNamed(n), d)
		} else {
			n, err = reference.WithTag(reference.TrimNamed(n), tag)
		}
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "invalid reference %q: %w", name, err)
	}
	if reference.FamiliarName(n) == "scratch" {
		return nil, fault.New(fault.Forbidden, "'scratch' is a reserved name")
	}
	return n, nil
}

func (a imagesAPI) pull(w *response, r *request, name, platform string) error {
	ref, err := pullReference(name, r.query.Get("tag"))
	if err != nil {
		return err
	}
	p := newProgress(w, r)
	return p.end(a.b.Pull(r.Context(), image.PullOptions{
		Ref: ref.String(), Platform: platform, Auth: r.registryAuth(),
		AllTags: reference.IsNameOnly(ref), Progress: p.report,
		// Ours; other engines ignore it.
		Lazy: r.query.Get("lazy") == "1" || r.query.Get("lazy") == "true",
	}))
}

func (a imagesAPI) imports(w *response, r *request, platform string) error {
	ref, err := tagReference(r.query.Get("repo"), r.query.Get("tag"))
	if err != nil {
		return err
	}
	src, comment := r.query.Get("fromSrc"), r.query.Get("message")
	if src == "" {
		return fault.New(fault.Invalid, "one of fromImage and fromSrc must be given")
	}
	if comment == "" {
		comment = "Imported from " + src
	}
	p := newProgress(w, r)
	body := io.Reader(r.Body)
	if src != "-" {
		// Before the stream begins: an address that leads nowhere has a status.
		rc, err := fetch(r.Context(), src)
		if err != nil {
			return p.end(err)
		}
		defer rc.Close()
		p.send(message{Status: "Downloading from " + src})
		body = rc
	}
	id, err := a.b.Import(r.Context(), body, ref, comment, platform, r.query["changes"])
	if err == nil {
		p.send(message{Status: id.String()})
	}
	return p.end(err)
}

// fetch opens a root file system's archive on a web server.
func fetch(ctx context.Context, src string) (io.ReadCloser, error) {
	if !strings.Contains(src, "://") {
		src = "http://" + src
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, src, nil)
	if err != nil || (req.URL.Scheme != "http" && req.URL.Scheme != "https") {
		return nil, fault.New(fault.Invalid, "cannot import from %q: not an http or https address", src)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fault.New(fault.Unavailable, "cannot import: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fault.New(fault.NotFound, "cannot import from %q: the server answered %s", src, resp.Status)
	}
	return resp.Body, nil
}

func (a imagesAPI) push(w *response, r *request) error {
	tag := r.query.Get("tag")
	n, err := reference.ParseNormalizedNamed(r.name)
	if err == nil && tag != "" {
		n, err = reference.WithTag(reference.TrimNamed(n), tag)
	}
	if err != nil {
		return fault.New(fault.Invalid, "invalid reference %q: %w", r.name, err)
	}
	var platform string
	if r.version >= 46 {
		if platform, err = parsePlatform(r.query.Get("platform")); err != nil {
			return err
		}
	}
	p := newProgress(w, r)
	return p.end(a.b.Push(r.Context(), image.PushOptions{
		Ref: n.String(), Platform: platform, Auth: r.registryAuth(),
		AllTags: reference.IsNameOnly(n), Progress: p.report,
	}))
}

// archivePlatforms reads the platform parameters of save and load.
func archivePlatforms(r *request) ([]ocispec.Platform, error) {
	l := r.query["platform"]
	if r.version < 48 || len(l) == 0 {
		return nil, nil
	}
	if r.version < 52 && len(l) > 1 {
		return nil, fault.New(fault.Invalid, "multiple platform parameters are not supported in this API version; use API version 1.52 or later")
	}
	return parsePlatformsJSON(l)
}

func (a imagesAPI) save(w *response, r *request) error {
	names := r.query["names"]
	if r.name != "" {
		names = []string{r.name}
	}
	if len(names) == 0 {
		return fault.New(fault.Invalid, "no image was named")
	}
	for _, n := range names {
		if err := checkName(n); err != nil {
			return err
		}
	}
	ps, err := archivePlatforms(r)
	if err != nil {
		return err
	}
	s := newStream(w, "application/x-tar", 0)
	defer s.end()
	return a.b.Save(r.Context(), names, ps, s)
}

func (a imagesAPI) load(w *response, r *request) error {
	ps, err := archivePlatforms(r)
	if err != nil {
		return err
	}
	p := newProgress(w, r)
	var report func(image.Progress)
	if !r.flagOr("quiet", true) {
		report = p.report
	}
	loaded, err := a.b.Load(r.Context(), r.Body, ps, report)
	for _, ref := range loaded {
		what := "Loaded image: "
		if strings.HasPrefix(ref, "sha256:") {
			what = "Loaded image ID: "
		}
		p.send(message{Stream: what + ref + "\n"})
	}
	return p.end(err)
}
