package client

import (
	"context"
	"encoding/json"
	"net/url"

	"github.com/moby/moby/api/types/volume"
)

// VolumeList lists volumes.
func (c *Client) VolumeList(ctx context.Context, f Filters) (volume.ListResponse, error) {
	var out volume.ListResponse
	err := c.read(ctx, "/volumes", values("filters", f.encode()), &out)
	return out, err
}

// VolumeCreate makes a volume; one of that name that exists already is returned.
func (c *Client) VolumeCreate(ctx context.Context, req volume.CreateRequest) (volume.Volume, error) {
	var out volume.Volume
	err := c.post(ctx, "/volumes/create", nil, req, &out)
	return out, err
}

// VolumeInspect tells about a volume; raw is what the engine sent.
func (c *Client) VolumeInspect(ctx context.Context, name string) (out volume.Volume, raw json.RawMessage, err error) {
	raw, err = c.fetch(ctx, "/volumes/"+url.PathEscape(name), nil, &out)
	return out, raw, err
}

// VolumeRemove removes a volume and its data.
func (c *Client) VolumeRemove(ctx context.Context, name string, force bool) error {
	return c.delete(ctx, "/volumes/"+url.PathEscape(name), values("force", flag(force)), nil)
}

// VolumePrune removes volumes that no container uses: anonymous ones, or with
// the filter all=true named ones too.
func (c *Client) VolumePrune(ctx context.Context, f Filters) (volume.PruneReport, error) {
	var out volume.PruneReport
	err := c.post(ctx, "/volumes/prune", values("filters", f.encode()), nil, &out)
	return out, err
}
