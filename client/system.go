package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/system"

	"github.com/cloudos-io/cloudos/api"
)

// Ping reports whether the engine answers.
func (c *Client) Ping(ctx context.Context) error {
	return c.do(ctx, &request{method: "GET", path: "/_ping"}, nil)
}

// Negotiate returns a client that speaks the newest API version which it and the
// engine both know. Engines of other makes may be older than this package.
func Negotiate(ctx context.Context, cfg Config) (*Client, error) {
	c, err := New(cfg)
	if err != nil {
		return nil, err
	}
	resp, err := c.send(ctx, &request{method: "GET", path: "/_ping", bare: true})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	theirs := resp.header["api-version"]
	if err := resp.body.Close(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if older(theirs, c.version) {
		c.version = theirs
	}
	return c, nil
}

// older compares versions such as 1.41; what is none is not older.
func older(a, b string) bool {
	var x, y [2]int
	if _, err := fmt.Sscanf(a, "%d.%d", &x[0], &x[1]); err != nil {
		return false
	}
	if _, err := fmt.Sscanf(b, "%d.%d", &y[0], &y[1]); err != nil {
		return false
	}
	return x[0] < y[0] || x[0] == y[0] && x[1] < y[1]
}

// Info tells about the engine and its host; raw is what the engine sent.
func (c *Client) Info(ctx context.Context) (out system.Info, raw json.RawMessage, err error) {
	raw, err = c.fetch(ctx, "/info", nil, &out)
	return out, raw, err
}

// ServerVersion tells the engine's version.
func (c *Client) ServerVersion(ctx context.Context) (system.VersionResponse, error) {
	var out system.VersionResponse
	err := c.read(ctx, "/version", nil, &out)
	return out, err
}

// DiskUsage measures what images, containers, volumes and build cache take. Types
// limits it to some of these; verbose lists the objects.
func (c *Client) DiskUsage(ctx context.Context, types []system.DiskUsageObject, verbose bool) (out system.DiskUsage, raw json.RawMessage, err error) {
	q := values("verbose", flag(verbose))
	for _, t := range types {
		q.Add("type", string(t))
	}
	raw, err = c.fetch(ctx, "/system/df", q, &out)
	return out, raw, err
}

// EventsOptions of Events.
type EventsOptions struct {
	Since, Until string // Unix time with fraction, RFC 3339 or a duration ago
	Filters      Filters
}

// Events calls fn for each event until the context or the time given by Until
// ends, or fn fails.
func (c *Client) Events(ctx context.Context, o EventsOptions, fn func(events.Message) error) error {
	resp, err := c.send(ctx, &request{method: "GET", path: "/events", query: values("since", o.Since, "until", o.Until, "filters", o.Filters.encode())})
	if err != nil {
		return err
	}
	defer resp.body.Close()
	return each(resp.body, fn)
}

// Doctor has the engine look at its host.
func (c *Client) Doctor(ctx context.Context) ([]api.Finding, error) {
	var out []api.Finding
	err := c.read(ctx, api.Root+"/doctor", nil, &out)
	return out, err
}

// Fix has the engine carry out actions of its findings that the user agreed to.
func (c *Client) Fix(ctx context.Context, actions []string) (api.FixReport, error) {
	var out api.FixReport
	err := c.post(ctx, api.Root+"/doctor/fix", nil, api.FixRequest{Actions: actions}, &out)
	return out, err
}

// Prune removes what nothing uses.
func (c *Client) Prune(ctx context.Context, req api.PruneRequest) (api.PruneReport, error) {
	var out api.PruneReport
	err := c.post(ctx, api.Root+"/prune", nil, req, &out)
	return out, err
}

// Shutdown stops the engine; with containers it stops them too and takes every
// mount, link and rule away.
func (c *Client) Shutdown(ctx context.Context, containers bool) error {
	return c.post(ctx, api.Root+"/shutdown", nil, api.ShutdownRequest{Containers: containers}, nil)
}

// Drained waits until no teardown of ended containers is pending and, with
// full, until the pool of parked sandboxes is full.
func (c *Client) Drained(ctx context.Context, full bool) error {
	var q url.Values
	if full {
		q = url.Values{"full": {"1"}}
	}
	return c.read(ctx, api.Root+"/drained", q, nil)
}

// Dial opens a bare connection to the engine, for relays.
func (c *Client) Dial(ctx context.Context) (net.Conn, error) { return c.dial(ctx) }

// Since renders a time for LogOptions and EventsOptions.
func Since(t time.Time) string { return unixTime(t) }

// unixTime renders a time with nanoseconds, "" for zero.
func unixTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return strconv.FormatInt(t.Unix(), 10) + "." + strconv.Itoa(t.Nanosecond() + 1_000_000_000)[1:]
}
