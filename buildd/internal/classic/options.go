package classic

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config/types"
	"github.com/docker/go-units"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/util/entitlements"

	"github.com/cloudos-io/cloudos/buildd/internal/upload"
	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// options is a request to build, understood.
type options struct {
	version      int
	id           string // of the build, to cancel it
	session      string
	caller       string // the engine's name for who asks
	remote       string
	quiet        bool
	tags         []tag
	attrs        map[string]string // of the Dockerfile frontend
	args         []string          // names of the build arguments
	labels       map[string]string
	cacheFrom    []client.CacheOptionsEntry
	entitlements []string
	outputs      []client.ExportEntry
	logins       map[string]types.AuthConfig
}

type tag struct{ full, familiar string }

// names is the list of references as exporters want it.
func (o *options) names() string {
	var l []string
	for _, t := range o.tags {
		l = append(l, t.full)
	}
	return strings.Join(l, ",")
}

// sharedKey names what BuildKit keeps of an uploaded context. It compares a file with
// the one it has by size and time alone, so only equal contents share a name.
func (o *options) sharedKey(tree *upload.Tree) string {
	key := "servin-upload " + o.names()
	if tree != nil {
		key += " " + tree.Digest()
	}
	return key
}

// maxJSON bounds a value of the query.
const maxJSON = 1 << 20

func parse(r *http.Request) (*options, error) {
	q := r.URL.Query()
	o := &options{
		version: 1, id: q.Get("buildid"), session: q.Get("session"), caller: r.Header.Get(contract.CallerHeader), remote: q.Get("remote"), quiet: truth(q.Get("q")),
		attrs: map[string]string{},
	}
	switch v := q.Get("version"); v {
	case "", "1":
	case "2":
		o.version = 2
	default:
		return nil, fmt.Errorf("cannot build with builder version %q: there are 1 and 2", v)
	}
	if truth(q.Get("squash")) {
		return nil, errors.New("squash is not supported: use a multi-stage build")
	}
	if v := q.Get("isolation"); v != "" && v != "default" {
		return nil, fmt.Errorf("isolation %q is for Windows", v)
	}
	for _, v := range q["t"] {
		if v == "" {
			continue
		}
		named, err := reference.ParseNormalizedNamed(v)
		if err != nil {
			return nil, fmt.Errorf("invalid tag %q: %w", v, err)
		}
		if _, ok := named.(reference.Canonical); ok {
			return nil, errors.New("build tag cannot contain a digest")
		}
		named = reference.TagNameOnly(named)
		t := tag{named.String(), reference.FamiliarString(named)}
		if !slices.Contains(o.tags, t) {
			o.tags = append(o.tags, t)
		}
	}
	o.attrs["filename"] = "Dockerfile"
	if v := q.Get("dockerfile"); v != "" {
		o.attrs["filename"] = v
	}
	set := func(attr, v string) {
		if v != "" {
			o.attrs[attr] = v
		}
	}
	set("target", q.Get("target"))
	if p := q.Get("platform"); p != "" {
		if _, err := platforms.Parse(p); err != nil {
			return nil, fmt.Errorf("invalid platform: %w", err)
		}
		o.attrs["platform"] = strings.ToLower(p)
	}
	if truth(q.Get("nocache")) {
		o.attrs["no-cache"] = ""
	}
	o.attrs["image-resolve-mode"] = "local"
	if truth(q.Get("pull")) {
		o.attrs["image-resolve-mode"] = "pull"
	}
	if o.remote != "" && o.remote != "client-session" {
		o.attrs["context"] = o.remote
	}
	for _, f := range []func(url.Values, *options) error{parseMaps, parseNetwork, parseLimits, parseOutputs} {
		if err := f(q, o); err != nil {
			return nil, err
		}
	}
	return o, o.parseLogins(r.Header.Get("X-Registry-Config"))
}

func decode(q url.Values, key string, v any) error {
	s := q.Get(key)
	if s == "" {
		return nil
	}
	if len(s) > maxJSON {
		return fmt.Errorf("%s is longer than %d bytes", key, maxJSON)
	}
	if err := json.Unmarshal([]byte(s), v); err != nil {
		return fmt.Errorf("error reading %s: %w", key, err)
	}
	return nil
}

func parseMaps(q url.Values, o *options) error {
	var args map[string]*string
	if err := decode(q, "buildargs", &args); err != nil {
		return err
	}
	for k, v := range args {
		o.args = append(o.args, k)
		if v != nil {
			o.attrs["build-arg:"+k] = *v
		}
	}
	var labels map[string]string
	if err := decode(q, "labels", &labels); err != nil {
		return err
	}
	o.labels = labels
	for k, v := range labels {
		o.attrs["label:"+k] = v
	}
	var from []string
	if err := decode(q, "cachefrom", &from); err != nil {
		return err
	}
	for _, ref := range from {
		named, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			return fmt.Errorf("cannot use the cache of %q: %w", ref, err)
		}
		o.cacheFrom = append(o.cacheFrom, client.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": reference.TagNameOnly(named).String()}})
	}
	return nil
}

func parseNetwork(q url.Values, o *options) error {
	switch mode := q.Get("networkmode"); mode {
	case "", "default", "bridge":
	case "host":
		o.attrs["force-network-mode"] = mode
		o.entitlements = append(o.entitlements, string(entitlements.EntitlementNetworkHost))
	case "none":
		o.attrs["force-network-mode"] = mode
	default:
		return fmt.Errorf("network mode %q not supported by buildkit: default, host and none are", mode)
	}
	var hosts []string
	for _, h := range q["extrahosts"] {
		name, ip, ok := strings.Cut(h, ":")
		if n, i, eq := strings.Cut(h, "="); eq {
			name, ip, ok = n, i, true
		}
		if !ok {
			return fmt.Errorf("invalid host %s", h)
		}
		hosts = append(hosts, name+"="+strings.Trim(ip, "[]"))
	}
	if len(hosts) > 0 {
		o.attrs["add-hosts"] = strings.Join(hosts, ",")
	}
	return nil
}

func parseLimits(q url.Values, o *options) error {
	for key, attr := range map[string]string{
		"memory": "memory", "memswap": "memswap", "cpushares": "cpushares", "cpuperiod": "cpuperiod", "cpuquota": "cpuquota", "shmsize": "shm-size",
	} {
		v := q.Get(key)
		if v == "" || v == "0" {
			continue
		}
		if _, err := strconv.ParseInt(v, 10, 64); err != nil {
			return fmt.Errorf("invalid %s: %q is no number", key, v)
		}
		o.attrs[attr] = v
	}
	for key, attr := range map[string]string{"cpusetcpus": "cpusetcpus", "cpusetmems": "cpusetmems", "cgroupparent": "cgroup-parent"} {
		if v := q.Get(key); v != "" {
			o.attrs[attr] = v
		}
	}
	var limits []*units.Ulimit
	if err := decode(q, "ulimits", &limits); err != nil {
		return err
	}
	var l []string
	for _, u := range limits {
		if u != nil {
			l = append(l, u.String())
		}
	}
	if len(l) > 0 {
		o.attrs["ulimit"] = strings.Join(l, ",")
	}
	return nil
}

func parseOutputs(q url.Values, o *options) error {
	var outs []struct {
		Type  string
		Attrs map[string]string
	}
	if err := decode(q, "outputs", &outs); err != nil {
		return err
	}
	if len(outs) > 0 && o.version != 2 {
		return errors.New("the classic builder doesn't support outputs: only BuildKit does")
	}
	for _, x := range outs {
		e := client.ExportEntry{Type: x.Type, Attrs: maps.Clone(x.Attrs)}
		if e.Attrs == nil {
			e.Attrs = map[string]string{}
		}
		o.outputs = append(o.outputs, e)
	}
	return nil
}

// parseLogins reads the header with logins by registry. It is never repeated in
// an error.
func (o *options) parseLogins(h string) error {
	if h == "" {
		return nil
	}
	b, err := base64.URLEncoding.DecodeString(h)
	if err != nil {
		if b, err = base64.StdEncoding.DecodeString(h); err != nil {
			return errors.New("cannot read X-Registry-Config: it is not base64")
		}
	}
	if err := json.Unmarshal(b, &o.logins); err != nil {
		o.logins = nil // clients send all sorts here; a build may need no login
	}
	return nil
}

// auth offers the logins to BuildKit.
func (o *options) auth() session.Attachable {
	return authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
		AuthConfigProvider: func(_ context.Context, host string, _ []string, _ authprovider.ExpireCachedAuthCheck) (types.AuthConfig, error) {
			if host == "registry-1.docker.io" {
				host = "https://index.docker.io/v1/"
			}
			for _, key := range []string{host, "https://" + host, "http://" + host, "https://" + host + "/v1/"} {
				if a, ok := o.logins[key]; ok {
					return a, nil
				}
			}
			return types.AuthConfig{}, nil
		},
	})
}

func truth(s string) bool {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}
