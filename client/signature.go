package client

import (
	"context"
	"encoding/json"
	"io"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/api"
)

// maxSignatures bounds an answer of ImageSignatures.
const maxSignatures = 256 << 20

// ImageSignatures fetches what the registry holds in signatures of an image. Nothing
// of it is checked.
func (c *Client) ImageSignatures(ctx context.Context, image string, auth *registry.AuthConfig) (api.Signatures, error) {
	var out api.Signatures
	resp, err := c.send(ctx, &request{method: "GET", path: api.Root + "/signatures", query: values("image", image), header: authHeader(auth)})
	if err != nil {
		return out, err
	}
	defer resp.body.Close()
	return out, json.NewDecoder(io.LimitReader(resp.body, maxSignatures)).Decode(&out)
}
