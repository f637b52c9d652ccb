package client

import (
	"context"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/api/debugshell"
)

// DebugShell tells whether shells may be opened on the engine's machine, and which are.
func (c *Client) DebugShell(ctx context.Context) (debugshell.Status, error) {
	var out debugshell.Status
	err := c.read(ctx, api.Root+"/debug-shell", nil, &out)
	return out, err
}

// DebugShellEnable lets shells be opened on the engine's machine for a while.
func (c *Client) DebugShellEnable(ctx context.Context, req debugshell.Request) (debugshell.Status, error) {
	var out debugshell.Status
	err := c.post(ctx, api.Root+"/debug-shell", nil, req, &out)
	return out, err
}

// DebugShellDisable ends that, and the shells that are open.
func (c *Client) DebugShellDisable(ctx context.Context) (debugshell.Status, error) {
	var out debugshell.Status
	err := c.do(ctx, &request{method: "DELETE", path: api.Root + "/debug-shell"}, &out)
	return out, err
}
