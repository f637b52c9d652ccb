package engine

import (
	"context"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sync/errgroup"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/display"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// LogOptions of Logs.
type LogOptions struct {
	Follow, Timestamps bool
	Since, Until, Tail string
}

// source is how a container is called beside its output.
func source(c *container.Summary) string { return model.ShortName(c) }

// Logs shows the logs of containers. With Follow it goes on until none of them
// runs any more, and shows containers of the services that start meanwhile.
func (e *Engine) Logs(ctx context.Context, project string, list []container.Summary, services []string, logs *display.Logs, o LogOptions) error {
	for i := range list {
		logs.Register(source(&list[i]))
	}
	since := client.Since(time.Now())
	g, gctx := errgroup.WithContext(ctx)
	for i := range list {
		c := &list[i]
		g.Go(func() error { return e.logOne(gctx, c.ID, source(c), logs, o) })
	}
	if o.Follow {
		f := &follower{e: e, project: project, services: services, since: since, live: map[string]bool{}, logs: logs}
		for i := range list {
			f.live[list[i].ID] = list[i].State == container.StateRunning || list[i].State == container.StateRestarting
		}
		f.onStart = func(ctx context.Context, x Happening) {
			started := o
			started.Since, started.Tail = x.At, o.Tail
			g.Go(func() error { return e.logOne(gctx, x.ID, x.Source, logs, started) })
		}
		f.seen = map[string]bool{}
		for i := range list {
			f.seen[list[i].ID] = f.live[list[i].ID]
		}
		g.Go(func() error { return f.run(gctx) })
	}
	return g.Wait()
}

func (e *Engine) logOne(ctx context.Context, id, name string, logs *display.Logs, o LogOptions) error {
	w := logs.Stdout(name)
	defer w.Close()
	err := e.Client.ContainerLogs(ctx, id, client.LogOptions{Stdout: true, Stderr: true, Follow: o.Follow, Timestamps: o.Timestamps, Since: o.Since, Until: o.Until, Tail: o.Tail}, w, w)
	switch {
	case client.IsNotFound(err):
		return nil
	case client.IsUnsupported(err): // its log driver keeps nothing
		return nil
	}
	return err
}

// Happening is something that befell a container.
type Happening struct {
	ID, Service, Source string
	// At is when, in the form of logs' since.
	At         string
	ExitCode   int
	Restarting bool
}

// follower watches the containers of services until none is left that runs.
type follower struct {
	e        *Engine
	project  string
	services []string
	since    string
	logs     *display.Logs

	mu   sync.Mutex
	live map[string]bool
	// seen are containers whose output is shown from their next start by others.
	seen map[string]bool
	// patient keeps following although nothing runs (yet).
	patient bool

	onStart func(ctx context.Context, h Happening)
	onExit  func(ctx context.Context, h Happening)
}

var errAllEnded = errors.New("all ended")

func (f *follower) wants(service string) bool {
	return len(f.services) == 0 || slices.Contains(f.services, service)
}

// idle tells whether nothing that is followed runs.
func (f *follower) idle() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.patient {
		return false
	}
	for _, l := range f.live {
		if l {
			return false
		}
	}
	return true
}

// settle ends the patience: from now on the end of the last ends the following.
func (f *follower) settle() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.patient = false
}

func (f *follower) run(ctx context.Context) error {
	if f.idle() {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// settle may come after the last event.
	done := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(done)
	wg.Add(1)
	go func() {
		defer wg.Done()
		t := time.NewTicker(200 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				if f.idle() {
					cancel(errAllEnded)
				}
			case <-done:
				return
			}
		}
	}()
	err := f.e.Client.Events(ctx, client.EventsOptions{Since: f.since,
		Filters: client.Filters{"type": {"container"}, "label": {model.LabelProject + "=" + f.project}}}, func(m events.Message) error {
		if err := f.handle(ctx, m); err != nil {
			return err
		}
		if f.idle() {
			return errAllEnded
		}
		return nil
	})
	if errors.Is(err, errAllEnded) || errors.Is(context.Cause(ctx), errAllEnded) {
		return nil
	}
	return err
}

func (f *follower) handle(ctx context.Context, m events.Message) error {
	a := m.Actor.Attributes
	if !f.wants(a[model.LabelService]) || a[model.LabelOneOff] == "True" {
		return nil
	}
	h := Happening{ID: m.Actor.ID, Service: a[model.LabelService], At: client.Since(time.Unix(0, m.TimeNano))}
	h.Source = source(&container.Summary{ID: m.Actor.ID, Names: []string{"/" + a["name"]}, Labels: a})
	switch m.Action {
	case events.ActionStart:
		f.mu.Lock()
		f.live[h.ID] = true
		shown := f.seen[h.ID]
		f.seen[h.ID] = false
		f.mu.Unlock()
		if !shown && f.onStart != nil {
			f.onStart(ctx, h)
		}
	case events.ActionDie:
		h.ExitCode, _ = strconv.Atoi(a["exitCode"])
		in, _, err := f.e.Client.ContainerInspect(ctx, h.ID, false)
		if err != nil && !client.IsNotFound(err) {
			return err
		}
		h.Restarting = err == nil && in.State != nil && (in.State.Restarting || in.State.Running)
		f.mu.Lock()
		f.live[h.ID] = h.Restarting
		f.seen[h.ID] = false
		f.mu.Unlock()
		text := "exited with code " + strconv.Itoa(h.ExitCode)
		if h.Restarting {
			text += " (restarting)"
		}
		f.logs.Status(h.Source, text)
		if f.onExit != nil {
			f.onExit(ctx, h)
		}
	case events.ActionDestroy:
		f.mu.Lock()
		delete(f.live, h.ID)
		f.mu.Unlock()
	case events.ActionCreate:
		if old := a[model.LabelReplace]; old != "" {
			f.logs.Status(old, "has been recreated")
		}
	}
	return nil
}

// attach connects to a container's output before it starts.
func (e *Engine) attach(ctx context.Context, c *container.Summary, logs *display.Logs, wg *sync.WaitGroup) error {
	in, _, err := e.Client.ContainerInspect(ctx, c.ID, false)
	if err != nil {
		return err
	}
	st, err := e.Client.ContainerAttach(ctx, c.ID, client.AttachOptions{Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	name := source(c)
	wg.Add(1)
	go func() {
		defer wg.Done()
		defer st.Close()
		stdout, stderr := logs.Stdout(name), logs.Stderr(name)
		defer stdout.Close()
		defer stderr.Close()
		if in.Config != nil && in.Config.Tty {
			io.Copy(stdout, st)
		} else {
			client.Demux(stdout, stderr, st)
		}
	}()
	return nil
}

// names joins the names of containers for a sentence.
func names(list []container.Summary) string {
	var out []string
	for i := range list {
		out = append(out, source(&list[i]))
	}
	return strings.Join(out, ", ")
}
