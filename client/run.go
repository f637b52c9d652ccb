package client

import (
	"context"
	"encoding/json"
	"errors"
	"io"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/api/debugshell"
)

// RunStream is a container that Run started, or a command that Exec did.
type RunStream struct {
	*Stream
	// Started is the engine's first word: the id (of an exec its own) and warnings.
	Started api.RunStarted

	exited *api.RunExited
}

// Run creates, attaches to and starts a container in one round trip. It returns
// once the container runs. A refusal comes back as an *Error with ExitCode set.
func (c *Client) Run(ctx context.Context, req *api.RunRequest) (*RunStream, error) {
	if req.Extra.Debug == debugshell.Target {
		return c.run(ctx, api.Root+"/debug-shell/run", req)
	}
	return c.run(ctx, api.Root+"/run", req)
}

// Exec creates an exec of a running container and starts it in one round trip. It
// returns once the command runs; Started.ID is the exec's. A refusal comes back
// as an *Error, with ExitCode set if the command cannot be executed.
func (c *Client) Exec(ctx context.Context, name string, req container.ExecCreateRequest) (*RunStream, error) {
	return c.run(ctx, api.Root+cpath(name, "/exec"), req)
}

func (c *Client) run(ctx context.Context, path string, req any) (*RunStream, error) {
	s, err := c.upgrade(ctx, path, nil, req)
	if err != nil {
		return nil, err
	}
	r := &RunStream{Stream: s}
	err = demux(nil, nil, s, func(b []byte) error {
		if err := json.Unmarshal(b, &r.Started); err != nil {
			return err
		}
		return errStop
	})
	switch {
	case err == nil:
		err = ErrConnectionLost
	case errors.Is(err, errStop):
		err = nil
	}
	if err == nil && r.Started.Error != "" {
		err = &Error{Status: r.Started.Status, Message: r.Started.Error, ExitCode: r.Started.ExitCode}
	}
	if err != nil {
		s.Close()
		return r, err
	}
	return r, nil
}

var errStop = errors.New("stop")

// Copy copies output until the container ends or is detached from. It returns nil
// with no error when the stream ended without either being told: the engine went
// away, and the container goes on (see ContainerWait).
func (r *RunStream) Copy(stdout, stderr io.Writer) (*api.RunExited, error) {
	err := demux(stdout, stderr, r.Stream, func(b []byte) error {
		r.exited = new(api.RunExited)
		if err := json.Unmarshal(b, r.exited); err != nil {
			return err
		}
		return errStop
	})
	if errors.Is(err, errStop) {
		err = nil
	}
	return r.exited, err
}
