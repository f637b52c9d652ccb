package engine

import (
	"context"
	"errors"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/logs"
)

// ContainerLogs calls emit for each record in order; it returns when the log (or
// with Follow, the container) ends.
func (e *Engine) ContainerLogs(ctx context.Context, name string, o LogOptions, emit func(LogRecord) error) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	if !o.Stdout && !o.Stderr {
		return fault.New(fault.Invalid, "must specify at least one of 'stdout' or 'stderr'")
	}
	r := u.rec.Load()
	set, err := e.logOptions(r.HostConfig.LogConfig)
	if err != nil {
		return err
	}
	if set.Format == "none" || set.Unreadable {
		return fault.New(fault.Unsupported, "configured logging driver does not support reading")
	}
	l, err := logs.Open(u.log, set.Format, e.logs)
	if err != nil {
		return fault.As(fault.Unsupported, err)
	}
	lo := logs.Options{Stdout: o.Stdout, Stderr: o.Stderr, Since: o.Since, Until: o.Until, Tail: o.Tail}
	if o.Follow {
		u.mu.Lock()
		if u.task != nil {
			lo.Ended = u.ended
		}
		u.mu.Unlock()
	}
	var attrs map[string]string
	if o.Details {
		attrs = e.logAttrs(r)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(e.ctx, cancel)()
	err = l.Read(ctx, lo, func(rec logs.Record) error {
		return emit(LogRecord{Time: rec.Time, Stream: rec.Stream, Line: rec.Line, Attrs: attrs})
	})
	if errors.Is(err, context.Canceled) && e.ctx.Err() != nil {
		return nil // the engine ends, not the log
	}
	return err
}

// logAttrs are the labels and variables that the log options name, and the tag.
func (e *Engine) logAttrs(r *container.Record) map[string]string {
	o := r.HostConfig.LogConfig.Config
	c := e.logContainer(r)
	m := c.Attrs(o, nil)
	if tag, err := c.Tag(o, ""); err == nil && tag != "" {
		m["tag"] = tag
	}
	if len(m) == 0 {
		return nil
	}
	return m
}
