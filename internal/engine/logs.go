package engine

import (
	"context"
	"errors"
	"regexp"
	"strings"

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
		return fault.New(fault.Invalid, "Bad parameters: you must choose at least one stream")
	}
	r := u.rec.Load()
	set, err := e.logSettings(r.HostConfig.LogConfig)
	if err != nil {
		return err
	}
	if set.Format == "none" {
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
		attrs = logAttrs(r)
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

// logAttrs are the labels and variables that the log options name.
func logAttrs(r *container.Record) map[string]string {
	c := r.HostConfig.LogConfig.Config
	m := map[string]string{}
	add := func(list, pattern string, has map[string]string) {
		for k := range strings.SplitSeq(list, ",") {
			if v, ok := has[k]; ok && k != "" {
				m[k] = v
			}
		}
		if pattern == "" {
			return
		}
		if re, err := regexp.Compile(pattern); err == nil {
			for k, v := range has {
				if re.MatchString(k) {
					m[k] = v
				}
			}
		}
	}
	add(c["labels"], c["labels-regex"], r.Config.Labels)
	env := make(map[string]string, len(r.Config.Env))
	for _, v := range r.Config.Env {
		if k, val, ok := strings.Cut(v, "="); ok {
			env[k] = val
		}
	}
	add(c["env"], c["env-regex"], env)
	if len(m) == 0 {
		return nil
	}
	return m
}
