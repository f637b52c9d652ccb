package client

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"

	"github.com/moby/moby/api/types/container"
)

// ContainerStatPath tells about a path inside a container.
func (c *Client) ContainerStatPath(ctx context.Context, name, path string) (container.PathStat, error) {
	resp, err := c.send(ctx, &request{method: "HEAD", path: cpath(name, "/archive"), query: values("path", path)})
	if err != nil {
		// A HEAD's answer has no text.
		if s := Status(err); s == 404 {
			return container.PathStat{}, &Error{Status: s, Message: fmt.Sprintf("no such container or path: %s:%s", name, path)}
		}
		return container.PathStat{}, err
	}
	defer resp.body.Close()
	return pathStat(resp.header)
}

func pathStat(h header) (container.PathStat, error) {
	var st container.PathStat
	b, err := base64.StdEncoding.DecodeString(h["x-docker-container-path-stat"])
	if err == nil {
		err = json.Unmarshal(b, &st)
	}
	return st, decodeErr(err)
}

// ContainerGetArchive gives a path inside a container as a tar stream. The
// caller closes it.
func (c *Client) ContainerGetArchive(ctx context.Context, name, path string) (io.ReadCloser, container.PathStat, error) {
	resp, err := c.send(ctx, &request{method: "GET", path: cpath(name, "/archive"), query: values("path", path)})
	if err != nil {
		return nil, container.PathStat{}, err
	}
	st, err := pathStat(resp.header)
	if err != nil {
		resp.body.Close()
		return nil, st, err
	}
	return resp.body, st, nil
}

// PutArchiveOptions of ContainerPutArchive.
type PutArchiveOptions struct {
	// NoOverwriteDirNonDir refuses to put a directory where a file is, and the
	// other way round.
	NoOverwriteDirNonDir bool
	// CopyUIDGID keeps owners as in the archive.
	CopyUIDGID bool
}

// ContainerPutArchive unpacks a tar stream into a directory inside a container.
func (c *Client) ContainerPutArchive(ctx context.Context, name, dir string, tar io.Reader, o PutArchiveOptions) error {
	q := values("path", dir, "noOverwriteDirNonDir", flag(o.NoOverwriteDirNonDir), "copyUIDGID", flag(o.CopyUIDGID))
	return c.do(ctx, &request{method: "PUT", path: cpath(name, "/archive"), query: q, body: tar, contentType: "application/x-tar"}, nil)
}
