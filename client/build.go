package client

import (
	"context"
	"encoding/json"
	"io"
	"net/url"
	"strconv"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/registry"
)

// BuildOptions of ImageBuild.
type BuildOptions struct {
	Dockerfile  string // inside the context; "" means Dockerfile
	Tags        []string
	Args        map[string]*string // nil takes the engine's
	Labels      map[string]string
	CacheFrom   []string
	Target      string
	Platform    string
	NetworkMode string
	ExtraHosts  []string
	NoCache     bool
	Pull        bool // look for newer base images
	Quiet       bool
	ShmSize     int64
	Memory      int64
	Ulimits     []*container.Ulimit
	// Auth are credentials by registry, for base images.
	Auth map[string]registry.AuthConfig
}

// ImageBuild builds an image of a context, a tar stream, and reports progress.
// The id comes as a message with Aux.
func (c *Client) ImageBuild(ctx context.Context, tar io.Reader, o BuildOptions, fn ProgressFunc) error {
	q := values("dockerfile", o.Dockerfile, "target", o.Target, "platform", o.Platform, "networkmode", o.NetworkMode,
		"nocache", flag(o.NoCache), "pull", flag(o.Pull), "q", flag(o.Quiet), "rm", "1")
	for _, t := range o.Tags {
		q.Add("t", t)
	}
	for _, h := range o.ExtraHosts {
		q.Add("extrahosts", h)
	}
	setInt(q, "shmsize", o.ShmSize)
	setInt(q, "memory", o.Memory)
	for k, v := range map[string]any{"buildargs": o.Args, "labels": o.Labels, "cachefrom": o.CacheFrom, "ulimits": o.Ulimits} {
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if s := string(b); s != "null" {
			q.Set(k, s)
		}
	}
	r := &request{method: "POST", path: "/build", query: q, body: tar, contentType: "application/x-tar"}
	if len(o.Auth) > 0 {
		b, err := json.Marshal(o.Auth)
		if err != nil {
			return err
		}
		r.header = map[string]string{"X-Registry-Config": base64URL(b)}
	}
	return c.progress(ctx, r, fn)
}

func setInt(q url.Values, key string, n int64) {
	if n != 0 {
		q.Set(key, strconv.FormatInt(n, 10))
	}
}
