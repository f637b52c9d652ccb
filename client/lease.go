package client

import (
	"context"
	"io"

	"github.com/cloudos-io/cloudos/api"
)

// Lease holds a lease until the context ends: containers, networks and volumes
// with the label api.LabelLease and this id are removed by the engine ten seconds
// after nobody holds it any more, however the holder ended. ready is called once
// the engine has taken it; the error is nil when the context ended it.
func (c *Client) Lease(ctx context.Context, id string, ready func()) error {
	resp, err := c.send(ctx, &request{method: "POST", path: api.Root + "/lease", query: values("id", id)})
	if err != nil {
		return err
	}
	defer resp.body.Close()
	var b [3]byte
	if _, err := io.ReadFull(resp.body, b[:]); err != nil {
		return ErrConnectionLost
	}
	if ready != nil {
		ready()
	}
	_, err = io.Copy(io.Discard, resp.body)
	if ctx.Err() != nil {
		return nil
	}
	if err == nil {
		err = ErrConnectionLost
	}
	return err
}
