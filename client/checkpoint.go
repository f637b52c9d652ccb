package client

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/url"

	"github.com/cloudos-io/cloudos/api"
)

// CheckpointCreate writes a container down under a name that its engine keeps.
func (c *Client) CheckpointCreate(ctx context.Context, name string, o api.CheckpointCreate) error {
	return c.post(ctx, cpath(name, "/checkpoints"), nil, o, nil)
}

// CheckpointList lists a container's checkpoints.
func (c *Client) CheckpointList(ctx context.Context, name string) ([]api.Checkpoint, error) {
	var out []api.Checkpoint
	err := c.read(ctx, cpath(name, "/checkpoints"), nil, &out)
	return out, err
}

// CheckpointRemove removes one.
func (c *Client) CheckpointRemove(ctx context.Context, name, checkpoint string) error {
	return c.delete(ctx, cpath(name, "/checkpoints/"+url.PathEscape(checkpoint)), nil, nil)
}

// CheckpointStart starts a stopped container from one of its checkpoints.
func (c *Client) CheckpointStart(ctx context.Context, name, checkpoint string) error {
	return c.post(ctx, cpath(name, "/start"), values("checkpoint", checkpoint), nil, nil)
}

// CheckpointRestore makes a new container of a checkpoint that the engine keeps.
func (c *Client) CheckpointRestore(ctx context.Context, name string, o api.RestoreOptions) (api.Restored, error) {
	var out api.Restored
	err := c.post(ctx, api.Root+"/containers/"+url.PathEscape(name)+"/restore", nil, o, &out)
	return out, err
}

// CheckpointImport makes a container of a checkpoint's tar.
func (c *Client) CheckpointImport(ctx context.Context, o api.RestoreOptions, r io.Reader) (api.Restored, error) {
	var out api.Restored
	b, err := json.Marshal(o)
	if err != nil {
		return out, err
	}
	err = c.do(ctx, &request{method: "POST", path: api.Root + "/checkpoints/import", query: values("options", string(b)),
		body: r, contentType: "application/x-tar"}, &out)
	return out, err
}

// Checkpoint writes a container down into a tar that take reads to its end. Only
// when take returns no error does the engine end the container: in every other
// case, and when the connection or ctx ends, it goes on as before. tell, if not
// nil, is told what happens; it is called from another goroutine than take.
func (c *Client) Checkpoint(ctx context.Context, name string, o api.CheckpointStart, tell func(api.CheckpointEvent), take func(io.Reader) error) error {
	s, err := c.upgrade(ctx, api.Root+"/containers/"+url.PathEscape(name)+"/checkpoint", nil, o)
	if err != nil {
		return err
	}
	defer s.Close()
	pr, pw := io.Pipe()
	var refused error
	done, ready := false, make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		err := demux(pw, nil, s, func(b []byte) error {
			var ev api.CheckpointEvent
			if err := json.Unmarshal(b, &ev); err != nil {
				return err
			}
			switch {
			case ev.Error != "":
				refused = &Error{Status: ev.Status, Message: ev.Error}
				return errStop
			case ev.Done:
				done = true
				return errStop
			case ev.Ready:
				pw.Close()
				close(ready)
			}
			if tell != nil {
				tell(ev)
			}
			return nil
		})
		if errors.Is(err, errStop) {
			err = refused
		} else if err == nil && !done {
			err = ErrConnectionLost
		}
		if err != nil {
			pw.CloseWithError(err)
		}
		ended <- err
	}()
	terr := take(pr)
	if terr != nil {
		pr.CloseWithError(terr)
		s.Close() // which calls it off
		if err := <-ended; refused != nil {
			return err // what the engine said is the cause
		}
		return terr
	}
	select {
	case <-ready:
	case err := <-ended: // it was taken for whole before its end
		if err == nil {
			err = ErrConnectionLost
		}
		return err
	}
	if _, err := io.WriteString(s, "commit\n"); err != nil {
		return err
	}
	return <-ended
}
