package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	maxTags     = 100_000
	maxTagsPage = 8 << 20
)

// ask sends one request to a registry host, with a token if it wants one.
func ask(ctx context.Context, h docker.RegistryHost, method, path string) (*http.Response, error) {
	return askFor(ctx, h, method, path, nil)
}

// askFor is ask with header fields of its own.
func askFor(ctx context.Context, h docker.RegistryHost, method, path string, header http.Header) (*http.Response, error) {
	u := url.URL{Scheme: h.Scheme, Host: h.Host}
	var responses []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, method, u.String()+path, nil)
		if err != nil {
			return nil, fault.New(fault.Invalid, "cannot ask the registry: %w", err)
		}
		for k, v := range h.Header {
			req.Header[k] = v
		}
		for k, v := range header {
			req.Header[k] = v
		}
		if h.Authorizer != nil {
			if err := h.Authorizer.Authorize(ctx, req); err != nil {
				return nil, err
			}
		}
		resp, err := h.Client.Do(req)
		if err != nil {
			return nil, fault.New(fault.Unavailable, "cannot reach the registry: %w", err)
		}
		if resp.StatusCode != http.StatusUnauthorized || h.Authorizer == nil || len(responses) >= 2 {
			return resp, nil
		}
		responses = append(responses, resp)
		resp.Body.Close()
		if err := h.Authorizer.AddResponses(ctx, responses); err != nil {
			if errdefs.IsNotImplemented(err) {
				return resp, nil
			}
			return nil, err
		}
	}
}

// remoteTags lists the tags of a repository.
func (s *Service) remoteTags(ctx context.Context, named reference.Named, auth *registry.AuthConfig) ([]string, error) {
	hosts, err := s.hosts(auth)(reference.Domain(named))
	if err != nil {
		return nil, err
	}
	h := hosts[len(hosts)-1] // the registry itself: a mirror may not have all
	ctx = docker.WithScope(s.ctx(ctx), "repository:"+reference.Path(named)+":pull")
	var tags []string
	next := h.Path + "/" + reference.Path(named) + "/tags/list"
	for next != "" {
		resp, err := ask(ctx, h, http.MethodGet, next)
		if err != nil {
			return nil, err
		}
		page, link, err := readTags(resp)
		if err != nil {
			return nil, err
		}
		if tags = append(tags, page...); len(tags) > maxTags {
			return nil, fault.New(fault.Invalid, "the repository has more than %d tags", maxTags)
		}
		next = link
		if len(page) == 0 {
			break
		}
	}
	return tags, nil
}

func readTags(resp *http.Response) (tags []string, next string, err error) {
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, "", remoteerrors.NewUnexpectedStatusErr(resp)
	}
	var body struct{ Tags []string }
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxTagsPage)).Decode(&body); err != nil {
		return nil, "", fault.New(fault.Invalid, "cannot read the list of tags: %w", err)
	}
	for _, l := range resp.Header.Values("Link") {
		to, rel, ok := strings.Cut(l, ";")
		if !ok || !strings.Contains(rel, "next") {
			continue
		}
		u, err := url.Parse(strings.Trim(strings.TrimSpace(to), "<>"))
		if err != nil {
			return nil, "", fault.New(fault.Invalid, "cannot read the list of tags: %w", err)
		}
		next = resp.Request.URL.ResolveReference(u).RequestURI()
	}
	return body.Tags, next, nil
}

// Login checks credentials with a registry.
func (s *Service) Login(ctx context.Context, auth registry.AuthConfig) (registry.AuthResponse, error) {
	host := auth.ServerAddress
	if host == "" || host == dockerHubAuth {
		host = dockerHub
	}
	if u, err := url.Parse(host); err == nil && u.Host != "" {
		host = u.Host
	}
	host, _, _ = strings.Cut(host, "/")
	if host == "index.docker.io" || host == dockerHubHost {
		host = dockerHub
	}
	hosts, err := s.hosts(&auth)(host)
	if err != nil {
		return registry.AuthResponse{}, err
	}
	h := hosts[len(hosts)-1]
	resp, err := ask(s.ctx(ctx), h, http.MethodGet, h.Path+"/")
	if err != nil {
		if unauthorized(err) {
			return registry.AuthResponse{}, fault.New(fault.Unauthorized, "cannot log in to %s: the registry refuses the user name or password", host)
		}
		return registry.AuthResponse{}, fault.As(fault.Of(asFault(err)), fmt.Errorf("cannot log in to %s: %w", host, err))
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		return registry.AuthResponse{Status: "Login Succeeded", IdentityToken: auth.IdentityToken}, nil
	case http.StatusUnauthorized, http.StatusForbidden:
		return registry.AuthResponse{}, fault.New(fault.Unauthorized, "cannot log in to %s: the registry refuses the user name or password", host)
	}
	return registry.AuthResponse{}, fault.New(fault.Unavailable, "cannot log in to %s: the registry answers %s", host, resp.Status)
}

// Distribution tells what a registry has under a reference.
func (s *Service) Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (registry.DistributionInspect, error) {
	var out registry.DistributionInspect
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return out, errBadRef(ref, err)
	}
	named = reference.TagNameOnly(named)
	p := &puller{s: s, named: named, auth: auth, base: s.ctx(ctx)}
	res := s.resolver(auth, nil)
	name, desc, err := res.Resolve(p.base, resolvable(named))
	if err != nil {
		return out, s.pullFault(named, auth, err)
	}
	if isSchema1(desc.MediaType) {
		return out, errSchema1()
	}
	if p.fetcher, err = res.Fetcher(p.base, name); err != nil {
		return out, s.pullFault(named, auth, err)
	}
	out.Descriptor = bare(desc)
	b, err := p.manifest(p.base, desc)
	if err != nil {
		return out, s.pullFault(named, auth, err)
	}
	if images.IsIndexType(desc.MediaType) {
		idx, err := parseIndex(b)
		if err != nil {
			return out, err
		}
		for _, m := range idx.Manifests {
			if m.Platform != nil {
				out.Platforms = append(out.Platforms, *m.Platform)
			}
		}
		return out, nil
	}
	m, err := parseManifest(b)
	if err != nil {
		return out, err
	}
	cb, err := p.small(p.base, m.Config, maxConfig)
	if err != nil {
		return out, s.pullFault(named, auth, err)
	}
	img, err := parseConfig(cb)
	if err != nil {
		return out, err
	}
	out.Platforms = []ocispec.Platform{img.Platform}
	return out, nil
}

func unauthorized(err error) bool {
	var st remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &st) {
		return st.StatusCode == http.StatusUnauthorized || st.StatusCode == http.StatusForbidden
	}
	return errors.Is(err, docker.ErrInvalidAuthorization)
}

// pullFault gives a registry's error its kind and Docker's words.
func (s *Service) pullFault(named reference.Named, auth *registry.AuthConfig, err error) error {
	short := reference.FamiliarString(named)
	if fault.Of(err) != fault.Internal {
		return fault.As(fault.Of(err), fmt.Errorf("cannot pull %s: %w", short, err))
	}
	var st remoteerrors.ErrUnexpectedStatus
	switch {
	case unauthorized(err):
		if auth != nil && (auth.Username != "" || auth.IdentityToken != "" || auth.RegistryToken != "") {
			return fault.New(fault.Unauthorized, "pull access denied for %s: the registry refuses these credentials: %w", reference.FamiliarName(named), err)
		}
		return fault.New(fault.NotFound, "pull access denied for %s, repository does not exist or may require login: %w", reference.FamiliarName(named), err)
	case errdefs.IsNotFound(err):
		return fault.New(fault.NotFound, "manifest for %s not found: manifest unknown", short)
	case errors.As(err, &st):
		kind := fault.Unavailable
		if st.StatusCode == http.StatusNotFound {
			kind = fault.NotFound
		}
		return fault.New(kind, "cannot pull %s: the registry answers %s", short, st.Status)
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		return fault.New(fault.Unavailable, "cannot pull %s: cannot reach the registry: %w", short, err)
	}
	return asFault(fmt.Errorf("cannot pull %s: %w", short, err))
}

// tooLarge tells a manifest that the registry has, but that is larger than what
// is read of one: resolving calls that "not found", as if it were not there.
func (s *Service) tooLarge(ctx context.Context, named reference.Named, auth *registry.AuthConfig) error {
	hosts, err := s.hosts(auth)(reference.Domain(named))
	if err != nil {
		return nil
	}
	h := hosts[len(hosts)-1]
	object := "latest"
	switch r := named.(type) {
	case reference.Digested:
		object = r.Digest().String()
	case reference.Tagged:
		object = r.Tag()
	}
	ctx = docker.WithScope(s.ctx(ctx), "repository:"+reference.Path(named)+":pull")
	resp, err := askFor(ctx, h, http.MethodHead, h.Path+"/"+reference.Path(named)+"/manifests/"+object, http.Header{"Accept": {"*/*"}})
	if err != nil {
		return nil
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusOK && resp.ContentLength > docker.MaxManifestSize {
		return fault.New(fault.Invalid, "cannot pull %s: its manifest has %d bytes, more than the %d allowed", reference.FamiliarString(named), resp.ContentLength, docker.MaxManifestSize)
	}
	return nil
}
