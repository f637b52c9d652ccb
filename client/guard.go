package client

import (
	"bufio"
	"context"
	"errors"
	"io"

	"github.com/cloudos-io/cloudos/api"
)

// Policy shows the policy in force.
func (c *Client) Policy(ctx context.Context) (api.Policy, error) {
	var out api.Policy
	err := c.read(ctx, api.Root+"/policy", nil, &out)
	return out, err
}

// PolicyReload makes the engine read its policy again.
func (c *Client) PolicyReload(ctx context.Context) error {
	return c.post(ctx, api.Root+"/policy/reload", nil, nil, nil)
}

// PolicyCheck tells whether a document is a policy.
func (c *Client) PolicyCheck(ctx context.Context, doc []byte) (api.PolicyVerdict, error) {
	var out api.PolicyVerdict
	err := c.do(ctx, &request{method: "POST", path: api.Root + "/policy/check", raw: doc, contentType: "application/yaml"}, &out)
	return out, err
}

// PolicyTest asks what the policy says to a container, without making it.
func (c *Client) PolicyTest(ctx context.Context, req *api.RunRequest) (api.PolicyVerdict, error) {
	var out api.PolicyVerdict
	err := c.post(ctx, api.Root+"/policy/test", nil, req, &out)
	return out, err
}

// AuditVerify has the engine check its own log.
func (c *Client) AuditVerify(ctx context.Context) (api.AuditReport, error) {
	var out api.AuditReport
	err := c.read(ctx, api.Root+"/audit/verify", nil, &out)
	return out, err
}

// Audit gives the lines of the audit log since a time (RFC 3339, Unix, or a
// duration before now), "" for all; with follow it goes on until ctx ends. A line is whole, and valid until fn returns.
func (c *Client) Audit(ctx context.Context, since string, follow bool, fn func(line []byte) error) error {
	body, err := c.open(ctx, api.Root+"/audit", values("since", since, "follow", flag(follow)))
	if err != nil {
		return err
	}
	defer body.Close()
	br := bufio.NewReaderSize(body, 64<<10)
	for {
		line, err := br.ReadBytes('\n')
		if len(line) > 0 && err == nil {
			if err := fn(line); err != nil {
				return err
			}
			continue
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
}
