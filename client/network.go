package client

import (
	"context"
	"encoding/json"
	"net/url"

	"github.com/moby/moby/api/types/network"
)

// NetworkList lists networks.
func (c *Client) NetworkList(ctx context.Context, f Filters) ([]network.Summary, error) {
	var out []network.Summary
	err := c.read(ctx, "/networks", values("filters", f.encode()), &out)
	return out, err
}

// NetworkCreate makes a network.
func (c *Client) NetworkCreate(ctx context.Context, req network.CreateRequest) (network.CreateResponse, error) {
	var out network.CreateResponse
	err := c.post(ctx, "/networks/create", nil, req, &out)
	return out, err
}

func npath(name, verb string) string { return "/networks/" + url.PathEscape(name) + verb }

// NetworkInspect tells about a network; raw is what the engine sent.
func (c *Client) NetworkInspect(ctx context.Context, name string, verbose bool) (out network.Inspect, raw json.RawMessage, err error) {
	raw, err = c.fetch(ctx, npath(name, ""), values("verbose", flag(verbose)), &out)
	return out, raw, err
}

// NetworkRemove removes a network that no container is connected to.
func (c *Client) NetworkRemove(ctx context.Context, name string) error {
	return c.delete(ctx, npath(name, ""), nil, nil)
}

// NetworkConnect connects a container.
func (c *Client) NetworkConnect(ctx context.Context, name string, req network.ConnectRequest) error {
	return c.post(ctx, npath(name, "/connect"), nil, req, nil)
}

// NetworkDisconnect disconnects one.
func (c *Client) NetworkDisconnect(ctx context.Context, name string, req network.DisconnectRequest) error {
	return c.post(ctx, npath(name, "/disconnect"), nil, req, nil)
}

// NetworkPrune removes user-defined networks that no container uses.
func (c *Client) NetworkPrune(ctx context.Context, f Filters) (network.PruneReport, error) {
	var out network.PruneReport
	err := c.post(ctx, "/networks/prune", values("filters", f.encode()), nil, &out)
	return out, err
}
