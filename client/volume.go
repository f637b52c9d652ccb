package client

import (
	"context"
	"encoding/json"
	"io"
	"net/url"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
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

// CopyVolumeOptions of VolumeBackup and VolumeExport.
type CopyVolumeOptions struct {
	// Pause holds the containers that run with the volume meanwhile.
	Pause bool
	// Size asks for the size of the volume's files, which takes a look at each.
	Size bool
}

// VolumeBackup gives an archive of a volume that VolumeRestore reads, and the size
// of its files in bytes, if that was asked for and is known. The caller closes it.
func (c *Client) VolumeBackup(ctx context.Context, name string, o CopyVolumeOptions) (io.ReadCloser, int64, error) {
	return c.volumeStream(ctx, name, "/backup", o)
}

// VolumeExport gives a volume's content as a tar. The caller closes it.
func (c *Client) VolumeExport(ctx context.Context, name string, o CopyVolumeOptions) (io.ReadCloser, int64, error) {
	return c.volumeStream(ctx, name, "/export", o)
}

func (c *Client) volumeStream(ctx context.Context, name, what string, o CopyVolumeOptions) (io.ReadCloser, int64, error) {
	resp, err := c.send(ctx, &request{method: "GET", path: api.Root + "/volumes/" + url.PathEscape(name) + what,
		query: values("pause", flag(o.Pause), "size", flag(o.Size))})
	if err != nil {
		return nil, 0, err
	}
	size, err := strconv.ParseInt(resp.header[strings.ToLower(api.HeaderVolumeSize)], 10, 64)
	if err != nil || size < 0 {
		size = 0
	}
	return resp.body, size, nil
}

// RestoreOptions of VolumeRestore and VolumeImport.
type RestoreOptions struct {
	// Replace permits to replace what the volume holds.
	Replace bool
	// Devices permits device nodes in the archive.
	Devices bool
	// Labels of the volume that VolumeImport makes; those of an archive stay.
	Labels map[string]string
}

// VolumeRestore makes a volume, or replaces its content, of an archive of
// VolumeBackup.
func (c *Client) VolumeRestore(ctx context.Context, name string, o RestoreOptions, r io.Reader) (api.VolumeArchive, error) {
	var out api.VolumeArchive
	err := c.do(ctx, &request{method: "POST", path: api.Root + "/volumes/" + url.PathEscape(name) + "/restore",
		query: values("replace", flag(o.Replace), "devices", flag(o.Devices)), body: r, contentType: "application/zstd"}, &out)
	return out, err
}

// VolumeImport makes a volume, or replaces its content, of a tar.
func (c *Client) VolumeImport(ctx context.Context, name string, o RestoreOptions, r io.Reader) error {
	labels := ""
	if len(o.Labels) > 0 {
		b, err := json.Marshal(o.Labels)
		if err != nil {
			return err
		}
		labels = string(b)
	}
	return c.do(ctx, &request{method: "POST", path: api.Root + "/volumes/" + url.PathEscape(name) + "/import",
		query: values("replace", flag(o.Replace), "devices", flag(o.Devices), "labels", labels), body: r, contentType: "application/x-tar"}, nil)
}

// VolumeClone makes a volume with the content of another one.
func (c *Client) VolumeClone(ctx context.Context, name string, o api.VolumeClone) (volume.Volume, error) {
	var out volume.Volume
	err := c.post(ctx, api.Root+"/volumes/"+url.PathEscape(name)+"/clone", nil, o, &out)
	return out, err
}
