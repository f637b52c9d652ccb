package client

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/url"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
)

// ImageListOptions of ImageList.
type ImageListOptions struct {
	All, Shared bool
	Filters     Filters
}

// ImageList lists images.
func (c *Client) ImageList(ctx context.Context, o ImageListOptions) ([]image.Summary, error) {
	var out []image.Summary
	err := c.read(ctx, "/images/json", o.query(), &out)
	return out, err
}

// ImageListRaw is ImageList with each entry as the engine wrote it.
func (c *Client) ImageListRaw(ctx context.Context, o ImageListOptions) ([]json.RawMessage, error) {
	var out []json.RawMessage
	err := c.read(ctx, "/images/json", o.query(), &out)
	return out, err
}

func (o ImageListOptions) query() url.Values {
	return values("all", flag(o.All), "shared-size", flag(o.Shared), "filters", o.Filters.encode())
}

func ipath(name, verb string) string { return "/images/" + escapeRef(name) + verb }

// escapeRef keeps the slashes of an image name.
func escapeRef(ref string) string {
	return strings.ReplaceAll(url.PathEscape(ref), "%2F", "/")
}

// ImageInspect tells all about an image; raw is what the engine sent.
func (c *Client) ImageInspect(ctx context.Context, name, platform string) (out image.InspectResponse, raw json.RawMessage, err error) {
	raw, err = c.fetch(ctx, ipath(name, "/json"), values("platform", platformJSON(platform)), &out)
	return out, raw, err
}

// ImageInspectRaw is ImageInspect without the decoding.
func (c *Client) ImageInspectRaw(ctx context.Context, name, platform string) (json.RawMessage, error) {
	return c.raw(ctx, ipath(name, "/json"), values("platform", platformJSON(platform)))
}

// platformJSON turns os/arch[/variant] into the form that the API takes.
func platformJSON(p string) string {
	if p == "" || strings.HasPrefix(p, "{") {
		return p
	}
	parts := strings.SplitN(p, "/", 3)
	m := map[string]string{"os": parts[0]}
	if len(parts) > 1 {
		m["architecture"] = parts[1]
	}
	if len(parts) > 2 {
		m["variant"] = parts[2]
	}
	b, _ := json.Marshal(m)
	return string(b)
}

// ImageHistory lists the steps that made an image.
func (c *Client) ImageHistory(ctx context.Context, name, platform string) ([]image.HistoryResponseItem, error) {
	var out []image.HistoryResponseItem
	err := c.read(ctx, ipath(name, "/history"), values("platform", platformJSON(platform)), &out)
	return out, err
}

// ImageTag gives an image another name.
func (c *Client) ImageTag(ctx context.Context, name, repo, tag string) error {
	return c.post(ctx, ipath(name, "/tag"), values("repo", repo, "tag", tag), nil, nil)
}

// ImageRemoveOptions of ImageRemove.
type ImageRemoveOptions struct {
	Force, NoPrune bool
	Platforms      []string
}

// ImageRemove removes a name of an image, and with the last name the image.
func (c *Client) ImageRemove(ctx context.Context, name string, o ImageRemoveOptions) ([]image.DeleteResponse, error) {
	q := values("force", flag(o.Force), "noprune", flag(o.NoPrune))
	for _, p := range o.Platforms {
		q.Add("platforms", platformJSON(p))
	}
	var out []image.DeleteResponse
	err := c.delete(ctx, ipath(name, ""), q, &out)
	return out, err
}

// ImagePrune removes images that nothing uses: untagged ones, or with the
// filter dangling=false all.
func (c *Client) ImagePrune(ctx context.Context, f Filters) (image.PruneReport, error) {
	var out image.PruneReport
	err := c.post(ctx, "/images/prune", values("filters", f.encode()), nil, &out)
	return out, err
}

// Progress is one message of a pull, push, load, import or build.
type Progress = jsonstream.Message

// ProgressFunc receives progress; its error ends the operation.
type ProgressFunc func(Progress) error

// PullOptions of ImagePull.
type PullOptions struct {
	Platform string
	AllTags  bool
	// Lazy starts with the layers' tables of contents where their format allows
	// and fetches files as they are read; an engine that does not know it pulls.
	Lazy bool
	Auth *registry.AuthConfig
}

// ImagePull pulls an image, "name[:tag][@digest]", and reports progress. A
// failure that the engine reports in the stream becomes the error.
func (c *Client) ImagePull(ctx context.Context, name string, o PullOptions, fn ProgressFunc) error {
	repo, tag := SplitTag(name)
	if o.AllTags {
		tag = ""
	} else if tag == "" {
		tag = "latest"
	}
	lazy := ""
	if o.Lazy {
		lazy = "1"
	}
	return c.progress(ctx, &request{method: "POST", path: "/images/create",
		query: values("fromImage", repo, "tag", tag, "platform", o.Platform, "lazy", lazy), header: authHeader(o.Auth)}, fn)
}

// SplitTag splits "name:tag" and "name@digest"; the tag is "" when there is none.
func SplitTag(ref string) (name, tag string) {
	if name, digest, ok := strings.Cut(ref, "@"); ok {
		return name, digest
	}
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

// PushOptions of ImagePush.
type PushOptions struct {
	Platform string
	AllTags  bool
	Auth     *registry.AuthConfig
}

// ImagePush pushes an image to the registry that its name begins with.
func (c *Client) ImagePush(ctx context.Context, name string, o PushOptions, fn ProgressFunc) error {
	repo, tag := SplitTag(name)
	if o.AllTags {
		tag = ""
	} else if tag == "" {
		tag = "latest"
	}
	auth := o.Auth
	if auth == nil {
		auth = &registry.AuthConfig{} // the API wants the header in any case
	}
	return c.progress(ctx, &request{method: "POST", path: ipath(repo, "/push"),
		query: values("tag", tag, "platform", platformJSON(o.Platform)), header: authHeader(auth)}, fn)
}

func authHeader(a *registry.AuthConfig) map[string]string {
	if a == nil {
		return nil
	}
	b, _ := json.Marshal(a)
	return map[string]string{registry.AuthHeader: base64.URLEncoding.EncodeToString(b)}
}

// ImageSave gives images as a tar stream that `load` reads. The caller closes it.
func (c *Client) ImageSave(ctx context.Context, names []string, platforms []string) (io.ReadCloser, error) {
	q := url.Values{"names": names}
	for _, p := range platforms {
		q.Add("platform", platformJSON(p))
	}
	return c.open(ctx, "/images/get", q)
}

// ImageLoad reads images from a tar stream.
func (c *Client) ImageLoad(ctx context.Context, tar io.Reader, quiet bool, platforms []string, fn ProgressFunc) error {
	q := values("quiet", flag(quiet))
	for _, p := range platforms {
		q.Add("platform", platformJSON(p))
	}
	return c.progress(ctx, &request{method: "POST", path: "/images/load", query: q, body: tar, contentType: "application/x-tar"}, fn)
}

// ImportOptions of ImageImport.
type ImportOptions struct {
	Repo, Tag, Message, Platform string
	Changes                      []string
	// Source is an URL that the engine fetches; empty takes the tar stream.
	Source string
}

// ImageImport makes an image of one layer from a root file system.
func (c *Client) ImageImport(ctx context.Context, tar io.Reader, o ImportOptions, fn ProgressFunc) error {
	q := values("repo", o.Repo, "tag", o.Tag, "message", o.Message, "platform", o.Platform)
	r := &request{method: "POST", path: "/images/create", query: q}
	if o.Source == "" {
		q.Set("fromSrc", "-")
		r.body, r.contentType = tar, "application/x-tar"
	} else {
		q.Set("fromSrc", o.Source)
	}
	for _, ch := range o.Changes {
		q.Add("changes", ch)
	}
	return c.progress(ctx, r, fn)
}

// progress reads a stream of messages.
func (c *Client) progress(ctx context.Context, r *request, fn ProgressFunc) error {
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer resp.body.Close()
	return each(resp.body, func(p Progress) error {
		if p.Error != nil {
			status := p.Error.Code
			if status == 0 {
				status = 500
			}
			return &Error{Status: status, Message: p.Error.Message}
		}
		if fn == nil {
			return nil
		}
		return fn(p)
	})
}

// RegistryLogin checks credentials with a registry.
func (c *Client) RegistryLogin(ctx context.Context, auth registry.AuthConfig) (registry.AuthResponse, error) {
	var out registry.AuthResponse
	err := c.post(ctx, "/auth", nil, auth, &out)
	return out, err
}

// DistributionInspect asks the registry about an image.
func (c *Client) DistributionInspect(ctx context.Context, name string, auth *registry.AuthConfig) (registry.DistributionInspect, error) {
	var out registry.DistributionInspect
	err := c.do(ctx, &request{method: "GET", path: "/distribution/" + escapeRef(name) + "/json", header: authHeader(auth)}, &out)
	return out, err
}

// ImageSearch asks a registry's index.
func (c *Client) ImageSearch(ctx context.Context, term string, limit int, f Filters, auth *registry.AuthConfig) ([]registry.SearchResult, error) {
	var out []registry.SearchResult
	q := values("term", term, "filters", f.encode())
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	err := c.do(ctx, &request{method: "GET", path: "/images/search", query: q, header: authHeader(auth)}, &out)
	return out, err
}
