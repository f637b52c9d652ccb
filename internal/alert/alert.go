// Package alert watches containers and tells people: rules of a file (a
// condition over readings, states, health and events, and how long it must
// hold) and actions (webhooks and commands, bounded in time, number and
// privileges). Rules are judged by a part without side effects (judge.go); what
// is read of containers comes from a Source. The composition root starts it
// when a rule file is configured.
package alert

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Source is what rules are judged on.
type Source interface {
	// Containers lists all, without counters.
	Containers() []Container
	// Read fills in counters and, if asked for, the size of the writable layer.
	Read(ctx context.Context, c *Container, stats, disk bool)
	Engine() Engine
	// Events calls fn for each event of a container until ctx ends; c is as the
	// event left it.
	Events(ctx context.Context, fn func(action string, c Container))
}

// Config of a Watch.
type Config struct {
	Path   string
	Source Source
	Logger *slog.Logger
}

// Watch judges the rules of a file.
type Watch struct {
	cfg  Config
	log  *slog.Logger
	host string

	mu    sync.Mutex
	judge *judge
	mtime time.Time
	fault string // why the newest file is not used
	sent  map[string]*tally

	queue chan job
}

// tally counts what was done by one action.
type tally struct {
	done, failed, dropped uint64
	last                  string
	minute                time.Time
	inMinute              int
}

type job struct {
	action string
	how    Action
	notice Notice
}

// New reads the rules; later changes of the file are taken up while it runs.
func New(c Config) (*Watch, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Watch{cfg: c, log: c.Logger, sent: map[string]*tally{}, queue: make(chan job, 256)}
	w.host, _ = os.Hostname()
	r, err := Load(c.Path)
	if err != nil {
		return nil, err
	}
	w.judge = newJudge(r)
	w.mtime = mtime(c.Path)
	return w, nil
}

func mtime(path string) time.Time {
	fi, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return fi.ModTime()
}

// workers is how many actions are under way at a time.
const workers = 4

// Run watches until ctx ends.
func (w *Watch) Run(ctx context.Context) error {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	for range workers {
		tasks.Go(func() { w.work(ctx) })
	}
	tasks.Go(func() {
		w.cfg.Source.Events(ctx, func(action string, c Container) {
			w.mu.Lock()
			v := w.judge.event(time.Now(), action, &c)
			w.mu.Unlock()
			w.tell(v)
		})
	})
	for {
		w.reload()
		w.look(ctx)
		w.mu.Lock()
		every := time.Duration(w.judge.rules.Interval)
		w.mu.Unlock()
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return nil
		}
	}
}

// reload takes up a changed file; a bad one is told of and not used.
func (w *Watch) reload() {
	at := mtime(w.cfg.Path)
	w.mu.Lock()
	same := at.Equal(w.mtime)
	w.mu.Unlock()
	if same || at.IsZero() {
		return
	}
	r, err := Load(w.cfg.Path)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mtime = at
	if err != nil {
		w.fault = err.Error()
		w.log.Error("changed alert rules are not used", "cause", err)
		return
	}
	w.fault = ""
	// Alarms of rules that stay as they are stay, too.
	old := w.judge
	w.judge = newJudge(r)
	w.judge.before = old.before
	for k, a := range old.alarms {
		for _, x := range r.Rules {
			if x.Name == k.rule && slices.ContainsFunc(old.rules.Rules, func(o *Rule) bool { return o.Name == x.Name && o.When == x.When }) {
				w.judge.alarms[k] = a
			}
		}
	}
	w.log.Info("alert rules were read again", "rules", len(r.Rules))
}

// look takes readings and judges them.
func (w *Watch) look(ctx context.Context) {
	all := w.cfg.Source.Containers()
	w.mu.Lock()
	j := w.judge
	w.mu.Unlock()
	for i := range all {
		all[i].Disk = -1
		if wanted, what := j.needs(&all[i]); wanted && what != 0 && ctx.Err() == nil {
			w.cfg.Source.Read(ctx, &all[i], what&stats != 0, what&disk != 0)
		}
	}
	e := w.cfg.Source.Engine()
	w.mu.Lock()
	v := w.judge.tick(time.Now(), all, e)
	w.mu.Unlock()
	w.tell(v)
}

// tell queues the actions of verdicts, within their rates.
func (w *Watch) tell(v []verdict) {
	for _, x := range v {
		x.notice.Host = w.host
		w.log.Warn("alert", "rule", x.rule.Name, "status", x.notice.Status, "container", name(x.notice), "values", x.notice.Values)
		w.mu.Lock()
		for _, n := range x.rule.Actions {
			how, ok := w.judge.rules.Actions[n]
			if !ok {
				continue
			}
			t := w.tally(n)
			if m := time.Now().Truncate(time.Minute); !m.Equal(t.minute) {
				t.minute, t.inMinute = m, 0
			}
			t.inMinute++
			if t.inMinute > how.PerMinute {
				t.dropped++
				continue
			}
			select {
			case w.queue <- job{n, how, x.notice}:
			default:
				t.dropped++
			}
		}
		w.mu.Unlock()
	}
}

func name(n Notice) string {
	if n.Container == nil {
		return ""
	}
	return n.Container.Name
}

// tally returns an action's; w.mu is held.
func (w *Watch) tally(action string) *tally {
	t := w.sent[action]
	if t == nil {
		t = &tally{}
		w.sent[action] = t
	}
	return t
}

func (w *Watch) work(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case j := <-w.queue:
			_ = w.do(ctx, j)
		}
	}
}

func (w *Watch) do(ctx context.Context, j job) error {
	err := perform(ctx, j.how, j.notice)
	w.mu.Lock()
	t := w.tally(j.action)
	if err != nil {
		t.failed++
		t.last = err.Error()
	} else {
		t.done++
		t.last = ""
	}
	w.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		w.log.Error("cannot carry out an alert's action", "rule", j.notice.Rule, "action", j.action, "cause", err)
	}
	return err
}

// List tells of every rule and action.
func (w *Watch) List() api.Alerts {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := api.Alerts{File: w.cfg.Path, Error: w.fault, Rules: []api.AlertRule{}, Actions: []api.AlertAction{}}
	for _, r := range w.judge.rules.Rules {
		x := api.AlertRule{Name: r.Name, When: r.When, For: time.Duration(r.For), Actions: r.Actions, State: "ok"}
		for k, a := range w.judge.alarms {
			if k.rule != r.Name {
				continue
			}
			al := api.Alarm{Container: a.last.Name, Since: a.since, Firing: a.firing}
			x.Alarms = append(x.Alarms, al)
			switch {
			case a.firing:
				x.State = "firing"
			case x.State == "ok":
				x.State = "pending"
			}
		}
		slices.SortFunc(x.Alarms, func(a, b api.Alarm) int { return strings.Compare(a.Container, b.Container) })
		out.Rules = append(out.Rules, x)
	}
	for n, a := range w.judge.rules.Actions {
		x := api.AlertAction{Name: n, Kind: "webhook"}
		if a.Webhook == "" {
			x.Kind = "command"
		}
		if t := w.sent[n]; t != nil {
			x.Done, x.Failed, x.Dropped, x.Error = t.done, t.failed, t.dropped, t.last
		}
		out.Actions = append(out.Actions, x)
	}
	slices.SortFunc(out.Actions, func(a, b api.AlertAction) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Test carries out the actions of a rule, or one action by its name, with a
// notice that says that it is a test.
func (w *Watch) Test(ctx context.Context, what string) ([]api.AlertTest, error) {
	w.mu.Lock()
	var jobs []job
	n := Notice{Version: 1, Status: "test", Rule: "test", Host: w.host, Since: time.Now().UTC(), Time: time.Now().UTC(), Message: "This is a test."}
	for _, r := range w.judge.rules.Rules {
		if r.Name == what {
			n.Rule, n.When = r.Name, r.When
			for _, a := range r.Actions {
				jobs = append(jobs, job{a, w.judge.rules.Actions[a], n})
			}
			if len(jobs) == 0 {
				w.mu.Unlock()
				return nil, fault.New(fault.Invalid, "cannot test rule %s: it has no actions", what)
			}
		}
	}
	if a, ok := w.judge.rules.Actions[what]; ok && len(jobs) == 0 {
		jobs = append(jobs, job{what, a, n})
	}
	w.mu.Unlock()
	if len(jobs) == 0 {
		return nil, fault.New(fault.NotFound, "no such alert rule or action: %s", what)
	}
	out := make([]api.AlertTest, len(jobs))
	var all sync.WaitGroup
	for i, j := range jobs {
		all.Go(func() {
			out[i].Action = j.action
			if err := w.do(ctx, j); err != nil {
				out[i].Error = fmt.Sprint(err)
			}
		})
	}
	all.Wait()
	return out, nil
}
