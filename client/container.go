package client

import (
	"context"
	"encoding/json"
	"io"
	"net/url"
	"strconv"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/api"
)

// ContainerListOptions of ContainerList.
type ContainerListOptions struct {
	All     bool // stopped ones too
	Size    bool // measure writable layers (slow)
	Limit   int  // the newest n, running or not
	Filters Filters
}

// ContainerList lists containers, newest first.
func (c *Client) ContainerList(ctx context.Context, o ContainerListOptions) ([]container.Summary, error) {
	var out []container.Summary
	err := c.read(ctx, "/containers/json", o.query(), &out)
	return out, err
}

// ContainerListAs is ContainerList with entries of a type of the caller's, which
// need have no more than the fields that it wants; json.RawMessage takes entries
// as the engine wrote them.
func ContainerListAs[T any](ctx context.Context, c *Client, o ContainerListOptions) ([]T, error) {
	var out []T
	err := c.read(ctx, "/containers/json", o.query(), &out)
	return out, err
}

func (o ContainerListOptions) query() url.Values {
	return values("all", flag(o.All), "size", flag(o.Size), "limit", number(o.Limit), "filters", o.Filters.encode())
}

// ContainerCreateOptions of ContainerCreate.
type ContainerCreateOptions struct {
	Name, Platform string
	Config         *container.Config
	HostConfig     *container.HostConfig
	Networking     *network.NetworkingConfig
	Extra          api.CreateExtra
}

// ContainerCreate creates a container without starting it.
func (c *Client) ContainerCreate(ctx context.Context, o ContainerCreateOptions) (container.CreateResponse, error) {
	cfg := *o.Config
	if o.Extra.RestartUnhealthy || o.Extra.PublishThrough || len(o.Extra.Secrets) > 0 {
		labels := make(map[string]string, len(cfg.Labels)+2)
		for k, v := range cfg.Labels {
			labels[k] = v
		}
		if o.Extra.RestartUnhealthy {
			labels[api.LabelRestartUnhealthy] = "true"
		}
		if o.Extra.PublishThrough {
			labels[api.LabelPublishThrough] = "true"
		}
		if err := secretLabels(o.Extra.Secrets, labels); err != nil {
			return container.CreateResponse{}, err
		}
		cfg.Labels = labels
	}
	hc := o.HostConfig
	if o.Extra.UsernsAuto {
		h := container.HostConfig{}
		if hc != nil {
			h = *hc
		}
		h.UsernsMode = "auto"
		hc = &h
	}
	var out container.CreateResponse
	err := c.post(ctx, "/containers/create", values("name", o.Name, "platform", o.Platform),
		container.CreateRequest{Config: &cfg, HostConfig: hc, NetworkingConfig: o.Networking}, &out)
	return out, err
}

func cpath(name, verb string) string { return "/containers/" + url.PathEscape(name) + verb }

// ContainerStart starts a container. One that runs already is no error.
func (c *Client) ContainerStart(ctx context.Context, name, detachKeys string) error {
	return ignoreNotModified(c.post(ctx, cpath(name, "/start"), values("detachKeys", detachKeys), nil, nil))
}

func ignoreNotModified(err error) error {
	if IsNotModified(err) {
		return nil
	}
	return err
}

// StopOptions of ContainerStop and ContainerRestart.
type StopOptions struct {
	Signal  string // "" is the container's stop signal
	Timeout *int   // seconds before SIGKILL; nil is the container's, -1 waits for ever
}

func (o StopOptions) query() url.Values {
	v := values("signal", o.Signal)
	if o.Timeout != nil {
		v.Set("t", strconv.Itoa(*o.Timeout))
	}
	return v
}

// ContainerStop stops a container. One that is stopped already is no error.
func (c *Client) ContainerStop(ctx context.Context, name string, o StopOptions) error {
	return ignoreNotModified(c.post(ctx, cpath(name, "/stop"), o.query(), nil, nil))
}

// ContainerRestart stops (if need be) and starts a container.
func (c *Client) ContainerRestart(ctx context.Context, name string, o StopOptions) error {
	return c.post(ctx, cpath(name, "/restart"), o.query(), nil, nil)
}

// ContainerKill sends a signal, KILL by default.
func (c *Client) ContainerKill(ctx context.Context, name, signal string) error {
	return c.post(ctx, cpath(name, "/kill"), values("signal", signal), nil, nil)
}

// ContainerPause freezes a container's processes.
func (c *Client) ContainerPause(ctx context.Context, name string) error {
	return c.post(ctx, cpath(name, "/pause"), nil, nil, nil)
}

// ContainerUnpause thaws them.
func (c *Client) ContainerUnpause(ctx context.Context, name string) error {
	return c.post(ctx, cpath(name, "/unpause"), nil, nil, nil)
}

// ContainerRename gives a container another name.
func (c *Client) ContainerRename(ctx context.Context, name, newName string) error {
	return c.post(ctx, cpath(name, "/rename"), values("name", newName), nil, nil)
}

// ContainerUpdate changes limits and the restart policy.
func (c *Client) ContainerUpdate(ctx context.Context, name string, u container.UpdateConfig) (container.UpdateResponse, error) {
	var out container.UpdateResponse
	err := c.post(ctx, cpath(name, "/update"), nil, u, &out)
	return out, err
}

// ContainerWait blocks until the condition holds and gives the exit code.
func (c *Client) ContainerWait(ctx context.Context, name string, cond container.WaitCondition) (container.WaitResponse, error) {
	w, err := c.ContainerWaitBegin(ctx, name, cond)
	if err != nil {
		return container.WaitResponse{}, err
	}
	return w()
}

// ContainerWaitBegin registers a wait: when it returns, the engine watches, so
// that a start afterwards cannot be missed. The function waits for the result.
func (c *Client) ContainerWaitBegin(ctx context.Context, name string, cond container.WaitCondition) (func() (container.WaitResponse, error), error) {
	resp, err := c.send(ctx, &request{method: "POST", path: cpath(name, "/wait"), query: values("condition", string(cond))})
	if err != nil {
		return nil, err
	}
	return func() (container.WaitResponse, error) {
		defer resp.body.Close()
		var out container.WaitResponse
		err := json.NewDecoder(resp.body).Decode(&out)
		if err == io.EOF {
			err = ErrConnectionLost
		}
		return out, err
	}, nil
}

// RemoveOptions of ContainerRemove.
type RemoveOptions struct{ Force, Volumes, Link bool }

// ContainerRemove removes a container.
func (c *Client) ContainerRemove(ctx context.Context, name string, o RemoveOptions) error {
	return c.delete(ctx, cpath(name, ""), values("force", flag(o.Force), "v", flag(o.Volumes), "link", flag(o.Link)), nil)
}

// ContainerInspect tells all about a container; raw is what the engine sent.
func (c *Client) ContainerInspect(ctx context.Context, name string, size bool) (out container.InspectResponse, raw json.RawMessage, err error) {
	raw, err = c.fetch(ctx, cpath(name, "/json"), values("size", flag(size)), &out)
	return out, raw, err
}

// ContainerInspectRaw is ContainerInspect without the decoding.
func (c *Client) ContainerInspectRaw(ctx context.Context, name string, size bool) (json.RawMessage, error) {
	return c.raw(ctx, cpath(name, "/json"), values("size", flag(size)))
}

// ContainerTop lists processes; args are ps's.
func (c *Client) ContainerTop(ctx context.Context, name, args string) (container.TopResponse, error) {
	var out container.TopResponse
	err := c.read(ctx, cpath(name, "/top"), values("ps_args", args), &out)
	return out, err
}

// ContainerStats calls fn for each reading: about one a second, or one in all
// if !stream (which takes a second unless oneShot, that leaves PreCPUStats empty).
func (c *Client) ContainerStats(ctx context.Context, name string, stream, oneShot bool, fn func(*container.StatsResponse) error) error {
	q := url.Values{"stream": {strconv.FormatBool(stream)}}
	if oneShot {
		q.Set("one-shot", "true")
	}
	resp, err := c.send(ctx, &request{method: "GET", path: cpath(name, "/stats"), query: q})
	if err != nil {
		return err
	}
	defer resp.body.Close()
	return each(resp.body, func(s container.StatsResponse) error { return fn(&s) })
}

// ContainerDiff lists what differs from the image.
func (c *Client) ContainerDiff(ctx context.Context, name string) ([]container.FilesystemChange, error) {
	var out []container.FilesystemChange
	err := c.read(ctx, cpath(name, "/changes"), nil, &out)
	return out, err
}

// ContainerExport gives the file system as a tar stream. The caller closes it.
func (c *Client) ContainerExport(ctx context.Context, name string) (io.ReadCloser, error) {
	return c.open(ctx, cpath(name, "/export"), nil)
}

func (c *Client) open(ctx context.Context, path string, q url.Values) (io.ReadCloser, error) {
	resp, err := c.send(ctx, &request{method: "GET", path: path, query: q})
	if err != nil {
		return nil, err
	}
	return resp.body, nil
}

// CommitOptions of ContainerCommit.
type CommitOptions struct {
	Repo, Tag, Comment, Author string
	NoPause                    bool
	Changes                    []string // Dockerfile instructions
}

// ContainerCommit makes an image of a container and gives its id.
func (c *Client) ContainerCommit(ctx context.Context, name string, o CommitOptions) (string, error) {
	q := values("container", name, "repo", o.Repo, "tag", o.Tag, "comment", o.Comment, "author", o.Author)
	q.Set("pause", strconv.FormatBool(!o.NoPause))
	for _, ch := range o.Changes {
		q.Add("changes", ch)
	}
	var out container.CommitResponse
	err := c.post(ctx, "/commit", q, nil, &out)
	return out.ID, err
}

// ContainerPrune removes stopped containers.
func (c *Client) ContainerPrune(ctx context.Context, f Filters) (container.PruneReport, error) {
	var out container.PruneReport
	err := c.post(ctx, "/containers/prune", values("filters", f.encode()), nil, &out)
	return out, err
}

// ContainerResize tells a container's terminal its size in cells.
func (c *Client) ContainerResize(ctx context.Context, name string, width, height uint16) error {
	return c.post(ctx, cpath(name, "/resize"), values("w", strconv.Itoa(int(width)), "h", strconv.Itoa(int(height))), nil, nil)
}

// AttachOptions of ContainerAttach.
type AttachOptions struct {
	Stdin, Stdout, Stderr bool
	Logs                  bool // what was written before, too
	DetachKeys            string
}

// ContainerAttach connects to a container's standard streams.
func (c *Client) ContainerAttach(ctx context.Context, name string, o AttachOptions) (*Stream, error) {
	return c.upgrade(ctx, cpath(name, "/attach"), values("stream", "1", "stdin", flag(o.Stdin), "stdout", flag(o.Stdout),
		"stderr", flag(o.Stderr), "logs", flag(o.Logs), "detachKeys", o.DetachKeys), nil)
}

// LogOptions of ContainerLogs.
type LogOptions struct {
	Stdout, Stderr              bool
	Follow, Timestamps, Details bool
	Since, Until                string // Unix time with fraction, RFC 3339 or a duration ago
	Tail                        string // a number of lines or "all"
}

// ContainerLogs copies a container's log to the two writers. With a terminal all
// of it is stdout.
func (c *Client) ContainerLogs(ctx context.Context, name string, o LogOptions, stdout, stderr io.Writer) error {
	resp, err := c.send(ctx, &request{method: "GET", path: cpath(name, "/logs"), query: values(
		"stdout", flag(o.Stdout), "stderr", flag(o.Stderr), "follow", flag(o.Follow), "timestamps", flag(o.Timestamps),
		"details", flag(o.Details), "since", o.Since, "until", o.Until, "tail", o.Tail)})
	if err != nil {
		return err
	}
	defer resp.body.Close()
	if resp.header["content-type"] == mediaRaw {
		_, err := io.Copy(stdout, resp.body)
		return err
	}
	return Demux(stdout, stderr, resp.body)
}

// ExecCreate prepares a process in a running container.
func (c *Client) ExecCreate(ctx context.Context, name string, req container.ExecCreateRequest) (string, error) {
	var out container.ExecCreateResponse
	err := c.post(ctx, cpath(name, "/exec"), nil, req, &out)
	return out.ID, err
}

// ExecStart starts it and connects to its streams, framed unless tty.
func (c *Client) ExecStart(ctx context.Context, id string, req container.ExecStartRequest) (*Stream, error) {
	s, err := c.upgrade(ctx, "/exec/"+url.PathEscape(id)+"/start", nil, req)
	if err == nil {
		s.Multiplexed = !req.Tty
	}
	return s, err
}

// ExecStartDetached starts it and leaves it alone.
func (c *Client) ExecStartDetached(ctx context.Context, id string, req container.ExecStartRequest) error {
	req.Detach = true
	return c.post(ctx, "/exec/"+url.PathEscape(id)+"/start", nil, req, nil)
}

// ExecInspect tells about an exec, its exit code among others.
func (c *Client) ExecInspect(ctx context.Context, id string) (container.ExecInspectResponse, error) {
	var out container.ExecInspectResponse
	err := c.read(ctx, "/exec/"+url.PathEscape(id)+"/json", nil, &out)
	return out, err
}

// ExecResize tells an exec's terminal its size in cells.
func (c *Client) ExecResize(ctx context.Context, id string, width, height uint16) error {
	return c.post(ctx, "/exec/"+url.PathEscape(id)+"/resize", values("w", strconv.Itoa(int(width)), "h", strconv.Itoa(int(height))), nil, nil)
}
