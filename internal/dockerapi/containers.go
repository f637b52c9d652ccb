package dockerapi

import (
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// containersAPI serves the life cycle of containers.
type containersAPI struct{ b Containers }

func (a containersAPI) list(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	limit, err := r.number("limit")
	if err != nil {
		return err
	}
	o := ListOptions{All: r.flag("all"), Size: r.flag("size"), Filters: f}
	if limit != nil && *limit > 0 {
		o.Limit, o.All = *limit, true
	}
	l, err := a.b.ContainerList(r.Context(), o)
	if err != nil {
		return err
	}
	if l == nil {
		l = []container.Summary{}
	}
	shapeSummaries(l, r.version)
	return jsonList(w, http.StatusOK, l)
}

func (a containersAPI) create(w *response, r *request) error {
	req, err := decodeCreate(w, r)
	if err != nil {
		return err
	}
	warnings := req.warnings
	r.noteCreate(&req.CreateRequest)
	resp, err := a.b.ContainerCreate(r.Context(), req.CreateRequest)
	if err != nil {
		return err
	}
	r.entry.Note("id", resp.ID)
	resp.Warnings = append(resp.Warnings, warnings...)
	if resp.Warnings == nil {
		resp.Warnings = []string{}
	}
	return w.json(http.StatusCreated, resp)
}

func (a containersAPI) inspect(w *response, r *request) error {
	c, err := a.b.ContainerInspect(r.Context(), r.name, r.flag("size"))
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, shapeInspect(&c, r.version))
}

var checkpointID = pattern.New(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

func (a containersAPI) start(w *response, r *request) error {
	// Before 1.24 a start could carry a host configuration.
	if r.ContentLength > 7 || r.ContentLength == -1 {
		return fault.New(fault.Invalid, "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24")
	}
	o := StartOptions{Checkpoint: r.query.Get("checkpoint"), CheckpointDir: r.query.Get("checkpoint-dir")}
	if o.Checkpoint != "" && !checkpointID.MatchString(o.Checkpoint) {
		return fault.New(fault.Invalid, "invalid checkpoint ID %q", o.Checkpoint)
	}
	if o.Checkpoint == "" && o.CheckpointDir != "" {
		return fault.New(fault.Invalid, "a checkpoint directory needs the checkpoint's name")
	}
	keys := r.query.Get("detachKeys")
	if _, err := parseDetachKeys(keys); err != nil {
		return err
	}
	o.DetachKeys = keys
	if err := a.b.ContainerStart(r.Context(), r.name, o); err != nil {
		return err
	}
	return w.noContent()
}

// stopOptions reads t and, from 1.42 on, signal.
func stopOptions(r *request) (signal string, timeout *int, err error) {
	if r.version >= 42 {
		signal = r.query.Get("signal")
	}
	timeout, err = r.number("t")
	return signal, timeout, err
}

func (a containersAPI) stop(w *response, r *request) error {
	signal, timeout, err := stopOptions(r)
	if err != nil {
		return err
	}
	if err := a.b.ContainerStop(r.Context(), r.name, signal, timeout); err != nil {
		return err
	}
	return w.noContent()
}

func (a containersAPI) restart(w *response, r *request) error {
	signal, timeout, err := stopOptions(r)
	if err != nil {
		return err
	}
	if err := a.b.ContainerRestart(r.Context(), r.name, signal, timeout); err != nil {
		return err
	}
	return w.noContent()
}

func (a containersAPI) kill(w *response, r *request) error {
	if err := a.b.ContainerKill(r.Context(), r.name, r.query.Get("signal")); err != nil {
		return err
	}
	return w.noContent()
}

func (a containersAPI) pause(w *response, r *request) error {
	if err := a.b.ContainerPause(r.Context(), r.name); err != nil {
		return err
	}
	return w.noContent()
}

func (a containersAPI) unpause(w *response, r *request) error {
	if err := a.b.ContainerUnpause(r.Context(), r.name); err != nil {
		return err
	}
	return w.noContent()
}

func (a containersAPI) rename(w *response, r *request) error {
	name, err := containerName(r.query.Get("name"))
	if err != nil {
		return err
	}
	if name == "" {
		return fault.New(fault.Invalid, "neither old nor new names may be empty")
	}
	if err := a.b.ContainerRename(r.Context(), r.name, name); err != nil {
		return err
	}
	return w.noContent()
}

func (a containersAPI) update(w *response, r *request) error {
	var u container.UpdateConfig
	if err := r.decode(w, &u); err != nil {
		return err
	}
	if r.version < 40 {
		u.PidsLimit = nil
	}
	if r.version < 55 {
		u.BlkioWeightDevice = nil
		u.BlkioDeviceReadBps, u.BlkioDeviceWriteBps = nil, nil
		u.BlkioDeviceReadIOps, u.BlkioDeviceWriteIOps = nil, nil
	}
	if u.PidsLimit != nil && *u.PidsLimit <= 0 {
		// 0 and any negative number mean unlimited.
		u.PidsLimit = new(int64)
	}
	resp, err := a.b.ContainerUpdate(r.Context(), r.name, u)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, resp)
}

func (a containersAPI) remove(w *response, r *request) error {
	if err := a.b.ContainerRemove(r.Context(), r.name, r.flag("force"), r.flag("v"), r.flag("link")); err != nil {
		return err
	}
	return w.noContent()
}

func (a containersAPI) prune(w *response, r *request) error {
	f, err := r.filters()
	if err != nil {
		return err
	}
	rep, err := a.b.ContainerPrune(r.Context(), f)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, rep)
}

func (a containersAPI) top(w *response, r *request) error {
	t, err := a.b.ContainerTop(r.Context(), r.name, r.query.Get("ps_args"))
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, t)
}

func (a containersAPI) changes(w *response, r *request) error {
	c, err := a.b.ContainerChanges(r.Context(), r.name)
	if err != nil {
		return err
	}
	return w.json(http.StatusOK, c) // null where nothing changed, as Docker
}

func (a containersAPI) resize(w *response, r *request) error {
	height, err := r.size("h", "height")
	if err != nil {
		return err
	}
	width, err := r.size("w", "width")
	if err != nil {
		return err
	}
	if err := a.b.ContainerResize(r.Context(), r.name, width, height); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (a containersAPI) wait(w *response, r *request) error {
	cond := container.WaitConditionNotRunning
	// Conditions, and the header ahead of the result, came with 1.30.
	if r.version >= 30 {
		switch c := container.WaitCondition(r.query.Get("condition")); c {
		case "":
		case container.WaitConditionNotRunning, container.WaitConditionNextExit, container.WaitConditionRemoved:
			cond = c
		default:
			return fault.New(fault.Invalid, "invalid condition: %q", c)
		}
	}
	ctx := r.Context()
	ch, err := a.b.ContainerWait(ctx, r.name, cond)
	if err != nil {
		return err
	}
	if r.version >= 30 {
		w.Header()["Content-Type"] = headerJSON
		w.WriteHeader(http.StatusOK)
		w.Flush()
	}
	var res container.WaitResponse
	var ok bool
	select {
	case res, ok = <-ch:
	case <-ctx.Done():
	}
	if !ok {
		return fault.New(fault.Unavailable, "stopped waiting for %s", r.name)
	}
	if r.version < 30 {
		return w.json(http.StatusOK, res)
	}
	if r.version < 34 && cond == container.WaitConditionRemoved && res.Error != nil {
		// An empty answer was then the only way to report a failed removal.
		return nil
	}
	b, err := encodeLine(res)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

func (a containersAPI) export(w *response, r *request) error {
	s := newStream(w, "application/octet-stream", 0)
	defer s.end()
	return a.b.ContainerExport(r.Context(), r.name, s)
}

func (a containersAPI) stats(w *response, r *request) error {
	stream := r.flagOr("stream", true)
	oneShot := r.version >= 41 && r.flag("one-shot")
	if oneShot && stream {
		return fault.New(fault.Invalid, "cannot have stream=true and one-shot=true")
	}
	s := newStream(w, "application/json", 0)
	defer s.end()
	return a.b.ContainerStats(r.Context(), r.name, stream, oneShot, func(st *container.StatsResponse) error {
		if r.version < 52 && st.OSType != "" {
			c := *st
			c.OSType = ""
			st = &c
		}
		b, err := encodeLine(st)
		if err != nil {
			return err
		}
		return s.send(b)
	})
}

// patience is how long a stream of logs or events may be silent before its
// header goes out: long enough for an error to come first.
const patience = 20 * time.Millisecond

const timestampLayout = "2006-01-02T15:04:05.000000000Z07:00"

func (a containersAPI) logs(w *response, r *request) error {
	o := LogOptions{
		Stdout: r.flag("stdout"), Stderr: r.flag("stderr"), Follow: r.flag("follow"),
		Timestamps: r.flag("timestamps"), Details: r.flag("details"), Tail: -1,
	}
	if !o.Stdout && !o.Stderr {
		return fault.New(fault.Invalid, "must specify at least one of 'stdout' or 'stderr'")
	}
	var err error
	if o.Since, err = r.moment("since"); err != nil {
		return err
	}
	if o.Until, err = r.moment("until"); err != nil {
		return err
	}
	// As with Docker, what is no number means all.
	if n, err := r.number("tail"); err == nil && n != nil && *n >= 0 {
		o.Tail = *n
	}
	tty, err := a.b.IsTerminal(r.Context(), r.name)
	if err != nil {
		return err
	}
	contentType := contentTypeRaw
	if !tty && r.version >= 42 {
		contentType = contentTypeMultiplexed
	}
	s := newStream(w, contentType, patience)
	defer s.end()
	var line, framed []byte
	err = a.b.ContainerLogs(r.Context(), r.name, o, func(rec LogRecord) error {
		kind := byte(frameStdout)
		if rec.Stream == "stderr" {
			kind = frameStderr
		}
		line = appendLogLine(line[:0], o, rec)
		out := line
		if !tty {
			framed = appendFrame(framed[:0], kind, line)
			out = framed
		}
		if o.Follow {
			return s.send(out)
		}
		_, werr := s.Write(out)
		return werr
	})
	if err == nil {
		s.begin()
		return nil
	}
	if !s.begun() || r.Context().Err() != nil {
		return err
	}
	msg := fmt.Appendf(nil, "Error grabbing logs: %v\n", err)
	if !tty {
		msg = appendFrame(nil, frameSystem, msg)
	}
	_ = s.send(msg)
	return nil
}

func appendLogLine(b []byte, o LogOptions, rec LogRecord) []byte {
	if o.Timestamps {
		b = rec.Time.UTC().AppendFormat(b, timestampLayout)
		b = append(b, ' ')
	}
	if o.Details {
		b = appendAttrs(b, rec.Attrs)
		b = append(b, ' ')
	}
	return append(b, rec.Line...)
}

var _ io.Writer = (*stream)(nil)
