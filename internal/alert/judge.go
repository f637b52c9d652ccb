package alert

import (
	"time"
)

// Container is what is known of a container at one moment.
type Container struct {
	ID, Name, Image string
	Labels          map[string]string
	State, Health   string // health is "" without a check
	ExitCode        int
	Restarts        int
	StartedAt       time.Time
	// Read is when the counters were read; zero if they were not, or it does not run.
	Read                time.Time
	CPU                 time.Duration // so far
	Memory, MemoryLimit uint64
	Pids                uint64
	Disk                int64 // -1 unknown
}

// Engine is what is known of the engine.
type Engine struct {
	DiskUsed float64 // percent
	Running  int
}

// Notice is what actions are told. It is stable: webhooks and commands read it.
type Notice struct {
	Version int       `json:"version"` // 1
	Status  string    `json:"status"`  // firing, resolved or test
	Rule    string    `json:"rule"`
	When    string    `json:"when"`
	Message string    `json:"message,omitempty"`
	Host    string    `json:"host"`
	Since   time.Time `json:"since"`
	Time    time.Time `json:"time"`
	// Container is missing where the rule is about the engine.
	Container *Subject `json:"container,omitempty"`
	// Values are the variables of the condition.
	Values map[string]any `json:"values,omitempty"`
}

// Subject names the container of a Notice.
type Subject struct {
	ID     string            `json:"id"`
	Name   string            `json:"name"`
	Image  string            `json:"image"`
	Labels map[string]string `json:"labels,omitempty"`
}

// key is one rule about one container ("" the engine).
type key struct{ rule, id string }

// alarm is a condition that holds.
type alarm struct {
	since  time.Time
	firing bool
	told   time.Time
	last   Container
	values map[string]any
}

// judge decides; it has no side effects and no clock.
type judge struct {
	rules  *Rules
	alarms map[key]*alarm
	before map[string]Container // the last reading, for rates
}

func newJudge(r *Rules) *judge {
	return &judge{rules: r, alarms: map[key]*alarm{}, before: map[string]Container{}}
}

// verdict is a notice and who is to get it.
type verdict struct {
	rule   *Rule
	notice Notice
}

// needs tells what must be read of a container; wanted is false if no rule
// selects it.
func (j *judge) needs(c *Container) (wanted bool, what cost) {
	for _, r := range j.rules.Rules {
		if r.expr.uses(ofEngine) || !r.Match.picks(c) {
			continue
		}
		wanted = true
		if r.expr.needs(stats) {
			what |= stats
		}
		if r.expr.needs(disk) {
			what |= disk
		}
	}
	return wanted, what
}

// tick judges all rules but those about events.
func (j *judge) tick(now time.Time, all []Container, e Engine) []verdict {
	var out []verdict
	seen := map[string]bool{}
	for i := range all {
		c := &all[i]
		seen[c.ID] = true
		v := j.values(c, now)
		for _, r := range j.rules.Rules {
			if r.expr.uses(ofEngine) || r.expr.has("event") || !r.Match.picks(c) {
				continue
			}
			out = j.step(out, r, key{r.Name, c.ID}, now, r.expr.Eval(v), c, v)
		}
		j.before[c.ID] = *c
	}
	ev := &Values{Numbers: map[string]float64{"disk_used": e.DiskUsed, "running": float64(e.Running)}}
	for _, r := range j.rules.Rules {
		if r.expr.uses(ofEngine) {
			out = j.step(out, r, key{r.Name, ""}, now, r.expr.Eval(ev), nil, ev)
		}
	}
	for id := range j.before {
		if !seen[id] {
			delete(j.before, id)
		}
	}
	// What was said of containers that are gone, is over.
	for k, a := range j.alarms {
		if k.id == "" || seen[k.id] {
			continue
		}
		for _, r := range j.rules.Rules {
			if r.Name == k.rule && a.firing {
				last := a.last
				out = append(out, verdict{r, j.notice(r, "resolved", now, a, &last)})
			}
		}
		delete(j.alarms, k)
	}
	return out
}

// step moves one alarm.
func (j *judge) step(out []verdict, r *Rule, k key, now time.Time, holds bool, c *Container, v *Values) []verdict {
	a := j.alarms[k]
	if !holds {
		if a != nil {
			delete(j.alarms, k)
			if a.firing {
				a.values = r.picked(v)
				out = append(out, verdict{r, j.notice(r, "resolved", now, a, c)})
			}
		}
		return out
	}
	if a == nil {
		a = &alarm{since: now}
		j.alarms[k] = a
	}
	a.values = r.picked(v)
	if c != nil {
		a.last = *c
	}
	switch {
	case !a.firing && now.Sub(a.since) >= time.Duration(r.For):
		a.firing, a.told = true, now
		out = append(out, verdict{r, j.notice(r, "firing", now, a, c)})
	case a.firing && r.Repeat > 0 && now.Sub(a.told) >= time.Duration(r.Repeat):
		a.told = now
		out = append(out, verdict{r, j.notice(r, "firing", now, a, c)})
	}
	return out
}

// event judges the rules about events; each that holds is told at once.
func (j *judge) event(now time.Time, action string, c *Container) []verdict {
	var out []verdict
	v := j.values(c, now)
	v.Words["event"] = action
	for _, r := range j.rules.Rules {
		if r.expr.has("event") && r.Match.picks(c) && r.expr.Eval(v) {
			a := &alarm{since: now, values: r.picked(v)}
			out = append(out, verdict{r, j.notice(r, "firing", now, a, c)})
		}
	}
	return out
}

func (j *judge) notice(r *Rule, status string, now time.Time, a *alarm, c *Container) Notice {
	n := Notice{Version: 1, Status: status, Rule: r.Name, When: r.When, Message: r.Message, Since: a.since.UTC(), Time: now.UTC(), Values: a.values}
	if c != nil {
		n.Container = &Subject{ID: c.ID, Name: c.Name, Image: c.Image, Labels: c.Labels}
	}
	return n
}

// picked are the values that the rule's condition names.
func (r *Rule) picked(v *Values) map[string]any {
	m := map[string]any{}
	for _, n := range r.expr.Names() {
		if x, ok := v.Numbers[n]; ok {
			m[n] = x
		} else if x, ok := v.Words[n]; ok {
			m[n] = x
		}
	}
	return m
}

func (j *judge) values(c *Container, now time.Time) *Values {
	v := &Values{Numbers: map[string]float64{"restarts": float64(c.Restarts)}, Words: map[string]string{"state": c.State, "health": "none"}}
	if c.Health != "" {
		v.Words["health"] = c.Health
	}
	if c.State == "exited" || c.State == "dead" {
		v.Numbers["exit_code"] = float64(c.ExitCode)
	} else if c.State == "running" && !c.StartedAt.IsZero() {
		v.Numbers["uptime"] = seconds(now.Sub(c.StartedAt))
	}
	if c.Disk >= 0 {
		v.Numbers["disk_bytes"] = float64(c.Disk)
	}
	if c.Read.IsZero() {
		return v
	}
	v.Numbers["memory_bytes"], v.Numbers["pids"] = float64(c.Memory), float64(c.Pids)
	if c.MemoryLimit > 0 {
		v.Numbers["memory"] = float64(c.Memory) / float64(c.MemoryLimit) * 100
	}
	if b, ok := j.before[c.ID]; ok && !b.Read.IsZero() && c.CPU >= b.CPU {
		if d := c.Read.Sub(b.Read); d > 0 {
			v.Numbers["cpu"] = float64(c.CPU-b.CPU) / float64(d) * 100
		}
	}
	return v
}
