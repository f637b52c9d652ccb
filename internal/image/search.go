package image

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Searching is not part of the OCI distribution API: Docker's Hub, and registries
// that copy it, serve it as the older GET /v1/search.
const (
	searchHub     = "docker.io"
	searchHubHost = "index.docker.io"
	searchDefault = 25
	searchMost    = 100
	searchBytes   = 4 << 20
)

// Search asks a registry's index for repositories. term may begin with the
// registry's name; filters are is-official, is-automated and stars.
func (s *Service) Search(ctx context.Context, term string, limit int, filters map[string]map[string]bool, auth *registry.AuthConfig) ([]registry.SearchResult, error) {
	keep, err := searchFilter(filters)
	if err != nil {
		return nil, err
	}
	if strings.Contains(term, "://") {
		return nil, fault.New(fault.Invalid, "invalid repository name: repository name (%s) should not have a scheme", term)
	}
	if limit == 0 {
		limit = searchDefault
	}
	if limit < 1 || limit > searchMost {
		return nil, fault.New(fault.Invalid, "limit %d is outside the range of [1, %d]", limit, searchMost)
	}
	domain, name := searchTerm(term)
	if keep == nil {
		return []registry.SearchResult{}, nil
	}
	hosts, err := s.hosts(auth)(domain)
	if err != nil {
		return nil, err
	}
	h := hosts[len(hosts)-1] // the registry itself: mirrors hold content, not an index
	if domain == searchHub {
		h.Host = searchHubHost
	}
	q := url.Values{"q": {name}, "n": {strconv.Itoa(limit)}}
	resp, err := askFor(s.ctx(ctx), h, http.MethodGet, "/v1/search?"+q.Encode(), http.Header{"Accept": {"application/json"}})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return nil, fault.New(fault.Unsupported, "cannot search %s: the registry has no search; look the image up on its site", domain)
	case resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden:
		return nil, fault.New(fault.Unauthorized, "cannot search %s: the registry answered %s; log in first", domain, resp.Status)
	case resp.StatusCode != http.StatusOK:
		return nil, fault.New(fault.Unavailable, "cannot search %s: the registry answered %s", domain, resp.Status)
	}
	var body registry.SearchResults
	if err := json.NewDecoder(io.LimitReader(resp.Body, searchBytes)).Decode(&body); err != nil {
		return nil, fault.New(fault.Unavailable, "cannot search %s: the answer cannot be read: %w", domain, err)
	}
	out := []registry.SearchResult{}
	for _, r := range body.Results {
		r.IsAutomated = false //nolint:staticcheck // Docker's engine says so whatever the index says
		if keep(r) && len(out) < limit {
			out = append(out, r)
		}
	}
	return out, nil
}

// searchTerm splits "registry/name": the first part is a registry where it could
// be no other name. The Hub's official images are known without "library/".
func searchTerm(term string) (domain, name string) {
	first, rest, ok := strings.Cut(term, "/")
	if !ok || !strings.ContainsAny(first, ".:") && first != "localhost" {
		return searchHub, strings.TrimPrefix(term, "library/")
	}
	if first == searchHub || first == searchHubHost {
		return searchHub, strings.TrimPrefix(rest, "library/")
	}
	return first, rest
}

// searchFilter makes the test of the filters; nil where nothing can pass it.
func searchFilter(filters map[string]map[string]bool) (func(registry.SearchResult) bool, error) {
	stars := 0
	var official *bool
	for key, set := range filters {
		for v, on := range set {
			if !on {
				continue
			}
			switch key {
			case "stars":
				n, err := strconv.Atoi(v)
				if err != nil {
					return nil, fault.New(fault.Invalid, "invalid filter 'stars=%s'", v)
				}
				stars = max(stars, n)
			case "is-official", "is-automated":
				b, err := searchBool(key, v)
				if err != nil {
					return nil, err
				}
				if key == "is-automated" {
					if b {
						return nil, nil // there are none any more
					}
					continue
				}
				official = &b
			default:
				return nil, fault.New(fault.Invalid, "invalid filter '%s'", key)
			}
		}
	}
	return func(r registry.SearchResult) bool {
		return (official == nil || r.IsOfficial == *official) && r.StarCount >= stars
	}, nil
}

func searchBool(key, v string) (bool, error) {
	switch strings.ToLower(v) {
	case "1", "true":
		return true, nil
	case "0", "false":
		return false, nil
	}
	return false, fault.New(fault.Invalid, "invalid filter '%s=%s'", key, v)
}
