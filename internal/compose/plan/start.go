package plan

import (
	"maps"
	"slices"

	"github.com/compose-spec/compose-go/v2/types"
)

// start plans the starts of a service's containers, once what it depends on is
// as it wants it.
func (u *up) start(name string) {
	s := u.p.Services[name]
	var mine []Step
	for _, p := range u.starts {
		if p.service == name {
			mine = append(mine, p.step)
		}
	}
	if len(mine) == 0 {
		return
	}
	after := u.conditions(&s)
	if u.barrier >= 0 {
		after = append(after, u.barrier)
	}
	for _, st := range mine {
		st.After = append(slices.Clone(st.After), after...)
		slices.Sort(st.After)
		st.After = slices.Compact(st.After)
		u.started[name] = append(u.started[name], u.add(st))
	}
}

// conditions lists the steps that a start of s has to come after.
func (u *up) conditions(s *types.ServiceConfig) []int {
	var after []int
	for _, d := range slices.Sorted(maps.Keys(s.DependsOn)) {
		dep, ok := u.p.Services[d]
		if !ok || dep.GetScale() == 0 {
			continue
		}
		c := s.DependsOn[d]
		if c.Condition == types.ServiceConditionStarted || c.Condition == "" {
			after = append(after, u.started[d]...)
			continue
		}
		after = append(after, u.add(Step{Kind: Wait, Service: d, Dependent: s.Name, Condition: c.Condition, Optional: !c.Required, After: slices.Clone(u.started[d])}))
	}
	return after
}

func (u *up) waitAll(order []string) {
	for _, name := range order {
		s := u.p.Services[name]
		if s.GetScale() == 0 {
			continue
		}
		cond := RunningOrHealthy
		for _, o := range u.p.Services {
			if d, ok := o.DependsOn[name]; ok && d.Condition == types.ServiceConditionCompletedSuccessfully {
				cond = d.Condition
			}
		}
		u.add(Step{Kind: Wait, Service: name, Dependent: u.p.Name, Condition: cond, After: slices.Clone(u.started[name])})
	}
}

// Waits plans what has to hold of a service's dependencies before a container of
// it may run.
func Waits(p *types.Project, service string) *Plan {
	u := &up{p: p, started: map[string][]int{}}
	s := p.Services[service]
	u.conditions(&s)
	return &u.Plan
}
