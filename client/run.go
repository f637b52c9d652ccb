package client

import (
	"context"
	"encoding/json"
	"errors"
	"io"

	"github.com/cloudos-io/cloudos/api"
)

// RunStream is a container that Run started.
type RunStream struct {
	*Stream
	// Started is the engine's first word: the id and warnings.
	Started api.RunStarted

	exited *api.RunExited
}

// Run creates, attaches to and starts a container in one round trip. It returns
// once the container runs. A refusal comes back as an *Error with ExitCode set.
func (c *Client) Run(ctx context.Context, req *api.RunRequest) (*RunStream, error) {
	s, err := c.upgrade(ctx, api.Root+"/run", nil, req)
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
