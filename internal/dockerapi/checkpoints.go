package dockerapi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Checkpoints is implemented by the engine.
type Checkpoints interface {
	CheckpointCreate(ctx context.Context, name string, o api.CheckpointCreate) error
	CheckpointList(name, dir string) ([]api.Checkpoint, error)
	CheckpointRemove(ctx context.Context, name, id, dir string) error
	CheckpointRestore(ctx context.Context, name string, o api.RestoreOptions) (api.Restored, error)
	CheckpointImport(ctx context.Context, o api.RestoreOptions, r io.Reader) (api.Restored, error)
	CheckpointStream(ctx context.Context, name string, o api.CheckpointStart, s engine.CheckpointSink) error
}

// checkpointsAPI serves Docker's experimental routes about checkpoints and ours.
type checkpointsAPI struct{ b Checkpoints }

func (a checkpointsAPI) create(w *response, r *request) error {
	var o api.CheckpointCreate
	if err := r.decode(w, &o); err != nil {
		return err
	}
	r.entry.Note("checkpoint", o.CheckpointID)
	if err := a.b.CheckpointCreate(r.Context(), r.name, o); err != nil {
		return err
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (a checkpointsAPI) list(w *response, r *request) error {
	l, err := a.b.CheckpointList(r.name, r.query.Get("dir"))
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, nonNil(l))
}

// remove is DELETE /containers/{id}/checkpoints/{checkpoint}: two names in one path.
func (a checkpointsAPI) remove(w *response, r *request) error {
	name, id, _ := strings.Cut(r.name, "/checkpoints/")
	if err := a.b.CheckpointRemove(r.Context(), name, id, r.query.Get("dir")); err != nil {
		return err
	}
	return w.noContent()
}

func (a checkpointsAPI) restore(w *response, r *request) error {
	var o api.RestoreOptions
	if err := r.decode(w, &o); err != nil {
		return err
	}
	res, err := a.b.CheckpointRestore(r.Context(), r.name, o)
	if err != nil {
		return err
	}
	r.entry.Note("id", res.ID)
	return w.json(http.StatusCreated, res)
}

func (a checkpointsAPI) imports(w *response, r *request) error {
	var o api.RestoreOptions
	if q := r.query.Get("options"); q != "" {
		if err := json.Unmarshal([]byte(q), &o); err != nil {
			return fault.New(fault.Invalid, "cannot read the options: %w", err)
		}
	}
	res, err := a.b.CheckpointImport(r.Context(), o, r.Body)
	if err != nil {
		return err
	}
	r.entry.Note("id", res.ID)
	return w.json(http.StatusCreated, res)
}

// stream is POST /servin/containers/{id}/checkpoint. What fails before the first
// frame is an ordinary answer; later it is a control frame.
func (a checkpointsAPI) stream(w *response, r *request) error {
	var o api.CheckpointStart
	if err := r.decode(w, &o); err != nil {
		return err
	}
	ctx, cancel := r.streaming()
	defer cancel()
	s := &checkpointStream{w: w, cancel: cancel}
	err := a.b.CheckpointStream(ctx, r.name, o, s)
	if s.d == nil {
		return err
	}
	defer s.d.finish()
	if err != nil {
		_ = s.Tell(api.CheckpointEvent{Error: err.Error(), Status: statusOf(err)})
	}
	return err
}

// checkpointStream is the sink that a client is.
type checkpointStream struct {
	w      *response
	d      *duplex
	cancel context.CancelFunc
	said   chan error // what the client says: nil is the commit
}

// begin takes the connection over with the first thing to be sent.
func (s *checkpointStream) begin() error {
	if s.d != nil {
		return nil
	}
	d, err := takeOver(s.w)
	if err != nil {
		return err
	}
	s.d = d
	if err := d.accept(true, contentTypeMultiplexed, s.w.Header(), nil); err != nil {
		return err
	}
	s.said = make(chan error, 1)
	go s.listen()
	return nil
}

// errNotCommitted is the end of a client that has not said that it has everything.
var errNotCommitted = errors.New("the client has gone")

// listen waits for the one word that the client may say; its end breaks the
// checkpoint off.
func (s *checkpointStream) listen() {
	line, err := bufio.NewReader(io.LimitReader(s.d.in, 64)).ReadString('\n')
	if err == nil && line == "commit\n" {
		s.said <- nil
		return
	}
	s.said <- errNotCommitted
	s.cancel()
}

// Write implements engine.CheckpointSink.
func (s *checkpointStream) Write(p []byte) (int, error) {
	if err := s.begin(); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		n := min(len(p)-done, copyBuffer)
		if _, err := s.d.Write(appendFrame(make([]byte, 0, frameHeader+n), frameStdout, p[done:done+n])); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// Tell implements engine.CheckpointSink.
func (s *checkpointStream) Tell(ev api.CheckpointEvent) error {
	if err := s.begin(); err != nil {
		return err
	}
	b, err := json.Marshal(ev)
	if err != nil {
		return err
	}
	_, err = s.d.Write(appendFrame(nil, frameSystem, b))
	return err
}

// confirmPatience is how long a client has to bring what it got to life.
const confirmPatience = 10 * time.Minute

// Confirm implements engine.CheckpointSink.
func (s *checkpointStream) Confirm(ctx context.Context) error {
	t := time.NewTimer(confirmPatience)
	defer t.Stop()
	select {
	case err := <-s.said:
		return err
	case <-ctx.Done():
		return errNotCommitted
	case <-t.C:
		return fault.New(fault.DeadlineExceeded, "nothing was said for %s", confirmPatience)
	}
}
