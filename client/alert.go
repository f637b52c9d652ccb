package client

import (
	"context"
	"net/url"

	"github.com/cloudos-io/cloudos/api"
)

// Alerts lists the alert rules and what they say now.
func (c *Client) Alerts(ctx context.Context) (api.Alerts, error) {
	var out api.Alerts
	err := c.read(ctx, api.Root+"/alerts", nil, &out)
	return out, err
}

// TestAlert carries out the actions of a rule, or an action, as a test.
func (c *Client) TestAlert(ctx context.Context, ruleOrAction string) ([]api.AlertTest, error) {
	var out []api.AlertTest
	err := c.post(ctx, api.Root+"/alerts/"+url.PathEscape(ruleOrAction)+"/test", nil, nil, &out)
	return out, err
}
